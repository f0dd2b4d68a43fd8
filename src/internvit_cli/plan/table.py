"""What is known of every image before its pixels are read, as columns: a million images cost some hundred megabytes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status

if TYPE_CHECKING:
    import hashlib
    import os
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

COLUMN_DTYPES: dict[str, str] = {
    "source": "<u4",
    "width": "<u4",
    "height": "<u4",
    "orientation": "|u1",
    "columns": "<u2",
    "rows": "<u2",
    "thumbnail": "|u1",
    "file_size": "<u8",
    "file_mtime_ns": "<i8",
}
"""The columns that are fixed when a shard is created, beside key and tile_offset; the names are those of the file."""

_LATEST_NS = (1 << 63) - 1


def modified_ns(status: os.stat_result) -> int:
    """A file's time of modification as the column has it, nanoseconds since 1970.

    A filesystem may hold years that the column does not: they count as its last moment, the year 2262, or its first.
    """
    return max(-_LATEST_NS - 1, min(status.st_mtime_ns, _LATEST_NS))


@dataclass(frozen=True, slots=True)
class ImageTable:
    """One row an image, as parallel columns.

    An image whose header could not be read has width 0, no tiles, and a status other than pending.
    """

    keys: Sequence[bytes]
    """The images' names, [n]."""
    source: NDArray[Any]
    """Index into the listing's sources, [n] uint32."""
    width: NDArray[Any]
    """After orientation, pixels, [n] uint32."""
    height: NDArray[Any]
    orientation: NDArray[Any]
    """EXIF orientation to apply, 1 to 8, [n] uint8; 0 where the header could not be read."""
    columns: NDArray[Any]
    """Tiles side by side, [n] uint16."""
    rows: NDArray[Any]
    """Tiles above each other, [n] uint16."""
    thumbnail: NDArray[Any]
    """1 where a thumbnail follows the grid's tiles, [n] uint8."""
    file_size: NDArray[Any]
    """Bytes, [n] uint64."""
    file_mtime_ns: NDArray[Any]
    """Time of modification, nanoseconds since 1970, [n] int64."""
    tile_offset: NDArray[Any]
    """Tiles of image i are tile rows tile_offset[i]:tile_offset[i+1], [n+1] uint64."""
    status: NDArray[Any]
    """`Status` numbers, [n] uint8: what is known when the table is made."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tiles(self) -> int:
        """Number of tile rows of all images together."""
        return int(self.tile_offset[-1])

    @property
    def tile_counts(self) -> NDArray[Any]:
        """Tiles of each image, [n] uint64."""
        return np.diff(self.tile_offset)

    @classmethod
    def build(cls, keys: Sequence[bytes], status: NDArray[Any], columns: dict[str, NDArray[Any]]) -> ImageTable:
        """A table from its columns; the tile offsets follow from grid and thumbnail."""
        typed = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMN_DTYPES.items()}
        offset = tile_offsets(typed["columns"], typed["rows"], typed["thumbnail"])
        return cls(keys=keys, status=np.asarray(status, np.uint8), tile_offset=offset, **typed)

    def take(self, rows: NDArray[Any]) -> ImageTable:
        """The named rows, in the order named, with tile offsets of their own."""
        columns = {name: getattr(self, name)[rows] for name in COLUMN_DTYPES}
        return ImageTable.build([self.keys[row] for row in rows.tolist()], self.status[rows], columns)

    def rows_without(self, keys: Collection[bytes]) -> NDArray[np.int64]:
        """Return the numbers of the rows whose keys are not among those given, ascending, [k] int64."""
        if not keys:
            return np.arange(len(self), dtype=np.int64)
        return np.array([row for row, key in enumerate(self.keys) if key not in keys], np.int64)

    def with_status(self, status: NDArray[Any]) -> ImageTable:
        """The same images with other statuses, [n] uint8."""
        return replace(self, status=status)

    def with_sources(self, source: NDArray[Any]) -> ImageTable:
        """The same images with other indices of sources, [n]."""
        return replace(self, source=source.astype(COLUMN_DTYPES["source"]))

    def digest_into(self, hasher: hashlib._Hash) -> None:
        """Feed every column that is fixed at creation, so that a damaged index is noticed."""
        lengths = np.fromiter((len(key) for key in self.keys), "<u4", len(self.keys))
        hasher.update(lengths.tobytes())
        for start in range(0, len(self.keys), 65536):
            hasher.update(b"".join(self.keys[start : start + 65536]))
        for name in (*COLUMN_DTYPES, "tile_offset"):
            hasher.update(name.encode())
            hasher.update(np.ascontiguousarray(getattr(self, name)).data)


def tile_offsets(columns: NDArray[Any], rows: NDArray[Any], thumbnail: NDArray[Any]) -> NDArray[Any]:
    """First tile row of every image, and behind the last one the number of all, [n+1] uint64; from [n] grids."""
    counts = columns.astype(np.uint64) * rows + thumbnail
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts, dtype=np.uint64)]).astype("<u8")


def concatenate(tables: Iterable[ImageTable]) -> ImageTable:
    """All rows of several tables, one after another."""
    parts = list(tables)
    if len(parts) == 1:
        return parts[0]
    keys = [key for part in parts for key in part.keys]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMN_DTYPES}
    return ImageTable.build(keys, np.concatenate([part.status for part in parts]), columns)


def count_statuses(status: NDArray[Any]) -> dict[Status, int]:
    """How many images have each status, for the statuses that occur."""
    numbers, counts = np.unique(status, return_counts=True)
    return {Status(int(number)): int(count) for number, count in zip(numbers, counts, strict=True)}


assert {field.name for field in fields(ImageTable)} >= set(COLUMN_DTYPES)
