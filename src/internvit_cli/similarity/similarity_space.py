"""The one space in which `search`, `duplicates` and `report` compare vectors, chosen by what the vectors are like.

Raw vectors share a large common part, so that any two have a high cosine, and a few directions hold most of what is
left. In the *balanced* space the mean is taken off, and a direction that holds more than 2 % of the variance is scaled
down to that. 0 then means as alike as any two images of the output, and 1 the same. Whitening would scale every
direction: with fewer images than directions, it then blows up what tells a copy from its original (docs/search.md).

Few images are no ground for a mean, and images that are all alike have a mean that says what they are. Their vectors
are compared as they are stored: the *raw* space. Letters: n vectors of d values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from internvit_cli.storage.read.row_index import PooledVectors

LEAST_IMAGES = 32
"""Fewer images are compared raw: a copy would be a good part of what the mean and the directions come from."""
LEAST_SPREAD = 0.01
"""Images are all alike when their vectors vary by less than this share of their mean square. Measured: 0.008 in a
burst, 0.009 among copies of one photograph, 0.16 among photographs. Raw cosines of 0.95, as InternViT has, make 0.05.
"""
MOST_SHARE = 0.02
"""Of the variance that one direction may hold."""
MOST_FITTED = 16_384
"""Vectors that mean and covariance are estimated from; of more, evenly spread ones."""
BLOCK_BYTES = 32 << 20
MOST_DIRECTIONS, ITERATIONS = 64, 12
"""Of the subspace iteration; fifty directions at most can hold more than `MOST_SHARE`."""


@dataclass(frozen=True, slots=True)
class Space:
    """How vectors become unit vectors whose dot product is their similarity."""

    name: str
    """`raw` or `balanced`."""
    reason: str = ""
    """Why the vectors are compared raw."""
    mean: NDArray[Any] | None = None
    """Taken off first, [d] float32."""
    directions: NDArray[Any] | None = None
    """Orthonormal rows that hold more than their share, [k, d] float32."""
    scales: NDArray[Any] | None = None
    """What the vectors' parts along them are multiplied by, [k] float32, at most 1."""
    fitted_on: int = 0
    """Vectors that it was estimated from."""

    @property
    def words(self) -> str:
        """What it is, for a reader, such as `balanced cosine, fitted to 42 images`."""
        told = self.reason or f"fitted to {counted(self.fitted_on, 'image')}"
        return f"{self.name} cosine, {told}"

    def embed(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Unit vectors, [n, d] float32; a vector without any direction becomes zeros."""
        moved = np.array(vectors, np.float32) if self.mean is None else vectors.astype(np.float32) - self.mean
        if self.directions is not None and self.scales is not None:
            moved += ((moved @ self.directions.T) * (self.scales - 1)) @ self.directions
        lengths = np.sqrt(np.einsum("nd,nd->n", moved, moved))[:, None]
        moved /= np.where(lengths > 0, lengths, 1)
        return moved

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What it takes to make it again beside its facts; nothing for the raw space."""
        if self.mean is None or self.directions is None or self.scales is None:
            return {}
        return {"mean": self.mean, "directions": self.directions, "scales": self.scales}

    def facts(self) -> dict[str, Any]:
        """For --json."""
        if self.mean is None:
            return {"space": self.name, "space_reason": self.reason}
        return {"space": self.name, "fitted_on": self.fitted_on}


RAW = Space("raw", "as asked for")


def choose_space(vectors: PooledVectors, observer: Observer = SILENT, *, raw: bool = False) -> Space:
    """Choose the space in which an output's vectors are compared.

    Args:
        vectors: all that the output holds.
        observer: told how it goes.
        raw: take the raw space whatever they are like.
    """
    if raw:
        return RAW
    if len(vectors) < LEAST_IMAGES:
        return Space("raw", f"since the output holds fewer than {LEAST_IMAGES} images")
    with observer.phase("fitting the space"):
        return _fitted(vectors)


def _fitted(vectors: PooledVectors) -> Space:
    """The balanced space; the raw one where the images are all alike."""
    count = min(len(vectors), MOST_FITTED)
    total = sum((block.sum(axis=0) for block in _blocks(vectors)), np.zeros(vectors.shape[1]))
    mean = total / count
    covariance = np.zeros((len(mean), len(mean)))
    for block in _blocks(vectors):
        centered = block - mean
        covariance += centered.T @ centered
    covariance /= count
    variance = float(np.trace(covariance))
    if variance <= LEAST_SPREAD * (variance + float(mean @ mean)):
        return Space("raw", "since the images are all nearly alike")
    variances, directions = _leading(covariance)
    most = MOST_SHARE * variance
    large = variances > most
    scales = np.sqrt(most / variances[large])
    mean, directions, scales = (array.astype(np.float32) for array in (mean, directions[large], scales))
    return Space("balanced", "", mean, directions, scales, count)


def _leading(covariance: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The variances of the directions of most variance, and the directions, [k] and [k, d], by subspace iteration.

    Directions near `MOST_SHARE` converge slowly, and need not converge: their scale is nearly 1.
    """
    width = len(covariance)
    count = min(width, MOST_DIRECTIONS)
    basis = np.random.default_rng(0).standard_normal((width, count))
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(covariance @ basis)
    variances, turned = np.linalg.eigh(basis.T @ covariance @ basis)
    return variances, (basis @ turned).T


def _blocks(vectors: PooledVectors) -> Iterator[NDArray[Any]]:
    """The vectors to fit to, a bounded number at a time, in float64."""
    step = max(1, BLOCK_BYTES // (8 * max(1, vectors.shape[1])))
    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), MOST_FITTED)).round().astype(np.int64)
    for start in range(0, len(chosen), step):
        yield vectors[chosen[start : start + step]].astype(np.float64)
