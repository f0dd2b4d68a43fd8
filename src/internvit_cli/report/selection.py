"""Which images the page shows: a sample, what is like it, what there is more than once, and all that the map has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.similarity.duplicates import DuplicateOptions, Duplicates, find_duplicates
from internvit_cli.similarity.nearest import nearest
from internvit_cli.similarity.similarity_space import Space, choose_space

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from internvit_cli.storage.read.reader import Features
    from internvit_cli.storage.read.row_index import PooledVectors

NEIGHBORS = 8
LOOKED_AT_BYTES = 64 << 20
"""Of vectors that a sample is chosen from, in float32."""
MOST_GROUPS = 50
"""Of each kind on the page; `internvit duplicates` lists them all."""
MOST_MEMBERS = 12
"""Of a group on the page."""


@dataclass(frozen=True, slots=True)
class RepeatedImages:
    """What there is more than once, as far as the page shows it."""

    identical: tuple[tuple[int, ...], ...]
    """Numbers of images with the same bytes."""
    similar: tuple[tuple[tuple[int, float], ...], ...]
    """Numbers of images that look the same, the largest picture first, with their cosines to that one."""
    found: Duplicates


@dataclass(frozen=True, slots=True)
class PageSelection:
    """Numbers of images, counted among those that have features."""

    sample: tuple[int, ...]
    neighbors: tuple[tuple[tuple[int, float], ...], ...]
    """For each image of the sample the most similar others, with their cosines, best first."""
    space: Space
    """In which the neighbors were compared."""
    groups: RepeatedImages
    points: NDArray[Any]
    """All numbers on the page, in order."""
    shuffled: NDArray[Any]
    """The same, those that the page's other parts show first, then the others by chance."""


def select(
    features: Features,
    samples: int,
    most_points: int,
    seed: int,
    pictures: str | None = None,
    observer: Observer = SILENT,
) -> PageSelection:
    """Choose the images of a page.

    Args:
        features: of the output.
        samples: images of the sample, which are chosen to differ from each other.
        most_points: images on the map, beside those that other parts show.
        seed: of what is drawn by chance.
        pictures: the folder to look for pictures in; None is where they were when they were encoded.
        observer: told how it goes.
    """
    done = features.done
    vectors = done.vectors()
    count = len(vectors)
    chance = np.random.default_rng(seed)
    groups = _groups(DuplicateOptions(done.path, pictures=pictures), done, observer)
    space = choose_space(vectors, observer)
    sample = _diverse(vectors, space, samples, chance)
    with observer.phase("finding neighbors", "image", count) as phase:
        neighbors = _neighbors(vectors, space, sample, phase.at)
    named = [*sample.tolist(), *(number for row in neighbors for number, _ in row)]
    named += [number for group in groups.similar for number, _ in group]
    named += [number for group in groups.identical for number in group]
    first = np.array(list(dict.fromkeys(named)), np.int64)
    others = np.setdiff1d(np.arange(count), first)
    others = chance.permutation(others)[: max(0, most_points - len(first))]
    shuffled = np.concatenate([first, others])
    return PageSelection(tuple(sample.tolist()), neighbors, space, groups, np.sort(shuffled), shuffled)


def _diverse(vectors: PooledVectors, space: Space, most: int, chance: np.random.Generator) -> NDArray[Any]:
    """Choose images that differ: the first by chance, then each time the one least similar to all chosen so far.

    Returns:
        Their numbers in order, [min(most, n)] int64. Of many images, some drawn by chance are looked at.
    """
    count = len(vectors)
    looked_at = max(most, LOOKED_AT_BYTES // (4 * max(1, vectors.shape[1])))
    candidates = np.sort(chance.choice(count, min(looked_at, count), replace=False)) if count else np.empty(0, np.int64)
    if not 0 < most < len(candidates):
        return candidates[:most]
    embedded = space.embed(vectors[candidates])
    chosen = [int(chance.integers(len(candidates)))]
    nearest_chosen = embedded @ embedded[chosen[0]]
    while len(chosen) < most:
        nearest_chosen[chosen[-1]] = np.inf  # even of many equal images none is taken twice
        chosen.append(int(nearest_chosen.argmin()))
        np.maximum(nearest_chosen, embedded @ embedded[chosen[-1]], out=nearest_chosen)
    return np.sort(candidates[chosen])


def _groups(options: DuplicateOptions, done: Features, observer: Observer) -> RepeatedImages:
    found = find_duplicates(options, observer)
    identical = tuple(
        tuple(done.position(image.key) for image in group[:MOST_MEMBERS]) for group in found.identical[:MOST_GROUPS]
    )
    similar = tuple(
        tuple((done.position(member.image.key), member.similarity) for member in group[:MOST_MEMBERS])
        for group in found.similar[:MOST_GROUPS]
    )
    return RepeatedImages(identical, similar, found)


def _neighbors(
    vectors: PooledVectors, space: Space, sample: NDArray[Any], on_progress: Callable[[int], None]
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The images most like each of the sample, that one itself left out."""
    if not len(sample):
        return ()
    numbers, similarities = nearest(vectors, space, space.embed(vectors[sample]), NEIGHBORS + 1, on_progress)
    rows = []
    for own, row, cosines in zip(sample.tolist(), numbers.tolist(), similarities.tolist(), strict=True):
        found = [(number, cosine) for number, cosine in zip(row, cosines, strict=True) if number != own]
        rows.append(tuple(found[:NEIGHBORS]))
    return tuple(rows)
