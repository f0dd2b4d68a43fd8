"""Turn the features of an image's tiles into the rows that are stored; only this module makes an image's vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.storage.format.layout import POOLED, TILE_POOLED, dataset_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from internvit_cli.config import Recipe
    from internvit_cli.encode.tile_features import LayerFeatures


def image_arrays(parts: Sequence[Sequence[LayerFeatures]], recipe: Recipe) -> dict[str, list[NDArray[Any]]]:
    """Return the rows that are stored for one image.

    Args:
        parts: Features of its tiles, in order, in one or more parts; each has one entry per layer, the main one first.
        recipe: Decides what is stored.

    Returns:
        Consecutive blocks of rows by dataset; datasets with one row per image have one block of one row.
    """
    arrays: dict[str, list[NDArray[Any]]] = {}
    for number, layer in enumerate((None, *recipe.earlier_layers)):
        of_layer = [part[number] for part in parts]
        vectors = np.concatenate([part.pooled for part in of_layer])
        # Without a thumbnail, the image's vector is the mean over its tiles.
        pooled = vectors[-1] if recipe.thumbnail else vectors.mean(axis=0, dtype=np.float32)
        found = {
            POOLED: [pooled[None]],
            recipe.tokens.dataset: [part.tokens for part in of_layer if part.tokens is not None],
            recipe.tokens.scales_dataset: [part.scales for part in of_layer if part.scales is not None],
            TILE_POOLED: [vectors] if recipe.tile_pooled else [],
        }
        arrays |= {dataset_of(kind, layer): blocks for kind, blocks in found.items() if blocks}
    return arrays
