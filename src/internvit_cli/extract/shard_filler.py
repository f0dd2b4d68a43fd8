"""Fill a shard from its creation to its final name: copy and check earlier rows, and encode the others."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status
from internvit_cli.decode.decoder import decode_jobs
from internvit_cli.errors import OutputError
from internvit_cli.extract.changes import StoredImages, stored_sources
from internvit_cli.extract.encode_loop import EncodeJob, EncodeRules
from internvit_cli.extract.engine import ShardJob
from internvit_cli.extract.results import Tally, run_log_entry
from internvit_cli.extract.run_engine import workload_of
from internvit_cli.extract.run_plan import decoded_tiles
from internvit_cli.extract.writer_thread import ShardSink
from internvit_cli.runtime.observer import Work
from internvit_cli.runtime.words import counted
from internvit_cli.storage.check.recheck import Recheck, contradictory_rows
from internvit_cli.storage.write.commit import ShardWriter
from internvit_cli.storage.write.reuse import reuse_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.extract.run_engine import RunEngine
    from internvit_cli.extract.run_plan import Run, RunPlan
    from internvit_cli.extract.shard_plan import ShardPlan
    from internvit_cli.extract.summary import Totals
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.runtime.observer import Phase
    from internvit_cli.sources import Listing, Source
    from internvit_cli.storage.output import FinishedShard


@dataclass(frozen=True, slots=True)
class CreatedShard:
    """A shard that was created at the output, and lacks rows."""

    table: ImageTable
    attributes: dict[str, Any]
    later: Sequence[ShardPlan]
    """The shards that will be created after it."""


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A shard to which rows are being written."""

    table: ImageTable
    sources: Sequence[Source]
    """The sources to which the table's `source` column refers."""
    writer: ShardWriter
    later: Sequence[ShardPlan]


class ShardFiller:
    """Fills the shards of a run, one after the other, and publishes each."""

    def __init__(self, run: Run, plan: RunPlan, engine: RunEngine, totals: Totals) -> None:
        """Prepare what all shards of the run share; `totals` accumulates what was done."""
        self._run = run
        self._listing = plan.listing
        self._skip_log = plan.skip_log
        self._rule = plan.rule
        self._unlisted = frozenset(plan.changes.unlisted)
        self._engine = engine
        self._totals = totals

    def fill(self, shard: CreatedShard, finished: StoredImages) -> None:
        """Encode what is missing in a shard, and publish it if it is complete and no stop was requested.

        Args:
            shard: The shard to fill.
            finished: The rows of complete shards of the output, from which rows of the same images are copied.

        Raises:
            OutputError: Another run writes to the output too.
            InternvitError: The disk, a device or the workers fail.
        """
        run, output, table = self._run, self._run.output, shard.table
        run.stop.is_working = True
        number = output.next_number()
        older = finished.by_shard(table.keys)
        taken_over = [old for old in finished.shards if output.is_file or old.name in older]
        with closing(ShardWriter(output.backend, output.partial_path(number), table)) as writer:
            sources = stored_sources(shard.attributes, output.path, run.relocations)
            opened = _OpenShard(table, sources, writer, shard.later)
            self._write_rows(opened, taken_over, is_begun=bool(finished.shards))
            is_complete = bool((writer.status != Status.PENDING).all())
        if is_complete and not run.is_stopped:
            self._publish(number, shard, older)

    def _write_rows(self, shard: _OpenShard, taken_over: Sequence[FinishedShard], *, is_begun: bool) -> None:
        """Write all rows, until the shard is complete or a stop is requested."""
        table, writer = shard.table, shard.writer
        writer.rewrite_commit_records()
        self._encode_again(contradictory_rows(table, writer, self._skip_log), writer)
        with self._recheck(table, writer) as recheck:
            for old in taken_over:
                with self._run.observer.phase("copying earlier rows", "image") as phase:
                    reuse_rows(old, table, writer, lambda: self._run.is_stopped, phase.at)
            self._encode_pending(shard, is_begun=is_begun or bool(self._totals.tally.images))
            damaged = self._wait_for(recheck)
        if damaged:
            self._encode_again(damaged, writer)
            self._encode_pending(shard, is_begun=True)

    def _recheck(self, table: ImageTable, writer: ShardWriter) -> Recheck:
        recheck = Recheck(table, writer)
        if (writer.status == Status.DONE).any():
            words = f"{counted(recheck.nbytes, 'byte')} of earlier runs checked again beside the encoding"
            self._run.observer.note(words)
        return recheck

    def _wait_for(self, recheck: Recheck) -> list[int]:
        if not recheck.nbytes:
            return []
        with self._run.observer.phase("checking earlier rows"):
            return recheck.damaged_rows(lambda: self._run.is_stopped)

    def _encode_again(self, rows: list[int], writer: ShardWriter) -> None:
        """Mark rows of an earlier run as pending, because they are not what was committed."""
        writer.reset_to_pending(rows)
        self._totals.redone += len(rows)
        if rows:
            words = f"{counted(len(rows), 'image')} more to encode: damaged on the disk since an earlier run"
            self._run.observer.note(words)

    def _encode_pending(self, shard: _OpenShard, *, is_begun: bool) -> None:
        table, writer = shard.table, shard.writer
        rows = np.flatnonzero(writer.status == Status.PENDING)
        if not len(rows):
            return
        workload = workload_of(table, rows, self._rule)
        engine = self._engine.start(workload)
        is_begun = is_begun or bool((writer.status == Status.DONE).any())
        rules = EncodeRules(self._engine.recipe, is_begun=is_begun, strict=self._run.options.run.strict)
        with closing(ShardSink(writer, self._skip_log, table.keys)) as sink:
            images = EncodeJob(table.keys, decode_jobs(table, rows, shard.sources), sink, rules)
            job = ShardJob(workload, images, table.tile_offset, writer.extents)
            with self._run.observer.phase("encoding", "image") as phase:
                result = engine.encode(job, self._run.stop, self._teller(phase, shard, rows))
        self._totals.add(result)
        is_done = writer.status[rows] == Status.DONE
        self._totals.encoded_unlisted += sum(table.keys[row] in self._unlisted for row in rows[is_done].tolist())
        done = result.tally
        writer.append_run_log(self._engine.facts | run_log_entry(result.stages, done.images, done.tiles))

    def _teller(self, phase: Phase, shard: _OpenShard, rows: NDArray[Any]) -> Callable[[Tally], None]:
        """Return a callback that reports the progress over all shards."""
        before = self._totals.tally
        parts = [decoded_tiles(shard.table, self._rule)[rows]]
        parts += [decoded_tiles(shard_plan.table, self._rule)[shard_plan.to_encode] for shard_plan in shard.later]
        images = before.images + before.skipped + sum(map(len, parts))
        tiles = before.tiles + before.skipped_tiles + sum(int(part.sum()) for part in parts)

        def tell(tally: Tally) -> None:
            so_far = before.plus(tally)
            work = Work("tile", so_far.tiles + so_far.skipped_tiles, tiles)
            phase.at(so_far.images + so_far.skipped, images, work=work, skipped=so_far.skipped)

        tell(Tally())
        return tell

    def _publish(self, number: int, shard: CreatedShard, older: dict[str, list[str]]) -> None:
        """Publish a complete shard under its final name."""
        output = self._run.output
        with self._run.observer.phase("publishing"):
            unpublished = output.partial()  # read again, because an unreadable shard must not get its final name
            if unpublished is None or (unpublished.stored.table.status == Status.PENDING).any():
                raise OutputError(
                    f"another run writes to {output.path} too",
                    "see to it that only one does, then run the same command again",
                )
            if not shard.later:
                others = () if output.is_file else output.finished()
                self._skip_log.rewrite(is_skipped_by([*others, unpublished], self._listing))
            output.publish(number, len(shard.table), shard.table.tiles, older)


def is_skipped_by(shards: Sequence[FinishedShard], listing: Listing) -> Callable[[str], bool]:
    """Return a function that says whether a key belongs on the list of skipped images for these shards."""
    stored = StoredImages(shards)
    folders = {os.fsdecode(problem.path) for problem in listing.unreadable_folders}
    settled = (None, Status.DONE, Status.PENDING)
    return lambda key: key in folders or stored.status(os.fsencode(key)) not in settled
