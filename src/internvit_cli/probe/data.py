"""Read the vectors and tokens of labelled images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Tokens
from internvit_cli.errors import OutputError, UsageError, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

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


@dataclass(eq=False)
class TokenReader:
    """Reads the tokens of the view of each image that shows it whole, which are as many for every image."""

    features: Features
    device: str
    _kept: dict[int, NDArray[Any]] = field(default_factory=dict)
    _is_kept: bool = False

    def __post_init__(self) -> None:
        check_tokens(self.features)
        first = self.features[0]
        tokens = first.tile_tokens(first.tiles - 1)
        self.width = tokens.shape[1]
        self._is_kept = len(self.features) * tokens.nbytes <= IN_MEMORY_BYTES

    def __call__(self, chosen: NDArray[np.int64]) -> Tensor:
        """Return tokens [k, T, C] float32 on the device."""
        import torch

        return torch.from_numpy(np.stack([self._tokens(number) for number in chosen.tolist()])).to(self.device).float()

    def _tokens(self, number: int) -> NDArray[Any]:
        if number in self._kept:
            return self._kept[number]
        image = self.features[number]
        tokens = np.asarray(image.tile_tokens(image.tiles - 1))
        if self._is_kept:
            self._kept[number] = tokens
        return tokens


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
