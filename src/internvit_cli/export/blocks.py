"""Read rows block by block, and check the CRC of each image before its rows are passed on."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.errors import OutputError
from internvit_cli.runtime.crc import crc32
from internvit_cli.storage.format.layout import feature_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from internvit_cli.export.selection import RowSelection
    from internvit_cli.storage.format.layout import DatasetSpec

BLOCK_BYTES = 8 << 20
"""Bytes per block; a larger image is a block of its own."""


@dataclass(frozen=True)
class RowSpecs:
    """Specifications of some datasets, in the order of an image's CRC."""

    datasets: tuple[DatasetSpec, ...]
    """The datasets; their lengths do not matter."""

    @cached_property
    def specs(self) -> dict[str, DatasetSpec]:
        """The specifications by name of the dataset."""
        return {spec.name: spec for spec in self.datasets}

    def is_per_tile(self, name: str) -> bool:
        """Return whether a dataset has one row per tile instead of one per image."""
        return feature_name(name).is_per_tile

    def image_bytes(self, tiles: NDArray[Any]) -> NDArray[Any]:
        """Return the bytes of images with the given numbers of tiles, [n] int64."""
        per_image = sum(spec.row_bytes for name, spec in self.specs.items() if not self.is_per_tile(name))
        per_tile = sum(spec.row_bytes for name, spec in self.specs.items() if self.is_per_tile(name))
        sizes: NDArray[Any] = per_image + tiles.astype(np.int64) * per_tile
        return sizes


@dataclass(frozen=True, eq=False)
class RowBlock:
    """Consecutive images of a selection: all done, with their rows, or all skipped, without rows."""

    first: int
    """The position of the first image in the selection."""
    is_done: bool
    tiles: NDArray[Any]
    """Offsets, [k + 1] int64; image i has the tile rows tiles[i]:tiles[i + 1] of this block."""
    arrays: Mapping[str, NDArray[Any]]
    """Stored rows by dataset: [k, ...] with one row per image, [tiles, ...] with one row per tile."""
    rows: RowSpecs

    def __len__(self) -> int:
        return len(self.tiles) - 1

    @property
    def nbytes(self) -> int:
        """The size of the rows in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    def take(self, start: int, stop: int) -> RowBlock:
        """Return the images from `start` up to `stop`."""
        arrays = {name: self._cut(name, start, stop) for name in self.arrays}
        tiles = self.tiles[start : stop + 1]
        return RowBlock(self.first + start, self.is_done, tiles - tiles[0], arrays, self.rows)

    def only(self, rows: RowSpecs) -> RowBlock:
        """Return the same images with only the given datasets."""
        return replace(self, arrays={name: self.arrays[name] for name in rows.specs}, rows=rows)

    def image(self, number: int) -> dict[str, NDArray[Any]]:
        """Return the rows of an image by dataset: [...] with one row per image, [tiles, ...] with one row per tile."""
        cut = {name: self._cut(name, number, number + 1) for name in self.arrays}
        return {name: rows if self.rows.is_per_tile(name) else rows[0] for name, rows in cut.items()}

    def checksum(self, number: int) -> int:
        """Return the CRC-32 of an image's rows."""
        checksum = 0
        for name in self.arrays:
            checksum = crc32(self._cut(name, number, number + 1).data, checksum)
        return checksum

    def _cut(self, name: str, start: int, stop: int) -> NDArray[Any]:
        if self.rows.is_per_tile(name):
            start, stop = int(self.tiles[start]), int(self.tiles[stop])
        return self.arrays[name][start:stop]


class _RowSpan(NamedTuple):
    """Positions whose rows are contiguous in one shard."""

    start: int
    stop: int


def read_blocks(
    selection: RowSelection, *, is_index: bool = False, block_bytes: int = BLOCK_BYTES
) -> Iterator[RowBlock]:
    """Yield all images in order, reading one block ahead, in memory of a few blocks.

    Args:
        selection: The images to read.
        is_index: Whether to yield images without reading their rows.
        block_bytes: Bytes of rows per block.

    Raises:
        OutputError: The rows of an image are not what was committed; the message names the image.
    """
    rows = RowSpecs(selection.shape.row_datasets(1, 1))
    spans = _spans(selection, rows, block_bytes)
    if is_index:
        yield from (RowBlock(start, False, _tiles(selection, start, stop), {}, rows) for start, stop in spans)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        waiting = None
        for span in spans:
            following = reader.submit(_read, selection, rows, span)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


def _spans(selection: RowSelection, rows: RowSpecs, block_bytes: int) -> Iterator[_RowSpan]:
    same_run = (np.diff(selection.shard_of) == 0) & (np.diff(selection.row_of) == 1)
    same_run &= np.diff(selection.is_done.astype(np.int8)) == 0
    edges = [0, *(np.flatnonzero(~same_run) + 1).tolist(), len(selection)]
    total = np.concatenate([[0], np.cumsum(rows.image_bytes(selection.table.tile_counts))])
    for start, stop in pairwise(edges):
        first = start
        while first < stop:
            last = max(first + 1, int(np.searchsorted(total, total[first] + block_bytes, "right")) - 1)
            yield _RowSpan(first, min(last, stop))
            first = min(last, stop)


def _read(selection: RowSelection, rows: RowSpecs, span: _RowSpan) -> RowBlock:
    tiles = _tiles(selection, span.start, span.stop)
    if not selection.is_done[span.start]:
        return RowBlock(span.start, False, tiles, {}, rows)
    shard = selection.shards[int(selection.shard_of[span.start])]
    row = int(selection.row_of[span.start])
    first_tile = int(shard.table.tile_offset[row])
    arrays = {
        name: shard.rows(name, first_tile, first_tile + int(tiles[-1]))
        if rows.is_per_tile(name)
        else shard.rows(name, row, row + len(tiles) - 1)
        for name in rows.specs
    }
    block = RowBlock(span.start, True, tiles, arrays, rows)
    _check(selection, block, shard.path)
    return block if selection.is_whole else block.only(RowSpecs(selection.written_datasets()))


def _tiles(selection: RowSelection, start: int, stop: int) -> NDArray[Any]:
    """Return the offsets of the tiles of consecutive images, [k + 1] int64."""
    offsets = selection.table.tile_offset[start : stop + 1].astype(np.int64)
    starts: NDArray[Any] = offsets - offsets[0]
    return starts


def _check(selection: RowSelection, block: RowBlock, path: str) -> None:
    for number in range(len(block)):
        position = block.first + number
        if block.checksum(number) != int(selection.checksums[position]):
            raise OutputError(
                f"{path} is damaged: the rows of {os.fsdecode(selection.table.keys[position])!r} are not what was "
                "committed",
                f"internvit verify {path} lists all such rows; restore the file, or extract it again",
            )
