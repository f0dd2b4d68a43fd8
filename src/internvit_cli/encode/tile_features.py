"""Define the features of tiles on the host, layer by layer, as an encoder returns them; without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Tiles: TypeAlias = "Sequence[NDArray[np.uint8]] | NDArray[np.uint8]"
"""uint8 [S,S,3] RGB each, one by one or as one array [n,S,S,3]."""
UNFIT = {1: "a feature is too large for the stored type", 2: "a feature is not a number"}
"""Messages for the verdicts on tiles that cannot be stored."""


@dataclass(frozen=True, slots=True)
class LayerFeatures:
    """Features of n tiles from one layer."""

    tokens: NDArray[Any] | None
    """[n,T,C] in the stored type, bfloat16 and fp8 as their bits; None if no tokens are stored."""
    pooled: NDArray[Any]
    """[n,d] float32."""
    scales: NDArray[Any] | None = None
    """[n,T] float32 or [n,T,s] float16, for tokens in a stored type that has scales."""

    def take(self, span: slice) -> LayerFeatures:
        """Return the features of some of the tiles, as views."""
        return LayerFeatures(
            tokens=None if self.tokens is None else self.tokens[span],
            pooled=self.pooled[span],
            scales=None if self.scales is None else self.scales[span],
        )

    @classmethod
    def join(cls, parts: Sequence[LayerFeatures]) -> LayerFeatures:
        """Return the features of all parts' tiles, in order, copied."""
        tokens = [part.tokens for part in parts if part.tokens is not None]
        scales = [part.scales for part in parts if part.scales is not None]
        return cls(
            tokens=np.concatenate(tokens) if tokens else None,
            pooled=np.concatenate([part.pooled for part in parts]),
            scales=np.concatenate(scales) if scales else None,
        )


@dataclass(frozen=True, slots=True)
class TileFeatures:
    """Features of n tiles in the order in which they were submitted; the arrays belong to the caller."""

    layers: tuple[LayerFeatures, ...]
    """The main layer first, then each earlier layer, ascending."""
    fits: NDArray[Any]
    """[n] uint8: 0 if all values can be stored, 1 if one is too large for the stored type, 2 if one is not a number."""
    clamped: int
    """Number of values that were clamped."""

    def __len__(self) -> int:
        return len(self.fits)

    def take(self, span: slice) -> TileFeatures:
        """Return the features of some of the tiles, as views; `clamped` remains that of all."""
        return TileFeatures(tuple(layer.take(span) for layer in self.layers), self.fits[span], self.clamped)

    @classmethod
    def join(cls, parts: Sequence[TileFeatures]) -> TileFeatures:
        """Return the features of all parts' tiles, in order, copied."""
        layers = zip(*(part.layers for part in parts), strict=True)
        return cls(
            layers=tuple(map(LayerFeatures.join, layers)),
            fits=np.concatenate([part.fits for part in parts]),
            clamped=sum(part.clamped for part in parts),
        )
