"""Link images with near vectors whose pictures show the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.similarity.alignment import SAME, agreement
from internvit_cli.similarity.gray_squares import read_gray_squares
from internvit_cli.viz.photograph import PictureFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.runtime.observer import Observer, Phase
    from internvit_cli.similarity.links import Links
    from internvit_cli.similarity.pairs import Pairs
    from internvit_cli.storage.read.row_index import PooledVectors

MOST_PICTURES = 20_000
"""Largest number of pictures that are read, the nearest pairs first; it takes some minutes on two processors."""
MOST_REFUSALS = 8
"""Pictures from which an image may differ before its other pairs are ignored; in a burst, all pairs are near."""


@dataclass(frozen=True, slots=True)
class PairCounts:
    """Numbers of pairs of near images by result."""

    same: int
    """Pairs whose pictures show the same."""
    different: int
    """Pairs whose pictures differ."""
    unseen: int
    """Pairs with a picture that was not read, because it is gone or too many were; their vectors decided."""


def link_same(
    links: Links,
    vectors: PooledVectors,
    pairs: Pairs,
    least_alone: float,
    observer: Observer,
    folder: str | None = None,
) -> PairCounts:
    """Link the images of pairs whose pictures show the same.

    Args:
        links: Links between the indices of vectors, to which new ones are added.
        vectors: The vectors of the images.
        pairs: Indices and similarities, in the order in which to compare them.
        least_alone: The similarity from which a pair is linked if its pictures cannot be compared.
        observer: Receives progress.
        folder: The folder that holds the pictures; None means where they were when they were encoded.
    """
    first, second, similarities = pairs
    needed = _in_order(first, second)[:MOST_PICTURES]
    files = (PictureFile.of(vectors.image(number), folder) for number in needed.tolist())
    with observer.phase("reading pictures", "picture", len(needed)) as phase:
        squares, is_there = read_gray_squares(files, len(needed), phase.at)
    place = np.full(len(vectors), -1)
    place[needed[is_there]] = np.flatnonzero(is_there)
    is_seen = (place[first] >= 0) & (place[second] >= 0)
    alone = ~is_seen & (similarities >= least_alone)
    links.add(first[alone], second[alone])
    with observer.phase("comparing pictures", "pair") as phase:
        same, different = _compare(links, first[is_seen], second[is_seen], squares, place, phase)
    return PairCounts(same, different, int((~is_seen).sum()))


def _compare(
    links: Links, first: NDArray[Any], second: NDArray[Any], squares: NDArray[Any], place: NDArray[Any], phase: Phase
) -> tuple[int, int]:
    """Link pairs whose pictures, at `place` of their indices, agree; return how many agree and how many differ.

    Each round compares every image at most once, with its nearest, because linked images need no further comparison.
    """
    same = different = 0
    refusals = np.zeros(len(place), np.int64)
    while len(first):
        now = _each_once(first, second)
        ones, others = first[now], second[now]
        agree = agreement(squares[place[ones]], squares[place[others]]) >= SAME
        links.add(ones[agree], others[agree])
        same, different = same + int(agree.sum()), different + int((~agree).sum())
        for numbers in (ones, others):
            refusals[numbers[~agree]] += 1
        is_open = ~now & links.are_apart(first, second)
        is_open &= (refusals[first] < MOST_REFUSALS) | (refusals[second] < MOST_REFUSALS)
        first, second = first[is_open], second[is_open]
        phase.at(same + different)
    return same, different


def _in_order(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return the indices in all pairs, in the order of their first pair."""
    numbers = np.stack([first, second], axis=1).ravel()
    found, places = np.unique(numbers, return_index=True)
    return found[np.argsort(places)]


def _each_once(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.bool_]:
    """Return a mask of pairs that are the first pair of both images."""
    numbers = np.stack([first, second], axis=1).ravel()
    found, places = np.unique(numbers, return_index=True)
    earliest = np.empty(int(numbers.max()) + 1, np.int64)
    earliest[found] = places // 2
    own = np.arange(len(first))
    mask: NDArray[np.bool_] = (earliest[first] == own) & (earliest[second] == own)
    return mask
