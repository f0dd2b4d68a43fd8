"""List the published encoders, whose shapes are known without asking the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.model.card import VisionConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

VISION_300M = VisionConfig(1024, 24, 16, 4096, 448, 14, qkv_bias=True, qk_norm=False, norm="layer_norm", eps=1e-6)
_6B = VisionConfig(3200, 45, 25, 12800, 448, 14, qkv_bias=False, qk_norm=True, norm="rms_norm", eps=1e-6)
_6B_48 = VisionConfig(3200, 48, 25, 12800, 448, 14, qkv_bias=False, qk_norm=True, norm="rms_norm", eps=1e-6)
_6B_224 = VisionConfig(3200, 48, 25, 12800, 224, 14, qkv_bias=False, qk_norm=True, norm="rms_norm", eps=1e-6)
VISION_TINY = VisionConfig(64, 2, 2, 256, 448, 14, qkv_bias=True, qk_norm=False, norm="layer_norm", eps=1e-6)
"""Of tiny-random."""


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published encoder whose shape is known without asking the hub."""

    repo: str
    """The hub id."""
    aliases: tuple[str, ...]
    """Short names in addition to the last part of the hub id."""
    vision: VisionConfig
    license: str = "MIT"
    """The license according to its page on the hub."""


KNOWN_MODELS = (
    KnownModel(DEFAULT_MODEL, ("300m", "300m-v2_5"), VISION_300M),
    KnownModel("OpenGVLab/InternViT-300M-448px", ("300m-v1",), VISION_300M),
    KnownModel("OpenGVLab/InternViT-6B-448px-V2_5", ("6b", "6b-v2_5"), _6B),
    KnownModel("OpenGVLab/InternViT-6B-448px-V1-5", ("6b-v1-5",), _6B),
    KnownModel("OpenGVLab/InternViT-6B-448px-V1-2", ("6b-v1-2",), _6B),
    KnownModel("OpenGVLab/InternViT-6B-448px-V1-0", ("6b-v1-0",), _6B_48),
    KnownModel("OpenGVLab/InternViT-6B-224px", ("6b-224px",), _6B_224),
)

TIMM_TOWERS: Mapping[str, VisionConfig] = {"vit_intern300m_patch14_448": VISION_300M}
"""The shapes of towers by timm's architecture."""

BY_NAME: Mapping[str, KnownModel] = {
    name.casefold(): model
    for model in KNOWN_MODELS
    for name in (model.repo, model.repo.rpartition("/")[2], *model.aliases)
}
"""The published encoders by hub id, last part of the hub id, and alias, in lower case."""
