"""What a feature file or folder holds, as plain values."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.accuracy import from_attributes
from internvit_cli.config import StoreDtype, Tokens
from internvit_cli.storage.layout import FEATURE_DATASETS, stored_recipe
from internvit_cli.storage.reader import find_shards
from internvit_cli.table import count_statuses

if TYPE_CHECKING:
    from internvit_cli.storage.output import FinishedShard


def describe_output(path: str) -> dict[str, Any]:
    """Facts for `info`: model, recipe, images by status, tiles, datasets with shapes and types, bytes, log of runs.

    Raises:
        OutputError: there is nothing there, or it is damaged.
    """
    shards = find_shards(path.rstrip("/") or "/")
    attributes = shards[-1].stored.attributes
    recipe = stored_recipe(attributes, path)
    # A key of a later shard takes the place of an earlier one's.
    newest: dict[bytes, int] = {}
    for shard in shards:
        superseded, table = shard.superseded_keys, shard.stored.table
        rows = zip(table.keys, table.status.tolist(), strict=True)
        newest |= {key: status for key, status in rows if key not in superseded}
    statuses = count_statuses(np.fromiter(newest.values(), np.uint8, len(newest)))
    return {
        "path": path,
        "model": attributes.get("model", ""),
        "model_revision": attributes.get("model_revision", ""),
        "recipe": json.loads(recipe.to_json()),
        "recipe_digest": attributes.get("recipe_digest", ""),
        "total_images": len(newest),
        "images": {status.word: count for status, count in statuses.items()},
        "tiles": sum(shard.stored.table.tiles for shard in shards),
        "datasets": _datasets(shards, StoreDtype(recipe.store_dtype), Tokens(recipe.tokens)),
        "bytes": sum(os.path.getsize(file) for shard in shards for file in shard.backend.final_paths(shard.path)),
        "shards": len(shards),
        "batch_tiles": attributes.get("batch_tiles", 0),
        "accuracy": from_attributes(attributes),
        "created_by": attributes.get("created_by", ""),
        "runs": [entry for shard in shards for entry in shard.backend.run_log(shard.path)],
    }


def _datasets(shards: list[FinishedShard], store_dtype: StoreDtype, tokens: Tokens) -> dict[str, Any]:
    """Shapes over all shards together, and types as a reader gets them."""
    found: dict[str, Any] = {}
    for shard in shards:
        for name, extent in shard.backend.extents(shard.path).items():
            if name not in FEATURE_DATASETS:
                continue
            is_tokens = tokens is not Tokens.NONE and name == tokens.dataset
            entry = found.setdefault(
                name, {"shape": [0, *extent.spec.shape[1:]], "dtype": store_dtype.value if is_tokens else "float32"}
            )
            entry["shape"][0] += extent.spec.shape[0]
    return found
