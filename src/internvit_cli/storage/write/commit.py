"""Implement the commit protocol: an image is done if and only if its rows are on the disk.

Rows, digests and CRCs are written and synced first; then statuses are written and synced. So a done status is true no
matter when the process dies or the power fails. Images since the last checkpoint are not guaranteed, and only those are
encoded again.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import Skipped, Status
from internvit_cli.errors import OutputError
from internvit_cli.runtime.crc import crc32
from internvit_cli.storage.durable import (
    disk_errors,
    open_ours,
    read_exactly,
    remove,
    rename_durably,
    reserve,
    sync_data,
    sync_path,
    sync_together,
    write_all,
)
from internvit_cli.storage.format.layout import (
    CRC32,
    DIGEST,
    RUN_LOG,
    RUN_LOG_BYTES,
    STATUS,
    Extent,
    NewShard,
    crc_order,
    feature_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.format.interface import ShardFormat


def create_shard(backend: ShardFormat, partial: str, shard: NewShard) -> None:
    """Create an empty shard with reserved space. It appears under `partial` complete and durable, or not at all.

    Images whose header could not be read have their final status and NaN vectors from the start.
    """
    temporary = f"{partial}.tmp"
    try:
        with disk_errors(partial):
            backend.build(temporary, shard)
            extents = backend.extents(temporary)
            for path in sorted({extent.path for extent in extents.values()}):
                reserve(path)
                _write_known_skips({name: e for name, e in extents.items() if e.path == path}, path, shard.table)
                sync_path(path)
            sync_path(temporary)
            rename_durably(temporary, partial)
    except BaseException:
        remove(temporary)  # above all on a full disk: it may occupy all remaining space
        raise


def _write_known_skips(extents: dict[str, Extent], path: str, table: ImageTable) -> None:
    rows = np.flatnonzero(table.status != Status.PENDING)
    if not len(rows):
        return
    descriptor = open_ours(path)
    try:
        if (extent := extents.get(STATUS)) is not None:
            write_all(descriptor, table.status, extent.offset)
        for name in crc_order(extents):
            if feature_name(name).is_per_tile:
                continue
            extent = extents[name]
            for start, stop in _runs(rows):
                nothing = np.full((stop - start, *extent.spec.shape[1:]), np.nan, "<f4")
                write_all(descriptor, nothing, extent.offset + start * extent.spec.row_bytes)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class ImageRows:
    """The features of one image, ready to be stored."""

    row: int
    digest: bytes
    """SHA-256 of the file that was decoded, 32 bytes."""
    arrays: Mapping[str, Sequence[NDArray[Any]]]
    """Consecutive blocks of its rows by dataset, in the stored type: one row per image or one per tile."""

    @property
    def blocks(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield every block with its dataset, in the order of the image's CRC."""
        return ((name, block) for name in crc_order(self.arrays) for block in self.arrays[name])

    @property
    def nbytes(self) -> int:
        """Bytes of all its rows."""
        return sum(block.nbytes for _, block in self.blocks)

    @property
    def checksum(self) -> int:
        """Return the CRC-32 of all its rows."""
        checksum = 0
        for _, block in self.blocks:
            checksum = crc32(np.ascontiguousarray(block).data, checksum)
        return checksum


@dataclass(slots=True)
class _Uncommitted:
    rows: list[int] = field(default_factory=list)
    nbytes: int = 0
    since: float = field(default_factory=time.monotonic)


class WrittenImage(NamedTuple):
    """An image whose rows are written, with the facts to be recorded."""

    row: int
    digest: bytes
    """SHA-256 of the file that was decoded, 32 bytes."""
    checksum: int
    """CRC-32 of its rows."""
    nbytes: int
    """Bytes of its rows."""


class RowWriter:
    """Writes feature rows at their places. Several processes may do so for different images, which share no bytes."""

    def __init__(self, extents: Mapping[str, Extent]) -> None:
        """Open the files of a shard that `create_shard` made; `extents` are the places of its datasets."""
        self.extents = extents
        self.descriptors = {path: open_ours(path) for path in {extent.path for extent in extents.values()}}
        self._vectors = [name for name in crc_order(extents) if not feature_name(name).is_per_tile]

    def write(self, image: ImageRows, first_tile: int) -> WrittenImage:
        """Write the rows of a finished image; its tile rows begin at `first_tile`."""
        checksum = 0
        written: dict[str, int] = {}
        for name, block in image.blocks:
            first = first_tile if feature_name(name).is_per_tile else image.row
            before = written.get(name, 0)
            checksum = self.put(name, first + before, block, checksum)
            written[name] = before + len(block)
        return WrittenImage(image.row, image.digest, checksum, image.nbytes)

    def write_nothing(self, row: int) -> int:
        """Write the NaN vectors of a skipped image and return their bytes."""
        for name in self._vectors:
            self.put(name, row, np.full((1, *self.extents[name].spec.shape[1:]), np.nan, "<f4"), 0)
        return sum(self.extents[name].spec.row_bytes for name in self._vectors)

    def put(self, name: str, position: int, rows: NDArray[Any], checksum: int) -> int:
        """Write rows of one dataset from index `position` on and return the running CRC."""
        extent = self.extents[name]
        data = np.ascontiguousarray(rows)
        with disk_errors(extent.path):
            write_all(self.descriptors[extent.path], data, extent.offset + position * extent.spec.row_bytes)
        return crc32(data.data, checksum)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()


class ShardWriter:
    """Fills one shard. Any thread may write rows; one thread records them, and one commits them."""

    def __init__(self, backend: ShardFormat, partial: str, table: ImageTable) -> None:
        """Open a shard that `create_shard` made; `table` has the statuses on disk."""
        self.extents = backend.extents(partial)
        """The places of the rows of each dataset."""
        self._rows = RowWriter(self.extents)
        self._descriptors = self._rows.descriptors
        self._tile_offset = table.tile_offset
        images = len(table)
        self._status: NDArray[Any] = table.status.copy()
        self._digest = self._load(DIGEST, (images, 32), np.uint8)
        self._crc32 = self._load(CRC32, (images,), np.uint32)
        self._pending = _Uncommitted()
        self._failed = False

    @property
    def status(self) -> NDArray[Any]:
        """Statuses as they will be after the next checkpoint, [n] uint8; do not change them."""
        return self._status

    @property
    def digest(self) -> NDArray[Any]:
        """SHA-256 of each image's file, [n, 32] uint8, zeros if there is none; do not change them."""
        return self._digest

    @property
    def checksums(self) -> NDArray[Any]:
        """CRC-32 of each image's rows, [n] uint32; do not change them."""
        return self._crc32

    @property
    def uncommitted_bytes(self) -> int:
        """Bytes written since the last checkpoint."""
        return self._pending.nbytes

    @property
    def uncommitted_seconds(self) -> float:
        """Seconds since the last checkpoint, or since the first write after it."""
        return time.monotonic() - self._pending.since if self._pending.rows else 0.0

    def rewrite_commit_records(self) -> None:
        """Write and sync digests, CRCs and statuses again, because an earlier failed sync may have dropped them."""
        self._write_records(np.arange(len(self._status)))

    def reset_to_pending(self, rows: Sequence[int]) -> None:
        """Make images pending again, on disk as well, because their records cannot be trusted."""
        for row in rows:
            self._status[row], self._digest[row], self._crc32[row] = Status.PENDING, 0, 0
        if rows:
            self._write_records(np.array(sorted(rows), np.int64))

    def write(self, image: ImageRows) -> None:
        """Write the rows of a finished image and record it; it is done after the next checkpoint."""
        self.record(self.write_rows(image))

    def write_rows(self, image: ImageRows) -> WrittenImage:
        """Write the rows of a finished image, in any thread; the image must then be recorded."""
        return self._rows.write(image, int(self._tile_offset[image.row]))

    def record(self, written: WrittenImage) -> None:
        """Record an image whose rows were written here or in another process; the next checkpoint makes it done."""
        self._crc32[written.row] = written.checksum
        self._finish(written.row, Status.DONE, written.digest, written.nbytes)

    def skip(self, row: int, skipped: Skipped) -> None:
        """Mark an image as skipped: its vectors are NaN, and its tile rows stay unwritten."""
        self._finish(row, skipped.status, bytes(32), self._rows.write_nothing(row))

    def checkpoint(self) -> int:
        """Commit everything that was written and return the number of images committed.

        Raises:
            OutputError: The disk reported an error, which is fatal: the state after a failed sync is unknown.
        """
        return self.commit(self.take_uncommitted())

    def take_uncommitted(self) -> NDArray[Any]:
        """Return the sorted rows that were written since the last call; the caller must commit them."""
        rows = np.array(sorted(self._pending.rows), np.int64)
        self._pending = _Uncommitted()
        return rows

    def commit(self, rows: NDArray[Any]) -> int:
        """Commit images whose rows are written and return their number. Others may be written meanwhile.

        Raises:
            OutputError: The disk reported an error.
        """
        self._check_disk()
        if len(rows):
            self._write_records(rows)
        return len(rows)

    def append_run_log(self, entry: dict[str, Any]) -> None:
        """Add a JSON line about this start to the shard; the oldest lines are dropped if there is no space left."""
        extent = self.extents[RUN_LOG]
        descriptor = self._descriptors[extent.path]
        log = read_exactly(descriptor, RUN_LOG_BYTES, extent.offset, extent.path).rstrip(b"\0")
        lines = [*bytes(log).splitlines(keepends=True), json.dumps(entry, sort_keys=True).encode() + b"\n"]
        while sum(map(len, lines)) > RUN_LOG_BYTES:
            del lines[0]
        with disk_errors(extent.path):
            write_all(descriptor, b"".join(lines).ljust(RUN_LOG_BYTES, b"\0"), extent.offset)
            sync_data(descriptor)

    def close(self) -> None:
        """Close the files without a checkpoint."""
        self._rows.close()

    def _load(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        extent = self.extents[name]
        data = read_exactly(self._descriptors[extent.path], extent.spec.nbytes, extent.offset, extent.path)
        return np.frombuffer(data, dtype).reshape(shape)

    def _finish(self, row: int, status: Status, digest: bytes, nbytes: int) -> None:
        if not self._pending.rows:
            self._pending.since = time.monotonic()
        self._status[row] = status
        self._digest[row] = np.frombuffer(digest, np.uint8)
        self._pending.rows.append(row)
        self._pending.nbytes += nbytes

    def _write_records(self, rows: NDArray[Any]) -> None:
        runs = list(_runs(rows))
        for name, column in ((DIGEST, self._digest), (CRC32, self._crc32)):
            self._write_runs(name, column, runs)
        self._sync({extent.path for extent in self.extents.values()})
        self._write_runs(STATUS, self._status, runs)
        self._sync({self.extents[STATUS].path})

    def _write_runs(self, name: str, column: NDArray[Any], runs: list[tuple[int, int]]) -> None:
        extent: Extent = self.extents[name]
        with disk_errors(extent.path):
            for start, stop in runs:
                write_all(
                    self._descriptors[extent.path], column[start:stop], extent.offset + start * extent.spec.row_bytes
                )

    def _check_disk(self) -> None:
        if self._failed:
            raise OutputError("the disk failed earlier", "check it, then run the same command again")

    def _sync(self, paths: set[str]) -> None:
        self._check_disk()
        self._failed = True  # until the sync succeeds: a failed sync is never retried
        sync_together({path: self._descriptors[path] for path in sorted(paths)})
        self._failed = False


def _runs(rows: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Yield consecutive rows of a sorted array as (start, stop)."""
    if len(rows) == 0:
        return
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for part in np.split(rows, breaks):
        yield int(part[0]), int(part[-1]) + 1
