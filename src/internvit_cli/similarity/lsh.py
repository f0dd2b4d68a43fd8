"""Find pairs of similar unit vectors among very many, with locality-sensitive hashing.

The code of a vector says on which side of b random planes it lies. Two vectors at an angle a share a code with
probability (1 - a / pi) ** b. The number of tables is chosen so that a pair exactly at the threshold shares a code in
at least one of them with probability `RECALL`; more similar pairs do so more surely. These pairs are then compared
exactly, so the results are right, and at most a thousandth of the pairs just above the threshold is missed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

RECALL = 0.999
BLOCK_BYTES = 32 << 20
MOST_BITS = 30
SKETCH_BYTES = 32
"""Bits of a second, longer code that drops pairs which share a code by chance."""
SKETCH_DEVIATIONS = 5.0
"""Standard deviations of the sketch above which a pair at the threshold is dropped: once in three million."""
PAIRS_AT_ONCE = 1 << 20
POPCOUNT = np.array([number.bit_count() for number in range(256)], np.uint8)


def hashed_pairs(
    vectors: NDArray[Any],
    threshold: float,
    is_wanted: Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]],
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]:
    """Yield the pairs of `pairs.exact_pairs`, except for a thousandth just above the threshold, some more than once.

    Args:
        vectors: Unit vectors, [n, d] float32, in memory or mapped; they have to be centered, or planes do not separate
            them.
        threshold: The lowest dot product.
        is_wanted: Returns a mask of the candidate pairs to compare.
        on_progress: Called with a number of vectors that corresponds to the share of the work done.
    """
    count = len(vectors)
    bits, tables = table_shape(count, threshold)
    generator = np.random.default_rng(0)
    sketches = _codes(vectors, generator, 8 * SKETCH_BYTES)
    farthest = _farthest_sketch(threshold)
    for table in range(tables):
        codes = _codes(vectors, generator, bits)
        for met in _sharing(codes):
            first, second = _only(met, is_wanted(*met))
            apart = POPCOUNT[sketches[first] ^ sketches[second]].sum(axis=1, dtype=np.int64)
            first, second = _only((first, second), apart <= farthest)
            products = _products(vectors, first, second)
            found = products >= threshold
            if found.any():
                yield first[found], second[found], products[found]
        on_progress(count * (table + 1) // tables)


def table_shape(count: int, threshold: float) -> tuple[int, int]:
    """Return bits per code and number of tables, for about one vector per code and `RECALL` at the threshold."""
    bits = min(MOST_BITS, max(8, math.ceil(math.log2(max(2, count)))))
    agreement = (1 - math.acos(min(1.0, max(-1.0, threshold))) / math.pi) ** bits
    tables = 1 if agreement > 1 - 1e-12 else math.ceil(math.log(1 - RECALL) / math.log(1 - agreement))
    return bits, max(1, tables)


def _farthest_sketch(threshold: float) -> int:
    """Return the largest number of planes of the sketch that may separate two vectors at the threshold."""
    planes = 8 * SKETCH_BYTES
    share = math.acos(min(1.0, max(-1.0, threshold))) / math.pi
    return math.ceil(planes * share + SKETCH_DEVIATIONS * math.sqrt(planes * share * (1 - share)) + 1)


def _codes(vectors: NDArray[Any], generator: np.random.Generator, bits: int) -> NDArray[np.uint8]:
    """Return on which side of `bits` random planes each vector lies, as packed bits [n, bytes]."""
    planes = generator.standard_normal((vectors.shape[1], bits), np.float32)
    step = max(1, BLOCK_BYTES // (4 * vectors.shape[1]))
    codes = [
        np.packbits(np.asarray(vectors[start : start + step]) @ planes > 0, axis=1)
        for start in range(0, len(vectors), step)
    ]
    return np.concatenate(codes)


def _sharing(codes: NDArray[np.uint8]) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield all pairs of vectors with the same code, lower index first, a limited number at a time."""
    keys = np.zeros((len(codes), 4), np.uint8)
    keys[:, -codes.shape[1] :] = codes
    numbers = keys.view(">u4").ravel()
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    # The position of a vector in its bucket is the number of earlier vectors with which it forms pairs.
    place = np.arange(len(order)) - np.repeat(starts, sizes)
    step, begin = 0, 0
    totals = np.cumsum(place)
    while begin < len(order):
        end = max(begin + 1, int(np.searchsorted(totals, step + PAIRS_AT_ONCE, side="right")))
        here = place[begin:end]
        second = np.repeat(np.arange(begin, end), here)
        back = np.arange(len(second)) - np.repeat(np.cumsum(here) - here, here)
        if len(second):
            yield order[second - 1 - back], order[second]
        step, begin = int(totals[end - 1]), end


def _only(pairs: tuple[NDArray[Any], NDArray[Any]], mask: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    return pairs[0][mask], pairs[1][mask]


def _products(vectors: NDArray[Any], first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return the dot products of pairs, [k]."""
    step = max(1, BLOCK_BYTES // (8 * vectors.shape[1]))
    parts = [
        np.einsum("kd,kd->k", vectors[first[start : start + step]], vectors[second[start : start + step]])
        for start in range(0, len(first), step)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)
