"""Hold what is known about every image before decoding, as columns; a million images take some hundred MB."""

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

    from internvit_cli.sources.members import FileStatus

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
"""Columns that are fixed when a shard is created, in addition to key and tile_offset, by their names in the file."""

_LATEST_NS = (1 << 63) - 1


def modified_ns(status: FileStatus | os.stat_result) -> int:
    """Return the modification time of a file for the column, in nanoseconds since 1970.

    A filesystem may have times outside the range of the column, which ends in 2262; they become its limits.
    """
    return max(-_LATEST_NS - 1, min(status.st_mtime_ns, _LATEST_NS))


@dataclass(frozen=True, slots=True)
class ImageTable:
    """A table with one row per image, as parallel columns.

    An image whose header could not be read has width 0, no tiles, and a status other than pending.
    """

    keys: Sequence[bytes]
    """The keys of the images, [n]."""
    source: NDArray[Any]
    """Indices into the sources of the listing, [n] uint32."""
    width: NDArray[Any]
    """Widths in pixels after orientation, [n] uint32."""
    height: NDArray[Any]
    orientation: NDArray[Any]
    """EXIF orientations to apply, 1 to 8, [n] uint8; 0 if the header could not be read."""
    columns: NDArray[Any]
    """Columns of the grids, [n] uint16."""
    rows: NDArray[Any]
    """Rows of the grids, [n] uint16."""
    thumbnail: NDArray[Any]
    """1 if a thumbnail follows the tiles of the grid, [n] uint8."""
    file_size: NDArray[Any]
    """File sizes in bytes, [n] uint64."""
    file_mtime_ns: NDArray[Any]
    """Modification times in nanoseconds since 1970, [n] int64."""
    tile_offset: NDArray[Any]
    """Offsets, [n+1] uint64; image i has the tile rows tile_offset[i]:tile_offset[i+1]."""
    status: NDArray[Any]
    """`Status` numbers when the table is made, [n] uint8."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tiles(self) -> int:
        """The number of tile rows of all images."""
        return int(self.tile_offset[-1])

    @property
    def tile_counts(self) -> NDArray[Any]:
        """The number of tiles of each image, [n] uint64."""
        return np.diff(self.tile_offset)

    @classmethod
    def build(cls, keys: Sequence[bytes], status: NDArray[Any], columns: dict[str, NDArray[Any]]) -> ImageTable:
        """Build a table from its columns; the tile offsets follow from grids and thumbnails."""
        typed = {name: np.asarray(columns[name], dtype=dtype) for name, dtype in COLUMN_DTYPES.items()}
        offset = tile_offsets(typed["columns"], typed["rows"], typed["thumbnail"])
        return cls(keys=keys, status=np.asarray(status, np.uint8), tile_offset=offset, **typed)

    def take(self, rows: NDArray[Any]) -> ImageTable:
        """Return the given rows in the given order, with new tile offsets."""
        columns = {name: getattr(self, name)[rows] for name in COLUMN_DTYPES}
        return ImageTable.build([self.keys[row] for row in rows.tolist()], self.status[rows], columns)

    def rows_without(self, keys: Collection[bytes]) -> NDArray[np.int64]:
        """Return the indices of rows whose keys are not among those given, ascending, [k] int64."""
        if not keys:
            return np.arange(len(self), dtype=np.int64)
        return np.array([row for row, key in enumerate(self.keys) if key not in keys], np.int64)

    def with_status(self, status: NDArray[Any]) -> ImageTable:
        """Return the table with other statuses, [n] uint8."""
        return replace(self, status=status)

    def with_sources(self, source: NDArray[Any]) -> ImageTable:
        """Return the table with other indices of sources, [n]."""
        return replace(self, source=source.astype(COLUMN_DTYPES["source"]))

    def digest_into(self, hasher: hashlib._Hash) -> None:
        """Feed every column that is fixed at creation to a hasher, so that a damaged index is noticed."""
        lengths = np.fromiter((len(key) for key in self.keys), "<u4", len(self.keys))
        hasher.update(lengths.tobytes())
        for start in range(0, len(self.keys), 65536):
            hasher.update(b"".join(self.keys[start : start + 65536]))
        for name in (*COLUMN_DTYPES, "tile_offset"):
            hasher.update(name.encode())
            hasher.update(np.ascontiguousarray(getattr(self, name)).data)


def tile_offsets(columns: NDArray[Any], rows: NDArray[Any], thumbnail: NDArray[Any]) -> NDArray[Any]:
    """Return the first tile row of each image, followed by the total, [n+1] uint64, from columns of shape [n]."""
    counts = columns.astype(np.uint64) * rows + thumbnail
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts, dtype=np.uint64)]).astype("<u8")


def concatenate(tables: Iterable[ImageTable]) -> ImageTable:
    """Return all rows of several tables, one table after the other."""
    parts = list(tables)
    if len(parts) == 1:
        return parts[0]
    keys = [key for part in parts for key in part.keys]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMN_DTYPES}
    return ImageTable.build(keys, np.concatenate([part.status for part in parts]), columns)


def count_statuses(status: NDArray[Any]) -> dict[Status, int]:
    """Return the number of images of each status that occurs."""
    numbers, counts = np.unique(status, return_counts=True)
    return {Status(int(number)): int(count) for number, count in zip(numbers, counts, strict=True)}


assert {field.name for field in fields(ImageTable)} >= set(COLUMN_DTYPES)
