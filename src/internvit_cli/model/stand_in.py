"""Create a checkpoint with random weights in a model's shape, which is as fast as the real one without a download."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.model.checkpoint import Checkpoint, Weight
from internvit_cli.model.layouts import expected_shapes

if TYPE_CHECKING:
    from internvit_cli.model.card import ModelCard


def stand_in_checkpoint(card: ModelCard, *, layer: int, projector: bool = False) -> Checkpoint:
    """Return a checkpoint with small random bfloat16 weights, which all blocks share.

    Args:
        card: The model.
        layer: The number of blocks that run.
        projector: Whether projected tokens are needed.
    """
    random = np.random.default_rng(0)
    shapes = expected_shapes(card.vision, layer, card.projector_size if projector else None)
    kinds: dict[str, Weight] = {}
    weights = {}
    for name, shape in shapes.items():
        kind = name.partition(".layers.")[2].partition(".")[2] or name
        if kind not in kinds:
            kinds[kind] = _weight(kind, shape, random)
        weights[name] = kinds[kind]
    return Checkpoint(card, layer, weights)


def _weight(kind: str, shape: tuple[int, ...], random: np.random.Generator) -> Weight:
    scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
    # The pattern is repeated, because drawing six billion numbers would take minutes.
    pattern = (random.standard_normal(min(math.prod(shape), 1 << 20), np.float32) * np.float32(scale)).astype(
        np.float32
    )
    if "norm" in kind and kind.endswith("weight"):
        pattern += 1
    bits = (pattern.view(np.uint32) >> 16).astype("<u2")
    return Weight("BF16", shape, (np.resize(bits, shape),))
