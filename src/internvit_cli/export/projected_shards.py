"""Make the shards of an output of projected tokens hold what an output of visual tokens holds."""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import Skipped, Status, Tokens
from internvit_cli.encode.tile_features import UNFIT
from internvit_cli.errors import OutputError
from internvit_cli.export.blocks import read_blocks
from internvit_cli.extract.changes import StoredImages, sources_to_json
from internvit_cli.extract.results import VERSIONED_PACKAGES, package_version
from internvit_cli.extract.resume import load_existing, shards_to_continue
from internvit_cli.extract.shard_plan import ShardPlanRules, ShardSize, plan_shards
from internvit_cli.storage.check.recheck import Recheck, contradictory_rows
from internvit_cli.storage.durable import check_space, disk_errors, write_file
from internvit_cli.storage.format.layout import NewShard, decode_values
from internvit_cli.storage.skipped import SkipLog, read_skip_log
from internvit_cli.storage.write.commit import ImageRows, ShardWriter, create_shard
from internvit_cli.storage.write.reuse import reuse_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from internvit_cli.config import Recipe
    from internvit_cli.encode.projection import TokenProjector
    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.selection import RowSelection
    from internvit_cli.extract.resume import Existing
    from internvit_cli.extract.shard_plan import ShardPlan
    from internvit_cli.model.projector import OpenProjector
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.runtime.observer import Observer
    from internvit_cli.runtime.signals import StopRequest
    from internvit_cli.storage.format.layout import FeatureShape
    from internvit_cli.storage.output import FinishedShard, Output

BLOCK_BYTES = 32 << 20
"""Bytes of visual tokens that are projected together."""
CHECKPOINT_BYTES = 128_000_000
CHECKPOINT_SECONDS = 2.0
SAME_PICTURE = ("file_size", "file_mtime_ns", "width", "height", "columns", "rows", "thumbnail")
"""Columns that are equal in rows of one picture."""


@dataclass(frozen=True, slots=True)
class ProjectionPlan:
    """What is decided before anything is written."""

    selection: RowSelection
    """The images with visual tokens."""
    projector: OpenProjector
    recipe: Recipe
    """The recipe of the projected tokens."""
    shape: FeatureShape
    attributes: dict[str, Any]
    """The attributes of new shards, except their sources."""
    shard_bytes: int | None
    device: str
    threads: int | None
    overwrite: bool


class _Pending(NamedTuple):
    """An image to project."""

    place: int
    """Its position in the selection."""
    row: int
    """Its row in the shard."""


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard that is being filled."""

    table: ImageTable
    writer: ShardWriter
    skip_log: SkipLog


class ProjectedShards:
    """The shards of a projection, and what was done to them."""

    def __init__(self, plan: ProjectionPlan, output: Output, stop: StopRequest, observer: Observer) -> None:
        self.projected = 0
        """The number of images that were projected."""
        self.tiles = 0
        """The number of their tiles."""
        self.skipped = 0
        """The number of images whose projected tokens do not fit into their type."""
        self._plan = plan
        self._selection = plan.selection
        self._output = output
        self._stop = stop
        self._observer = observer
        self._places = {key: place for place, key in enumerate(plan.selection.table.keys)}
        self._projector: TokenProjector | None = None

    def bring_up_to_date(self) -> None:
        """Continue an unfinished shard, create what is missing, and drop what the source no longer has.

        Raises:
            OtherRecipeError: The output has another recipe.
            InternvitError: A row is damaged, or the disk or the device failed.
        """
        existing = self._existing()
        if existing.partial is not None and not self._fits(existing.partial):
            self._output.discard_partial()
            existing = replace(existing, partial=None)
        try:
            self._make_shards(existing)
        finally:
            if self._projector is not None:
                self._projector.close()
        if not self._is_stopped:
            self._output.complete()

    def statuses(self) -> NDArray[Any]:
        """Return the statuses of all images that the output holds now, [n] uint8."""
        shards = load_existing(self._output, overwrite=self._plan.overwrite).shards
        found = [shard.stored.table.status[shard.live_rows] for shard in shards]
        return np.concatenate(found) if found else np.zeros(0, np.uint8)

    @property
    def _is_stopped(self) -> bool:
        return bool(self._stop.signal)

    def _existing(self) -> Existing:
        existing = load_existing(self._output, overwrite=self._plan.overwrite)
        return shards_to_continue(self._output, existing, self._plan.recipe, overwrite=self._plan.overwrite)

    # ------------------------------------------------------------------------------------------------ what is missing

    def _make_shards(self, existing: Existing) -> None:
        plans = self._missing(existing)
        self._check_space(plans)
        if existing.partial is not None:
            self._fill(existing.partial.stored.table, existing.finished, is_last=not plans)
            existing = self._existing()
            plans = self._missing(existing)
        for number, plan in enumerate(plans, 1):
            if self._is_stopped:
                return
            self._list_skips()
            with self._observer.phase("setting space aside"):
                partial = self._output.partial_path(self._output.next_number())
                create_shard(self._output.backend, partial, self._new_shard(plan))
            self._fill(plan.table, existing.finished, is_last=number == len(plans))
        if not self._output.is_file and not self._is_stopped:
            self._drop_rows(existing.finished)

    def _missing(self, existing: Existing) -> list[ShardPlan]:
        """Return the shards to create so that the output holds what the source holds."""
        gone = self._outdated(existing.finished)
        stored = {key for shard in existing.shards for key in _live_keys(shard)} - gone
        missing = np.array([place for key, place in self._places.items() if key not in stored], np.int64)
        table = self._selection.table.take(missing)
        table = table.with_status(np.where(table.status == Status.DONE, Status.PENDING, table.status).astype(np.uint8))
        sources, size = self._selection.sources, None
        if not self._output.is_file:
            attributes = self._plan.attributes | {"sources": sources_to_json(sources)}
            size = ShardSize.of(self._plan.shard_bytes, self._output.backend, self._plan.shape, attributes)
        return plan_shards(existing.finished, gone, table, ShardPlanRules(size, sources, ()))

    def _outdated(self, finished: Sequence[FinishedShard]) -> set[bytes]:
        """Return the keys whose rows are not those of the source any more."""
        return {
            shard.stored.table.keys[row]
            for shard in finished
            for row in shard.live_rows[~self._are_current(shard)].tolist()
        }

    def _fits(self, partial: FinishedShard) -> bool:
        """Return whether an unfinished shard has only images that the source still has."""
        return bool(self._are_current(partial).all())

    def _are_current(self, shard: FinishedShard) -> NDArray[np.bool_]:
        """Return which live rows are of the picture that the source has under their key, in the same state."""
        table, own, rows = shard.stored.table, self._selection.table, shard.live_rows
        places = np.fromiter((self._places.get(table.keys[row], -1) for row in rows.tolist()), np.int64, len(rows))
        are_current: NDArray[np.bool_] = places >= 0
        for name in SAME_PICTURE:
            are_current &= getattr(table, name)[rows] == getattr(own, name)[places]
        here, there = table.status[rows], own.status[places]
        # An image whose projected tokens do not fit into their type stays skipped.
        is_settled = (there == Status.DONE) & np.isin(here, [Status.PENDING, Status.OVERFLOW])
        are_current &= (here == there) | is_settled
        return are_current

    def _drop_rows(self, finished: Sequence[FinishedShard]) -> None:
        """Mark the rows of images that the source no longer has."""
        if gone := [key for key in self._outdated(finished) if key not in self._places]:
            self._output.drop_rows(StoredImages(self._output.finished()).by_shard(gone))

    def _new_shard(self, plan: ShardPlan) -> NewShard:
        attributes = self._plan.attributes | {"sources": sources_to_json(plan.sources)}
        return NewShard(plan.table, self._plan.shape, attributes)

    def _check_space(self, plans: Sequence[ShardPlan]) -> None:
        with disk_errors(self._output.path):  # such as a limit on the size of files
            needed = sum(self._output.backend.planned_bytes(self._new_shard(plan)) for plan in plans)
        check_space(self._output.path, needed, "--store-dtype float16")

    def _list_skips(self) -> None:
        """List the skipped images of the source, so that each has its reason before it has its status."""
        path = self._output.skipped_path
        known = read_skip_log(path)
        entries = {entry["key"]: entry for entry in (*known, *self._selection.skips)}
        if list(entries.values()) != known:
            write_file(path, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries.values()))

    # ------------------------------------------------------------------------------------------------------- one shard

    def _fill(self, table: ImageTable, finished: Sequence[FinishedShard], *, is_last: bool) -> None:
        """Write what is missing in a shard, and publish it if it is complete then."""
        self._stop.is_working = True
        output = self._output
        number = output.next_number()
        with closing(ShardWriter(output.backend, output.partial_path(number), table)) as writer:
            shard = _OpenShard(table, writer, SkipLog(output.skipped_path))
            writer.rewrite_commit_records()
            self._project_again(shard, contradictory_rows(table, writer, shard.skip_log))
            with Recheck(table, writer) as recheck:
                for old in finished if output.is_file else ():
                    with self._observer.phase("copying earlier rows", "image") as phase:
                        reuse_rows(old, table, writer, lambda: self._is_stopped, phase.at)
                self._project_pending(shard)
                damaged = recheck.damaged_rows(lambda: self._is_stopped) if recheck.nbytes else []
            if damaged:
                self._project_again(shard, damaged)
                self._project_pending(shard)
            is_complete = bool((writer.status != Status.PENDING).all())
        if is_complete and not self._is_stopped:
            self._publish(number, table, finished, is_last=is_last)

    def _project_again(self, shard: _OpenShard, rows: Sequence[int]) -> None:
        """Mark rows as pending that are not what was committed, unless the source has no tokens for them either."""
        own = self._selection.table.status
        shard.writer.reset_to_pending([row for row in rows if own[self._places[shard.table.keys[row]]] == Status.DONE])

    def _publish(self, number: int, table: ImageTable, finished: Sequence[FinishedShard], *, is_last: bool) -> None:
        output = self._output
        with self._observer.phase("publishing"):
            unpublished = output.partial()  # read again, because an unreadable shard must not get its final name
            if unpublished is None or (unpublished.stored.table.status == Status.PENDING).any():
                raise OutputError(
                    f"another run writes to {output.path} too",
                    "see to it that only one does, then run the same command again",
                )
            if is_last:
                stored = StoredImages([*(() if output.is_file else output.finished()), unpublished])
                settled = (None, Status.DONE, Status.PENDING)
                SkipLog(output.skipped_path).rewrite(lambda key: stored.status(os.fsencode(key)) not in settled)
            output.publish(number, len(table), table.tiles, StoredImages(finished).by_shard(table.keys))

    def _project_pending(self, shard: _OpenShard) -> None:
        """Project the pending images of a shard, until all are done or a stop is requested."""
        table, writer = shard.table, shard.writer
        rows = np.flatnonzero(writer.status == Status.PENDING).tolist()
        if not rows or self._is_stopped:
            return
        pending = sorted(_Pending(self._places[table.keys[row]], row) for row in rows)
        images = self._selection.take(np.array([image.place for image in pending], np.int64))
        started, images_before, tiles_before = time.monotonic(), self.projected, self.tiles
        with self._observer.phase("projecting", "image", len(pending)) as phase:
            for block in read_blocks(images, block_bytes=BLOCK_BYTES):
                self._project_block(shard, block, pending[block.first : block.first + len(block)])
                phase.at(block.first + len(block))
                if writer.uncommitted_bytes >= CHECKPOINT_BYTES or writer.uncommitted_seconds >= CHECKPOINT_SECONDS:
                    writer.checkpoint()
                if self._is_stopped:
                    break
        writer.checkpoint()
        seconds = time.monotonic() - started
        writer.append_run_log(self._run_facts(self.projected - images_before, self.tiles - tiles_before, seconds))

    def _project_block(self, shard: _OpenShard, block: RowBlock, pending: Sequence[_Pending]) -> None:
        visual = (Tokens.VISUAL.dataset, Tokens.VISUAL.scales_dataset)
        dtype, tokens = self._selection.recipe.store_dtype, block.arrays[visual[0]]
        if dtype.is_scaled:
            tokens = decode_values(tokens, dtype, block.arrays[visual[1]])
        found = self._started().project(tokens)
        skipped: list[tuple[_Pending, Skipped]] = []
        for number, image in enumerate(pending):
            span = slice(int(block.tiles[number]), int(block.tiles[number + 1]))
            if worst := int(found.fits[span].max()):
                kind = "OverflowError" if worst == 1 else "ArithmeticError"
                skipped.append((image, Skipped(Status.OVERFLOW, kind, UNFIT[worst])))
                continue
            arrays = {
                name: [rows] for name, rows in block.take(number, number + 1).arrays.items() if name not in visual
            }
            arrays[Tokens.PROJECTED.dataset] = [found.tokens[span]]
            shard.writer.write(ImageRows(image.row, self._selection.digests[image.place].tobytes(), arrays))
            self.projected += 1
            self.tiles += span.stop - span.start
        shard.skip_log.append((shard.table.keys[image.row], reason) for image, reason in skipped)
        for image, reason in skipped:
            shard.writer.skip(image.row, reason)
        self.skipped += len(skipped)

    def _started(self) -> TokenProjector:
        """Return the projector, which is loaded only if there is something to project."""
        if self._projector is None:
            from internvit_cli.encode.projection import ProjectionTypes, TokenProjector

            types = ProjectionTypes(self._selection.recipe, self._plan.recipe)
            with self._observer.phase("loading the projector"):
                self._projector = TokenProjector.load(
                    self._plan.projector, types, device=self._plan.device, threads=self._plan.threads
                )
        return self._projector

    def _run_facts(self, images: int, tiles: int, seconds: float) -> dict[str, Any]:
        """Return an entry for the shard's log of runs."""
        facts = {
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": platform.node(),
            "device": self._started().device_name,
            "dtype": self._plan.recipe.compute_dtype.value,
            "projector": self._plan.projector.name,
            "output": os.path.abspath(self._output.path),
            "images": images,
            "tiles": tiles,
            "seconds": round(seconds, 3),
            "python": platform.python_version(),
        }
        return facts | {package: package_version(package) for package in VERSIONED_PACKAGES}


def _live_keys(shard: FinishedShard) -> dict[bytes, int]:
    """Return the keys of a shard's rows that count, with their rows."""
    return {shard.stored.table.keys[row]: row for row in shard.live_rows.tolist()}
