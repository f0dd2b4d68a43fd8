"""Index the rows of shards that count, and provide their pooled vectors as one array-like."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.storage.format.layout import POOLED, dataset_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from internvit_cli.storage.read.image import ImageFeatures
    from internvit_cli.storage.read.shard import OpenShard


class RowIndex:
    """The rows of several shards that count, in order; for each key, the row of the latest shard."""

    def __init__(self, shards: list[OpenShard]) -> None:
        self.shards = shards
        self._found: dict[bytes, int] | None = None
        if len(shards) == 1 and not shards[0].superseded_keys:
            self.shard_of = np.zeros(len(shards[0].table), np.int32)
            self.row_of = np.arange(len(shards[0].table))
        else:
            self._merge()

    def __len__(self) -> int:
        return len(self.row_of)

    def key(self, position: int) -> bytes:
        """Return the key at a position."""
        keys = self.shards[int(self.shard_of[position])].table.keys
        return keys[int(self.row_of[position])]

    def image(self, position: int, layer: int | None) -> ImageFeatures:
        """Return the image at a position, with the arrays of an earlier layer; None means the main layer."""
        return self.shards[int(self.shard_of[position])].image(int(self.row_of[position]), layer)

    def close(self) -> None:
        """Stop reading rows."""
        for shard in self.shards:
            shard.close()

    def find(self, key: bytes) -> int | None:
        """Return the position of a key; None if no image has it."""
        if self._found is None:
            self._found = dict(zip(self.shards[0].table.keys, range(len(self)), strict=True))
        return self._found.get(key)

    def column(self, name: str) -> NDArray[Any]:
        """Return a column over all shards, [n]."""
        if len(self.shards) == 1:
            column: NDArray[Any] = getattr(self.shards[0].table, name)[self.row_of]
            return column
        values = np.zeros(len(self), getattr(self.shards[0].table, name).dtype if self.shards else np.int64)
        for number, shard in enumerate(self.shards):
            is_here = self.shard_of == number
            values[is_here] = getattr(shard.table, name)[self.row_of[is_here]]
        return values

    def _merge(self) -> None:
        most = sum(len(shard.table) for shard in self.shards)
        self.shard_of, self.row_of = np.zeros(most, np.int32), np.zeros(most, np.int64)
        self._found = {}
        for number, shard in enumerate(self.shards):
            for row in shard.live_rows.tolist():
                place = self._found.setdefault(shard.table.keys[row], len(self._found))
                self.shard_of[place], self.row_of[place] = number, row
        self.shard_of, self.row_of = self.shard_of[: len(self._found)], self.row_of[: len(self._found)]

    def __getstate__(self) -> dict[str, Any]:
        # The lookup table of keys is built again on demand, unless merging needs it.
        return self.__dict__ | ({"_found": None} if len(self.shards) == 1 else {})


class PooledVectors:
    """Pooled vectors of many images as an array-like [n, d] float32 that is read on access.

    Slices that are contiguous in one shard are read-only views of the mapped file; others are copies.
    """

    def __init__(self, index: RowIndex, positions: NDArray[Any], layer: int | None) -> None:
        self._index = index
        self._positions = positions
        self._layer = layer
        self._dataset = name = dataset_of(POOLED, layer)
        self._mapped: dict[int, NDArray[Any]] = {}
        widths = [shard.extents[name].spec.shape[1] for shard in index.shards if name in shard.extents]
        self.shape = (len(positions), widths[0] if widths else 0)
        self.dtype = np.dtype("<f4")

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {list(self.shape)} {self.dtype}>"

    @property
    def keys(self) -> list[str]:
        """The keys of the images, [n]."""
        return [self.key(number) for number in range(len(self))]

    def key(self, number: int) -> str:
        """Return the key of a vector's image."""
        return os.fsdecode(self._index.key(int(self._positions[number])))

    def image(self, number: int) -> ImageFeatures:
        """Return the image of a vector."""
        return self._index.image(int(self._positions[number]), self._layer)

    def __getitem__(self, wanted: Any) -> NDArray[Any]:
        """Return [d] for an index, [k, d] for a slice or several indices."""
        if isinstance(wanted, (int, np.integer)):
            vector: NDArray[Any] = self[np.array([wanted])][0]
            return vector
        positions = self._positions[wanted]
        shard_of, row_of = self._index.shard_of[positions], self._index.row_of[positions]
        numbers = np.unique(shard_of)
        if len(numbers) == 1:
            return self._rows(int(numbers[0]), row_of)
        vectors = np.empty((len(positions), self.shape[1]), np.float32)
        for number in numbers.tolist():
            is_here = shard_of == number
            vectors[is_here] = self._rows(number, row_of[is_here])
        return vectors

    def blocks(self, most_bytes: int = 64 << 20) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield all vectors in order in blocks: the index of the first one, and [k, d] float32."""
        size = max(1, most_bytes // max(1, 4 * self.shape[1]))
        for start in range(0, len(self), size):
            yield start, self[start : start + size]

    def _rows(self, shard: int, rows: NDArray[Any]) -> NDArray[Any]:
        self._index.shards[shard].require_open()
        if shard not in self._mapped:
            self._mapped[shard] = self._index.shards[shard].mapped(self._dataset)
        first, last = int(rows[0]), int(rows[-1])
        is_run = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        return self._mapped[shard][first : last + 1] if is_run else self._mapped[shard][rows]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}
