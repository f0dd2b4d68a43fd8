"""Read the vectors and tokens of labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Tokens
from internvit_cli.errors import OutputError, UsageError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from internvit_cli.storage.read.image import ImageFeatures
    from internvit_cli.storage.read.reader import Features

IN_MEMORY_BYTES = 2 << 30
"""Tokens of up to this many bytes are kept in memory; more are read again in every epoch."""


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one part, with features and labels."""

    features: Features
    """Images with features."""
    labels: NDArray[np.int64]
    """Their class numbers, [n]."""

    def __len__(self) -> int:
        return len(self.labels)

    def vectors(self) -> NDArray[np.float32]:
        """Return the pooled vectors, [n, d]."""
        return np.array(self.features.vectors()[:], np.float32)

    def take(self, chosen: NDArray[Any]) -> Part:
        """Return some of the images, by a mask or by numbers."""
        return Part(self.features.at(self.features.positions[chosen]), self.labels[chosen])


class ArrayReader:
    """Reads an array per image from the disk, and keeps all of them in memory if they are small enough."""

    def __init__(self, features: Features, read: Callable[[ImageFeatures], NDArray[Any]], nbytes: int) -> None:
        """Say what is read.

        Args:
            features: Images with features.
            read: Reads the array of one image.
            nbytes: The bytes of all arrays together.
        """
        self._features = features
        self._read = read
        self._is_kept = nbytes <= IN_MEMORY_BYTES
        self._kept: dict[int, NDArray[Any]] = {}

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the array of the image with this number; it must not be changed."""
        if number in self._kept:
            return self._kept[number]
        array = self._read(self._features[number])
        if self._is_kept:
            self._kept[number] = array
        return array


class TokenReader:
    """Reads the tokens of the view of each image that shows it whole, which are as many for every image."""

    def __init__(self, features: Features, device: str) -> None:
        check_tokens(features)
        self.device = device
        tokens = _whole_view(features[0])
        self.width = tokens.shape[1]
        # A visual token is four patch tokens side by side.
        self.hidden_size = self.width // 4 if features.recipe.tokens is Tokens.VISUAL else self.width
        self._arrays = ArrayReader(features, _whole_view, len(features) * tokens.nbytes)

    def __call__(self, chosen: NDArray[np.int64]) -> Tensor:
        """Return tokens [k, T, C] float32 on the device."""
        import torch

        return torch.from_numpy(np.stack([self._arrays[number] for number in chosen.tolist()])).to(self.device).float()


def _whole_view(image: ImageFeatures) -> NDArray[Any]:
    return np.asarray(image.tile_tokens(image.tiles - 1))


class MapReader:
    """Reads the tokens of each image at their places on its picture, at the resolution of patches."""

    def __init__(self, features: Features, device: str) -> None:
        first = patch_map(features[0])
        self.device = device
        self.width = first.shape[2]
        tiles = features.column("columns").astype(np.int64) * features.column("rows")
        self.values: NDArray[np.int64] = first.size // tiles[0] * tiles
        """The numbers in each map, [n]."""
        self._arrays = ArrayReader(features, patch_map, first.itemsize * int(self.values.sum()))

    def __call__(self, number: int) -> Tensor:
        """Return the map of an image, [h, w, C] float32 on the device."""
        import torch

        return torch.from_numpy(self._arrays[number]).to(self.device).float()


def patch_map(image: ImageFeatures) -> NDArray[Any]:
    """Return the token map of an image, [h, w, C], with visual tokens taken apart into the 2 x 2 patches they hold.

    A visual token is four patch tokens side by side, so both kinds give the same map.
    """
    tokens = image.token_map()
    if image.recipe.tokens is not Tokens.VISUAL:
        return np.ascontiguousarray(tokens)
    rows, columns, width = tokens.shape
    patches = tokens.reshape(rows, columns, 2, 2, width // 4).swapaxes(1, 2)
    return np.ascontiguousarray(patches).reshape(2 * rows, 2 * columns, width // 4)


def check_tokens(features: Features) -> None:
    """Refuse features from which attention cannot be trained.

    Raises:
        OutputError: There are no tokens.
        UsageError: An image has several tiles and none that shows it whole.
    """
    recipe = features.recipe
    if recipe.tokens is Tokens.NONE:
        raise OutputError(
            f"{features.path} holds no tokens, which an attention probe needs",
            "use --probe knn,linear, or extract with --tokens visual",
        )
    if recipe.thumbnail:
        return
    several = np.flatnonzero(features.column("columns") * features.column("rows") > 1)
    if len(several):
        raise UsageError(
            f"{one_line(features[int(several[0])].key)} has several tiles and no thumbnail, but an attention probe "
            "needs a tile that shows the whole picture",
            "use --probe knn,linear, or extract with thumbnails or --max-tiles 1",
        )
