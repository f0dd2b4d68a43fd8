"""Read the rows of a shard, whose index is in memory."""

from __future__ import annotations

import mmap
import os
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Recipe, Status
from internvit_cli.errors import ClosedError, OutputError
from internvit_cli.plan.tiling import Grid
from internvit_cli.storage.durable import read_into, too_short
from internvit_cli.storage.format.layout import MODEL_LAYERS, Extent, crc_order, recorded_sources, stored_recipe
from internvit_cli.storage.read.image import ImageFeatures
from internvit_cli.storage.same_file import open_same

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from internvit_cli.sources.interface import Source
    from internvit_cli.storage.format.layout import DatasetSpec
    from internvit_cli.storage.output import FinishedShard


class OpenShard:
    """A shard that is open for reading, with its index in memory."""

    def __init__(self, shard: FinishedShard) -> None:
        self._found = shard
        self.table = shard.stored.table
        self.attributes = shard.stored.attributes
        self.superseded_keys = shard.superseded_keys
        self._is_closed = False

    @property
    def live_rows(self) -> NDArray[Any]:
        """The indices of the rows that count, ascending, [k] int64."""
        return self._found.live_rows

    @property
    def path(self) -> str:
        """The path of its file, or the common prefix of its files."""
        return self._found.path

    @property
    def identity(self) -> list[tuple[int, ...]]:
        """The identity of each file, which differs from that of later files with the same names."""
        return list(self._found.files.values())

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe of its rows."""
        return stored_recipe(self.attributes, self._found.path)

    @cached_property
    def sources(self) -> list[Source]:
        """The folders to which its keys are relative."""
        return recorded_sources(self.attributes, self._found.path)

    @cached_property
    def extents(self) -> dict[str, Extent]:
        """The place of the rows of each dataset."""
        return self._found.backend.extents(self._found.path)

    @property
    def specs(self) -> Mapping[str, DatasetSpec]:
        """The specifications of its datasets, including those without rows."""
        return self._found.stored.specs

    @cached_property
    def stored(self) -> tuple[str, ...]:
        """The names of datasets of features that have rows."""
        return crc_order(self.extents)

    @property
    def model_layers(self) -> int | None:
        """The number of blocks of the model; None if it is not recorded."""
        return self.attributes.get(MODEL_LAYERS)

    @cached_property
    def digests(self) -> NDArray[Any]:
        """The SHA-256 of each picture's file, [n, 32] uint8; zeros if there is none."""
        return self._found.backend.commit_records(self._found.path)[0]

    @property
    def checksums(self) -> NDArray[Any]:
        """The CRC-32 of each image's rows, [n] uint32."""
        return self._found.backend.commit_records(self._found.path)[1]

    def close(self) -> None:
        """Stop reading; no file is open between reads."""
        self._is_closed = True

    def require_open(self) -> None:
        """Raise a ClosedError after `close`."""
        if self._is_closed:
            raise ClosedError(f"the features of {self.path} were closed", "open them again, or read before closing")

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a row of a dataset."""
        return self.extents[name].spec.shape[1:]

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a dataset as stored, [stop - start, ...]."""
        self.require_open()
        return read_rows(self.extents[name], start, stop, self._found.files)

    def mapped(self, name: str) -> NDArray[Any]:
        """Return all rows of a dataset as stored, memory-mapped and read-only, even if the file is replaced later."""
        extent = self.extents[name]
        descriptor = self._open(extent.path)
        try:
            data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise OutputError(f"{extent.path} cannot be mapped: {error}", "copy it to another filesystem") from error
        finally:
            os.close(descriptor)
        if extent.offset + extent.spec.nbytes > len(data):
            raise too_short(extent.path)
        count = extent.spec.nbytes // np.dtype(extent.spec.dtype).itemsize
        return np.frombuffer(data, extent.spec.dtype, count, extent.offset).reshape(extent.spec.shape)

    def picture(self, row: int) -> bytes:
        """Return the path of an image's file."""
        return self.sources[int(self.table.source[row])].path(self.table.keys[row])

    def digest(self, row: int) -> bytes:
        """Return the SHA-256 of the file, 32 bytes; zeros if there is none."""
        return bytes(self.digests[row].tobytes())

    def file_size(self, row: int) -> int:
        """Return the size of the file in bytes when it was encoded."""
        return int(self.table.file_size[row])

    def image(self, row: int, layer: int | None = None) -> ImageFeatures:
        """Return the image of a row, with the arrays of an earlier layer; None means the main layer."""
        self.require_open()
        table = self.table
        return ImageFeatures(
            key=os.fsdecode(table.keys[row]),
            status=Status(int(table.status[row])),
            width=int(table.width[row]),
            height=int(table.height[row]),
            orientation=int(table.orientation[row]),
            grid=Grid(int(table.columns[row]), int(table.rows[row])),
            has_thumbnail=bool(table.thumbnail[row]),
            _store=self,
            _row=row,
            _first_tile=int(table.tile_offset[row]),
            _layer=layer,
        )

    def _open(self, path: str) -> int:
        """Open one of the shard's files, and no later file with its name; return the descriptor.

        Raises:
            ReplacedError: A later run has replaced the file.
            ClosedError: The shard was closed.
        """
        self.require_open()
        return open_same(path, self._found.files)


def read_rows(extent: Extent, start: int, stop: int, files: Mapping[str, tuple[int, ...]]) -> NDArray[Any]:
    """Return rows of a dataset as stored, [stop - start, ...].

    The file is opened for each read, so that readers in forked or spawned workers share no file position and no handle.

    Args:
        extent: The place of the dataset.
        start: The first row.
        stop: The row after the last.
        files: The `file_identity` of each file when the index was read.

    Raises:
        ReplacedError: A later run has replaced the file.
        OutputError: The file ends before the rows do.
    """
    size = (stop - start) * extent.spec.row_bytes
    data = np.empty(size, np.uint8)  # unlike bytearray, it is not filled with zeros first
    descriptor = open_same(extent.path, files)
    try:
        read_into(descriptor, data, extent.offset + start * extent.spec.row_bytes, extent.path)
    finally:
        os.close(descriptor)
    return data.view(extent.spec.dtype).reshape(stop - start, *extent.spec.shape[1:])
