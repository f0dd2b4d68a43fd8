"""Describe what a feature file or folder holds, as plain values."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import RESTORE_OR_OVERWRITE, OutputError
from internvit_cli.model.accuracy import from_attributes
from internvit_cli.options import named_path
from internvit_cli.plan.table import count_statuses
from internvit_cli.runtime.words import counted
from internvit_cli.storage.format.layout import crc_order, is_tokens, stored_recipe
from internvit_cli.storage.output_names import PARTIAL, unfinished_shards
from internvit_cli.storage.read.places import ShardPlace, find_places

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.config import StoreDtype


@dataclass(frozen=True, slots=True)
class _ShardFacts:
    """The facts about a shard."""

    place: ShardPlace
    attributes: dict[str, Any]
    status: NDArray[Any]
    """The statuses of the rows that count, [n] uint8."""
    tiles: int
    """The number of tiles of all rows."""


def describe_output(path: str) -> dict[str, Any]:
    """Return facts for `info`: model, recipe, images by status, tiles, shapes and types of datasets, bytes, runs.

    Keys are read only if some rows do not count any more, so damage to a key or a picture's size is left to `verify`.

    Raises:
        OutputError: There is no output, or it is damaged.
    """
    looks = [_look_at(place) for place in find_places(named_path(path))]
    places = [look.place for look in looks]
    attributes = looks[-1].attributes
    recipe = stored_recipe(attributes, path)
    status = np.concatenate([look.status for look in looks])
    return {
        "path": path,
        "unfinished": _unfinished(path, places),
        "model": attributes.get("model", ""),
        "model_revision": attributes.get("model_revision", ""),
        "projector": attributes.get("projector", ""),
        "recipe": json.loads(recipe.to_json()),
        "recipe_digest": attributes.get("recipe_digest", ""),
        "total_images": len(status),
        "images": {status.word: count for status, count in count_statuses(status).items()},
        "tiles": sum(look.tiles for look in looks),
        "layers": list(recipe.layers),
        "datasets": _datasets(places, recipe.store_dtype),
        "bytes": sum(os.path.getsize(file) for place in places for file in place.backend.final_paths(place.path)),
        "shards": len(places),
        "batch_tiles": attributes.get("batch_tiles", 0),
        "accuracy": _accuracy(attributes, path),
        "created_by": attributes.get("created_by", ""),
        "runs": [entry for place in places for entry in place.backend.run_log(place.path)],
    }


def _unfinished(path: str, places: list[ShardPlace]) -> str | None:
    """Return the path of the unfinished part of an output; None if there is none."""
    filled = [place.path for place in places if place.path.endswith(PARTIAL)]
    in_folder = [os.path.join(path, name) for name in unfinished_shards(path)]
    beside = [partial] if os.path.exists(partial := named_path(path) + PARTIAL) else []
    return next(iter([*filled, *in_folder, *beside]), None)


def _accuracy(attributes: dict[str, Any], path: str) -> dict[str, dict[str, Any]]:
    try:
        found = from_attributes(attributes)
    except (ValueError, TypeError) as error:
        raise OutputError(f"the accuracy that {path} records is damaged", RESTORE_OR_OVERWRITE) from error
    return {name: figures for name, figures in found.items() if isinstance(figures, dict)}


def _look_at(place: ShardPlace) -> _ShardFacts:
    entry = place.entry
    if entry is not None and entry.superseded:  # only keys determine which rows count
        found = place.load()
        table, rows = found.stored.table, found.live_rows
        return _ShardFacts(place, found.stored.attributes, table.status[rows], int(table.tile_counts[rows].sum()))
    outline = place.backend.outline(place.path)
    if entry is not None and outline.images != entry.images:
        raise OutputError(
            f"{place.path} has {counted(outline.images, 'image')}; its manifest says {entry.images:,}",
            RESTORE_OR_OVERWRITE,
        )
    tiles = outline.tiles if outline.tiles is not None else entry.tiles if entry is not None else 0
    return _ShardFacts(place, outline.attributes, outline.status, tiles)


def _datasets(places: list[ShardPlace], store_dtype: StoreDtype) -> dict[str, Any]:
    """Return the shapes over all shards together, and the types that a reader gets."""
    found: dict[str, Any] = {}
    for place in places:
        extents = place.backend.extents(place.path)
        for name in crc_order(extents):
            spec = extents[name].spec
            dtype = store_dtype.value if is_tokens(name) else np.dtype(spec.dtype).name
            entry = found.setdefault(name, {"shape": [0, *spec.shape[1:]], "dtype": dtype})
            entry["shape"][0] += spec.shape[0]
    return found
