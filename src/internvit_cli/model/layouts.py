"""Map the names of tensors in every published layout, with any prefix, to one set of names.

The names are those of the standalone InternViT (docs/model.md). transformers' own layout renames them and splits qkv
into three tensors, whose rows are joined; timm's layout renames them too. A tower inside a larger model is found by its
tensors, as the one prefix that all of them have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from internvit_cli.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from internvit_cli.model.card import VisionConfig

Slot: TypeAlias = "tuple[str, int | None]"
"""A standalone name, and which third of qkv a tensor is (None: the whole tensor)."""

PROJECTOR = "mlp1."

MOST_TOWERS = 32
"""Largest number of prefixes that are examined, which limits the work for a made-up file."""

_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
        (r"^embeddings\.position_embeddings$", "embeddings.position_embedding"),
        (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
        (r"^encoder\.layer\.", "encoder.layers."),
        (r"\.lambda_([12])$", r".ls\1"),
        (r"\.attention\.projection_layer\.", ".attn.proj."),
        (r"\.attention\.([qk]_norm)\.", r".attn.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        # timm
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.ls([12])\.gamma$", r".ls\1"),
    )
)
_THIRD = re.compile(r"\.attention\.([qkv])_proj\.")

_PROJECTOR_RULES = (("layer_norm.", "mlp1.0."), ("linear_1.", "mlp1.1."), ("linear_2.", "mlp1.3."))
_PROJECTOR_ANCHOR = re.compile(r"(?:^|.*\.)(?P<module>mlp1|multi_modal_projector)\.(?:0|layer_norm)\.weight")

_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, DataParallel, DeepSpeed and FSDP insert anywhere in names."""

_ANCHOR = re.compile(
    r"(?P<prefix>|.*\.)(?:embeddings\.(?:class_embedding|position_embedding|cls_token|position_embeddings)"
    r"|(?<!embeddings\.)(?:cls_token|pos_embed)"
    r"|encoder\.layers?\.0\.(?:norm1|layernorm_before)\.weight)"
)
"""Tensors that every tower has, after any prefix."""

UNUSED = frozenset({"embeddings.mask_token"})
"""A tensor that transformers' layout may have; only masked training uses it."""

FINAL_NORMS = frozenset({"norm.weight", "norm.bias", "layernorm.weight", "layernorm.bias", "fc_norm.weight"})
"""Norms that DINOv2 and other vision transformers have after the last block."""

_HEAD = "head."
"""The classifier in timm's files, which is not part of the tower."""


def standalone_name(name: str) -> Slot:
    """Return the slot for the name of a tensor in any layout, without prefix; unknown names are kept."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    match = _THIRD.search(name)
    if match is None:
        return name, None
    return _THIRD.sub(".attn.qkv.", name), "qkv".index(match.group(1))


@dataclass(frozen=True, slots=True)
class Tower:
    """The tensors under one prefix."""

    prefix: str
    """The prefix in the file, without the parts of module wrappers."""
    slots: Mapping[Slot, str]
    """Stored names."""

    def has(self, name: str) -> bool:
        """Return whether the tower has a tensor, whole or in three parts."""
        return (name, None) in self.slots or all((name, third) in self.slots for third in range(3))

    def missing(self, wanted: Iterable[str]) -> list[str]:
        """Return the names that the tower lacks."""
        return [name for name in wanted if not self.has(name)]

    def parts(self, name: str, where: str) -> tuple[str, ...]:
        """Return the stored names of the parts of a tensor that the tower has.

        Raises:
            ModelError: The tensor exists both whole and in parts.
        """
        whole = self.slots.get((name, None))
        thirds = tuple(stored for third in range(3) if (stored := self.slots.get((name, third))))
        if whole and thirds:
            raise ModelError(f"{where}: tensor {name!r} exists both whole and in parts")
        return (whole,) if whole else thirds


def find_towers(stored_names: Iterable[str], where: str) -> list[Tower]:
    """Return the candidates for a tower: the tensors of each prefix that has some of a tower's tensors.

    Args:
        stored_names: All names of a checkpoint.
        where: The checkpoint, for messages.

    Raises:
        ModelError: A tensor has two names.
    """
    bare = {stored: _WRAPPERS.sub("", stored) for stored in stored_names}
    prefixes = {match["prefix"] for name in bare.values() if (match := _ANCHOR.fullmatch(name))}
    if len(prefixes) > MOST_TOWERS:
        raise ModelError(f"{where}: {len(prefixes)} parts could be a vision tower; no valid model has so many")
    return [Tower(prefix, _slots(bare, prefix, where)) for prefix in sorted(prefixes)]


def _slots(bare: Mapping[str, str], prefix: str, where: str) -> dict[Slot, str]:
    slots: dict[Slot, str] = {}
    for stored, name in bare.items():
        if not name.startswith(prefix):
            continue
        tail = name.removeprefix(prefix)
        if tail.startswith(_HEAD) or _is_projector(name):
            continue
        slot = standalone_name(tail)
        if slot in slots:
            raise ModelError(f"{where}: tensors {slots[slot]!r} and {stored!r} are the same tensor")
        slots[slot] = stored
    return slots


def choose_tower(towers: list[Tower], known: Iterable[str], wanted: Iterable[str], where: str) -> Tower:
    """Return the only complete tower, or else the only one complete enough for a run, or else the most complete one.

    Args:
        towers: The result of `find_towers`, at least one.
        known: The standalone names of a complete tower.
        wanted: The names that a run uses, which may need fewer blocks.
        where: The checkpoint, for messages.

    Raises:
        ModelError: Several towers are complete.
    """
    for names in (list(known), list(wanted)):
        whole = [tower for tower in towers if not tower.missing(names)]
        if len(whole) > 1:
            raise ModelError(
                f"{where}: {len(whole)} whole vision towers, under {', '.join(repr(tower.prefix) for tower in whole)}",
                "save a checkpoint that holds one of them",
            )
        if whole:
            return whole[0]
    return min(towers, key=lambda tower: len(tower.missing(names)))


def find_projector(stored_names: Iterable[str], where: str) -> Tower:
    """Return the tensors of the projector under their standalone names, `mlp1.0.weight` and so on.

    Raises:
        ModelError: There is no projector, or there are several.
    """
    bare = {stored: _WRAPPERS.sub("", stored) for stored in stored_names}
    prefixes = {
        name[: match.end("module") + 1] for name in bare.values() if (match := _PROJECTOR_ANCHOR.fullmatch(name))
    }
    if len(prefixes) != 1:
        found = ", ".join(sorted(prefixes)) or "none"
        raise ModelError(
            f"{where}: one projector (mlp1 or multi_modal_projector) is needed, but found {found}",
            "use --tokens visual",
        )
    prefix = prefixes.pop()
    slots: dict[Slot, str] = {}
    for stored, name in bare.items():
        if name.startswith(prefix):
            slots[_projector_name(name.removeprefix(prefix)), None] = stored
    return Tower(prefix, slots)


def _projector_name(tail: str) -> str:
    for start, replacement in _PROJECTOR_RULES:
        if tail.startswith(start):
            return replacement + tail.removeprefix(start)
    return PROJECTOR + tail


def _is_projector(name: str) -> bool:
    return any(part in {"mlp1", "multi_modal_projector"} for part in name.split(".")[:-1])


def expected_shapes(vision: VisionConfig, blocks: int, projector_size: int | None) -> dict[str, tuple[int, ...]]:
    """Return the standalone names and shapes of the tensors that a run uses.

    Args:
        vision: The shape of the tower.
        blocks: The number of blocks that run.
        projector_size: The size of a projected token if the projector is used, otherwise None.
    """
    hidden = vision.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, hidden),
        "embeddings.position_embedding": (1, 1 + vision.grid**2, hidden),
        "embeddings.patch_embedding.weight": (hidden, 3, vision.patch_size, vision.patch_size),
        "embeddings.patch_embedding.bias": (hidden,),
    }
    for block in range(blocks):
        shapes |= {f"encoder.layers.{block}.{name}": shape for name, shape in _block_shapes(vision).items()}
    return shapes if projector_size is None else shapes | projector_shapes(4 * hidden, projector_size)


def projector_shapes(token_size: int, projector_size: int) -> dict[str, tuple[int, ...]]:
    """Return the standalone names and shapes of a projector's tensors.

    Args:
        token_size: The number of values of a visual token.
        projector_size: That of a projected token.
    """
    return {
        "mlp1.0.weight": (token_size,),
        "mlp1.0.bias": (token_size,),
        "mlp1.1.weight": (projector_size, token_size),
        "mlp1.1.bias": (projector_size,),
        "mlp1.3.weight": (projector_size, projector_size),
        "mlp1.3.bias": (projector_size,),
    }


def _block_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    hidden, mlp = vision.hidden_size, vision.mlp_size
    shapes: dict[str, tuple[int, ...]] = {
        "ls1": (hidden,),
        "ls2": (hidden,),
        "norm1.weight": (hidden,),
        "norm2.weight": (hidden,),
        "attn.qkv.weight": (3 * hidden, hidden),
        "attn.proj.weight": (hidden, hidden),
        "attn.proj.bias": (hidden,),
        "mlp.fc1.weight": (mlp, hidden),
        "mlp.fc1.bias": (mlp,),
        "mlp.fc2.weight": (hidden, mlp),
        "mlp.fc2.bias": (hidden,),
    }
    if vision.norm == "layer_norm":
        shapes |= {"norm1.bias": (hidden,), "norm2.bias": (hidden,)}
    if vision.qkv_bias:
        shapes["attn.qkv.bias"] = (3 * hidden,)
    if vision.qk_norm:
        shapes |= {"attn.q_norm.weight": (hidden,), "attn.k_norm.weight": (hidden,)}
    return shapes
