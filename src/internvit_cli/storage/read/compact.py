"""Hold what is needed to read the images of a shard in few bytes per image, for streams over large folders."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Recipe, Status
from internvit_cli.plan.tiling import Grid
from internvit_cli.storage.durable import read_ahead
from internvit_cli.storage.format.layout import MODEL_LAYERS, crc_order, feature_name, stored_recipe
from internvit_cli.storage.read.image import ImageFeatures
from internvit_cli.storage.read.shard import read_rows
from internvit_cli.storage.same_file import open_same

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from internvit_cli.storage.output import FinishedShard


class CompactShard:
    """The images with features of a shard: their keys, grids, and the places of their rows, and nothing else.

    Per image it takes 21 bytes and those of the key. Digests, sizes of pictures and paths are not held.
    """

    def __init__(self, shard: FinishedShard) -> None:
        """Keep what is needed of a shard, whose own index may be dropped then."""
        table, self.path = shard.stored.table, shard.path
        rows = shard.live_rows
        rows = rows[table.status[rows] == Status.DONE]
        self.extents = shard.backend.extents(shard.path)
        self.stored = crc_order(self.extents)
        """The names of datasets of features that have rows."""
        self.recipe: Recipe = stored_recipe(shard.stored.attributes, shard.path)
        self.model_layers: int | None = shard.stored.attributes.get(MODEL_LAYERS)
        self._files = dict(shard.files)
        self._row = rows.astype(np.uint32)
        self._first_tile = table.tile_offset[rows]
        self._columns, self._rows = table.columns[rows], table.rows[rows]
        self._thumbnail = table.thumbnail[rows]
        keys = [table.keys[row] for row in rows.tolist()]
        ends = np.cumsum([0, *map(len, keys)])
        self._key_offset: NDArray[Any] = ends.astype(np.uint32 if ends[-1] < 1 << 32 else np.uint64)
        self._keys = b"".join(keys)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def nbytes(self) -> int:
        """The size of the index in bytes."""
        columns = (self._row, self._first_tile, self._columns, self._rows, self._thumbnail, self._key_offset)
        return len(self._keys) + sum(column.nbytes for column in columns)

    @property
    def identity(self) -> list[tuple[int, ...]]:
        """The identity of each file, which differs from that of later files with the same names."""
        return list(self._files.values())

    def image(self, number: int, layer: int | None) -> ImageFeatures:
        """Return an image by its number among those with features; the size of its picture is not known."""
        key = self._keys[int(self._key_offset[number]) : int(self._key_offset[number + 1])]
        return ImageFeatures(
            key=os.fsdecode(key),
            status=Status.DONE,
            width=0,
            height=0,
            orientation=0,
            grid=Grid(int(self._columns[number]), int(self._rows[number])),
            has_thumbnail=bool(self._thumbnail[number]),
            _store=self,
            _row=int(self._row[number]),
            _first_tile=int(self._first_tile[number]),
            _layer=layer,
        )

    def read_ahead(self, number: int, names: Iterable[str]) -> None:
        """Ask the system to read the rows per tile of an image into its cache, and return at once.

        Args:
            number: The number of the image.
            names: The names of datasets; those with a row per image are left out, because they are small.
        """
        tiles = int(self._columns[number]) * int(self._rows[number]) + int(self._thumbnail[number])
        for name in names:
            if not feature_name(name).is_per_tile:
                continue
            extent = self.extents[name]
            size = extent.spec.row_bytes
            descriptor = open_same(extent.path, self._files)
            try:
                read_ahead(descriptor, tiles * size, extent.offset + int(self._first_tile[number]) * size)
            finally:
                os.close(descriptor)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a row of a dataset."""
        return self.extents[name].spec.shape[1:]

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a dataset as stored, [stop - start, ...]."""
        return read_rows(self.extents[name], start, stop, self._files)

    def picture(self, row: int) -> bytes | None:  # noqa: ARG002 - the index does not have it
        """Return None: paths are not held."""
        return None

    def digest(self, row: int) -> bytes:  # noqa: ARG002
        """Return zeros: digests are not held."""
        return bytes(32)

    def file_size(self, row: int) -> int:  # noqa: ARG002
        """Return 0: sizes of files are not held."""
        return 0
