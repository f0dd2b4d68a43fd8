"""Find all pairs of similar unit vectors by comparing all of them, and keep the best pairs.

Every block of vectors is compared with every other block: that takes n * n * d multiplications, and memory for two
blocks and their products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Pairs: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
    """First indices, second indices, and dot products, [k] each."""

PRODUCT_ROWS = 2048
"""Rows and columns of the products that are in memory at once, which take 16 MiB."""
PAIRS_WAITING = 1 << 21
"""Pairs that are collected before those that are not among the best are dropped."""


def exact_pairs(
    vectors: NDArray[Any], threshold: float, on_progress: Callable[[int], None] = lambda _: None
) -> Iterator[Pairs]:
    """Yield all pairs at or above a threshold, in parts.

    Args:
        vectors: Unit vectors, [n, d] float32, in memory or mapped.
        threshold: The lowest dot product.
        on_progress: Called with the number of vectors that were compared with all later ones.

    Yields:
        First indices, second (larger) indices, and dot products, [k] each.
    """
    for start in range(0, len(vectors), PRODUCT_ROWS):
        rows = np.asarray(vectors[start : start + PRODUCT_ROWS])
        for other in range(start, len(vectors), PRODUCT_ROWS):
            products = rows @ np.asarray(vectors[other : other + PRODUCT_ROWS]).T
            if other == start:
                products[np.tril_indices(len(rows))] = -2.0  # each pair once, without pairs of a vector with itself
            first, second = np.nonzero(products >= threshold)
            if len(first):
                yield first + start, second + other, products[first, second]
        on_progress(start + len(rows))


class BestPairs:
    """The most similar pairs of each image, a few per image.

    Among n images that are all similar, there would be n * n pairs otherwise.
    """

    def __init__(self, count: int, each: int) -> None:
        self._each = each
        self._least = np.full(count, -np.inf, np.float32)
        """For each image, the similarity that a pair must reach to be among its best."""
        self._kept: list[Pairs] = []
        self._waiting = 0

    def add(self, pairs: Pairs) -> None:
        """Add pairs that are among the best of either image."""
        first, second, products = pairs
        wanted = products >= np.minimum(self._least[first], self._least[second])
        if wanted.any():
            self._kept.append((first[wanted], second[wanted], products[wanted]))
            self._waiting += int(wanted.sum())
        if self._waiting > PAIRS_WAITING:
            self._drop()

    def best_first(self) -> Pairs:
        """Return the kept pairs without duplicates, the most similar first, ties by index."""
        self._drop()
        return self._kept[0] if self._kept else (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))

    def _drop(self) -> None:
        """Keep only the best pairs of each image."""
        if not self._kept:
            return
        first, second, products = (np.concatenate(part) for part in zip(*self._kept, strict=True))
        _, once = np.unique(first.astype(np.int64) * len(self._least) + second, return_index=True)
        order = once[np.argsort(-products[once], kind="stable")]
        first, second, products = first[order], second[order], products[order]
        # The first `each` pairs of each image, in this order.
        numbers = np.concatenate([first, second])
        pairs = np.tile(np.arange(len(first)), 2)
        by_number = np.lexsort((pairs, numbers))
        numbers, pairs = numbers[by_number], pairs[by_number]
        place = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        is_last = place == self._each - 1
        self._least[numbers[is_last]] = products[pairs[is_last]]
        wanted = np.unique(pairs[place < self._each])
        self._kept = [(first[wanted], second[wanted], products[wanted])]
        self._waiting = 0
