"""What a shard holds, whatever its format: datasets with names, shapes and types, and the attributes beside them."""

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

from internvit_cli.config import Recipe, RecipeError, StoreDtype, Tokens, UnknownRecipeError
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
"""Of the JSON that names a shard's sources, at most: some hundred thousand folders."""
TEXT_BYTES = 1 << 16
"""Of any other attribute, at most."""
ATTRIBUTES_BYTES = SOURCES_BYTES + (1 << 20)
"""More than all attributes of a shard take."""
SHARD_NAME = re.compile(r"shard-(\d{5}|[1-9]\d{5,8})")
SHARD_FILE = re.compile(
    r"(shard-(?:\d{5}|[1-9]\d{5,8}))((\.h5)?(\.partial)?|\.json|\.images\.jsonl"
    r"|\.(?:pooled|tile_pooled|[a-z]+_(?:tokens|scales))(?:_layer_(?:0|[1-9]\d{0,9}))?\.npy)(\.tmp)?"
)
"""The names of our files in a folder and no others: a folder of `shard-00000.tar` is somebody else's."""
NEWER = "install the version of internvit that wrote it, or a newer one"
OUR_MARKS = {"recipe_digest", "index_digest"}
"""Attributes that no other program's file has."""

DIGEST = "image/digest"
CRC32 = "image/crc32"
STATUS = "image/status"
RUN_LOG = "run_log"
POOLED = "pooled"
TILE_POOLED = "tile_pooled"
TOKEN_DATASETS = tuple(tokens.dataset for tokens in Tokens if tokens is not Tokens.NONE)
SCALE_DATASETS = tuple(tokens.scales_dataset for tokens in Tokens if tokens is not Tokens.NONE)
FEATURE_DATASETS = (POOLED, *TOKEN_DATASETS, *SCALE_DATASETS, TILE_POOLED)
"""What can be stored of a layer, in the order in which an image's CRC goes over it (`crc_order`)."""
MODEL_LAYERS = "model_layers"
"""Attribute of outputs of several layers: how many blocks the model has, so that a layer can be counted from its end.
"""
OF_LAYER = re.compile(r"(.+)_layer_(0|[1-9]\d{0,9})", re.ASCII)


class ForeignFileError(OutputError):
    """A file at the output that internvit did not make, and so does not touch."""


class UnrecognizedFileError(ForeignFileError):
    """A file whose bytes say nothing of who made it; its name and its place may."""


def dataset_of(kind: str, layer: int | None) -> str:
    """Return the name of the dataset with the rows of a layer.

    Args:
        kind: one of `FEATURE_DATASETS`.
        layer: an earlier layer; None is the main one, `Recipe.layer`.

    >>> dataset_of("pooled", None), dataset_of("pooled", 21)
    ('pooled', 'pooled_layer_21')
    """
    return kind if layer is None else f"{kind}_layer_{layer}"


class FeatureName(NamedTuple):
    """What the name of a dataset of features says."""

    kind: str
    """One of `FEATURE_DATASETS`."""
    layer: int | None
    """An earlier layer; None is the main one."""

    @classmethod
    def parse(cls, name: str) -> FeatureName | None:
        """Read a name; None for a dataset that holds no features."""
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
    """Read the name of a dataset that is known to hold features."""
    found = FeatureName.parse(name)
    assert found is not None, name
    return found


def is_tokens(name: str) -> bool:
    """Return whether a dataset holds tokens."""
    found = FeatureName.parse(name)
    return found is not None and found.is_tokens


def crc_order(names: Iterable[str]) -> tuple[str, ...]:
    """Those of some datasets that hold features, in the order in which an image's CRC goes over them.

    That is first the main layer's, then those of each earlier layer, ascending; of a layer in the order of
    `FEATURE_DATASETS`.
    """
    found = {name: known for name in names if (known := FeatureName.parse(name)) is not None}

    def rank(name: str) -> tuple[int, int]:
        kind, layer = found[name]
        return -1 if layer is None else layer, FEATURE_DATASETS.index(kind)

    return tuple(sorted(found, key=rank))


def feature_datasets(stored: Recipe | FeatureShape) -> tuple[str, ...]:
    """The names of the datasets of features, in the order of `crc_order`."""
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
    """Little-endian numpy type."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, that is of one index of the first axis."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the whole dataset."""
        return self.shape[0] * self.row_bytes


@dataclass(frozen=True, slots=True)
class FeatureShape:
    """Sizes of the features of one tile and one image, as a recipe and a model give them."""

    tokens: Tokens
    tokens_per_tile: int
    channels: int
    """Width of one stored token."""
    pooled_width: int
    store_dtype: StoreDtype
    tile_pooled: bool
    earlier_layers: tuple[int, ...] = ()
    """As in the recipe; all layers have rows of the same sizes."""

    def row_datasets(self, images: int, tiles: int) -> tuple[DatasetSpec, ...]:
        """The datasets of feature rows, in the order in which an image's CRC goes over them."""
        return tuple(self._spec(name, images, tiles) for name in feature_datasets(self))

    def _spec(self, name: str, images: int, tiles: int) -> DatasetSpec:
        kind = feature_name(name).kind
        if kind == POOLED:
            return DatasetSpec(name, (images, self.pooled_width), "<f4")
        if kind == TILE_POOLED:
            return DatasetSpec(name, (tiles, self.pooled_width), "<f4")
        if kind in SCALE_DATASETS:
            return DatasetSpec(name, (tiles, self.tokens_per_tile), "<f4")
        return DatasetSpec(name, (tiles, self.tokens_per_tile, self.channels), self.store_dtype.numpy_name)


@dataclass(frozen=True, slots=True)
class NewShard:
    """All that is known of a shard when it is created."""

    table: ImageTable
    features: FeatureShape
    attributes: dict[str, Any]
    """Root attributes but for `index_digest`: strings and integers."""

    @property
    def datasets(self) -> tuple[DatasetSpec, ...]:
        """Every dataset that is filled by writing rows: commit records first, then features."""
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
        """The attributes with the digest that vouches for them and for the table."""
        return self.attributes | {"index_digest": index_digest(self.table, self.attributes)}


@dataclass(frozen=True, slots=True)
class StoredShard:
    """The index of a shard on disk: its table with the statuses as they stand, and its attributes."""

    table: ImageTable
    attributes: dict[str, Any]
    specs: Mapping[str, DatasetSpec]
    """Its datasets by name, those without rows too."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What a shard says of itself but for its keys: read in a moment, and not vouched for by the index's digest."""

    attributes: dict[str, Any]
    images: int
    status: NDArray[Any]
    """As in the table, [n] uint8."""
    tiles: int | None
    """None where only the manifest has their sum."""


def check_format(attributes: Mapping[str, Any], path: str) -> None:
    """Refuse what is none of ours, or of a version that we do not know; before anything else of it is looked at.

    Raises:
        ForeignFileError: another program's file.
        OutputError: another version.
    """
    if attributes.get("format") != FORMAT:
        if attributes.keys() >= OUR_MARKS:  # one flipped bit does not make a file somebody else's
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
    """Return the error of a stored value that this version does not know, with both versions.

    Args:
        attributes: of the shard; they tell which version wrote it.
        statement: names the shard, the field and the value.
    """
    from internvit_cli import __version__  # package metadata, read only to say this

    creator = one_line(str(attributes.get("created_by", "an unnamed program")), 80)
    is_ours = creator.endswith(f" {__version__}")  # then it is damage: this version writes no such value
    message = f"{statement}, which version {__version__} does not know; {creator} wrote it"
    return OutputError(message, RESTORE_OR_OVERWRITE if is_ours else NEWER)


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a dataset's bytes lie: what a row is written to and read from, without HDF5 or numpy in between."""

    path: str
    offset: int
    """Byte offset of row 0."""
    spec: DatasetSpec


def index_digest(table: ImageTable, attributes: dict[str, Any]) -> str:
    """SHA-256 over all that is fixed when a shard is created, 64 hex digits."""
    hasher = hashlib.sha256()
    hasher.update(json.dumps(attributes, sort_keys=True, separators=(",", ":")).encode())
    table.digest_into(hasher)
    return hasher.hexdigest()


def stored_layer(wanted: int, recipe: Recipe, model_layers: int | None, holder: str) -> int | None:
    """Find the stored layer that a number means.

    Args:
        wanted: a number of blocks, or a negative one, which counts from the end of the model: an index into
            hidden_states, as `--layer` takes it.
        recipe: what is stored.
        model_layers: how many blocks the model has; None where that is not known.
        holder: what the message calls the features.

    Returns:
        An earlier layer, or None for the main one.

    Raises:
        UsageError: that layer is not stored, or nobody knows which it is.
    """
    layers = recipe.layers
    holds = f"it holds {'layer' if len(layers) == 1 else 'the layers'} {listed(layers)}"
    if wanted < 0 and model_layers is None:
        raise UsageError(
            f"layer {wanted} counts from the end of the model, and {holder} does not record how long that is", holds
        )
    layer = wanted + model_layers + 1 if wanted < 0 and model_layers is not None else wanted
    if layer not in layers:
        raise UsageError(f"{holder} holds no layer {wanted}", holds)
    return None if layer == recipe.layer else layer


def parse_run_log(data: bytes) -> list[dict[str, Any]]:
    """The entries of a zero-padded log of JSON lines; what is damaged is left out, for it decides nothing."""
    entries = []
    for line in data.rstrip(b"\0").splitlines():
        with contextlib.suppress(ValueError):
            entries.append(parse_json(line))
    return [entry for entry in entries if isinstance(entry, dict)]


def stored_recipe(attributes: Mapping[str, Any], path: str) -> Recipe:
    """The recipe that a shard was made with.

    Raises:
        OutputError: there is none that this version understands.
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
    """The sources that a shard's table counts, as they were when it was made.

    Raises:
        OutputError: they are damaged, or are no folders that pictures can have come from.
    """
    try:
        return [_source(entry) for entry in parse_json(attributes["sources"])]
    except (KeyError, ValueError, TypeError) as error:
        raise OutputError(f"the sources of {path} are damaged: {one_line(str(error))}", RESTORE_OR_OVERWRITE) from error


def _source(entry: dict[str, Any]) -> Source:
    source = Source(root=os.fsencode(entry["root"]), name=os.fsencode(entry["name"]))
    if not source.root.startswith(b"/") or b"\0" in source.root:
        raise ValueError(f"{one_line(source.root, 80)!r} is not the path of a folder")
    if b"/" in source.name or b"\0" in source.name or source.name in (b".", b".."):
        raise ValueError(f"{one_line(source.name, 80)!r} is not the name of a source")
    return source


def decode_values(stored: NDArray[Any], dtype: StoreDtype, scales: NDArray[Any] | None = None) -> NDArray[Any]:
    """Stored token values as numpy has them: bfloat16, int8 and fp8 become float32; others stay as they are.

    Args:
        stored: [...,C].
        dtype: the stored type.
        scales: [...] float32, of the types that have them.
    """
    if scales is not None:
        values = _e4m3_values()[stored] if dtype is StoreDtype.FP8 else stored.astype(np.float32)
        scaled: NDArray[Any] = np.multiply(values, scales[..., None], out=values)
        return scaled
    if dtype is not StoreDtype.BFLOAT16:
        return stored
    widened: NDArray[Any] = (stored.astype(np.uint32) << 16).view(np.float32)
    return widened


@cache
def _e4m3_values() -> NDArray[Any]:
    """The numbers behind the 256 codes of float8 e4m3: sign, 4 bits of exponent, 3 of mantissa, no infinities."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    magnitude = np.where(exponent, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    magnitude[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)
