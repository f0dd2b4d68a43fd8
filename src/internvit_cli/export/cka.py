"""Compare vectors: cosines of pairs, and the alignment of two sets of vectors, also of different width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_FOR_ALIGNMENT = 3
"""Smallest number of images; the alignment of two images is always 1."""


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
    """Return the cosines of pairs of vectors, computed in float64.

    Args:
        one: [n, d].
        other: [n, d].

    Returns:
        [n] float64: exactly 1 for equal vectors, including two zero vectors; 0 if only one of them is zero.
    """
    first, second = one.astype(np.float64), other.astype(np.float64)
    product = np.einsum("nd,nd->n", first, second)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    values: NDArray[Any] = np.clip(
        np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0), -1.0, 1.0
    )
    values[(one == other).all(axis=1)] = 1.0
    return values


class LinearCka:
    """Linear centered kernel alignment of two sets of vectors, accumulated block by block in float64.

    It is 1 if one set is the other rotated and scaled, and near 0 if they have nothing in common.
    """

    def __init__(self, width: int, other_width: int) -> None:
        """Start without vectors; memory grows with the squares of `width` and `other_width`, the lengths of vectors."""
        self._sums = np.zeros(width), np.zeros(other_width)
        self._own = np.zeros((width, width)), np.zeros((other_width, other_width))
        self._cross = np.zeros((width, other_width))
        self._shifts: tuple[NDArray[Any], NDArray[Any]] | None = None
        self._count = 0

    def add(self, one: NDArray[Any], other: NDArray[Any]) -> None:
        """Add pairs of vectors, [k, d] and [k, e]."""
        both = one.astype(np.float64), other.astype(np.float64)
        if self._shifts is None:
            # Vectors share a large part, which would dominate the sums of squares.
            self._shifts = both[0].mean(axis=0), both[1].mean(axis=0)
        first, second = both[0] - self._shifts[0], both[1] - self._shifts[1]
        for side, vectors in enumerate((first, second)):
            np.add(self._sums[side], vectors.sum(axis=0), out=self._sums[side])
            np.add(self._own[side], vectors.T @ vectors, out=self._own[side])
        self._cross += first.T @ second
        self._count += len(first)

    @property
    def alignment(self) -> float | None:
        """Return the alignment, 0 to 1; None for too few pairs, or if all vectors are the same."""
        if self._count < LEAST_FOR_ALIGNMENT:
            return None
        means = self._sums[0] / self._count, self._sums[1] / self._count
        cross = self._cross - self._count * np.outer(*means)
        own = [
            np.linalg.norm(products - self._count * np.outer(mean, mean))
            for products, mean in zip(self._own, means, strict=True)
        ]
        if not all(own):
            return None
        return float(np.linalg.norm(cross) ** 2 / (own[0] * own[1]))
