"""Choose the space in which `search`, `duplicates` and `report` compare the vectors of an output.

Raw vectors share a large common part, so that any two have a high cosine, and a few directions hold most of what is
left. In the *balanced* space, the mean is subtracted, and a direction that holds more than 2 % of the variance is
scaled down to that. Then 0 means as similar as any two images of the output, and 1 means the same. Whitening would
scale every direction, and with fewer images than directions enlarge what separates a copy from its original
(docs/search.md).

A few images do not give a meaningful mean, and the mean of images that are all similar is what they show. Such vectors
are compared as they are stored, in the *raw* space. In shapes, n is the number of vectors, and d that of their values.
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
"""Fewer images are compared raw, because a single copy would influence the mean and the directions too much."""
LEAST_SPREAD = 0.01
"""Images count as nearly the same if their vectors vary by less than this share of their mean square. It is 0.008 in a
burst, 0.009 among copies of one photograph, and 0.16 among photographs. InternViT's raw cosines of 0.95 leave 0.05.
"""
MOST_SHARE = 0.02
"""Largest share of the variance that a direction may hold."""
MOST_FITTED = 16_384
"""Largest number of vectors for estimating mean and covariance; of more, evenly spread ones are used."""
BLOCK_BYTES = 32 << 20
MOST_DIRECTIONS, ITERATIONS = 64, 12
"""Directions of the subspace iteration; at most fifty can hold more than `MOST_SHARE`."""


@dataclass(frozen=True, slots=True)
class Space:
    """A map from vectors to unit vectors whose dot product is their similarity."""

    name: str
    """`raw` or `balanced`."""
    reason: str = ""
    """Why the vectors are compared raw."""
    mean: NDArray[Any] | None = None
    """The mean that is subtracted first, [d] float32."""
    directions: NDArray[Any] | None = None
    """Orthonormal directions that hold more than their share, [k, d] float32."""
    scales: NDArray[Any] | None = None
    """Factors for the components along these directions, [k] float32, at most 1."""
    fitted_on: int = 0
    """The number of vectors from which the space was estimated."""

    @property
    def words(self) -> str:
        """A description such as `balanced cosine, fitted to 42 images`."""
        told = self.reason or f"fitted to {counted(self.fitted_on, 'image')}"
        return f"{self.name} cosine, {told}"

    def embed(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Return unit vectors, [n, d] float32; a zero vector stays zero."""
        moved = np.array(vectors, np.float32) if self.mean is None else vectors.astype(np.float32) - self.mean
        if self.directions is not None and self.scales is not None:
            moved += ((moved @ self.directions.T) * (self.scales - 1)) @ self.directions
        lengths = np.sqrt(np.einsum("nd,nd->n", moved, moved))[:, None]
        moved /= np.where(lengths > 0, lengths, 1)
        return moved

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that define the space; none for the raw space."""
        if self.mean is None or self.directions is None or self.scales is None:
            return {}
        return {"mean": self.mean, "directions": self.directions, "scales": self.scales}

    def facts(self) -> dict[str, Any]:
        """Return the facts for --json."""
        if self.mean is None:
            return {"space": self.name, "space_reason": self.reason}
        return {"space": self.name, "fitted_on": self.fitted_on}


RAW = Space("raw", "as requested")


def choose_space(vectors: PooledVectors, observer: Observer = SILENT, *, raw: bool = False) -> Space:
    """Choose the space in which an output's vectors are compared.

    Args:
        vectors: All vectors of the output.
        observer: Receives progress.
        raw: Whether to use the raw space in any case.
    """
    if raw:
        return RAW
    if len(vectors) < LEAST_IMAGES:
        return Space("raw", f"because the output holds fewer than {LEAST_IMAGES} images")
    with observer.phase("fitting the space"):
        return _fitted(vectors)


def _fitted(vectors: PooledVectors) -> Space:
    """Return the balanced space, or the raw one if the images are nearly the same."""
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
        return Space("raw", "because the images are all nearly the same")
    variances, directions = _leading(covariance)
    most = MOST_SHARE * variance
    large = variances > most
    scales = np.sqrt(most / variances[large])
    mean, directions, scales = (array.astype(np.float32) for array in (mean, directions[large], scales))
    return Space("balanced", "", mean, directions, scales, count)


def _leading(covariance: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the largest variances and their directions, [k] and [k, d], by subspace iteration.

    Directions near `MOST_SHARE` converge slowly, but need not converge, because their scale is nearly 1.
    """
    width = len(covariance)
    count = min(width, MOST_DIRECTIONS)
    basis = np.random.default_rng(0).standard_normal((width, count))
    for _ in range(ITERATIONS):
        basis, _ = np.linalg.qr(covariance @ basis)
    variances, turned = np.linalg.eigh(basis.T @ covariance @ basis)
    return variances, (basis @ turned).T


def _blocks(vectors: PooledVectors) -> Iterator[NDArray[Any]]:
    """Yield the vectors to fit in float64, a limited number at a time."""
    step = max(1, BLOCK_BYTES // (8 * max(1, vectors.shape[1])))
    chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), MOST_FITTED)).round().astype(np.int64)
    for start in range(0, len(chosen), step):
        yield vectors[chosen[start : start + step]].astype(np.float64)
