"""Plan what a run will do from the sources, the output and the headers, before anything is encoded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status
from internvit_cli.extract.changes import Relocation, StoredImages, prunable
from internvit_cli.extract.engine import Workload
from internvit_cli.extract.resume import load_existing, shards_to_continue
from internvit_cli.extract.shard_plan import EMPTY_TABLE, RunMeasurements, ShardPlan, ShardSize, is_moved, new_shard
from internvit_cli.plan.scan import PlanOptions, plan_images
from internvit_cli.recipes import feature_shape, pixel_rule
from internvit_cli.runtime.workers import usable_cpus
from internvit_cli.sources.find_images import require_images
from internvit_cli.storage.skipped import SkipLog, read_skip_log

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.config import PixelRule
    from internvit_cli.extract.changes import Changes
    from internvit_cli.extract.resume import Existing
    from internvit_cli.options import ExtractOptions
    from internvit_cli.plan.scan import Plan
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.recipes import ModelInUse
    from internvit_cli.runtime.observer import Observer
    from internvit_cli.runtime.signals import StopRequest
    from internvit_cli.sources import Listing
    from internvit_cli.storage.format.layout import FeatureShape
    from internvit_cli.storage.output import Output


@dataclass(frozen=True, slots=True)
class Run:
    """A running command: its options, its output, the stop request, and the observer."""

    options: ExtractOptions
    output: Output
    stop: StopRequest
    observer: Observer

    @property
    def relocations(self) -> list[Relocation]:
        """Folders that moved since they were encoded."""
        return [Relocation(old, new) for old, new in self.options.store.relocations]

    @property
    def is_stopped(self) -> bool:
        """Whether a signal has requested a stop."""
        return bool(self.stop.signal)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Everything that is decided before anything is encoded."""

    listing: Listing
    """The files in the sources, without those that internvit drew."""
    existing: Existing
    """The existing output, which may be continued."""
    changes: Changes
    """The entries of the listing that are new or changed."""
    planned: Plan
    """Sizes and tiles of new and changed entries."""
    replaced: tuple[bytes, ...]
    """Keys whose rows the planned images replace."""
    dropped: tuple[bytes, ...]
    """Keys whose rows `--prune` drops."""
    model: ModelInUse
    skip_log: SkipLog
    rule: PixelRule
    shape: FeatureShape | None
    """The shape of rows; None if there is nothing to do, because then no model is needed."""
    shard_size: ShardSize | None
    """The size of a folder's shards; None for a single file."""

    @property
    def is_up_to_date(self) -> bool:
        """Whether there is nothing to do."""
        return self.shape is None

    @property
    def gone(self) -> set[bytes]:
        """The keys whose rows in finished shards no longer count."""
        return {*self.replaced, *self.dropped}

    @property
    def workload(self) -> Workload | None:
        """All images to encode, including those that an earlier run planned; None if there are none."""
        partial = self.existing.partial
        tables = [self.planned.table, *([partial.stored.table] if partial else [])]
        counts = np.concatenate([decoded_tiles(table, self.rule)[table.status == Status.PENDING] for table in tables])
        return Workload(len(counts), int(counts.max())) if len(counts) else None


def decoded_tiles(table: ImageTable, rule: PixelRule) -> NDArray[Any]:
    """Return the number of tiles to which each image is decoded, [n] int64."""
    counts = table.tile_counts.astype(np.int64)
    return np.ones_like(counts) if rule.global_view_only else counts


def read_output(run: Run) -> Existing:
    """Read what is at the output.

    Raises:
        OutputError: It is damaged and not to be overwritten, or is not from internvit.
    """
    run.output.prepare()
    with run.observer.phase("reading the output"):
        return load_existing(run.output, overwrite=run.options.store.overwrite)


def prepare(run: Run, listing: Listing, existing: Existing, model: ModelInUse) -> RunPlan:
    """Compare the sources with the output, and read the headers of what is new or changed.

    Args:
        run: The command.
        listing: The files in the sources.
        existing: What is at the output.
        model: The model, whose weights may still be hashed; a new output does not wait for them.

    Raises:
        OtherRecipeError: The output was made with another recipe.
        NoImagesError: The sources hold only pictures that internvit drew.
        InternvitError: The run cannot start.
    """
    store, output = run.options.store, run.output
    wanted = model.draft if existing.is_absent else model.recipe
    existing = shards_to_continue(output, existing, wanted, overwrite=store.overwrite)
    stored = StoredImages(existing.shards, run.relocations)
    skip_log = SkipLog(output.skipped_path, run.options.limits)
    with run.observer.phase("comparing with the output", "image", len(listing)) as phase:
        changes = stored.compare(listing, skip_log, retry_skipped=store.retry_skipped, on_progress=phase.at)
    dropped = prunable(stored, changes, listing, confirmed=store.yes) if store.prune else []
    del stored  # an index of a million images takes some hundred MB
    _list_unreadable_folders(listing, output, skip_log)
    if not existing.shards:
        _shape_and_size(run, model, listing)  # fails early, before a million headers are read
    rule = pixel_rule(model.draft, run.options.pictures.max_pixels)
    planned = _read_headers(run, listing, changes, rule)
    drawn = set(planned.drawn)
    replaced = tuple(listing.keys[entry] for entry in changes.changed if entry not in drawn)
    listing = require_images(listing.without_drawn(planned.drawn))
    is_work_left = existing.partial is not None or bool(planned.table.keys or dropped)
    shape, shard_size = None, None
    if is_work_left or is_moved(existing.shards, run.relocations):
        shape, shard_size = _shape_and_size(run, model, listing)
    return RunPlan(
        listing=listing,
        existing=existing,
        changes=changes,
        planned=planned,
        replaced=replaced,
        dropped=tuple(dropped),
        model=model,
        skip_log=skip_log,
        rule=rule,
        shape=shape,
        shard_size=shard_size,
    )


def _shape_and_size(run: Run, model: ModelInUse, listing: Listing) -> tuple[FeatureShape, ShardSize | None]:
    """Return the shape of rows, and the size of a folder's shards.

    Raises:
        UsageError: Empty shards are already larger than requested.
    """
    shape = feature_shape(run.options, model.card, model.draft)
    if run.output.is_file:
        return shape, None
    nothing = new_shard(ShardPlan(EMPTY_TABLE, listing.sources), shape, model.draft, model.card, RunMeasurements())
    size = ShardSize.of(run.options.store.shard_bytes, run.output.backend, shape, nothing.attributes)
    return shape, size


def _read_headers(run: Run, listing: Listing, changes: Changes, rule: PixelRule) -> Plan:
    entries, how = changes.entries, run.options.run
    options = PlanOptions(rule, usable_cpus(), how.decode_timeout, how.worker_memory)
    with run.observer.phase("reading headers", "image", len(entries)) as phase:
        return plan_images(listing, entries, options, phase.at)


def _list_unreadable_folders(listing: Listing, output: Output, skip_log: SkipLog) -> None:
    """Add unreadable folders to the list of skipped images, unless they are already listed."""
    folders = {problem.path: problem.skipped for problem in listing.unreadable_folders}
    if folders:
        known = {os.fsencode(entry["key"]) for entry in read_skip_log(output.skipped_path)}
        skip_log.append((path, skipped) for path, skipped in folders.items() if path not in known)
