"""Check the CRC of every committed row at the speed of the disk.

An image's CRC covers its rows dataset by dataset (`layout.crc_order`). In each dataset, the rows of one image are
contiguous and those of consecutive images follow each other. So threads read long runs of each dataset block by block
into reused buffers, and update the CRCs of the images on the way.
"""

from __future__ import annotations

import os
import queue
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import Status
from internvit_cli.errors import RESTORE, OutputError
from internvit_cli.runtime.crc import crc32
from internvit_cli.storage.format.layout import Extent, crc_order, feature_name
from internvit_cli.storage.same_file import ReplacedError, open_same

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from internvit_cli.plan.table import ImageTable

CHUNK_BYTES = 32 << 20
"""Bytes of a thread's task: consecutive images of about this size, or one larger image."""
BLOCK_BYTES = 1 << 20
"""Bytes of one read, which are still in the processor's cache when their CRC is computed. The kernel reads ahead."""
MOST_THREADS = 8
CHUNKS_AHEAD = 2
"""Chunks per thread that wait or are done, so that no thread is idle."""


class RowProblem(NamedTuple):
    """A row that differs from what was committed."""

    row: int
    problem: str


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The outcome of one chunk."""

    images: int
    nbytes: int
    """Bytes of rows that were read."""
    problems: tuple[RowProblem, ...]


@dataclass(frozen=True, slots=True)
class CommittedRows:
    """A shard's rows and their records."""

    extents: dict[str, Extent]
    table: ImageTable
    """With the statuses on disk."""
    checksums: NDArray[Any]
    """[n] uint32."""
    files: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The `file_identity` of the files at the time the table was read."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets of features, in the order of the CRC."""
        return crc_order(self.extents)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Datasets with one row per image: a skipped image has NaN there."""
        return tuple(name for name in self.datasets if not feature_name(name).is_per_tile)

    def bytes_per(self, names: Iterable[str]) -> int:
        """Return the total bytes of one row of each of the given datasets."""
        return sum(self.extents[name].spec.row_bytes for name in names)

    @property
    def row_bytes(self) -> NDArray[Any]:
        """Bytes of each image's rows, [n] int64."""
        per_image = self.bytes_per(self.vectors)
        per_tile = self.bytes_per(self.datasets) - per_image
        sizes: NDArray[Any] = per_image + self.table.tile_counts.astype(np.int64) * per_tile
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes that a check reads."""
        return sum(chunk.nbytes for chunk in self._chunks())

    def check(self, threads: int) -> Iterator[CheckedRows]:
        """Read every committed row; compare done images with their CRC, and the vectors of skipped ones with NaN.

        Args:
            threads: The number of threads that read and compute, at most `MOST_THREADS`.

        Yields:
            What was found, chunk by chunk, in row order. A part of the file that cannot be read is a problem of its
            rows.

        Raises:
            ReplacedError: Another file has taken the name.
        """
        threads = max(1, min(threads, MOST_THREADS))
        buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        for _ in range(threads):
            buffers.put(bytearray(BLOCK_BYTES))
        waiting: deque[Future[CheckedRows]] = deque()
        with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
            for chunk in self._chunks():
                if len(waiting) == threads * CHUNKS_AHEAD:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(self._check, chunk, buffers))
            while waiting:
                yield waiting.popleft().result()

    def _chunks(self) -> Iterator[_Chunk]:
        status = self.table.status
        sizes = self.row_bytes
        for start, stop, is_done in _runs(status):
            if not is_done:
                nbytes = (stop - start) * self.bytes_per(self.vectors)
                yield _Chunk(start, stop, nbytes, is_done=False)
                continue
            total = np.concatenate([[0], np.cumsum(sizes[start:stop])])
            first = 0
            while first < stop - start:
                # As many images as fit, but at least one.
                last = max(first + 1, int(np.searchsorted(total, total[first] + CHUNK_BYTES, "right")) - 1)
                yield _Chunk(start + first, start + last, int(total[last] - total[first]), is_done=True)
                first = last

    def _check(self, chunk: _Chunk, buffers: queue.SimpleQueue[bytearray]) -> CheckedRows:
        buffer = buffers.get()
        try:
            problems = tuple(self._problems(chunk, memoryview(buffer)))
        finally:
            buffers.put(buffer)
        return CheckedRows(chunk.stop - chunk.start, chunk.nbytes, problems)

    def _problems(self, chunk: _Chunk, buffer: memoryview) -> Iterator[RowProblem]:
        try:
            sums, is_finite = self._sums(chunk, buffer)
        except ReplacedError:
            raise
        except (OSError, OutputError) as error:
            if chunk.stop - chunk.start == 1:
                yield RowProblem(chunk.start, f"its rows cannot be read: {_reason(error)}")
                return
            for row in range(chunk.start, chunk.stop):  # find which of them it is
                yield from self._problems(chunk._replace(start=row, stop=row + 1), buffer)
            return
        if not chunk.is_done:
            for row in np.flatnonzero(sums != self._crc_of_nothing).tolist():
                yield RowProblem(chunk.start + row, "it was skipped, but its vector is not NaN")
            return
        committed = self.checksums[chunk.start : chunk.stop]
        for row in np.flatnonzero((sums != committed) | ~is_finite).tolist():
            is_damaged = sums[row] != committed[row]
            crcs = f"its rows have CRC {int(sums[row]):08x}; {int(committed[row]):08x} was committed"
            yield RowProblem(chunk.start + row, crcs if is_damaged else "its vector holds a value that is not finite")

    @property
    def _crc_of_nothing(self) -> int:
        """Return the CRC of the vectors of a skipped image: NaN with numpy's bits."""
        values = self.bytes_per(self.vectors) // np.dtype("<f4").itemsize
        return crc32(np.full(values, np.nan, "<f4").tobytes())

    def _sums(self, chunk: _Chunk, buffer: memoryview) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return each image's CRC (of its vectors alone if skipped), and whether its vectors are finite, [k] each."""
        sums = [0] * (chunk.stop - chunk.start)
        is_finite = np.ones(len(sums), bool)
        offsets = self.table.tile_offset[chunk.start : chunk.stop + 1].astype(np.int64)
        for name in self.datasets if chunk.is_done else self.vectors:
            if feature_name(name).is_per_tile:
                self._add(name, offsets, sums, buffer)
                continue
            first = 0
            for vectors in self._vectors(name, chunk, buffer):
                last = first + len(vectors)
                sums[first:last] = map(crc32, vectors, sums[first:last])
                is_finite[first:last] &= np.isfinite(vectors).all(axis=1)
                first = last
        return np.array(sums, np.uint32), is_finite

    def _vectors(self, name: str, chunk: _Chunk, buffer: memoryview) -> Iterator[NDArray[Any]]:
        """Yield the images' vectors of one dataset in blocks, [k,d] float32, each valid until the next."""
        spec = self.extents[name].spec
        step = max(1, len(buffer) // spec.row_bytes)
        for first in range(chunk.start, chunk.stop, step):
            last = min(first + step, chunk.stop)
            size = (last - first) * spec.row_bytes
            place = buffer[:size] if size <= len(buffer) else memoryview(bytearray(size))
            for _, block in self._blocks(name, first * spec.row_bytes, last * spec.row_bytes, place):
                yield np.frombuffer(block, spec.dtype).reshape(last - first, -1)

    def _add(self, name: str, rows: NDArray[Any], sums: list[int], buffer: memoryview) -> None:
        """Update each image's CRC with its rows of one dataset: image i has rows[i]:rows[i + 1]."""
        extent = self.extents[name]
        bounds = (rows * extent.spec.row_bytes).tolist()
        image = 0
        for position, block in self._blocks(name, bounds[0], bounds[-1], buffer):
            taken = 0
            while taken < len(block):
                while bounds[image + 1] <= position + taken:
                    image += 1
                end = min(len(block), bounds[image + 1] - position)
                sums[image] = crc32(block[taken:end], sums[image])
                taken = end

    def _blocks(self, name: str, start: int, stop: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Yield bytes start:stop of a dataset in blocks, each with its position and valid until the next.

        Raises:
            OutputError: The file ends before, or is another one now.
            OSError: The disk cannot be read.
        """
        extent = self.extents[name]
        # Each run has its own descriptor, because the kernel reads ahead at one place per open file.
        descriptor = self._open(extent.path)
        try:
            for position in range(start, stop, len(buffer)):
                block = buffer[: min(len(buffer), stop - position)]
                _read(descriptor, block, extent.offset + position, extent.path)
                yield position, block
        finally:
            os.close(descriptor)

    def _open(self, path: str) -> int:
        descriptor = open_same(path, self.files)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return descriptor


class _Chunk(NamedTuple):
    """Consecutive rows that are all done, or all skipped."""

    start: int
    stop: int
    nbytes: int
    is_done: bool


def _runs(status: NDArray[Any]) -> Iterator[tuple[int, int, bool]]:
    """Yield runs of done rows and of skipped rows as (start, stop, done); pending rows are in none."""
    kind = np.where(status == Status.DONE, 1, np.where(status == Status.PENDING, 0, 2))
    edges = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)] if len(kind) else []
    for start, stop in pairwise(edges):
        if kind[start]:
            yield start, stop, bool(kind[start] == 1)


def _read(descriptor: int, block: memoryview, offset: int, path: str) -> None:
    while block:
        got = os.preadv(descriptor, [block], offset)
        if got == 0:
            raise OutputError(f"{path} ends before its rows do", RESTORE)
        block, offset = block[got:], offset + got


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
