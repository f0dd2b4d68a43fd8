"""Determine the shape of a tower from its tensors, for a checkpoint whose config does not describe it.

The shapes of tensors give every number except that of attention heads, which is known only for the two published sizes.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.config import PATCH_SIZE
from internvit_cli.errors import ModelError
from internvit_cli.model.card import VisionConfig
from internvit_cli.model.configs import MOST_HIDDEN, MOST_LAYERS, MOST_MLP
from internvit_cli.model.kinds import no_tower_error, other_tower_error, refuse_altered, refuse_first_internvl
from internvit_cli.model.layouts import Tower, expected_shapes, find_towers
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.model.safetensors_header import StoredTensor

PUBLISHED_HEADS = {("layer_norm", 1024): 16, ("rms_norm", 3200): 25}
"""The number of attention heads by norm and hidden size."""
EPS = 1e-6
"""The epsilon of all published InternViT models."""

_BLOCK = re.compile(r"encoder\.layers\.(\d{1,4})\..+")


class UndecidedError(Exception):
    """The tensors do not determine the tower; the text says why."""


class DescribedTower(NamedTuple):
    """The shape of a tower, and a note for the user on how it was found."""

    vision: VisionConfig
    note: str


def vision_from_tensors(stored: Mapping[str, StoredTensor], heads: int | None, where: str) -> DescribedTower:
    """Return the shape of the only whole tower among some tensors.

    Args:
        stored: All tensors of the checkpoint by name.
        heads: The number of attention heads, if a file has it; None means that of the published size.
        where: The checkpoint, for messages.

    Raises:
        ModelError: There is no whole tower, there are several, or the tensors do not determine its shape.
    """
    refuse_first_internvl(stored, where)
    towers = find_towers(stored, where)
    if not towers:
        raise no_tower_error(stored, where)
    outcomes = [_vision_or_reason(tower, stored, heads) for tower in towers]
    found = [outcome for outcome in outcomes if isinstance(outcome, VisionConfig)]
    if len(found) > 1:
        prefixes = ", ".join(
            repr(tower.prefix)
            for tower, outcome in zip(towers, outcomes, strict=True)
            if isinstance(outcome, VisionConfig)
        )
        raise ModelError(
            f"{where}: {len(found)} whole vision towers, under {prefixes}",
            "save a checkpoint that holds one of them",
        )
    if not found:
        raise _refusal(towers, str(outcomes[0]), where)
    vision = found[0]
    note = f"no config describes the tower: {counted(vision.num_layers, 'block')} of size {vision.hidden_size}"
    return DescribedTower(
        vision, f"{note}, {counted(vision.num_heads, 'head')} of {vision.head_dim}, {vision.image_size} px"
    )


def _vision_or_reason(tower: Tower, stored: Mapping[str, StoredTensor], heads: int | None) -> VisionConfig | str:
    try:
        return _vision(tower, stored, heads)
    except UndecidedError as reason:
        return str(reason)


def _refusal(towers: list[Tower], reason: str, where: str) -> ModelError:
    for tower in towers:
        names = tower.slots.values()
        refuse_altered(names, where)
        if other := other_tower_error(names, where):
            return other
    return ModelError(
        f"{where}: no config describes the tower, and its tensors do not determine it: {reason}",
        'put a config.json beside them, such as {"num_attention_heads": 16}, or that of its model',
    )


def _vision(tower: Tower, stored: Mapping[str, StoredTensor], heads: int | None) -> VisionConfig:
    hidden = _hidden_size(tower, stored)
    positions = _shape(tower, stored, "embeddings.position_embedding")
    grid = math.isqrt(max(0, positions[1] - 1)) if len(positions) == 3 else 0
    if not grid or grid**2 != positions[1] - 1:
        raise UndecidedError(f"a position table of shape {positions} does not fit a square picture")
    patch = _shape(tower, stored, "embeddings.patch_embedding.weight")
    if patch[1:] != (3, PATCH_SIZE, PATCH_SIZE):
        raise UndecidedError(f"patches of shape {patch[1:]} are not those of an InternViT, (3, 14, 14)")
    layers = _layers(tower)
    first = "encoder.layers.0."
    mlp = _shape(tower, stored, first + "mlp.fc1.weight")
    if len(mlp) != 2 or not 1 <= mlp[0] <= MOST_MLP:
        raise UndecidedError(f"tensor {tower.prefix + first + 'mlp.fc1.weight'!r} of shape {mlp} is not one of an MLP")
    is_layer_norm = tower.has(first + "norm1.bias")
    vision = VisionConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=1,
        mlp_size=mlp[0],
        image_size=grid * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        qkv_bias=tower.has(first + "attn.qkv.bias"),
        qk_norm=tower.has(first + "attn.q_norm.weight"),
        norm="layer_norm" if is_layer_norm else "rms_norm",
        eps=EPS,
    )
    missing = tower.missing(expected_shapes(vision, layers, None))
    if missing:
        raise UndecidedError(f"tensor {tower.prefix + missing[0]!r} is missing")
    return _with_heads(vision, heads)


def _with_heads(vision: VisionConfig, heads: int | None) -> VisionConfig:
    if heads is None:
        is_300m = vision.norm == "layer_norm" and vision.qkv_bias and not vision.qk_norm
        is_6b = vision.norm == "rms_norm" and vision.qk_norm and not vision.qkv_bias
        if not is_300m and not is_6b:
            raise UndecidedError("norms and biases fit neither family, and no shape gives the number of heads")
        if (vision.norm, vision.hidden_size) not in PUBLISHED_HEADS:
            raise UndecidedError(
                f"no published InternViT has size {vision.hidden_size}, and no shape gives the number of heads"
            )
        heads = PUBLISHED_HEADS[vision.norm, vision.hidden_size]
    if vision.hidden_size % heads:
        raise UndecidedError(f"size {vision.hidden_size} does not divide into {heads} heads")
    return replace(vision, num_heads=heads)


def _layers(tower: Tower) -> int:
    numbers = {int(match[1]) for name, _ in tower.slots if (match := _BLOCK.fullmatch(name))}
    if not numbers or numbers != set(range(len(numbers))) or len(numbers) > MOST_LAYERS:
        raise UndecidedError(f"the numbers of {len(numbers)} blocks have gaps")
    return len(numbers)


def _hidden_size(tower: Tower, stored: Mapping[str, StoredTensor]) -> int:
    shape = _shape(tower, stored, "embeddings.class_embedding")
    if len(shape) != 3 or shape[:2] != (1, 1) or not 1 <= shape[2] <= MOST_HIDDEN:
        raise UndecidedError(f"a class token of shape {shape} is not one of an InternViT, (1, 1, size)")
    return shape[-1]


def _shape(tower: Tower, stored: Mapping[str, StoredTensor], name: str) -> tuple[int, ...]:
    slot = tower.slots.get((name, None))
    if slot is None:
        raise UndecidedError(f"tensor {tower.prefix + name!r} is missing")
    return stored[slot].shape
