"""Choose the images of the page: a sample and its neighbors, duplicates, and the images on the map."""

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
"""Bytes of float32 vectors from which a sample is chosen."""
MOST_GROUPS = 50
"""Largest number of groups of each kind on the page; `internvit duplicates` lists all of them."""
MOST_MEMBERS = 12
"""Largest number of images of a group on the page."""


@dataclass(frozen=True, slots=True)
class RepeatedImages:
    """The duplicates that the page shows."""

    identical: tuple[tuple[int, ...], ...]
    """Groups of indices of images with the same bytes."""
    similar: tuple[tuple[tuple[int, float], ...], ...]
    """Groups of indices of images that look the same, the largest picture first, with cosines to that one."""
    found: Duplicates


@dataclass(frozen=True, slots=True)
class PageSelection:
    """The images of the page, as indices among the images with features."""

    sample: tuple[int, ...]
    neighbors: tuple[tuple[tuple[int, float], ...], ...]
    """For each image of the sample, the most similar others with their cosines, best first."""
    space: Space
    """The space in which neighbors were compared."""
    groups: RepeatedImages
    points: NDArray[Any]
    """All indices on the page, in order."""
    shuffled: NDArray[Any]
    """The same indices, first those that other sections show, then the others in random order."""


def select_images(
    features: Features,
    samples: int,
    most_points: int,
    seed: int,
    pictures: str | None = None,
    observer: Observer = SILENT,
) -> PageSelection:
    """Choose the images of a page.

    Args:
        features: The features of the output.
        samples: The number of images of the sample, which are chosen to differ from each other.
        most_points: The largest number of images on the map, in addition to those that other sections show.
        seed: The seed of random choices.
        pictures: The folder that holds the pictures; None means where they were when they were encoded.
        observer: Receives progress.
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
    """Choose different images: the first at random, then the one that is least similar to all chosen so far.

    Returns:
        Their indices in order, [min(most, n)] int64. From many images, a random part is considered.
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
        nearest_chosen[chosen[-1]] = np.inf  # no image is chosen twice, even if many are equal
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
    """Return the most similar images to each of the sample, without that image itself."""
    if not len(sample):
        return ()
    numbers, similarities = nearest(vectors, space, space.embed(vectors[sample]), NEIGHBORS + 1, on_progress)
    rows = []
    for own, row, cosines in zip(sample.tolist(), numbers.tolist(), similarities.tolist(), strict=True):
        found = [(number, cosine) for number, cosine in zip(row, cosines, strict=True) if number != own]
        rows.append(tuple(found[:NEIGHBORS]))
    return tuple(rows)
