"""Divide labelled images into a training and a test part, with copies of a picture on one side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


def group_numbers(count: int, groups: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    """Return a number per image, [count] int64, that images which are linked by any group share."""
    parent = np.arange(count)

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = int(parent[image])
        return image

    for group in groups:
        for other in group[1:]:
            parent[root(other)] = root(group[0])
    return np.array([root(image) for image in range(count)], np.int64)


def stratified_split(
    labels: NDArray[Any], groups: NDArray[Any], fraction: float, random: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which images are for testing, [n] bool.

    Of each class, groups are drawn until they hold the fraction of its images. A group of several classes counts for
    the class of its first image. A class with one group is not tested.

    Args:
        labels: Class numbers, [n].
        groups: Group numbers, [n]; a group is never divided.
        fraction: The share of images for testing, between 0 and 1.
        random: Decides which.
    """
    is_test = np.zeros(len(labels), bool)
    _, first, number = np.unique(groups, return_index=True, return_inverse=True)
    sizes = np.bincount(number)
    label_of_group = labels[first]
    for label in np.unique(labels):
        own = np.flatnonzero(label_of_group == label)
        wanted = fraction * sizes[own].sum()
        drawn = random.permutation(own)[: max(0, len(own) - 1)]  # one group stays for training
        before = np.cumsum(sizes[drawn]) - sizes[drawn]
        is_test[np.isin(number, drawn[before + sizes[drawn] / 2 <= wanted])] = True
        if len(drawn) and not is_test[np.isin(number, own)].any():
            is_test[number == drawn[0]] = True  # a small class is tested with one group
    return is_test


def shots_of(labels: NDArray[Any], shots: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return `shots` images of each class, in random order; a class with fewer images gives all it has."""
    drawn = [random.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return random.permutation(np.concatenate(drawn))
