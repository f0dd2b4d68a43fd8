"""Write outputs like those of `extract`, from rows that no model made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import (
    ComputeDtype,
    OnOverflow,
    Pool,
    Preprocess,
    Recipe,
    Status,
    StoreDtype,
    TokenOrder,
    Tokens,
)
from internvit_cli.extract.changes import sources_to_json
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.sources.interface import Source
from internvit_cli.storage.format.layout import DIGEST, FORMAT, FORMAT_VERSION, POOLED, STATUS, FeatureShape, NewShard
from internvit_cli.storage.output import Output
from internvit_cli.storage.write.commit import create_shard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

RECIPE = Recipe(
    weights_digest="0" * 64,
    layer=24,
    tile_size=448,
    min_tiles=1,
    max_tiles=12,
    thumbnail=True,
    preprocess=Preprocess.TILES,
    exif=True,
    background=None,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    tokens=Tokens.NONE,
    token_order=TokenOrder.V2,
    pool=Pool.MEAN,
    tile_pooled=False,
    compute_dtype=ComputeDtype.BFLOAT16,
    store_dtype=StoreDtype.FLOAT16,
    on_overflow=OnOverflow.SKIP,
)


def attributes_of(recipe: Recipe, sources: str = '[{"root": "/nowhere", "name": ""}]') -> dict[str, Any]:
    """Return the attributes of a shard, from a recipe and the JSON of its sources."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.to_json(),
        "recipe_digest": recipe.digest,
        "sources": sources,
        "created_by": "benchmark",
        "model": "none",
        "model_revision": "",
        "weights_digest": recipe.weights_digest,
        "batch_tiles": 0,
        "pooled_from": "global_view",
    }


def write_output(
    path: Path,
    keys: Sequence[str],
    width: int,
    blocks: Iterable[NDArray[np.float32]],
    *,
    digests: NDArray[np.uint8],
    sizes: Sequence[tuple[int, int]] = (),
    root: str = "/nowhere",
) -> None:
    """Write a finished feature file of pooled vectors.

    Args:
        path: The output.
        keys: Keys of the images, sorted.
        width: Width of the vectors.
        blocks: The vectors in order, in blocks [k, width].
        digests: SHA-256 of the pictures, [n, 32].
        sizes: Width and height of the pictures; None if the pictures do not exist.
        root: The folder that the keys are relative to; pictures there are recorded with their sizes in bytes.
    """
    columns = {name: np.zeros(len(keys), dtype) for name, dtype in COLUMN_DTYPES.items()}
    columns["columns"][:] = columns["rows"][:] = columns["orientation"][:] = 1
    columns["width"][:] = columns["height"][:] = 1
    if sizes:
        columns["width"][:], columns["height"][:] = np.array(sizes).T
    files = [Path(root, key) for key in keys]
    columns["file_size"][:] = [file.stat().st_size if file.exists() else 0 for file in files]
    table = ImageTable.build([key.encode() for key in keys], np.zeros(len(keys), np.uint8), columns)
    attributes = attributes_of(RECIPE, sources_to_json([Source(root=root.encode())]))
    shard = NewShard(table, FeatureShape(Tokens.NONE, 0, 0, width, StoreDtype.FLOAT16, False), attributes)
    output = Output(str(path))
    output.prepare()
    partial = output.partial_path(0)
    create_shard(output.backend, partial, shard)
    extents = output.backend.extents(partial)
    with open(partial, "r+b") as file:
        file.seek(extents[POOLED].offset)
        file.writelines(block.astype("<f4").tobytes() for block in blocks)
        file.seek(extents[STATUS].offset)
        file.write(np.full(len(keys), Status.DONE, np.uint8).tobytes())
        file.seek(extents[DIGEST].offset)
        file.write(digests.astype(np.uint8).tobytes())
    output.publish(0, len(keys), table.tiles, {})
