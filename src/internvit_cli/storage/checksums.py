"""The CRC of every committed row, read at the speed of the disk.

An image's CRC runs over its vector, then its tokens, then its tiles' vectors. In each dataset the rows of one image are
contiguous, and those of consecutive images follow each other: so threads read long runs of each dataset, block by
block into buffers that are used again, and carry the CRCs of the images along.
"""

from __future__ import annotations

import os
import queue
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import Status
from internvit_cli.errors import OutputError
from internvit_cli.storage.layout import POOLED, TILE_POOLED, TOKEN_DATASETS, Extent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from internvit_cli.table import ImageTable

CHUNK_BYTES = 32 << 20
"""What one thread takes at a time: consecutive images of about so many bytes, or one larger image."""
BLOCK_BYTES = 1 << 20
"""Bytes of one read: what still lies in the processor's cache when its CRC is computed. The kernel reads ahead."""
MOST_THREADS = 8
CHUNKS_AHEAD = 2
"""Chunks a thread that wait or are done, so that none is idle."""


class RowProblem(NamedTuple):
    """A row that is not what was committed."""

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
    """A shard's rows and what is recorded of them."""

    extents: dict[str, Extent]
    table: ImageTable
    """With the statuses on disk."""
    checksums: NDArray[Any]
    """[n] uint32."""

    @property
    def tile_datasets(self) -> list[str]:
        """Datasets with a row a tile, in the order of the CRC."""
        return [name for name in (*TOKEN_DATASETS, TILE_POOLED) if name in self.extents]

    @property
    def row_bytes(self) -> NDArray[Any]:
        """Bytes of each image's rows, [n] int64."""
        per_tile = sum(self.extents[name].spec.row_bytes for name in self.tile_datasets)
        per_image = self.extents[POOLED].spec.row_bytes if POOLED in self.extents else 0
        sizes: NDArray[Any] = per_image + self.table.tile_counts.astype(np.int64) * per_tile
        return sizes

    @property
    def nbytes(self) -> int:
        """Bytes that a check reads."""
        return sum(chunk.nbytes for chunk in self._chunks())

    def check(self, threads: int) -> Iterator[CheckedRows]:
        """Read every committed row: done images by their CRC, the vectors of skipped ones for being NaN.

        Args:
            threads: how many read and compute at the same time, at most `MOST_THREADS`.

        Yields:
            What was found, chunk by chunk, in row order. A part of the file that cannot be read is a problem of the
            rows that lie there.
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
                width = self.extents[POOLED].spec.row_bytes if POOLED in self.extents else 0
                yield _Chunk(start, stop, (stop - start) * width, is_done=False)
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
            check = self._check_done if chunk.is_done else self._check_skipped
            problems = tuple(check(chunk.start, chunk.stop, memoryview(buffer)))
        finally:
            buffers.put(buffer)
        return CheckedRows(chunk.stop - chunk.start, chunk.nbytes, problems)

    def _check_done(self, start: int, stop: int, buffer: memoryview) -> Iterator[RowProblem]:
        try:
            sums, is_finite = self._sums(start, stop, buffer)
        except (OSError, OutputError) as error:
            if stop - start == 1:
                yield RowProblem(start, f"its rows cannot be read: {_reason(error)}")
                return
            for row in range(start, stop):  # which of them it is
                yield from self._check_done(row, row + 1, buffer)
            return
        for row, checksum, finite in zip(range(start, stop), sums, is_finite, strict=True):
            if checksum != int(self.checksums[row]):
                yield RowProblem(row, f"its rows have CRC {checksum:08x}; {int(self.checksums[row]):08x} was committed")
            elif not finite:
                yield RowProblem(row, "its vector holds a value that is not a finite number")

    def _sums(self, start: int, stop: int, buffer: memoryview) -> tuple[list[int], list[bool]]:
        """CRC of each image, and whether its vector is finite."""
        images = np.arange(start, stop + 1)
        offsets = self.table.tile_offset[start : stop + 1].astype(np.int64)
        sums, vectors = [0] * (stop - start), _Finite()
        if POOLED in self.extents:
            self._add(POOLED, images, sums, buffer, vectors)
        for name in self.tile_datasets:
            self._add(name, offsets, sums, buffer)
        return sums, [row not in vectors.unfit for row in range(stop - start)]

    def _add(
        self, name: str, rows: NDArray[Any], sums: list[int], buffer: memoryview, vectors: _Finite | None = None
    ) -> None:
        """Carry each image's CRC on over its rows of one dataset: image i has rows[i]:rows[i + 1]."""
        extent = self.extents[name]
        bounds = (rows * extent.spec.row_bytes).tolist()
        image = 0
        for position, block in _blocks(extent, bounds[0], bounds[-1], buffer):
            taken = 0
            while taken < len(block):
                while bounds[image + 1] <= position + taken:
                    image += 1
                end = min(len(block), bounds[image + 1] - position)
                part = block[taken:end]
                sums[image] = zlib.crc32(part, sums[image])
                if vectors is not None:
                    vectors.look(image, part)
                taken = end

    def _check_skipped(self, start: int, stop: int, buffer: memoryview) -> Iterator[RowProblem]:
        if POOLED not in self.extents:
            return
        spec = self.extents[POOLED].spec
        nothing = np.full(spec.shape[1:], np.nan, "<f4").tobytes()
        for row in range(start, stop):
            try:
                blocks = _blocks(self.extents[POOLED], row * spec.row_bytes, (row + 1) * spec.row_bytes, buffer)
                if b"".join(bytes(block) for _, block in blocks) != nothing:
                    yield RowProblem(row, "it was skipped, but its vector is not NaN")
            except (OSError, OutputError) as error:
                yield RowProblem(row, f"its rows cannot be read: {_reason(error)}")


class _Chunk(NamedTuple):
    """Consecutive rows that are all done, or all skipped."""

    start: int
    stop: int
    nbytes: int
    is_done: bool


class _Finite:
    """Which images' vectors hold a value that is not finite; blocks end at multiples of four bytes."""

    def __init__(self) -> None:
        self.unfit: set[int] = set()

    def look(self, image: int, part: memoryview) -> None:
        if not np.isfinite(np.frombuffer(part, "<f4")).all():
            self.unfit.add(image)


def _runs(status: NDArray[Any]) -> Iterator[tuple[int, int, bool]]:
    """Runs of rows that are done, and of rows that were skipped, as (start, stop, done); pending rows in none."""
    kind = np.where(status == Status.DONE, 1, np.where(status == Status.PENDING, 0, 2))
    edges = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)] if len(kind) else []
    for start, stop in zip(edges, edges[1:], strict=False):
        if kind[start]:
            yield start, stop, bool(kind[start] == 1)


def _blocks(extent: Extent, start: int, stop: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Bytes start:stop of a dataset, block by block, each with its position; a block is good until the next.

    Raises:
        OutputError: the file ends before.
        OSError: the disk cannot read.
    """
    # A descriptor of its own for each run: the kernel follows, and reads ahead of, one place in an open file.
    descriptor = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _advise_sequential(descriptor)
        for position in range(start, stop, len(buffer)):
            block = buffer[: min(len(buffer), stop - position)]
            _read(descriptor, block, extent.offset + position, extent.path)
            yield position, block
    finally:
        os.close(descriptor)


def _read(descriptor: int, block: memoryview, offset: int, path: str) -> None:
    while block:
        got = os.preadv(descriptor, [block], offset)
        if got == 0:
            raise OutputError(f"{path} ends before them", "restore it from a copy")
        block, offset = block[got:], offset + got


def _advise_sequential(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
