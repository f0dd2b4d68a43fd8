"""Features that were just computed, behind the same `ImageFeatures` as those that are read from a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Recipe, Skipped, Status
from internvit_cli.plan.tiling import Grid
from internvit_cli.storage.read.image import ImageFeatures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from internvit_cli.decode.direct import TiledPicture


@dataclass(frozen=True, slots=True, eq=False)  # arrays have no one answer to ==
class RowsInMemory:
    """The rows of one image."""

    recipe: Recipe
    arrays: Mapping[str, NDArray[Any]]
    """By dataset, as a file would hold them: pooled [1, d], tiles' rows [tiles, ...]."""
    path: bytes | None
    sha256: bytes
    size: int = 0
    """Bytes of the file."""
    model_layers: int | None = None
    """How many blocks the model has."""

    @property
    def stored(self) -> tuple[str, ...]:
        """The datasets that there are."""
        return tuple(self.arrays)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a dataset."""
        return self.arrays[name].shape[1:]

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of one dataset, copied."""
        rows: NDArray[Any] = self.arrays[name][start:stop].copy()
        return rows

    def picture(self, row: int) -> bytes | None:  # noqa: ARG002 - there is one
        """The file that the image came from."""
        return self.path

    def digest(self, row: int) -> bytes:  # noqa: ARG002
        """SHA-256 of that file."""
        return self.sha256

    def file_size(self, row: int) -> int:  # noqa: ARG002
        """Bytes of that file."""
        return self.size


@dataclass(frozen=True, slots=True)
class ImageName:
    """Which image it is."""

    key: str
    path: bytes | None
    """The file, absolute; None for a picture that never was one."""


def done_image(
    named: ImageName, recipe: Recipe, tiled: TiledPicture, arrays: Mapping[str, NDArray[Any]], model_layers: int
) -> ImageFeatures:
    """An image with features."""
    store = RowsInMemory(recipe, arrays, named.path, tiled.digest, tiled.file_size, model_layers)
    size = tiled.width, tiled.height, tiled.orientation
    return ImageFeatures(named.key, Status.DONE, *size, tiled.grid, tiled.has_thumbnail, store, 0, 0)


def skipped_image(named: ImageName, recipe: Recipe, skipped: Skipped) -> ImageFeatures:
    """An image without features, which says why."""
    store = RowsInMemory(recipe, {}, named.path, bytes(32))
    return ImageFeatures(named.key, skipped.status, 0, 0, 0, Grid(0, 0), False, store, 0, 0, reason=skipped.message)


def absolute(path: str | bytes | os.PathLike[Any]) -> bytes:
    """A path as the names of files are kept: absolute bytes."""
    return os.path.abspath(os.fsencode(path))
