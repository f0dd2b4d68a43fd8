"""Check a shard, whose file may be damaged or hostile, before any of its contents are trusted.

Both formats apply these rules as soon as they open a shard. So every command refuses the same files, with the same
messages, before it reads a row.
"""

from __future__ import annotations

import hashlib
import os
import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import PATCH_SIZE, Preprocess, Recipe, Status, Tokens, scales_per_token
from internvit_cli.errors import RESTORE_OR_OVERWRITE, OutputError, one_line
from internvit_cli.model.accuracy import COMPUTE_ERROR, STORE_ERROR, from_attributes
from internvit_cli.plan.table import COLUMN_DTYPES
from internvit_cli.runtime.words import listed
from internvit_cli.storage.format.layout import (
    CRC32,
    DIGEST,
    MODEL_LAYERS,
    POOLED,
    PROJECTOR,
    PROJECTOR_TOWER,
    RUN_LOG,
    RUN_LOG_BYTES,
    SOURCES_BYTES,
    STATUS,
    TEXT_BYTES,
    TILE_POOLED,
    DatasetSpec,
    StoredShard,
    check_format,
    crc_order,
    feature_datasets,
    feature_name,
    index_digest,
    recorded_sources,
    stored_recipe,
    unknown_value,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from internvit_cli.sources.interface import Source

NUMBERS = ("format_version", "batch_tiles")
TEXTS = ("format", "recipe", "recipe_digest", "index_digest", "sources", "weights_digest")
"""Attributes that every shard has in addition to the numbers."""
MORE_TEXTS = (
    *("created_by", "model", "model_revision", "pooled_from", COMPUTE_ERROR, STORE_ERROR),
    *(PROJECTOR, PROJECTOR_TOWER),
)
"""Attributes that nothing depends on. Those of later versions are also texts or numbers."""
MORE_NUMBERS = (MODEL_LAYERS,)
MOST_LAYERS = 1024
"""Maximum layers of a model, many times more than any model has."""
MOST_ATTRIBUTES = 64
MOST_BATCH_TILES = 65536
MOST_SCALE = 1e6
"""Bound of means, standard deviations, and inverse scales; checkpoints beyond it are not accepted either."""
MOST_LIGHT = 255
MOST_TILE_SIDE = 16384
MOST_GRID_TILES = 4096
MOST_ROW_VALUES = 1 << 20
"""Maximum width of a vector or token, many times more than that of any model."""
MOST_ORIENTATION = 8
KEY_BLOCK = 65536
"""Keys checked at a time."""
CLIMBING = re.compile(rb"[\0/]\.\.[\0/]")


class ExpectedDataset(NamedTuple):
    """What a dataset must be: the lengths of its first axes, the number of axes, and its type."""

    lengths: tuple[int, ...]
    dimensions: int
    dtype: str

    @classmethod
    def exactly(cls, shape: tuple[int, ...], dtype: str) -> ExpectedDataset:
        """Expect a shape with known lengths of all axes."""
        return cls(shape, len(shape), dtype)


def expected_features(recipe: Recipe, images: int, tiles: int) -> dict[str, ExpectedDataset]:
    """Return the feature datasets by name; widths of vectors and tokens depend on the model and are not checked."""
    patches = (recipe.tile_size // PATCH_SIZE) ** 2
    count = patches if recipe.tokens is Tokens.PATCH else patches // 4
    of_kind = {
        POOLED: ExpectedDataset((images,), 2, "<f4"),
        recipe.tokens.dataset: ExpectedDataset((tiles, count), 3, recipe.store_dtype.numpy_name),
        recipe.tokens.scales_dataset: ExpectedDataset((tiles, count), 3, "<f2")
        if recipe.values_per_scale
        else ExpectedDataset.exactly((tiles, count), "<f4"),
        TILE_POOLED: ExpectedDataset((tiles,), 2, "<f4"),
    }
    return {name: of_kind[feature_name(name).kind] for name in feature_datasets(recipe)}


def expected_records(images: int) -> dict[str, ExpectedDataset]:
    """Return the datasets of commit records, and the log of runs, by name."""
    return {
        STATUS: ExpectedDataset.exactly((images,), "|u1"),
        DIGEST: ExpectedDataset.exactly((images, 32), "|u1"),
        CRC32: ExpectedDataset.exactly((images,), "<u4"),
        RUN_LOG: ExpectedDataset.exactly((RUN_LOG_BYTES,), "|u1"),
    }


def expected_columns(images: int) -> dict[str, ExpectedDataset]:
    """Return the columns of the index that are separate arrays, by dataset name."""
    columns = {f"image/{name}": ExpectedDataset.exactly((images,), dtype) for name, dtype in COLUMN_DTYPES.items()}
    return columns | {"image/tile_offset": ExpectedDataset.exactly((images + 1,), "<u8")}


def check_datasets(
    found: Mapping[str, DatasetSpec], expected: Mapping[str, ExpectedDataset], recipe: Recipe, path: str
) -> None:
    """Refuse datasets that are missing, unexpected, or of the wrong shape or type.

    Raises:
        OutputError: Names the first such dataset.
    """
    for name, wanted in expected.items():
        if name not in found:
            raise damaged(path, f"{name} is missing")
        _check_dataset(found[name], wanted, path)
    for name in crc_order(set(found) - set(expected)):
        raise damaged(path, f"{name} exists, but the recipe does not store it")
    _check_widths(found, path)
    _check_scales(found, recipe, path)


def _check_widths(found: Mapping[str, DatasetSpec], path: str) -> None:
    """Refuse rows whose width differs from the main layer: the model decides the width, but all layers share it."""
    for name in crc_order(found):
        kind = feature_name(name).kind
        model = POOLED if kind == TILE_POOLED else kind
        row, wanted = found[name].shape[1:], found[model].shape[1:]
        if row != wanted:
            raise damaged(path, f"a row of {name} has shape {row}, but a row of {model} has {wanted}")


def _check_scales(found: Mapping[str, DatasetSpec], recipe: Recipe, path: str) -> None:
    """Refuse several scales per token whose number does not follow from the width of a token."""
    name = recipe.tokens.scales_dataset
    if name not in found or not recipe.values_per_scale:
        return
    size, count = found[recipe.tokens.dataset].shape[2], found[name].shape[2]
    if count != (wanted := scales_per_token(size, recipe.values_per_scale)):
        raise damaged(path, f"{name} has {count} scales per token, but {size} values have {wanted}")


def _check_dataset(spec: DatasetSpec, wanted: ExpectedDataset, path: str) -> None:
    shape, known = spec.shape, len(wanted.lengths)
    is_row_sound = all(0 < length <= MOST_ROW_VALUES for length in shape[known:])
    if shape[:known] != wanted.lengths or len(shape) != wanted.dimensions or not is_row_sound:
        rest = ", ".join([*map(str, wanted.lengths), *["any"] * (wanted.dimensions - known)])
        raise damaged(path, f"{spec.name} has shape ({', '.join(map(str, shape))}), not ({rest})")
    if spec.dtype != wanted.dtype:
        raise damaged(path, f"{spec.name} has type {spec.dtype}, not {wanted.dtype}")


# -------------------------------------------------------------------------------------------------------- attributes


def check_attributes(attributes: Mapping[str, Any], path: str) -> tuple[Recipe, list[Source]]:
    """Refuse attributes that a sound shard of a known version cannot have.

    Returns:
        The recipe and the sources in the attributes.

    Raises:
        ForeignFileError: It is another program's file.
        OutputError: It has a newer version, or is damaged.
    """
    check_format(attributes, path)
    _check_kinds(attributes, path)
    recipe = stored_recipe(attributes, path)
    text = attributes["recipe"].encode("utf-8", "surrogatepass")
    if attributes["recipe_digest"] != hashlib.sha256(text).hexdigest():
        raise damaged(path, "its recipe does not match the digest beside it")
    if attributes["weights_digest"] != recipe.weights_digest:
        raise damaged(path, "its weights_digest is not that of its recipe")
    _check_tiles(recipe, path)
    _check_pixels(recipe, path)
    _check_layers(recipe, attributes.get(MODEL_LAYERS, recipe.layer), path)
    if recipe.values_per_scale and not recipe.before_projection.store_dtype.values_per_scale(recipe.tokens):
        raise damaged(path, "its recipe has a number of values per scale for tokens without several scales")
    if not 0 <= attributes["batch_tiles"] <= MOST_BATCH_TILES:
        raise damaged(path, f"batch_tiles is {attributes['batch_tiles']}")
    try:
        from_attributes(attributes)
    except ValueError as error:
        raise damaged(path, f"its recorded accuracy is invalid: {error}") from error
    return recipe, recorded_sources(attributes, path)


def _check_tiles(recipe: Recipe, path: str) -> None:
    """Refuse tiles that no run cuts: not made of whole patches, too large, or too many for one picture."""
    is_size = 0 < recipe.tile_size <= MOST_TILE_SIDE and recipe.tile_size % PATCH_SIZE == 0
    if not is_size or not 1 <= recipe.min_tiles <= recipe.max_tiles <= MOST_GRID_TILES:
        numbers = f"{recipe.min_tiles} to {recipe.max_tiles} tiles of {recipe.tile_size} px"
        raise damaged(path, f"its recipe cuts a picture into {numbers}")


def _check_pixels(recipe: Recipe, path: str) -> None:
    """Refuse pixel normalization that no model can have: no picture could be encoded again for comparison."""
    scales = (*recipe.std, recipe.rescale_factor)
    if not all(1 / MOST_SCALE <= value <= MOST_SCALE for value in scales) or max(map(abs, recipe.mean)) > MOST_SCALE:
        raise damaged(path, "its recipe normalizes pixels with invalid scales or means")
    if recipe.background is not None and max(recipe.background) > MOST_LIGHT:
        raise damaged(path, f"its recipe has a background of {listed(recipe.background)}")


def _check_layers(recipe: Recipe, model_layers: int, path: str) -> None:
    """Refuse layers that no run stores: out of order, duplicate, or more than the model has."""
    layers = recipe.layers
    if any(layer >= following for layer, following in pairwise(layers)):
        raise damaged(path, f"its recipe stores the layers {listed(layers)}, which are not ascending")
    is_projected = recipe.projected_from is not None
    if is_projected != bool(recipe.projector_digest) or (is_projected and recipe.tokens is not Tokens.PROJECTED):
        raise damaged(path, "its recipe contradicts itself about the projector")
    if recipe.earlier_layers and recipe.tokens is Tokens.PROJECTED:
        raise damaged(path, "its recipe stores projected tokens of several layers")
    if not recipe.layer <= MOST_LAYERS or (recipe.earlier_layers and not recipe.layer <= model_layers <= MOST_LAYERS):
        raise damaged(path, f"it stores layer {recipe.layer} of a model with {model_layers} layers")


def _check_kinds(attributes: Mapping[str, Any], path: str) -> None:
    if len(attributes) > MOST_ATTRIBUTES:
        raise damaged(path, f"it has {len(attributes):,} attributes")
    for name, value in attributes.items():
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise unknown_value(attributes, f"attribute {one_line(name, 80)} of {path} is {one_line(repr(value), 80)}")
        most = SOURCES_BYTES if name == "sources" else TEXT_BYTES
        if isinstance(value, str) and (len(value) > most or not _is_storable(value)):
            raise damaged(path, f"attribute {one_line(name, 80)} is not a valid text: {one_line(value, 80)}")
    for name in (*TEXTS, *NUMBERS):
        if name not in attributes:
            raise damaged(path, f"it has no attribute {name}")
    for names, kind in (((*TEXTS, *MORE_TEXTS), str), ((*NUMBERS, *MORE_NUMBERS), int)):
        for name in names:
            if not isinstance(attributes.get(name, kind()), kind):
                value = one_line(repr(attributes[name]), 80)
                raise unknown_value(attributes, f"attribute {name} of {path} is {value}")


def _is_storable(text: str) -> bool:
    """Return whether every format can store a text, which may hold bytes that are not UTF-8, but not NUL."""
    try:
        return b"\0" not in text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False


# ------------------------------------------------------------------------------------------------------------- index


def check_shard(stored: StoredShard, path: str) -> None:
    """Refuse an index that was changed, or that cannot exist.

    Raises:
        OutputError: It does not match its digest, or contradicts itself, its recipe or its sources.
    """
    attributes, table = stored.attributes, stored.table
    recipe, sources = check_attributes(attributes, path)
    check_lengths([len(table.status)], len(table), path)
    check_statuses(table.status, path)
    unsigned = {name: value for name, value in attributes.items() if name != "index_digest"}
    if index_digest(table, unsigned) != attributes["index_digest"]:
        raise damaged(path, "its index does not match its digest")
    columns = {name: getattr(table, name) for name in COLUMN_DTYPES}
    check_columns(columns, table.status, recipe, len(sources), path)
    check_keys(table.keys, path)
    _check_prefixes(table.keys, table.source, sources, path)


def check_statuses(status: NDArray[Any], path: str) -> None:
    """Refuse undefined statuses.

    Raises:
        OutputError: They are damaged.
    """
    if int(np.bincount(status, minlength=256)[list(Status)].sum()) != len(status):
        raise OutputError(f"the statuses of {path} are damaged", RESTORE_OR_OVERWRITE)


def check_columns(
    columns: Mapping[str, NDArray[Any]], status: NDArray[Any], recipe: Recipe, sources: int, path: str
) -> None:
    """Refuse columns that no listing of pictures can give with a recipe.

    Args:
        columns: The columns of the table, [n] each.
        status: The statuses, [n] uint8.
        recipe: The recipe of the shard.
        sources: The number of sources.
        path: The shard, for the message.

    Raises:
        OutputError: They contradict each other, the recipe or the sources.
    """
    if not len(status):
        return
    if int(columns["source"].max()) >= sources:
        raise damaged(path, f"an image is from source {int(columns['source'].max())}, but there are {sources}")
    most = recipe.max_tiles if recipe.preprocess is Preprocess.TILES else 1
    grid = columns["columns"].astype(np.uint64) * columns["rows"]
    if int(grid.max()) > most or int(columns["thumbnail"].max()) > 1:
        raise damaged(path, f"an image has more tiles than its recipe allows ({most} and a thumbnail)")
    if int(columns["orientation"].max()) > MOST_ORIENTATION:
        raise damaged(path, f"an image has orientation {int(columns['orientation'].max())}")
    is_done = status == Status.DONE
    if ((grid == 0) & is_done).any():
        raise damaged(path, "an image without tiles is done")
    if (((columns["width"] == 0) | (columns["height"] == 0)) & is_done).any():
        raise damaged(path, "an image without pixels is done")


def check_keys(keys: Sequence[bytes], path: str) -> None:
    """Refuse keys that lead out of their folder, or that cannot be names of files.

    Raises:
        OutputError: A key is empty or absolute, climbs with `..`, holds NUL, or names two images.
    """
    for start in range(0, len(keys), KEY_BLOCK):
        block = keys[start : start + KEY_BLOCK]
        text = b"\0" + b"\0".join(block) + b"\0"  # one search is about ten times as fast as a search per key
        climbs = b".." in text and CLIMBING.search(text) is not None
        if climbs or b"\0\0" in text or b"\0/" in text or text.count(b"\0") > len(block) + 1:
            for key in block:
                if problem := _problem_of(key):
                    raise damaged(path, f"the key {one_line(key, 80)!r} {problem}")
    if len(set(keys)) < len(keys):
        ordered = sorted(keys)
        twice = next(key for key, following in pairwise(ordered) if key == following)
        raise damaged(path, f"two images have the key {one_line(twice, 80)!r}")


def _problem_of(key: bytes) -> str:
    if not key:
        return "is empty"
    if b"\0" in key:
        return "contains NUL"
    if key.startswith(b"/"):
        return "is absolute"
    return "leads out of its folder" if b".." in key.split(b"/") else ""


def _check_prefixes(keys: Sequence[bytes], source: NDArray[Any], sources: Sequence[Source], path: str) -> None:
    """Refuse keys without the name of their source, which is removed to find their files."""
    for number, named in enumerate(sources):
        if not named.prefix:
            continue
        for row in np.flatnonzero(source == number).tolist():
            if not keys[row].startswith(named.prefix):
                name = one_line(os.fsdecode(named.name), 80)
                raise damaged(path, f"the key {one_line(keys[row], 80)!r} does not belong to its source {name!r}")


def check_lengths(lengths: Collection[int], images: int, path: str) -> None:
    """Refuse arrays that do not have one row per image.

    Raises:
        OutputError: At least one differs.
    """
    if any(length != images for length in lengths):
        raise damaged(path, f"its columns do not all have one entry for each of its {images:,} images")


def check_alike(shards: Sequence[tuple[str, Mapping[str, DatasetSpec]]]) -> None:
    """Refuse shards of one output whose rows have different sizes.

    Args:
        shards: The path and datasets of each.

    Raises:
        OutputError: Two of them differ.
    """
    first: dict[str, tuple[str, DatasetSpec]] = {}
    for path, specs in shards:
        for name in crc_order(specs):
            where, spec = first.setdefault(name, (path, specs[name]))
            if (spec.shape[1:], spec.dtype) != (specs[name].shape[1:], specs[name].dtype):
                raise damaged(
                    path, f"a row of {name} has shape {specs[name].shape[1:]}, but in {where} {spec.shape[1:]}"
                )


def damaged(path: str, problem: str) -> OutputError:
    """Return the error for a shard that is not sound."""
    return OutputError(f"{path} is not a sound feature shard: {problem}", RESTORE_OR_OVERWRITE)
