"""Classify by the nearest training images: k-NN with weighted votes, as DINO evaluates features.

Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, and eval_knn.py there: cosine
similarity, votes weighted by exp(similarity / 0.07), k of 10, 20, 100 and 200.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEIGHBORS = (10, 20, 100, 200)
TEMPERATURE = 0.07
_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class NearestNeighbors:
    """Training vectors, centered and of length 1."""

    center: NDArray[np.float32]
    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: int

    @classmethod
    def fit(cls, vectors: NDArray[Any], labels: NDArray[Any], classes: int) -> NearestNeighbors:
        """Center and scale training vectors, [n, d], with class numbers [n]."""
        center = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        return cls(center, _unit(vectors - center), labels, classes)

    def votes(
        self, vectors: NDArray[Any], neighbors: tuple[int, ...], *, leave_one_out: bool = False
    ) -> dict[int, NDArray[np.float64]]:
        """Return the share of each class in the votes for vectors, [m, classes] for each number of neighbors.

        Args:
            vectors: [m, d] as they are stored.
            neighbors: Numbers of neighbors; more than there are training images mean all.
            leave_one_out: Whether these are the training vectors, of which none votes for itself.
        """
        most = min(max(neighbors), len(self.vectors) - leave_one_out)
        found = {k: np.zeros((len(vectors), self.classes)) for k in neighbors}
        for start in range(0, len(vectors), _BLOCK):
            similarity = _unit(vectors[start : start + _BLOCK] - self.center) @ self.vectors.T
            rows = np.arange(len(similarity))
            if leave_one_out:
                similarity[rows, start + rows] = -np.inf
            near = np.argpartition(-similarity, most - 1, axis=1)[:, :most]
            near = np.take_along_axis(near, np.argsort(-similarity[rows[:, None], near], axis=1, kind="stable"), axis=1)
            weights = np.exp(similarity[rows[:, None], near].astype(np.float64) / TEMPERATURE)
            for k in neighbors:
                sums = found[k][start : start + len(rows)]
                np.add.at(sums, (rows[:, None], self.labels[near[:, :k]]), weights[:, :k])
                sums /= sums.sum(axis=1, keepdims=True)
        return found


def choose_neighbors(trained: NearestNeighbors, vectors: NDArray[Any]) -> int:
    """Return the number of neighbors that classifies the training vectors best, each by the others."""
    usable = tuple(k for k in NEIGHBORS if k < len(vectors)) or (max(1, len(vectors) - 1),)
    votes = trained.votes(vectors, usable, leave_one_out=True)
    return max(usable, key=lambda k: (float((votes[k].argmax(axis=1) == trained.labels).mean()), -k))


def _unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled
