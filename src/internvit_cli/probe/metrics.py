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


@dataclass(frozen=True, eq=False)
class PixelCounts:
    """How many pixels of each class there are in n images, and how many of them were found."""

    both: NDArray[np.int32]
    """Pixels that are of a class and were taken for it, [n, classes]."""
    labelled: NDArray[np.int32]
    """Pixels that are of a class, [n, classes]."""
    predicted: NDArray[np.int32]
    """Pixels that were taken for a class, [n, classes], without those that have no class."""

    @classmethod
    def zeros(cls, images: int, classes: int) -> PixelCounts:
        """Return counts to add to."""
        return cls(*(np.zeros((images, classes), np.int32) for _ in range(3)))

    def add(self, image: int, labels: NDArray[Any], predicted: NDArray[Any]) -> None:
        """Count some pixels of an image.

        Args:
            image: Its number.
            labels: The classes of pixels; negative for those without a class.
            predicted: What they were taken for, of the same shape.
        """
        counts = labels >= 0
        labels, predicted = labels[counts], predicted[counts]
        classes = self.both.shape[1]
        for row, found in (
            (self.both, labels[labels == predicted]),
            (self.labelled, labels),
            (self.predicted, predicted),
        ):
            row[image] += np.bincount(found, minlength=classes).astype(np.int32)

    def ious(self) -> NDArray[np.float64]:
        """Return the intersection over union of each class over all images, [classes]; NaN if it never occurs."""
        return _iou(self.both.sum(axis=0), self.labelled.sum(axis=0), self.predicted.sum(axis=0))

    def mean_iou(self, seed: int) -> Interval:
        """Return the mean over classes that occur, with its bootstrap interval over images."""
        random, images = np.random.default_rng(seed), len(self.both)
        counts = [part.astype(np.float64) for part in (self.both, self.labelled, self.predicted)]
        means = []
        for _ in range(RESAMPLES):
            drawn = np.bincount(random.integers(0, images, images), minlength=images).astype(np.float64)
            means.append(np.nanmean(_iou(*(drawn @ part for part in counts))))
        low, high = np.percentile(means, [2.5, 97.5])
        return Interval(float(np.nanmean(self.ious())), float(low), float(high))

    def pixel_accuracy(self) -> float:
        """Return the share of labelled pixels that were taken for their class."""
        return float(self.both.sum() / self.labelled.sum())

    def of_images(self) -> NDArray[np.float64]:
        """Return the mean intersection over union of each image, over classes that occur in it, [n]."""
        shares: NDArray[np.float64] = np.nanmean(_iou(self.both, self.labelled, self.predicted), axis=1)
        return shares


def _iou(both: NDArray[Any], labelled: NDArray[Any], predicted: NDArray[Any]) -> NDArray[np.float64]:
    union = (labelled + predicted - both).astype(np.float64)
    shares = np.full(union.shape, np.nan)
    np.divide(both, union, out=shares, where=union > 0)
    return shares
