"""Recognize checkpoints that are not a plain InternViT, from their config or the names of their tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from internvit_cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MERGE_HINT = "merge them into the model first (peft's merge_and_unload), and save the merged model"
ORIGINAL_HINT = "use the original weights (bfloat16, float16 or float32)"
FIRST_INTERNVL_HINT = "its tower alone is published as OpenGVLab/InternViT-6B-224px"

TOWERS = (
    ("siglip", "SigLIP"),
    ("clip", "CLIP"),
    ("dino", "DINO"),
    ("radio", "RADIO"),
    ("eva", "EVA"),
    ("aimv2", "AIMv2"),
    ("qwen", "Qwen-VL's vision transformer"),
    ("pixtral", "Pixtral's vision transformer"),
    ("sam", "SAM"),
    ("convnext", "ConvNeXt"),
    ("swin", "Swin"),
    ("moonvit", "MoonViT"),
    ("idefics", "Idefics' SigLIP"),
    ("mllama", "Llama's vision transformer"),
    ("vit", "a plain ViT"),
)
"""Names of vision towers by words in their model_type or architecture, the most specific first."""

_FIRST_INTERNVL = re.compile(r"(?:^|\.)(?:qllama|clip_projector)\.")
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|base_layer\.|modules_to_save\.|original_module\.|ia3_|oft_|hada_|lokr_)")

_QUANTIZED = (
    (re.compile(r"\.weight\.(?:absmax|quant_map|nested_|quant_state)|\.SCB$|\.weight_format$"), "bitsandbytes"),
    (re.compile(r"\.g_idx$"), "GPTQ"),
    (re.compile(r"\.(?:qweight|qzeros|scales)$"), "AWQ or GPTQ"),
    (re.compile(r"\.weight_(?:packed|shape|zero_point|g_idx)$"), "compressed-tensors"),
    (re.compile(r"\.(?:weight_scale|weight_scale_inv|input_scale|weight_scale_2)$"), "fp8 or int8 with scales"),
    (re.compile(r"\.weight\._(?:data|scale|shift)$|\._qdata$|\.W_q$"), "quanto, torchao or HQQ"),
)  # fmt: skip
"""Names of tensors that quantizers add or write instead of a weight, with the name of the method."""

_TOWER_MARKS = (
    (re.compile(r"(?:^|\.)pre_layrnorm\."), "CLIP"),
    (re.compile(r"(?:^|\.)vision_model\.head\.probe$"), "SigLIP"),
    (re.compile(r"(?:^|\.)encoder\.layers\.\d+\.self_attn\.q_proj\."), "CLIP or SigLIP"),
    (re.compile(r"\.layer_scale1\.lambda1$"), "DINOv2"),
    (re.compile(r"(?:^|\.)register_tokens$|(?:^|\.)reg_token$"), "DINOv2 with registers"),
    (re.compile(r"\.attention\.attention\.query\."), "a plain ViT"),
    (re.compile(r"(?:^|\.)visual\.blocks\.\d+\."), "Qwen-VL's vision transformer"),
    (re.compile(r"(?:^|\.)radio_model\."), "RADIO"),
    (re.compile(r"(?:^|\.)blocks\.\d+\.(?:attn\.q_bias|mlp\.w12?\.)"), "EVA"),
)
"""Names of tensors that an InternViT does not have, with the name of the tower that has them."""


def refuse_altered(tensors: Iterable[str], where: str) -> None:
    """Refuse a tower with adapters that are not merged, or with quantized weights.

    Args:
        tensors: The stored names of the tower's tensors.
        where: The checkpoint, for messages.

    Raises:
        ModelError: The tower has adapters or is quantized; the message names a tensor and the method.
    """
    for name in tensors:
        if _ADAPTER.search(name):
            raise ModelError(f"{where}: the tower holds LoRA adapters that are not merged ({name!r})", MERGE_HINT)
        for pattern, whose in _QUANTIZED:
            if pattern.search(name):
                raise ModelError(f"{where}: the tower is quantized ({whose}: tensor {name!r})", ORIGINAL_HINT)


def refuse_first_internvl(stored_names: Iterable[str], where: str) -> None:
    """Refuse InternVL-C and InternVL-G, whose image features need more than their tower.

    Raises:
        ModelError: The checkpoint is one of them.
    """
    for stored in stored_names:
        if _FIRST_INTERNVL.search(stored):
            raise first_internvl_refusal(where, f"tensor {stored!r}")


def first_internvl_refusal(where: str, mark: str) -> ModelError:
    """Return the refusal of InternVL-C and InternVL-G."""
    return ModelError(
        f"{where}: InternVL-C or InternVL-G (14B; {mark}), whose image features come from a projector and a language "
        "model after the tower",
        FIRST_INTERNVL_HINT,
    )


def no_tower_error(tensors: Iterable[str], where: str) -> ModelError:
    """Return the error for a checkpoint without an InternViT, which says what it contains instead."""
    names = list(tensors)
    adapters = [name for name in names if _ADAPTER.search(name)]
    if adapters:
        return ModelError(f"{where}: LoRA adapters, not a model ({adapters[0]!r})", MERGE_HINT)
    return other_tower_error(names, where) or ModelError(
        f"{where}: no vision tower among its {len(names):,} tensors", "name an InternViT or a full InternVL checkpoint"
    )


def other_tower_error(tensors: Iterable[str], where: str) -> ModelError | None:
    """Return the error for another kind of tower, if the names show which it is; None if they do not."""
    for name in tensors:
        for pattern, kind in _TOWER_MARKS:
            if pattern.search(name):
                return ModelError(
                    f"{where}: its vision tower is {kind}, not an InternViT (tensor {name!r})",
                    "name an InternViT or a full InternVL checkpoint",
                )
    return None


def name_of_tower(section: Mapping[str, Any]) -> str:
    """Return the name of the tower in a part of a config, such as `SigLIP (siglip_vision_model)`."""
    words = [section.get("model_type"), *_texts(section.get("architectures")), section.get("model_name")]
    for word in words:
        if isinstance(word, str) and word:
            kind = kind_of_tower(word)
            return f"{kind} ({word[:80]})" if kind else f"{word[:80]!r}"
    return "of no known kind"


def kind_of_tower(word: str) -> str | None:
    """Return the kind of tower for a model's type, class or name; None if it is unknown."""
    return next((kind for part, kind in TOWERS if part in word.casefold()), None)


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
