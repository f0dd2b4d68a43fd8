"""Define the contents of a shard in any format: the names, shapes and types of its datasets, and its attributes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import (
    Recipe,
    RecipeError,
    StoreDtype,
    Tokens,
    UnknownRecipeError,
    scales_per_token,
)
from internvit_cli.errors import RESTORE_OR_OVERWRITE, OutputError, UsageError, one_line
from internvit_cli.runtime.untrusted import parse_json
from internvit_cli.runtime.words import listed
from internvit_cli.sources.interface import Source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from internvit_cli.plan.table import ImageTable

FORMAT = "internvit-features"
FORMAT_VERSION = 1
ALIGNMENT = 4096
"""Datasets start at multiples of this many bytes, so that rows can be written with direct or mapped I/O."""
RUN_LOG_BYTES = 65536
SOURCES_BYTES = 32 << 20
"""Maximum size of the JSON that names a shard's sources: some hundred thousand folders."""
TEXT_BYTES = 1 << 16
"""Maximum size of any other attribute."""
ATTRIBUTES_BYTES = SOURCES_BYTES + (1 << 20)
"""Upper bound of the size of all attributes of a shard."""
SHARD_NAME = re.compile(r"shard-(\d{5}|[1-9]\d{5,8})")
SHARD_FILE = re.compile(
    r"(shard-(?:\d{5}|[1-9]\d{5,8}))((\.h5)?(\.partial)?|\.json|\.images\.jsonl"
    r"|\.(?:pooled|tile_pooled|[a-z]+_(?:tokens|scales))(?:_layer_(?:0|[1-9]\d{0,9}))?\.npy)(\.tmp)?"
)
"""Matches only the names of our files: a folder with `shard-00000.tar` is somebody else's."""
NEWER = "install the version of internvit that wrote it, or a newer one"
OUR_MARKS = {"recipe_digest", "index_digest"}
"""Attributes that files of other programs do not have."""

DIGEST = "image/digest"
CRC32 = "image/crc32"
STATUS = "image/status"
RUN_LOG = "run_log"
POOLED = "pooled"
TILE_POOLED = "tile_pooled"
TOKEN_DATASETS = tuple(tokens.dataset for tokens in Tokens if tokens is not Tokens.NONE)
SCALE_DATASETS = tuple(tokens.scales_dataset for tokens in Tokens if tokens is not Tokens.NONE)
FEATURE_DATASETS = (POOLED, *TOKEN_DATASETS, *SCALE_DATASETS, TILE_POOLED)
"""The datasets that can be stored for a layer, in the order of an image's CRC (`crc_order`)."""
MODEL_LAYERS = "model_layers"
"""Attribute of outputs of several layers: the number of the model's blocks, for counting layers from the end."""
PROJECTOR, PROJECTOR_TOWER = "projector", "projector_tower_digest"
"""Attributes of outputs that `internvit project` made: the model of the projector, and the digest of that model's own
tower, empty if the projector came alone."""
OF_LAYER = re.compile(r"(.+)_layer_(0|[1-9]\d{0,9})", re.ASCII)


class ForeignFileError(OutputError):
    """A file at the output that internvit did not create and does not touch."""


class UnrecognizedFileError(ForeignFileError):
    """A file whose bytes do not tell who created it; its name and place may."""


def dataset_of(kind: str, layer: int | None) -> str:
    """Return the name of the dataset with the rows of a layer.

    Args:
        kind: One of `FEATURE_DATASETS`.
        layer: An earlier layer; None is the main one, `Recipe.layer`.

    >>> dataset_of("pooled", None), dataset_of("pooled", 21)
    ('pooled', 'pooled_layer_21')
    """
    return kind if layer is None else f"{kind}_layer_{layer}"


class FeatureName(NamedTuple):
    """The parts of the name of a feature dataset."""

    kind: str
    """One of `FEATURE_DATASETS`."""
    layer: int | None
    """An earlier layer; None is the main one."""

    @classmethod
    def parse(cls, name: str) -> FeatureName | None:
        """Parse a name; return None for a dataset that does not hold features."""
        match = OF_LAYER.fullmatch(name)
        kind, layer = (match[1], int(match[2])) if match else (name, None)
        return cls(kind, layer) if kind in FEATURE_DATASETS else None

    @property
    def is_per_tile(self) -> bool:
        """Whether the dataset has one row per tile; otherwise it has one per image."""
        return self.kind != POOLED

    @property
    def is_tokens(self) -> bool:
        """Whether it holds tokens, in the type that the recipe names."""
        return self.kind in TOKEN_DATASETS


def feature_name(name: str) -> FeatureName:
    """Parse the name of a dataset that is known to hold features."""
    found = FeatureName.parse(name)
    assert found is not None, name
    return found


def is_tokens(name: str) -> bool:
    """Return whether a dataset holds tokens."""
    found = FeatureName.parse(name)
    return found is not None and found.is_tokens


def crc_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return the feature datasets among some names, in the order of an image's CRC.

    The main layer comes first, then each earlier layer in ascending order; within a layer, the order is that of
    `FEATURE_DATASETS`.
    """
    found = {name: known for name in names if (known := FeatureName.parse(name)) is not None}

    def rank(name: str) -> tuple[int, int]:
        kind, layer = found[name]
        return -1 if layer is None else layer, FEATURE_DATASETS.index(kind)

    return tuple(sorted(found, key=rank))


def feature_datasets(stored: Recipe | FeatureShape) -> tuple[str, ...]:
    """Return the names of the feature datasets, in the order of `crc_order`."""
    kinds = [POOLED]
    if stored.tokens is not Tokens.NONE:
        kinds.append(stored.tokens.dataset)
        if stored.store_dtype.is_scaled:
            kinds.append(stored.tokens.scales_dataset)
    if stored.tile_pooled:
        kinds.append(TILE_POOLED)
    return crc_order(dataset_of(kind, layer) for layer in (None, *stored.earlier_layers) for kind in kinds)


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """One dataset of fixed-size rows."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Little-endian numpy dtype."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is one index of the first axis."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole dataset."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True, slots=True)
class FeatureShape:
    """Sizes of the features of one tile and one image, which follow from a recipe and a model."""

    tokens: Tokens
    tokens_per_tile: int
    channels: int
    """Width of one stored token."""
    pooled_width: int
    store_dtype: StoreDtype
    tile_pooled: bool
    earlier_layers: tuple[int, ...] = ()
    """As in the recipe; all layers have rows of the same sizes."""
    values_per_scale: int = 0
    """As in the recipe."""

    def row_datasets(self, images: int, tiles: int) -> tuple[DatasetSpec, ...]:
        """Return the datasets of feature rows, in the order of an image's CRC."""
        return tuple(self._spec(name, images, tiles) for name in feature_datasets(self))

    def _spec(self, name: str, images: int, tiles: int) -> DatasetSpec:
        kind = feature_name(name).kind
        if kind == POOLED:
            return DatasetSpec(name, (images, self.pooled_width), "<f4")
        if kind == TILE_POOLED:
            return DatasetSpec(name, (tiles, self.pooled_width), "<f4")
        if kind in SCALE_DATASETS:
            if not self.values_per_scale:
                return DatasetSpec(name, (tiles, self.tokens_per_tile), "<f4")
            scales = scales_per_token(self.channels, self.values_per_scale)
            return DatasetSpec(name, (tiles, self.tokens_per_tile, scales), "<f2")
        return DatasetSpec(name, (tiles, self.tokens_per_tile, self.channels), self.store_dtype.numpy_name)


@dataclass(frozen=True, slots=True)
class NewShard:
    """Everything that is known about a shard when it is created."""

    table: ImageTable
    features: FeatureShape
    attributes: dict[str, Any]
    """Root attributes except `index_digest`: strings and integers."""

    @property
    def datasets(self) -> tuple[DatasetSpec, ...]:
        """Return every dataset that is filled by writing rows: commit records first, then features."""
        images = len(self.table)
        return (
            DatasetSpec(STATUS, (images,), "|u1"),
            DatasetSpec(DIGEST, (images, 32), "|u1"),
            DatasetSpec(CRC32, (images,), "<u4"),
            DatasetSpec(RUN_LOG, (RUN_LOG_BYTES,), "|u1"),
            *self.features.row_datasets(images, self.table.tiles),
        )

    @property
    def complete_attributes(self) -> dict[str, Any]:
        """Return the attributes, including the digest of the attributes and the table."""
        return self.attributes | {"index_digest": index_digest(self.table, self.attributes)}


@dataclass(frozen=True, slots=True)
class StoredShard:
    """The index of a shard on disk: its table with the current statuses, and its attributes."""

    table: ImageTable
    attributes: dict[str, Any]
    specs: Mapping[str, DatasetSpec]
    """Its datasets by name, including those without rows."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A summary of a shard without its keys; quick to read, and not checked against the index's digest."""

    attributes: dict[str, Any]
    images: int
    status: NDArray[Any]
    """Statuses as in the table, [n] uint8."""
    tiles: int | None
    """None if only the manifest has the number of tiles."""


def check_format(attributes: Mapping[str, Any], path: str) -> None:
    """Refuse files of other programs or of unknown versions, before anything else is read.

    Raises:
        ForeignFileError: It is another program's file.
        OutputError: It has another version.
    """
    if attributes.get("format") != FORMAT:
        if attributes.keys() >= OUR_MARKS:  # a file of ours with a flipped bit is not somebody else's
            raise OutputError(f"{path} is damaged: its format is not {FORMAT!r}", RESTORE_OR_OVERWRITE)
        raise ForeignFileError(
            f"{path} is not an internvit feature file", "choose another output, or move that file away"
        )
    version = attributes.get("format_version")
    if version != FORMAT_VERSION:
        raise OutputError(
            f"{path} has format version {one_line(str(version), 40)}; this program reads version {FORMAT_VERSION}",
            NEWER,
        )


def unknown_value(attributes: Mapping[str, Any], statement: str) -> OutputError:
    """Return the error for a stored value that this version does not know; it names both versions.

    Args:
        attributes: The attributes of the shard, which name the version that wrote it.
        statement: Names the shard, the field and the value.
    """
    from internvit_cli import __version__  # reads package metadata, so it is imported only here

    creator = one_line(str(attributes.get("created_by", "an unnamed program")), 80)
    is_ours = creator.endswith(f" {__version__}")  # then the file is damaged: this version does not write such a value
    message = f"{statement}, which version {__version__} does not know; {creator} wrote it"
    return OutputError(message, RESTORE_OR_OVERWRITE if is_ours else NEWER)


@dataclass(frozen=True, slots=True)
class Extent:
    """The place of a dataset's bytes, for reading and writing rows without HDF5 or numpy in between."""

    path: str
    offset: int
    """Byte offset of row 0."""
    spec: DatasetSpec


def index_digest(table: ImageTable, attributes: dict[str, Any]) -> str:
    """Return the SHA-256 of everything that is fixed when a shard is created, 64 hex digits."""
    hasher = hashlib.sha256()
    hasher.update(json.dumps(attributes, sort_keys=True, separators=(",", ":")).encode())
    table.digest_into(hasher)
    return hasher.hexdigest()


def stored_layer(wanted: int, recipe: Recipe, model_layers: int | None, holder: str) -> int | None:
    """Find the stored layer for a layer number.

    Args:
        wanted: A number of blocks, or a negative number that counts from the end of the model: an index into
            hidden_states, as in `--layer`.
        recipe: The recipe of the stored features.
        model_layers: The number of the model's blocks; None if it is not known.
        holder: The name of the features in the message.

    Returns:
        An earlier layer, or None for the main one.

    Raises:
        UsageError: That layer is not stored, or the number counts from an unknown end.
    """
    layers = recipe.layers
    holds = f"it holds {'layer' if len(layers) == 1 else 'the layers'} {listed(layers)}"
    if wanted < 0 and model_layers is None:
        raise UsageError(
            f"layer {wanted} counts from the end of the model, and {holder} does not record how many layers that has",
            holds,
        )
    layer = wanted + model_layers + 1 if wanted < 0 and model_layers is not None else wanted
    if layer not in layers:
        raise UsageError(f"{holder} holds no layer {wanted}", holds)
    return None if layer == recipe.layer else layer


def parse_run_log(data: bytes) -> list[dict[str, Any]]:
    """Parse a zero-padded log of JSON lines; damaged lines are left out, because nothing depends on them."""
    entries = []
    for line in data.rstrip(b"\0").splitlines():
        with contextlib.suppress(ValueError):
            entries.append(parse_json(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def stored_recipe(attributes: Mapping[str, Any], path: str) -> Recipe:
    """Return the recipe of a shard.

    Raises:
        OutputError: There is none that this version understands.
    """
    if "recipe" not in attributes:
        raise OutputError(f"{path} has no recipe", RESTORE_OR_OVERWRITE)
    try:
        return Recipe.from_json(attributes["recipe"])
    except UnknownRecipeError as error:
        raise unknown_value(attributes, f"the recipe of {path} {one_line(str(error), 120)}") from error
    except RecipeError as error:
        raise OutputError(f"the recipe of {path} {error}", RESTORE_OR_OVERWRITE) from error


def recorded_sources(attributes: Mapping[str, Any], path: str) -> list[Source]:
    """Return the sources of a shard, as they were when it was created.

    Raises:
        OutputError: They are damaged, or cannot be folders of pictures.
    """
    try:
        return [_source(entry) for entry in parse_json(attributes["sources"])]
    except (KeyError, ValueError, TypeError) as error:
        raise OutputError(f"the sources of {path} are damaged: {one_line(str(error))}", RESTORE_OR_OVERWRITE) from error


def _source(entry: dict[str, Any]) -> Source:
    is_archive = entry.get("archive", False) is True
    source = Source(root=os.fsencode(entry["root"]), name=os.fsencode(entry["name"]), is_archive=is_archive)
    if not source.root.startswith(b"/") or b"\0" in source.root:
        raise ValueError(f"{one_line(source.root, 80)!r} is not the path of a folder")
    parts = source.name.split(b"/") if is_archive else [source.name]
    if b"\0" in source.name or (len(parts) > 1 and b"" in parts) or any(part in (b".", b"..") for part in parts):
        raise ValueError(f"{one_line(source.name, 80)!r} is not the name of a source")
    if b"/" in source.name and not is_archive:
        raise ValueError(f"{one_line(source.name, 80)!r} is not the name of a source")
    return source


def decode_values(stored: NDArray[Any], dtype: StoreDtype, scales: NDArray[Any] | None = None) -> NDArray[Any]:
    """Convert stored token values for numpy: bfloat16, int8 and fp8 become float32; others stay as they are.

    Args:
        stored: Values [...,C].
        dtype: The stored type.
        scales: Scales for the types that have them: [...] float32, or several per token, [...,s] float16, of which
            value i of a token has scale i % s.
    """
    if scales is not None:
        values = _e4m3_values()[stored] if dtype is StoreDtype.FP8 else stored.astype(np.float32)
        return _scaled(values, scales if scales.ndim == stored.ndim else scales[..., None])
    if dtype is not StoreDtype.BFLOAT16:
        return stored
    widened: NDArray[Any] = (stored.astype(np.uint32) << 16).view(np.float32)
    return widened


def _scaled(values: NDArray[Any], scales: NDArray[Any]) -> NDArray[Any]:
    """Multiply values [...,C] float32 in place by their scales [...,s]."""
    size, count = values.shape[-1], scales.shape[-1]
    if size % count:  # the last values of a token do not reach all scales
        scales, count = scales[..., np.arange(size) % count], size
    rows = values.reshape(*values.shape[:-1], size // count, count)
    np.multiply(rows, scales.astype(np.float32)[..., None, :], out=rows)
    return values


@cache
def _e4m3_values() -> NDArray[Any]:
    """Return the values of the 256 codes of float8 e4m3: sign, 4 bits of exponent, 3 of mantissa, no infinities."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)
