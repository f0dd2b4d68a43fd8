"""Find the nearest vectors by comparing all of them, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from internvit_cli.similarity.similarity_space import Space
    from internvit_cli.storage.read.row_index import PooledVectors

BLOCK_BYTES = 32 << 20


def nearest(
    vectors: PooledVectors,
    space: Space,
    queries: NDArray[Any],
    count: int,
    on_progress: Callable[[int], None] = lambda _: None,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the most similar vectors to each query, in memory of one block of vectors.

    Args:
        vectors: The n vectors.
        space: The space in which they are compared.
        queries: Embedded queries, [q, d] float32.
        count: The number of vectors per query.
        on_progress: Called with the number of vectors compared.

    Returns:
        Indices, [q, k] int64, and similarities, [q, k] float32, the best first, ties by index; k is at most n.
    """
    numbers = np.empty((len(queries), 0), np.int64)
    similarities = np.empty((len(queries), 0), np.float32)
    for start, block in vectors.blocks(BLOCK_BYTES):
        scores = queries @ space.embed(block).T
        both = np.concatenate([similarities, scores], axis=1)
        fresh = np.broadcast_to(np.arange(start, start + len(block)), scores.shape)
        numbers, similarities = best(np.concatenate([numbers, fresh], axis=1), both, count)
        on_progress(start + len(block))
    return numbers, similarities


def best(numbers: NDArray[Any], similarities: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the highest values of each row, [q, m] -> [q, at most count], highest first, ties by number."""
    kept_numbers, kept = [], []
    for row_numbers, row in zip(numbers, similarities, strict=True):
        chosen = np.arange(len(row))
        if len(row) > count:
            limit = np.partition(row, len(row) - count)[len(row) - count]
            chosen = np.flatnonzero(row >= limit)  # all that are equal to the last one, so that the order decides
        order = chosen[np.lexsort((row_numbers[chosen], -row[chosen]))][:count]
        kept_numbers.append(row_numbers[order])
        kept.append(row[order])
    return np.stack(kept_numbers), np.stack(kept)
