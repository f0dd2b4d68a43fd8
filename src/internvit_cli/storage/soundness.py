"""Whether a shard is built as its recipe says: what reading it does not need to know, and other programs go by."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import h5py
import numpy as np

from internvit_cli.config import PATCH_SIZE, Status, Tokens
from internvit_cli.storage import hdf5
from internvit_cli.storage.layout import (
    CRC32,
    DIGEST,
    FEATURE_DATASETS,
    POOLED,
    RUN_LOG,
    RUN_LOG_BYTES,
    STATUS,
    TILE_POOLED,
    TOKEN_DATASETS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from internvit_cli.config import Recipe
    from internvit_cli.storage.layout import Extent
    from internvit_cli.storage.output import FinishedShard
    from internvit_cli.table import ImageTable

UNREADABLE = (*hdf5.DAMAGE, RecursionError)
"""What damaged files make their readers raise, beside errors of our own."""


class Expected(NamedTuple):
    """A dataset as it has to be: the lengths of its first axes, the number of all, and its type."""

    lengths: tuple[int, ...]
    dimensions: int
    dtype: str


def expected_datasets(recipe: Recipe, images: int, tiles: int) -> dict[str, Expected]:
    """The datasets of a shard with rows, by name; the width of a vector and of a token is the model's affair."""
    found = {
        STATUS: Expected((images,), 1, "|u1"),
        DIGEST: Expected((images, 32), 2, "|u1"),
        CRC32: Expected((images,), 1, "<u4"),
        RUN_LOG: Expected((RUN_LOG_BYTES,), 1, "|u1"),
        POOLED: Expected((images,), 2, "<f4"),
    }
    tokens = recipe.tokens
    if tokens is not Tokens.NONE:
        patches = (recipe.tile_size // PATCH_SIZE) ** 2
        count = patches if tokens is Tokens.PATCH else patches // 4
        dtype = recipe.store_dtype
        found[tokens.dataset] = Expected((tiles, count), 3, dtype.numpy_name)
        if dtype.is_scaled:
            found[tokens.scales_dataset] = Expected((tiles, count), 2, "<f4")
    if recipe.tile_pooled:
        found[TILE_POOLED] = Expected((tiles,), 2, "<f4")
    return {name: expected for name, expected in found.items() if expected.lengths[0]}


def attribute_problems(shard: FinishedShard, recipe: Recipe) -> Iterator[str]:
    """Attributes that do not follow from the recipe that stands beside them."""
    attributes = shard.stored.attributes
    if attributes.get("recipe_digest") != recipe.digest:
        yield "the recipe's digest does not match it"
    if attributes.get("weights_digest") != recipe.weights_digest:
        yield "weights_digest is not that of the recipe"


def table_problems(table: ImageTable, sources: int) -> Iterator[str]:
    """Index columns that contradict each other."""
    if len(set(table.keys)) < len(table):
        yield "two rows have the same key"
    if len(table) and int(table.source.max()) >= sources:
        yield "a row names a source that is not in the list of sources"
    if (np.diff(table.tile_offset.astype(np.int64)) < 0).any():
        yield "tile offsets decrease"
    if ((table.tile_counts == 0) & (table.status == Status.DONE)).any():
        yield "an image without tiles is done"


def dataset_problems(shard: FinishedShard, recipe: Recipe) -> Iterator[str]:
    """Datasets that are missing, too many, or of another shape or type than the recipe and the index ask for.

    Raises:
        OutputError: the file is damaged.
    """
    table = shard.stored.table
    extents = shard.backend.extents(shard.path)
    expected = expected_datasets(recipe, len(table), table.tiles)
    is_hdf5 = shard.backend is hdf5
    published_apart = () if is_hdf5 or os.path.isdir(shard.path) else (STATUS, DIGEST, CRC32, RUN_LOG)
    for name, wanted in expected.items():
        if name not in published_apart:
            yield from _differences(name, wanted, extents.get(name))
    for name in sorted(set(FEATURE_DATASETS) & set(extents) - set(expected)):
        yield f"{name} is there, but the recipe stores none"
    if is_hdf5:
        yield from _type_problems(shard.path, recipe)


def _differences(name: str, wanted: Expected, extent: Extent | None) -> Iterator[str]:
    if extent is None:
        yield f"{name} is missing"
        return
    shape, dtype = extent.spec.shape, extent.spec.dtype
    lengths = wanted.lengths
    if shape[: len(lengths)] != lengths or len(shape) != wanted.dimensions or not all(shape):
        rest = ", ".join([*map(str, lengths), *["any"] * (wanted.dimensions - len(lengths))])
        yield f"{name} has shape {shape}, not ({rest})"
    elif dtype != wanted.dtype:
        yield f"{name} has type {dtype}, not {wanted.dtype}"
    elif extent.offset + extent.spec.nbytes > os.path.getsize(extent.path):
        yield f"{name} reaches beyond the end of the file"


def _type_problems(path: str, recipe: Recipe) -> Iterator[str]:
    """Types of an HDF5 file that are not plain little-endian ones: its bytes are right, and read as something else."""
    with h5py.File(path, "r", locking=False) as file:
        for name, extent in hdf5.extents(path).items():
            plain = h5py.h5t.py_create(np.dtype(extent.spec.dtype), logical=True)
            dataset = file[name]
            if dataset.id.get_type() != plain:
                yield f"{name} has an odd type: {dataset.dtype.str}"
            elif name in TOKEN_DATASETS and dataset.attrs.get("dtype") != recipe.store_dtype:
                yield f"{name} says that its type is {dataset.attrs.get('dtype')!r}, not {recipe.store_dtype.value!r}"
