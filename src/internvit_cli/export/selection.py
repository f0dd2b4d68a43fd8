"""Select the rows of one or more outputs for a new one, with the facts about them and their places."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Recipe, Status, Tokens
from internvit_cli.errors import OutputError
from internvit_cli.extract.changes import ROW_BITS, sources_to_json
from internvit_cli.model.accuracy import COMPUTE_ERROR, STORE_ERROR, is_measured, measured_attributes
from internvit_cli.options import named_path
from internvit_cli.plan.table import ImageTable, concatenate
from internvit_cli.storage.format.layout import (
    MODEL_LAYERS,
    POOLED,
    DatasetSpec,
    FeatureShape,
    dataset_of,
    feature_name,
    stored_layer,
    stored_recipe,
)
from internvit_cli.storage.format.soundness import check_alike
from internvit_cli.storage.output import FinishedShard, Output
from internvit_cli.storage.output_names import PARTIAL
from internvit_cli.storage.read.reader import OpenShard, find_shards
from internvit_cli.storage.read.wanted_keys import find_wanted, unknown_key
from internvit_cli.storage.skipped import read_skip_log

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.sources.interface import Source


ATTRIBUTE_ORDER = (
    "format",
    "format_version",
    "recipe",
    "recipe_digest",
    "sources",
    "created_by",
    "model",
    "model_revision",
    "weights_digest",
    "batch_tiles",
    "pooled_from",
    MODEL_LAYERS,
)
"""The order of attributes in new shards; HDF5 returns them sorted by name, but bytes depend on their order."""


@dataclass(frozen=True)
class StoredOutput:
    """The shards of an output, including the unfinished one of a folder, and its list of skipped images."""

    path: str
    found: tuple[FinishedShard, ...]
    skips: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, path: str) -> StoredOutput:
        """Read the indexes of the output at a path.

        Raises:
            OutputError: There is no output, or it is damaged, or a newer version wrote it.
        """
        name = named_path(path)
        output = Output(name.removesuffix(PARTIAL))
        found = _folder_shards(output) if os.path.isdir(name) else []
        return cls(name, tuple(found or find_shards(name)), tuple(read_skip_log(output.skipped_path)))

    @cached_property
    def shards(self) -> list[OpenShard]:
        """The shards, open for reading, oldest first."""
        return [OpenShard(shard) for shard in self.found]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the rows.

        Raises:
            OutputError: This version does not understand the recipe, or the shards have several.
        """
        recipes = {stored_recipe(shard.attributes, shard.path) for shard in self.shards}
        if len(recipes) > 1:
            raise OutputError(f"the shards of {self.path} have several recipes", f"internvit verify {self.path}")
        return recipes.pop()

    @property
    def pending_keys(self) -> set[bytes]:
        """Return the keys of images that are not encoded yet."""
        return {
            shard.table.keys[row]
            for shard in self.shards
            for row in np.flatnonzero(shard.table.status == Status.PENDING).tolist()
        }

    def live_places(self) -> dict[bytes, int]:
        """Return the place of the committed row that counts for each key: shard index and row as one integer."""
        places: dict[bytes, int] = {}
        for number, shard in enumerate(self.shards):
            rows, keys = shard.live_rows, shard.table.keys
            for row in rows[shard.table.status[rows] != Status.PENDING].tolist():
                places[keys[row]] = number << ROW_BITS | row
        return places


@dataclass(frozen=True, eq=False)
class RowSelection:
    """Rows of several shards as one table, in an order that reads each shard from front to back."""

    found: tuple[FinishedShard, ...]
    shard_of: NDArray[Any]
    """The index of each image's shard, [n] int64."""
    row_of: NDArray[Any]
    """The row of each image in its shard, [n] int64."""
    table: ImageTable
    """The images with their statuses; the column `source` refers to `sources`."""
    sources: Sequence[Source]
    recipe: Recipe
    shape: FeatureShape
    skips: tuple[dict[str, Any], ...]
    """Lines of the lists of skipped images for these images, and for folders that could not be read."""
    pending: int
    """The number of images that are left out because they are not encoded in any output yet."""
    drops_tokens: bool = False
    """Whether tokens are not written."""
    kept_layers: tuple[int, ...] | None = None
    """The stored layers that are written, ascending; None means all."""

    @property
    def written(self) -> FeatureShape:
        """The sizes of what is written to a feature file."""
        recipe = self.written_recipe
        return replace(self.shape, tokens=recipe.tokens, earlier_layers=recipe.earlier_layers)

    @property
    def written_recipe(self) -> Recipe:
        """The recipe of what is written, which has the deepest layer even if its rows are not written."""
        earlier = tuple(layer for layer in self.recipe.earlier_layers if self._is_kept(layer))
        recipe = replace(self.recipe, earlier_layers=earlier)
        if not self.drops_tokens:
            return recipe
        return replace(recipe, tokens=Tokens.NONE, projector_digest="", projected_from=None, values_per_scale=0)

    @property
    def keeps_deepest(self) -> bool:
        """Whether the deepest layer is written, which a feature file needs."""
        return self._is_kept(self.recipe.layer)

    @property
    def is_whole(self) -> bool:
        """Whether all datasets of an image are written, so that its CRC stays the same."""
        return self.keeps_deepest and self.written == self.shape

    def written_datasets(self, images: int = 1, tiles: int = 1) -> tuple[DatasetSpec, ...]:
        """Return the datasets that are written, with the given numbers of rows, in the order of an image's CRC."""
        specs = self.written.row_datasets(images, tiles)
        return tuple(spec for spec in specs if self.keeps_deepest or feature_name(spec.name).layer is not None)

    def _is_kept(self, layer: int) -> bool:
        return self.kept_layers is None or layer in self.kept_layers

    def dataset(self, kind: str, layer: int) -> str:
        """Return the name of the dataset with the rows of a stored layer, such as `pooled_layer_21`."""
        return dataset_of(kind, None if layer == self.recipe.layer else layer)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def shards(self) -> list[OpenShard]:
        """The shards, open for reading."""
        return [OpenShard(shard) for shard in self.found]

    @property
    def is_done(self) -> NDArray[Any]:
        """Whether each image has features, [n] bool."""
        done: NDArray[Any] = self.table.status == Status.DONE
        return done

    @cached_property
    def digests(self) -> NDArray[Any]:
        """The SHA-256 of each picture's file, [n, 32] uint8; zeros if there is none."""
        return self._gathered([shard.digests for shard in self.shards])

    @cached_property
    def checksums(self) -> NDArray[Any]:
        """The CRC-32 of each image's rows, [n] uint32."""
        return self._gathered([shard.checksums for shard in self.shards])

    def _gathered(self, columns: list[NDArray[Any]]) -> NDArray[Any]:
        values = np.zeros((len(self), *columns[0].shape[1:]), columns[0].dtype)
        for number, column in enumerate(columns):
            is_here = self.shard_of == number
            values[is_here] = column[self.row_of[is_here]]
        return values

    def attributes(self, position: int = 0) -> dict[str, Any]:
        """Return the root attributes for a shard whose first image is at a position, without `index_digest`."""
        attributes = dict(self.shards[int(self.shard_of[position])].attributes)
        attributes.pop("index_digest", None)
        recipe = self.written_recipe
        if recipe != self.recipe:
            attributes |= {"recipe": recipe.to_json(), "recipe_digest": recipe.digest}
        if not recipe.earlier_layers:
            attributes.pop(MODEL_LAYERS, None)
        due = measured_attributes(recipe)
        for name in (COMPUTE_ERROR, STORE_ERROR):
            figures = attributes.pop(name, None)
            if figures is not None and name in due:
                attributes[name] = self._measured(name, figures)
        attributes["sources"] = sources_to_json(self.sources)
        return {name: attributes.pop(name) for name in ATTRIBUTE_ORDER if name in attributes} | attributes

    def _measured(self, name: str, own: str) -> str:
        """Return a shard's own accuracy, or the first of another shard if it had no tile to measure."""
        others = [shard.attributes[name] for shard in self.shards if name in shard.attributes]
        return next((figures for figures in (own, *others) if is_measured(figures)), own)

    @cached_property
    def messages(self) -> dict[str, str]:
        """The exception and message of skipped images by key."""
        return {entry["key"]: _message(entry) for entry in self.skips}

    def positions_of(self, words: Iterable[str], keys: Iterable[str], path: str) -> NDArray[Any]:
        """Return the positions of images, sorted, [k] int64.

        Args:
            words: Keys and patterns of keys.
            keys: Literal keys.
            path: The output, for messages.

        Raises:
            UnknownKeyError: There is no such image; the hint names similar keys.
        """
        places = {key: position for position, key in enumerate(self.table.keys)}
        found = set(find_wanted(words, self.table.keys, places.get, path))
        for key in keys:
            position = places.get(os.fsencode(key))
            if position is None:
                raise unknown_key(key, self.table.keys, path)
            found.add(position)
        return np.array(sorted(found), np.int64)

    def without_tokens(self) -> RowSelection:
        """Return the same images with only their vectors written."""
        return replace(self, drops_tokens=True)

    def with_layers(self, wanted: Iterable[int], path: str) -> RowSelection:
        """Return the same images with only some of the stored layers written.

        Args:
            wanted: Numbers of blocks, or negative numbers, which count from the end of the model.
            path: The output, for messages.

        Raises:
            UsageError: A layer is not stored.
        """
        model_layers = self.shards[-1].model_layers
        found = {stored_layer(layer, self.recipe, model_layers, path) for layer in wanted}
        kept = sorted(self.recipe.layer if layer is None else layer for layer in found)
        return replace(self, kept_layers=tuple(kept))

    def take(self, positions: NDArray[Any]) -> RowSelection:
        """Return some of the images."""
        table = self.table.take(positions)
        kept = {os.fsdecode(key) for key in table.keys}
        skips = tuple(entry for entry in self.skips if entry["key"] in kept)
        return replace(self, shard_of=self.shard_of[positions], row_of=self.row_of[positions], table=table, skips=skips)


def _folder_shards(output: Output) -> list[FinishedShard]:
    """Return a folder's finished shards, followed by the unfinished one unless it has another recipe."""
    shards, unfinished = output.finished(), output.partial()
    if unfinished is None:
        return shards
    recipes = [stored_recipe(shard.stored.attributes, shard.path) for shard in (*shards, unfinished)]
    return [*shards, unfinished] if recipes[-1] == recipes[0] else shards


def select_rows(outputs: Sequence[StoredOutput], places: Sequence[int]) -> RowSelection:
    """Return some rows of one or more outputs of one recipe.

    Args:
        outputs: The outputs, whose shards are numbered one output after the other.
        places: Shard index and row of each image, from `live_places`.

    Raises:
        OutputError: There are no rows, or a shard is damaged.
    """
    if not places:
        raise OutputError(f"{outputs[0].path} holds no finished image yet", "let internvit extract finish first")
    ordered = np.sort(np.array(places, np.int64))
    shard_of, row_of = ordered >> ROW_BITS, ordered & ((1 << ROW_BITS) - 1)
    shards = [shard for output in outputs for shard in output.shards]
    sources: list[Source] = []
    tables = []
    for number in np.unique(shard_of).tolist():
        table = shards[number].table.take(row_of[shard_of == number])
        tables.append(table.with_sources(_renumbered(shards[number], sources)[table.source]))
    whole = concatenate(tables)
    output_of = np.repeat(np.arange(len(outputs)), [len(output.found) for output in outputs])[shard_of]
    return RowSelection(
        found=tuple(shard for output in outputs for shard in output.found),
        shard_of=shard_of,
        row_of=row_of,
        table=whole,
        sources=sources,
        recipe=outputs[-1].recipe,
        shape=stored_shape(shards, outputs[-1].recipe),
        skips=_kept_skips(outputs, whole, output_of),
        pending=len(set().union(*(output.pending_keys for output in outputs)).difference(whole.keys)),
    )


def select_all_rows(path: str) -> RowSelection:
    """Return all committed rows of an output that count.

    Raises:
        OutputError: There is no output, or it is damaged.
    """
    output = StoredOutput.open(path)
    return select_rows([output], list(output.live_places().values()))


def stored_shape(shards: Sequence[OpenShard], recipe: Recipe) -> FeatureShape:
    """Return the sizes of features in shards of a recipe, from the datasets themselves.

    Raises:
        OutputError: Two shards have rows of different sizes.
    """
    check_alike([(shard.path, shard.specs) for shard in shards])
    tokens, specs = recipe.tokens, shards[0].specs
    per_tile, channels = (1, 1) if tokens is Tokens.NONE else specs[tokens.dataset].shape[1:]
    return FeatureShape(
        tokens=tokens,
        tokens_per_tile=per_tile,
        channels=channels,
        pooled_width=specs[POOLED].shape[1],
        store_dtype=recipe.store_dtype,
        tile_pooled=recipe.tile_pooled,
        earlier_layers=recipe.earlier_layers,
        values_per_scale=recipe.values_per_scale,
    )


def _renumbered(shard: OpenShard, sources: list[Source]) -> NDArray[Any]:
    """Return the indices of a shard's sources among all sources, [k], and add new ones to those."""
    numbers = []
    for source in shard.sources:
        if source not in sources:
            sources.append(source)
        numbers.append(sources.index(source))
    return np.array(numbers or [0], np.uint32)


def _kept_skips(
    outputs: Sequence[StoredOutput], table: ImageTable, output_of: NDArray[Any]
) -> tuple[dict[str, Any], ...]:
    """Return one line per skipped image of the table, and one per folder that could not be read.

    Args:
        outputs: The outputs, whose lists are read.
        table: The images.
        output_of: The index of the output of each image's row, [n] int64. The reason comes from its list, because
            another
            output may have skipped the same image for another reason.
    """
    latest = [{os.fsencode(entry["key"]): entry for entry in output.skips} for output in outputs]
    listed = set().union(*latest)
    with_rows = {key for output in outputs for shard in output.shards for key in listed.intersection(shard.table.keys)}
    owners = {table.keys[row]: int(output_of[row]) for row in np.flatnonzero(table.status > Status.DONE).tolist()}
    kept: dict[bytes, dict[str, Any]] = {}
    for number, entries in enumerate(latest):
        kept |= {key: entry for key, entry in entries.items() if key not in with_rows or owners.get(key) == number}
    return tuple(kept.values())


def _message(entry: dict[str, Any]) -> str:
    parts = (str(entry.get("exception") or ""), str(entry.get("message") or ""))
    return ": ".join(part for part in parts if part)
