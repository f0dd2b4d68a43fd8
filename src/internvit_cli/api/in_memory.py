"""Provide computed features with the same `ImageFeatures` interface as features from a file."""

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


@dataclass(frozen=True, slots=True, eq=False)  # == of arrays has no single answer
class RowsInMemory:
    """The rows of an image in memory."""

    recipe: Recipe
    arrays: Mapping[str, NDArray[Any]]
    """Rows by dataset, as in a file: pooled [1, d], rows per tile [tiles, ...]."""
    path: bytes | None
    sha256: bytes
    size: int = 0
    """The size of the file in bytes."""
    model_layers: int | None = None
    """The number of blocks of the model."""

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of the datasets."""
        return tuple(self.arrays)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a row of a dataset."""
        return self.arrays[name].shape[1:]

    def rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return a copy of some rows of a dataset."""
        rows: NDArray[Any] = self.arrays[name][start:stop].copy()
        return rows

    def picture(self, row: int) -> bytes | None:  # noqa: ARG002 - there is only one image
        """Return the path of the image's file."""
        return self.path

    def digest(self, row: int) -> bytes:  # noqa: ARG002
        """Return the SHA-256 of the file."""
        return self.sha256

    def file_size(self, row: int) -> int:  # noqa: ARG002
        """Return the size of the file in bytes."""
        return self.size


@dataclass(frozen=True, slots=True)
class ImageName:
    """The key and the path of an image."""

    key: str
    path: bytes | None
    """The absolute path of the file; None for a picture without a file."""


def done_image(
    named: ImageName, recipe: Recipe, tiled: TiledPicture, arrays: Mapping[str, NDArray[Any]], model_layers: int
) -> ImageFeatures:
    """Return an image with features."""
    store = RowsInMemory(recipe, arrays, named.path, tiled.digest, tiled.file_size, model_layers)
    size = tiled.width, tiled.height, tiled.orientation
    return ImageFeatures(named.key, Status.DONE, *size, tiled.grid, tiled.has_thumbnail, store, 0, 0)


def skipped_image(named: ImageName, recipe: Recipe, skipped: Skipped) -> ImageFeatures:
    """Return an image without features, with the reason."""
    store = RowsInMemory(recipe, {}, named.path, bytes(32))
    return ImageFeatures(named.key, skipped.status, 0, 0, 0, Grid(0, 0), False, store, 0, 0, reason=skipped.message)


def absolute(path: str | bytes | os.PathLike[Any]) -> bytes:
    """Return a path as absolute bytes."""
    return os.path.abspath(os.fsencode(path))
