"""Write features as another feature file or folder, with the storage formats and the commit protocol."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status
from internvit_cli.export.blocks import RowSpecs
from internvit_cli.export.writer import UnpublishedResult
from internvit_cli.extract.shard_plan import ShardSize
from internvit_cli.storage.durable import disk_errors, write_all, write_file
from internvit_cli.storage.format.layout import NewShard
from internvit_cli.storage.output import SKIPPED, Output
from internvit_cli.storage.output_names import PARTIAL
from internvit_cli.storage.write.commit import RowWriter, ShardWriter, WrittenImage, create_shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.config import Format
    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination
    from internvit_cli.export.selection import RowSelection
    from internvit_cli.plan.table import ImageTable

CHECKPOINT_BYTES = 128_000_000


@dataclass(slots=True)
class _FillingShard:
    """A shard that is being filled."""

    rows: RowWriter
    writer: ShardWriter
    shard: NewShard
    first: int
    """The position of its first image in the selection."""
    commits: ThreadPoolExecutor
    commit: Future[int] | None = None
    """The commit that waits for the disk while further rows are written."""

    @property
    def stop(self) -> int:
        return self.first + len(self.shard.table)

    def put(self, name: str, position: int, rows: NDArray[Any]) -> None:
        """Write rows of one dataset from index `position` on."""
        extent = self.rows.extents[name]
        with disk_errors(extent.path):
            write_all(self.rows.descriptors[extent.path], rows, extent.offset + position * extent.spec.row_bytes)

    def begin_commit(self) -> None:
        """Commit what was written so far, once the previous commit is complete."""
        self.wait()
        self.commit = self.commits.submit(self.writer.commit, self.writer.take_uncommitted())

    def wait(self) -> None:
        """Wait until the commit is complete.

        Raises:
            OutputError: The disk failed.
        """
        commit, self.commit = self.commit, None
        if commit is not None:
            commit.result()

    def close(self) -> None:
        self.commits.shutdown()
        self.rows.close()
        self.writer.close()


class FeatureFileWriter:
    """Writes a selection as one HDF5 file, or as a folder of shards."""

    def __init__(
        self, selection: RowSelection, destination: Destination, shard_format: Format, shard_bytes: int | None
    ) -> None:
        self._selection = selection
        self._destination = destination
        staged = destination.staged(destination.name)
        self._output = Output(os.path.join(staged, "") if destination.is_folder else staged, shard_format)
        self._shards = list(self._cut(shard_bytes))
        self._open: _FillingShard | None = None
        self._number = 0

    def needed_bytes(self) -> int:
        """Return the exact size of all shards in bytes."""
        return sum(self._output.backend.planned_bytes(shard) for shard in self._shards)

    def begin(self) -> None:
        """Create the folder if there is one; shards are created one by one, with their space reserved."""
        self._output.prepare()

    def add(self, block: RowBlock) -> None:
        """Write the rows of done images; skipped images were recorded when the shard was created."""
        while len(block):
            shard = self._open or self._next_shard(block.first)
            count = min(len(block), shard.stop - block.first)
            if block.is_done:
                self._write(shard, block.take(0, count))
            if block.first + count == shard.stop:
                self._finish_shard(shard)
            block = block.take(count, len(block))

    def finish(self) -> UnpublishedResult:
        """Write the list of skipped images; the shards already have their names in the working folder."""
        lines = b"".join(json.dumps(entry).encode() + b"\n" for entry in self._selection.skips)
        if lines:
            write_file(self._output.skipped_path, lines)
        self._output.complete()
        name = self._destination.name
        if not self._output.is_file:
            return UnpublishedResult([name])
        skipped = f"{name}.{SKIPPED}"
        # A list must never describe other features, so the old list is removed first and the new one comes last. If the
        # process is killed in between, features have no list of reasons, but never a wrong one.
        return UnpublishedResult(
            [name, skipped] if lines else [name],
            obsolete=[self._destination.final(f"{name}{PARTIAL}")],
            withdrawn=[self._destination.final(skipped)],
        )

    def close(self) -> None:
        """Close the files."""
        if self._open is not None:
            self._open.close()
            self._open = None

    # ----------------------------------------------------------------------------------------------------- the shards

    def _cut(self, shard_bytes: int | None) -> list[NewShard]:
        selection, first = self._selection, 0
        # Done rows are marked as pending, and copied once the new shard exists.
        status = selection.table.status
        table = selection.table.with_status(np.where(status == Status.DONE, Status.PENDING, status).astype(np.uint8))
        tables: list[ImageTable] = [table]
        if not self._output.is_file:
            attributes = selection.attributes(first)
            tables = list(ShardSize.of(shard_bytes, self._output.backend, selection.written, attributes).split(table))
        shards = []
        for part in tables:
            shards.append(NewShard(part, selection.written, selection.attributes(first)))
            first += len(part)
        return shards

    def _next_shard(self, first: int) -> _FillingShard:
        shard = self._shards[self._number]
        partial = self._output.partial_path(self._number)
        create_shard(self._output.backend, partial, shard)
        extents = self._output.backend.extents(partial)
        writer = ShardWriter(self._output.backend, partial, shard.table)
        commits = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._open = _FillingShard(RowWriter(extents), writer, shard, first, commits)
        return self._open

    def _write(self, shard: _FillingShard, block: RowBlock) -> None:
        """Write contiguous rows with the digests and CRCs of the rows that were read."""
        rows = RowSpecs(self._selection.written_datasets())
        row = block.first - shard.first
        tile = int(shard.shard.table.tile_offset[row])
        for name, array in block.arrays.items():
            if len(array):
                shard.put(name, tile if rows.is_per_tile(name) else row, array)
        for number, size in enumerate(rows.image_bytes(np.diff(block.tiles)).tolist()):
            position = block.first + number
            digest = self._selection.digests[position].tobytes()
            # With fewer datasets the CRC differs; otherwise it is the one that was just checked.
            is_whole = self._selection.is_whole
            checksum = int(self._selection.checksums[position]) if is_whole else block.checksum(number)
            shard.writer.record(WrittenImage(row + number, digest, checksum, size))
        if shard.writer.uncommitted_bytes >= CHECKPOINT_BYTES:
            shard.begin_commit()

    def _finish_shard(self, shard: _FillingShard) -> None:
        shard.wait()
        shard.writer.checkpoint()
        for entry in self._run_log(shard):
            shard.writer.append_run_log(entry)
        self.close()
        self._output.publish(self._number, len(shard.shard.table), shard.shard.table.tiles, {})
        self._number += 1

    def _run_log(self, shard: _FillingShard) -> list[dict[str, object]]:
        """Return the logs of the shards whose first row is in this shard, so that each log is copied once."""
        entries = []
        for number in np.unique(self._selection.shard_of[shard.first : shard.stop]).tolist():
            if int(np.flatnonzero(self._selection.shard_of == number)[0]) >= shard.first:
                found = self._selection.found[number]
                entries += found.backend.run_log(found.path)
        return entries
