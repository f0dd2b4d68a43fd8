"""Convert tensors on the host to arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from internvit_cli.encode.tile_features import LayerFeatures, TileFeatures
from internvit_cli.model.features import FeatureSpec, check_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.model.features import LayerTensors


def on_host(layers: Sequence[LayerTensors], spec: FeatureSpec) -> TileFeatures:
    """Return features in host tensors as arrays over the same memory.

    Args:
        layers: Features of the same tiles, the main layer first.
        spec: What the features are.
    """
    found = tuple(
        LayerFeatures(
            tokens=None if layer.tokens is None else _as_stored(layer.tokens),
            pooled=layer.pooled.numpy(),
            scales=None if layer.scales is None else layer.scales.numpy(),
        )
        for layer in layers
    )
    # The verdicts are ordered: one layer that cannot be stored is enough.
    fits = [check_tiles(layer.extremes.numpy(), layer.pooled.numpy(), spec) for layer in layers]
    return TileFeatures(found, np.maximum.reduce(fits), sum(int(layer.clamped.sum()) for layer in layers))


def _as_stored(tokens: torch.Tensor) -> np.ndarray:
    """Return tokens for numpy, bfloat16 as uint16 bits."""
    return (tokens.view(torch.uint16) if tokens.dtype is torch.bfloat16 else tokens).numpy()
