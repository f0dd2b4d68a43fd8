"""Reading features back: one view over a single file or a folder of shards, lazily, without torch.

features = open_features("feats.h5")
features["cat.jpg"].visual_tokens   # [tiles, 256, 4096]
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Recipe, Status, Tokens
from internvit_cli.errors import InternvitError, OutputError
from internvit_cli.storage.durable import read_exactly
from internvit_cli.storage.layout import PARTIAL, POOLED, TILE_POOLED, Extent, decode_values, stored_recipe
from internvit_cli.storage.output import MANIFEST, FinishedShard, Output, file_identity, load_shard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.table import ImageTable

COLUMN_MAJOR = "v1"


class SkippedImageError(InternvitError):
    """An image that has no features; the message gives the reason."""


@dataclass(frozen=True)
class ImageFeatures:
    """One image's row. Arrays are read from the disk when they are asked for."""

    key: str
    status: Status
    width: int
    """After orientation, pixels."""
    height: int
    grid: tuple[int, int]
    """(columns, rows) of tiles."""
    has_thumbnail: bool
    """Whether the last tile is the thumbnail."""
    _shard: OpenShard
    _row: int

    @property
    def tiles(self) -> int:
        """Number of tiles, the thumbnail included."""
        return self.grid[0] * self.grid[1] + self.has_thumbnail

    @property
    def pooled(self) -> NDArray[Any]:
        """One vector of the whole image, [d] float32."""
        self._check(POOLED)
        vector: NDArray[Any] = self._shard.rows(POOLED, self._row, self._row + 1)[0]
        return vector

    @property
    def visual_tokens(self) -> NDArray[Any]:
        """[tiles, 256, 4 * hidden_size], each tile's tokens row by row; bfloat16 comes as float32."""
        return self._tokens(Tokens.VISUAL)

    @property
    def patch_tokens(self) -> NDArray[Any]:
        """[tiles, 1024, hidden_size], row by row."""
        return self._tokens(Tokens.PATCH)

    @property
    def projected_tokens(self) -> NDArray[Any]:
        """[tiles, 256, llm_hidden_size], row by row."""
        return self._tokens(Tokens.PROJECTED)

    @property
    def tokens(self) -> NDArray[Any]:
        """The tokens of whichever kind the file holds."""
        return self._tokens(Tokens(self._shard.recipe.tokens))

    @property
    def tile_pooled(self) -> NDArray[Any]:
        """One vector a tile, [tiles, d] float32."""
        return self._tile_rows(TILE_POOLED)

    def _tokens(self, kind: Tokens) -> NDArray[Any]:
        stored = self._tile_rows(kind.dataset)
        values = decode_values(stored, self._shard.recipe.store_dtype)
        if kind is not Tokens.PATCH and self._shard.recipe.token_order == COLUMN_MAJOR:
            side = math.isqrt(values.shape[1])
            by_column = values.reshape(-1, side, side, values.shape[2])
            values = by_column.swapaxes(1, 2).reshape(values.shape)
        return values

    def _tile_rows(self, name: str) -> NDArray[Any]:
        self._check(name)
        offset = self._shard.table.tile_offset
        return self._shard.rows(name, int(offset[self._row]), int(offset[self._row + 1]))

    def _check(self, name: str) -> None:
        if self.status is not Status.DONE:
            raise SkippedImageError(f"{self.key!r} has no features: {self.status.word}", "features[key].status tells")
        if name not in self._shard.extents:
            raise OutputError(f"the file holds no {name}", f"it holds {', '.join(sorted(self._shard.extents))}")


class Features(Mapping[str, ImageFeatures]):
    """The images of a feature file or folder, by key, in the order in which they are stored."""

    def __init__(self, path: str, shards: list[OpenShard]) -> None:
        self.path = path
        self._shards = shards

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __getitem__(self, key: str) -> ImageFeatures:
        shard, row = self._rows[key]
        return shard.image(key, row)

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the newest shard: model, recipe, versions."""
        return dict(self._shards[-1].attributes) if self._shards else {}

    @property
    def tables(self) -> list[ImageTable]:
        """The index of every shard."""
        return [shard.table for shard in self._shards]

    def pooled_matrix(self) -> tuple[list[str], NDArray[Any]]:
        """Keys and pooled vectors, [n, d] float32, of all images that have one."""
        done = [(key, shard, row) for key, (shard, row) in self._rows.items() if shard.table.status[row] == Status.DONE]
        matrices = {id(shard): shard.rows(POOLED, 0, len(shard.table)) for shard in self._shards}
        vectors = [matrices[id(shard)][row] for _, shard, row in done]
        return [key for key, _, _ in done], np.stack(vectors) if vectors else np.empty((0, 0), np.float32)

    @cached_property
    def _rows(self) -> dict[str, tuple[OpenShard, int]]:
        """Where each key's row is; a key of a later shard replaces an earlier one's."""
        return {
            os.fsdecode(key): (shard, row)
            for shard in self._shards
            for row, key in enumerate(shard.table.keys)
            if key not in shard.superseded_keys
        }


class OpenShard:
    """A shard's index in memory and its rows on disk."""

    def __init__(self, shard: FinishedShard) -> None:
        self._found = shard
        self.table = shard.stored.table
        self.attributes = shard.stored.attributes
        self.superseded_keys = shard.superseded_keys

    @cached_property
    def recipe(self) -> Recipe:
        """What its rows were made with."""
        return stored_recipe(self.attributes, self._found.path)

    @cached_property
    def extents(self) -> dict[str, Extent]:
        """Where the rows of each dataset lie."""
        return self._found.backend.extents(self._found.path)

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of one dataset as stored, [stop - start, ...]."""
        extent = self.extents[name]
        size = extent.spec.row_bytes
        # Opened for each read: a reader that is pickled or forked into workers shares no file position and no handle.
        descriptor = self._open(extent.path)
        try:
            data = read_exactly(descriptor, (stop - start) * size, extent.offset + start * size, extent.path)
        finally:
            os.close(descriptor)
        return np.frombuffer(data, extent.spec.dtype).reshape(stop - start, *extent.spec.shape[1:])

    def _open(self, path: str) -> int:
        """A descriptor of one of the shard's files, and of no other that has its name by now.

        Raises:
            OutputError: a later run has replaced the file: this index says nothing of the new one's rows.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise _replaced(path) from None
        identity = file_identity(path, os.fstat(descriptor))
        if self._found.files.get(path, identity) != identity:
            os.close(descriptor)
            raise _replaced(path)
        return descriptor

    def image(self, key: str, row: int) -> ImageFeatures:
        """One row, by number."""
        table = self.table
        return ImageFeatures(
            key=key,
            status=Status(int(table.status[row])),
            width=int(table.width[row]),
            height=int(table.height[row]),
            grid=(int(table.columns[row]), int(table.rows[row])),
            has_thumbnail=bool(table.thumbnail[row]),
            _shard=self,
            _row=row,
        )


def _replaced(path: str) -> OutputError:
    return OutputError(f"{path} was replaced after it was opened", "open the features again")


def open_features(path: str | os.PathLike[str]) -> Features:
    """Open a feature file (`feats.h5`, also a `.partial` one) or a folder of shards (`feats/`).

    Raises:
        OutputError: there is nothing there, or it is damaged, or of a newer format.
    """
    name = os.fspath(path).rstrip("/")
    return Features(name, [OpenShard(shard) for shard in find_shards(name)])


def find_shards(path: str) -> list[FinishedShard]:
    """The shards at a path that a user names: finished ones, or the partial file itself."""
    if not os.path.exists(path):
        partial = path + PARTIAL
        hint = (
            f"the run that makes it has not finished: open {partial}" if os.path.exists(partial) else "check the path"
        )
        raise OutputError(f"{path} is not there", hint)
    if os.path.isdir(path):
        shards = Output(path).finished()
        if not shards:
            raise OutputError(
                f"{path} has no finished shard ({MANIFEST} names none)",
                "is it a feature folder, and has its run finished?",
            )
        return shards
    output = Output(path.removesuffix(PARTIAL))
    if not output.is_file:
        raise OutputError(
            f"{path} is not a feature file",
            "feature files end in .h5 or .hdf5; feature folders are opened by their folder",
        )
    return [load_shard("", path, output.backend)]
