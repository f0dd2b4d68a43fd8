"""In which space vectors are compared: as they are, or centred and whitened.

Raw InternViT vectors share a large common part: any two of them have a cosine above 0.9. Whitened, the mean is taken
off and every direction has the same variance, so that a cosine tells how much more two pictures have in common than
any two of the file. Letters: n vectors of d values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.observer import SILENT, Observer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from internvit_cli.storage.row_index import PooledVectors

MOST_FITTED = 65_536
"""Vectors that mean and covariance are estimated from; of more, evenly spread ones."""
LEAST_SHRINKAGE = 0.05
"""Directions of less variance than this share of the average are noise (of rounding, of JPEG), and not blown up."""
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Space:
    """How vectors become unit vectors whose dot product is their similarity."""

    name: str
    """`raw` or `whitened`."""
    mean: NDArray[Any] | None = None
    """Taken off first, [d] float32."""
    matrix: NDArray[Any] | None = None
    """What then multiplies from the right, [d, d] float32."""
    fitted_on: int = 0
    """Vectors that it was estimated from."""
    shrinkage: float = 0.0
    """How far the covariance was drawn towards a multiple of the identity, 0 to 1."""

    def embed(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Unit vectors, [n, d] float32; a vector without any direction becomes zeros."""
        moved = np.array(vectors, np.float32) if self.mean is None else vectors.astype(np.float32) - self.mean
        if self.matrix is not None:
            moved = moved @ self.matrix
        lengths = np.sqrt(np.einsum("nd,nd->n", moved, moved))[:, None]
        moved /= np.where(lengths > 0, lengths, 1)
        return moved

    def facts(self) -> dict[str, Any]:
        """For --json."""
        if self.mean is None:
            return {"space": self.name}
        return {"space": self.name, "fitted_on": self.fitted_on, "shrinkage": round(self.shrinkage, 4)}


RAW = Space("raw")


def fit_whitening(vectors: PooledVectors, observer: Observer = SILENT) -> Space:
    """Estimate mean and covariance of a file's vectors.

    The covariance is shrunk towards a multiple of the identity as Ledoit and Wolf (2004) derive: fully for a handful of
    images, which leaves them centred, hardly for many. Where nothing varies there is nothing to whiten, and vectors are
    compared as they are.
    """
    with observer.phase("fitting the space"):
        return _whitening(vectors)


def _whitening(vectors: PooledVectors) -> Space:
    count = min(len(vectors), MOST_FITTED)
    mean = sum((block.sum(axis=0, dtype=np.float64) for block in _blocks(vectors)), np.zeros(vectors.shape[1]))
    mean /= max(1, count)
    covariance, fourth = np.zeros((vectors.shape[1],) * 2), 0.0
    for block in _blocks(vectors):
        centred = block - mean
        covariance += centred.T @ centred
        fourth += float(np.square(np.einsum("nd,nd->n", centred, centred)).sum())
    covariance /= max(1, count)
    average = float(np.trace(covariance)) / max(1, len(covariance))
    if average <= 1e-12 * max(1e-30, float(mean @ mean)):
        return RAW
    shrinkage = max(LEAST_SHRINKAGE, _shrinkage(covariance, average, fourth / count, count))
    covariance *= 1 - shrinkage
    covariance[np.diag_indices_from(covariance)] += shrinkage * average
    matrix = np.linalg.inv(np.linalg.cholesky(covariance)).T
    return Space("whitened", mean.astype(np.float32), matrix.astype(np.float32), count, shrinkage)


def _shrinkage(covariance: NDArray[Any], average: float, fourth: float, count: int) -> float:
    """Ledoit and Wolf's share, 0 to 1.

    Args:
        covariance: of the sample, [d, d].
        average: of its diagonal.
        fourth: the mean fourth power of the centred vectors' lengths.
        count: vectors in the sample.
    """
    squared = float(np.einsum("ij,ij->", covariance, covariance))
    dispersion = squared - len(covariance) * average**2
    error = (fourth - squared) / count
    return 1.0 if dispersion <= 0 else float(np.clip(error / dispersion, 0.0, 1.0))


def _blocks(vectors: PooledVectors) -> Iterator[NDArray[Any]]:
    """The vectors to fit to, a bounded number at a time, in float64."""
    step = max(1, BLOCK_BYTES // (8 * max(1, vectors.shape[1])))
    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), MOST_FITTED)).round().astype(np.int64)
    for start in range(0, len(chosen), step):
        yield vectors[chosen[start : start + step]].astype(np.float64)
