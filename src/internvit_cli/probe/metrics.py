"""Compute what predictions are worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 1000
"""Draws of the bootstrap interval."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a probe says of n images."""

    classes: NDArray[np.int64]
    """The most probable class, [n]."""
    confidence: NDArray[np.float64]
    """Its probability, [n]."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A share, and where it lies in 95 % of resamplings of the test images."""

    value: float
    low: float
    high: float


def predictions_of(probabilities: NDArray[Any]) -> Predictions:
    """Return the most probable classes for probabilities [n, classes]."""
    classes = probabilities.argmax(axis=1)
    return Predictions(classes, probabilities[np.arange(len(classes)), classes].astype(np.float64))


def accuracy(is_right: NDArray[np.bool_], seed: int) -> Interval:
    """Return the share of right predictions with its bootstrap interval; the same seed gives the same interval.

    If all or none are right, resampling would see no other case, so that end is the exact one of Clopper and Pearson.
    """
    count, share = len(is_right), float(is_right.mean())
    random = np.random.default_rng(seed)
    low, high = np.percentile(random.binomial(count, share, RESAMPLES) / count, [2.5, 97.5])
    if share == 1:
        low = 0.025 ** (1 / count)
    elif share == 0:
        high = 1 - 0.025 ** (1 / count)
    return Interval(share, float(low), float(high))


def confusion(labels: NDArray[Any], predicted: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """Return how often each class (row) was taken for each class (column), [classes, classes]."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts
