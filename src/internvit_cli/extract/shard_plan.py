"""Assign planned images to the shards that will hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli import __version__
from internvit_cli.config import Recipe, Status
from internvit_cli.errors import UsageError
from internvit_cli.extract.changes import sources_to_json, stored_sources
from internvit_cli.model.accuracy import Accuracy, to_attributes
from internvit_cli.options import DEFAULT_SHARD_BYTES
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable, concatenate
from internvit_cli.storage.format.layout import (
    FORMAT,
    FORMAT_VERSION,
    MODEL_LAYERS,
    FeatureShape,
    NewShard,
    feature_name,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from internvit_cli.extract.changes import Relocation
    from internvit_cli.model.card import ModelCard
    from internvit_cli.sources import Source
    from internvit_cli.storage.format.interface import ShardFormat
    from internvit_cli.storage.output import FinishedShard

CREATED_BY = f"internvit-cli {__version__}"
EMPTY_TABLE = ImageTable.build([], np.zeros(0, np.uint8), {name: np.zeros(0, np.int64) for name in COLUMN_DTYPES})


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard to create."""

    table: ImageTable
    sources: Sequence[Source]
    """The sources to which the table's `source` column refers."""
    kept: int = 0
    """The number of its first rows that a finished shard already has."""

    @property
    def to_encode(self) -> NDArray[Any]:
        """The rows whose images no shard has yet, [k] int64."""
        return self.kept + np.flatnonzero(self.table.status[self.kept :] == Status.PENDING)


@dataclass(frozen=True, slots=True)
class ShardPlanRules:
    """How images are assigned to shards."""

    size: ShardSize | None
    """The size of a folder's shards; None means a single file, which is rewritten when it changes."""
    sources: Sequence[Source]
    """The sources of the added images."""
    relocations: Sequence[Relocation]


def plan_shards(
    finished: Sequence[FinishedShard], gone: Collection[bytes], added: ImageTable, rules: ShardPlanRules
) -> list[ShardPlan]:
    """Return the shards to create: additional ones in a folder, or a new single file with the existing rows.

    A shard whose pictures moved is rewritten too, because it names their source.

    Args:
        finished: The existing shards.
        gone: Keys whose rows in them no longer count.
        added: The images to encode.
        rules: How images are assigned to shards.
    """
    if rules.size is None and finished:
        if not len(added) and not gone and not is_moved(finished, rules.relocations):
            return []
        return [merge_rows(finished[0], gone, added, rules.sources, rules.relocations)]
    moved = [shard for shard in finished if is_moved([shard], rules.relocations)]
    shard_plans = [merge_rows(shard, gone, EMPTY_TABLE, (), rules.relocations) for shard in moved]
    if not len(added):
        return shard_plans
    tables = [added] if rules.size is None else rules.size.split(added)
    return [*shard_plans, *(ShardPlan(table, rules.sources) for table in tables)]


def is_moved(shards: Sequence[FinishedShard], relocations: Sequence[Relocation]) -> bool:
    """Return whether shards name a source that has moved since."""
    return bool(relocations) and any(
        stored_sources(shard.stored.attributes, shard.path)
        != stored_sources(shard.stored.attributes, shard.path, relocations)
        for shard in shards
        if len(shard.superseded_keys) < len(shard.stored.table)
    )


@dataclass(frozen=True, slots=True)
class ShardSize:
    """The largest size of a folder's shards, which includes rows, index and all fixed parts."""

    most: int
    fixed: int
    """Bytes of a shard without images."""
    shape: FeatureShape
    backend: ShardFormat

    @classmethod
    def of(cls, most: int | None, backend: ShardFormat, shape: FeatureShape, attributes: dict[str, Any]) -> ShardSize:
        """Return the limit for shards with these attributes; None means `DEFAULT_SHARD_BYTES`.

        Raises:
            UsageError: A shard without images is already larger.
        """
        most = DEFAULT_SHARD_BYTES if most is None else most
        # Every dataset gets its space with the first tile.
        table = ImageTable.build([b""], np.zeros(1, np.uint8), {name: np.ones(1, np.int64) for name in COLUMN_DTYPES})
        rows = sum(spec.nbytes for spec in shape.row_datasets(len(table), table.tiles))
        fixed = backend.planned_bytes(NewShard(table, shape, attributes)) - rows + backend.LOG_BYTES
        if most < fixed:
            raise UsageError(
                f"--shard-size: {most:,} bytes are too few, for {fixed:,} of each shard are no image's",
                f"give {fixed:,} or more; with a few megabytes that part hardly matters",
            )
        return cls(most, fixed, shape, backend)

    def split(self, table: ImageTable) -> Iterator[ImageTable]:
        """Split a table into shards; an image never spans two, and a shard above the limit holds only one image.

        The result depends only on the images, so that a continued run creates the same shards.
        """
        specs = self.shape.row_datasets(1, 1)
        per_tile = sum(spec.row_bytes for spec in specs if feature_name(spec.name).is_per_tile)
        per_image = sum(spec.row_bytes for spec in specs) - per_tile
        sizes = per_image + self.backend.index_bytes(table) + table.tile_counts.astype(np.int64) * per_tile
        start, filled = 0, self.fixed
        for row, size in enumerate(sizes.tolist()):
            if row > start and filled + size > self.most:
                yield table.take(np.arange(start, row))
                start, filled = row, self.fixed
            filled += size
        yield table.take(np.arange(start, len(table)))


def merge_rows(
    old: FinishedShard,
    dropped: Collection[bytes],
    added: ImageTable,
    sources: Sequence[Source],
    relocations: Sequence[Relocation] = (),
) -> ShardPlan:
    """Return a shard that replaces another: its rows without the dropped ones, followed by the added ones.

    Done rows become pending, and are copied once the new shard exists.
    """
    table = old.stored.table
    kept = table.take(table.rows_without(old.superseded_keys.union(dropped)))
    kept = kept.with_status(np.where(kept.status == Status.DONE, Status.PENDING, kept.status).astype(np.uint8))
    merged = stored_sources(old.stored.attributes, old.path, relocations)
    numbers = []
    for source in sources:
        if source not in merged:
            merged.append(source)
        numbers.append(merged.index(source))
    renumbered = np.array(numbers, np.uint32)[added.source] if len(added) else added.source
    return ShardPlan(concatenate([kept, added.with_sources(renumbered)]), merged, len(kept))


@dataclass(frozen=True, slots=True)
class RunMeasurements:
    """Facts about a run for a shard's attributes, which are known once its encoder is loaded."""

    batch_tiles: int = 0
    """The batch size that a later run has to use for the same bits."""
    accuracy: Mapping[str, str] | None = None
    """The accuracy, from `to_attributes`."""


def new_shard(
    shard_plan: ShardPlan, shape: FeatureShape, recipe: Recipe, card: ModelCard, measured: RunMeasurements | None = None
) -> NewShard:
    """Return the description of a new shard; before anything is measured, with placeholders of the same size."""
    measured = measured or RunMeasurements()
    accuracy = to_attributes(recipe, Accuracy()) if measured.accuracy is None else measured.accuracy
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.to_json(),
        "recipe_digest": recipe.digest,
        "sources": sources_to_json(shard_plan.sources),
        "created_by": CREATED_BY,
        "model": card.recorded_name,
        "model_revision": card.revision or "",
        "weights_digest": recipe.weights_digest,
        "batch_tiles": measured.batch_tiles,
        "pooled_from": "global_view" if recipe.thumbnail or recipe.max_tiles == 1 else "tiles",
        **({MODEL_LAYERS: card.vision.num_layers} if recipe.earlier_layers else {}),
        **accuracy,
    }
    return NewShard(shard_plan.table, shape, attributes)
