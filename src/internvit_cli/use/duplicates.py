"""`internvit duplicates`: images of one file's bytes, and images that look the same."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import UsageError
from internvit_cli.observer import SILENT, Observer
from internvit_cli.storage.durable import check_space
from internvit_cli.storage.reader import open_features
from internvit_cli.use.pairs import exact_pairs, hashed_pairs
from internvit_cli.use.spaces import RAW, Space, fit_whitening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from internvit_cli.storage.image import ImageFeatures
    from internvit_cli.storage.reader import Features
    from internvit_cli.storage.row_index import PooledVectors

WHITENED_THRESHOLD, RAW_THRESHOLD = 0.9, 0.999
"""Measured (docs/search.md): re-encoded and halved photographs lie above, different ones below."""
EXACT_UP_TO = 100_000
"""Images that are compared each with each; of more, those that meet in a table of hashes."""
IN_MEMORY_BYTES = 512 << 20
"""Vectors up to so many bytes are kept in memory; more of them in a temporary file."""


@dataclass(frozen=True, slots=True)
class DuplicateOptions:
    """What counts as the same."""

    path: str
    threshold: float | None = None
    """Least similarity; None is the default of the space."""
    raw: bool = False
    """Plain cosines instead of centred and whitened ones."""
    exact: bool = False
    """Compare each with each, however many there are."""
    bytes_only: bool = False
    """Leave it at identical files."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold}: not above 0 and up to 1", "give a cosine, such as 0.9")

    @property
    def least(self) -> float:
        """The threshold."""
        if self.threshold is not None:
            return self.threshold
        return RAW_THRESHOLD if self.raw else WHITENED_THRESHOLD


@dataclass(frozen=True, slots=True)
class Member:
    """An image of a group."""

    image: ImageFeatures
    similarity: float
    """To the group's first image; 1 for that one itself, and for files of its very bytes."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """What there is more than once."""

    path: str
    images: int
    """Looked at."""
    identical: tuple[tuple[ImageFeatures, ...], ...]
    """Files with the same bytes."""
    similar: tuple[tuple[Member, ...], ...]
    """Images linked by pairs over the threshold, the largest picture first; of identical files the first only."""
    threshold: float
    space: Space
    how: str
    """`exact`, or `hashed`."""

    @property
    def redundant(self) -> int:
        """Images that one of each group would leave over."""
        return sum(len(group) - 1 for group in (*self.identical, *self.similar))

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        facts = {"path": self.path, "images": self.images, "threshold": self.threshold, "how": self.how}
        return (
            facts
            | self.space.facts()
            | {
                "redundant": self.redundant,
                "identical": [[_facts(image) for image in group] for group in self.identical],
                "similar": [
                    [_facts(member.image) | {"similarity": round(member.similarity, 6)} for member in group]
                    for group in self.similar
                ],
            }
        )


def find_duplicates(options: DuplicateOptions, observer: Observer = SILENT) -> Duplicates:
    """Group the images of an output that are the same file, and those that look the same.

    Args:
        options: what counts as the same.
        observer: told how it goes.

    Raises:
        OutputError: there is no output, or it is damaged.
        NoSpaceError: the temporary file for very many vectors does not fit.
    """
    with observer.phase("reading the output"):
        features = open_features(options.path).done
        groups, firsts = _identical(_digests(features))
    identical = tuple(tuple(features[int(number)] for number in group) for group in groups)
    similar: tuple[tuple[Member, ...], ...] = ()
    space, is_exact = RAW, True
    if not options.bytes_only and len(firsts) > 1:
        vectors = features[firsts].vectors()
        space = RAW if options.raw else fit_whitening(vectors, observer)
        is_exact = _is_exact(options, space, len(vectors))
        with _embedded(vectors, space, observer) as embedded:
            with observer.phase("comparing", "image", len(vectors)) as phase:
                linked = _linked(embedded, options.least, phase.at, is_exact)
            similar = tuple(_group(vectors, embedded, numbers) for numbers in linked)
    how = "exact" if is_exact else "hashed"
    return Duplicates(options.path, len(features), identical, similar, options.least, space, how)


def _is_exact(options: DuplicateOptions, space: Space, count: int) -> bool:
    if options.exact or count <= EXACT_UP_TO:
        return True
    if space is RAW:
        raise UsageError(
            f"--raw with {count:,} images: raw vectors all lie on one side, and hashing them tells nothing apart",
            "compare each with each all the same (--exact), or leave out --raw",
        )
    return False


def _linked(
    embedded: NDArray[Any], least: float, on_progress: Callable[[int], None], is_exact: bool
) -> list[NDArray[Any]]:
    """Groups of numbers that pairs over the threshold link."""
    links = _Links(len(embedded))
    # Rounding must not part a picture from itself: two equal vectors have a cosine of 1 to some 1e-7.
    least = min(least, 1 - 1e-6)
    if is_exact:
        pairs = exact_pairs(embedded, least, on_progress)
    else:
        pairs = hashed_pairs(embedded, least, links.are_apart, on_progress)
    for first, second, _ in pairs:
        links.add(first, second)
    return links.groups()


def _digests(features: Features) -> NDArray[Any]:
    """SHA-256 of every image's file, [n, 32] uint8."""
    shards = features.shards
    digests = np.zeros((len(features), 32), np.uint8)
    shard_of, row_of = features.places
    for number, shard in enumerate(shards):
        is_here = shard_of == number
        digests[is_here] = shard.digests[row_of[is_here]]
    return digests


def _identical(digests: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """Groups of numbers of equal digests, and the first number of every digest, both in order.

    A digest of zeros is none: such an image is like itself alone.
    """
    rows = np.ascontiguousarray(digests).view("V32").ravel()
    _, firsts, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    groups = [group for group in np.split(order, bounds[1:]) if len(group) > 1 and digests[group[0]].any()]
    without = np.flatnonzero(~digests.any(axis=1))
    return sorted(groups, key=lambda group: int(group[0])), np.union1d(firsts, without)


class _Links:
    """Which numbers hang together, by way of pairs."""

    def __init__(self, count: int) -> None:
        self._root = np.arange(count)
        """For each number one that it hangs together with, at last the lowest."""

    def add(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Link pairs of numbers."""
        new = self.are_apart(first, second)
        for one, other in zip(first[new].tolist(), second[new].tolist(), strict=True):
            root, other_root = self._find(one), self._find(other)
            self._root[max(root, other_root)] = min(root, other_root)

    def are_apart(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
        """Of pairs, a mask of those that do not hang together yet."""
        self._settle()
        apart: NDArray[Any] = self._root[first] != self._root[second]
        return apart

    def groups(self) -> list[NDArray[Any]]:
        """Numbers that hang together with others, in order."""
        self._settle()
        order = np.argsort(self._root, kind="stable")
        bounds = np.flatnonzero(np.diff(self._root[order], prepend=-1))
        return [group for group in np.split(order, bounds[1:]) if len(group) > 1]

    def _settle(self) -> None:
        """Have every number name its root itself."""
        while (self._root[self._root] != self._root).any():
            self._root = self._root[self._root]

    def _find(self, number: int) -> int:
        while self._root[number] != number:
            number = int(self._root[number])
        return number


def _group(vectors: PooledVectors, embedded: NDArray[Any], numbers: NDArray[Any]) -> tuple[Member, ...]:
    """The images of a group: the largest picture first, then by likeness to it."""
    images = [vectors.image(number) for number in numbers.tolist()]
    largest = max(range(len(images)), key=lambda place: (images[place].width * images[place].height, -place))
    similarities = np.asarray(embedded[numbers]) @ np.asarray(embedded[numbers[largest]])
    similarities[largest] = 2.0  # to the front
    order = np.argsort(-similarities, kind="stable").tolist()
    return tuple(Member(images[place], min(1.0, float(similarities[place]))) for place in order)


@contextmanager
def _embedded(vectors: PooledVectors, space: Space, observer: Observer) -> Iterator[NDArray[Any]]:
    """All vectors embedded, [n, d] float32: in memory, or where they are many in a file that goes with the block."""
    size = 4 * len(vectors) * vectors.shape[1]
    with tempfile.TemporaryFile() as file:
        if size <= IN_MEMORY_BYTES:
            embedded = np.empty(vectors.shape, np.float32)
        else:
            check_space(tempfile.gettempdir(), size)
            embedded = np.memmap(file, np.float32, "w+", shape=vectors.shape)
        with observer.phase("embedding", "image", len(vectors)) as phase:
            for start, block in vectors.blocks():
                embedded[start : start + len(block)] = space.embed(block)
                phase.at(start + len(block))
        yield embedded


def _facts(image: ImageFeatures) -> dict[str, Any]:
    return {"key": image.key, "path": image.path, "width": image.width, "height": image.height}
