"""Find identical files and images that look the same, for `internvit duplicates`."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import UsageError
from internvit_cli.model.caveats import caveats
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.similarity.links import Links
from internvit_cli.similarity.lsh import hashed_pairs
from internvit_cli.similarity.pairs import BestPairs, exact_pairs
from internvit_cli.similarity.same_pictures import PairCounts, link_same
from internvit_cli.similarity.similarity_space import RAW, Space, choose_space
from internvit_cli.storage.durable import check_space
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from internvit_cli.similarity.pairs import Pairs
    from internvit_cli.storage.read.image import ImageFeatures
    from internvit_cli.storage.read.reader import Features
    from internvit_cli.storage.read.row_index import PooledVectors

LEAST_ALONE = {"raw": 0.995, "balanced": 0.9}
"""The cosine by space from which two images are similar without comparing their pictures (see docs/search.md)."""
LEAST_NEAR = {"raw": 0.8, "balanced": 0.45}
"""The cosine by space from which pictures are compared; hardly any copy is below it, and few others above it."""
EACH_WITH_EACH = 256
"""Up to this many images, all pairs with a raw cosine of 0.8 are compared, because most of them may be copies."""
NEAR_EACH = 32
"""Pairs that are kept per image."""
EXACT_UP_TO = 100_000
"""Up to this many images, all pairs are compared; above it, pairs with a common hash are."""
IN_MEMORY_BYTES = 512 << 20
"""Vectors of up to this many bytes are kept in memory; larger ones go to a temporary file."""


@dataclass(frozen=True, slots=True)
class DuplicateOptions:
    """The options of a search for duplicates."""

    path: str
    threshold: float | None = None
    """The similarity from which images are similar by their vectors alone; None means that pictures are compared."""
    raw: bool = False
    """Whether to compare vectors as they are stored."""
    exact: bool = False
    """Whether to compare all pairs, however many images there are."""
    bytes_only: bool = False
    """Whether to find only identical files."""
    pictures: str | None = None
    """The folder that holds the pictures; None means where they were when they were encoded."""
    layer: int | None = None
    """The stored layer to compare; None means the deepest."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} is not above 0 and at most 1", "give a cosine, such as 0.9")


@dataclass(frozen=True, slots=True)
class GroupMember:
    """An image of a group."""

    image: ImageFeatures
    similarity: float
    """The similarity to the group's first image; 1 for that image, and for identical files."""


@dataclass(frozen=True, slots=True)
class ComparisonMethod:
    """How similar images were found."""

    space: Space
    how: str
    """`exact`, or `hashed`."""
    threshold: float
    """The cosine from which images are similar by their vectors alone."""
    pictures: PairCounts | None
    """The counts of compared pictures; None if vectors alone decided."""

    def to_json(self) -> dict[str, Any]:
        """Return its part of the object of `--json`."""
        facts = {"threshold": self.threshold, "how": self.how} | self.space.facts()
        return facts | {"pictures": None if self.pictures is None else asdict(self.pictures)}


@dataclass(frozen=True, slots=True)
class Duplicates:
    """The groups of identical files and of similar images in an output."""

    path: str
    images: int
    """Looked at."""
    identical: tuple[tuple[ImageFeatures, ...], ...]
    """Groups of files with the same bytes."""
    similar: tuple[tuple[GroupMember, ...], ...]
    """Groups of images linked by similar pairs, the largest picture first, with only the first of identical files."""
    comparison: ComparisonMethod | None
    """How images were compared; None if only identical files were searched, or there are fewer than two images."""
    notes: tuple[str, ...] = ()
    """Warnings for the reader."""

    @property
    def redundant(self) -> int:
        """The number of images that are left over if one of each group is kept."""
        return sum(len(group) - 1 for group in (*self.identical, *self.similar))

    def to_json(self) -> dict[str, Any]:
        """Return the object of `--json`."""
        facts: dict[str, Any] = {"path": self.path, "images": self.images, "notes": list(self.notes)}
        nothing = {"threshold": None, "how": None, "space": None, "pictures": None}
        facts |= nothing if self.comparison is None else self.comparison.to_json()
        return facts | {
            "redundant": self.redundant,
            "identical": [[_facts(image) for image in group] for group in self.identical],
            "similar": [
                [_facts(member.image) | {"similarity": round(member.similarity, 6)} for member in group]
                for group in self.similar
            ],
        }


def find_duplicates(options: DuplicateOptions, observer: Observer = SILENT) -> Duplicates:
    """Group the images of an output that are the same file, and those that look the same.

    Vectors propose pairs of images, and their pictures decide whether they show the same. If a picture does not exist
    any more, or a threshold is given, vectors alone decide.

    Args:
        options: The output, and what counts as the same.
        observer: Receives progress.

    Raises:
        OutputError: There is no output, or it is damaged.
        UsageError: There are too many images to compare their raw vectors without `exact`.
        NoSpaceError: The temporary file for very many vectors does not fit on the disk.
    """
    with observer.phase("reading the output"):
        features = open_features(options.path, options.layer).done
        groups, firsts = _identical(_digests(features))
    identical = tuple(tuple(features[int(number)] for number in group) for group in groups)
    if options.bytes_only or len(firsts) < 2:
        return Duplicates(options.path, len(features), identical, (), None)
    similar, comparison = _similar(options, features, firsts, observer)
    notes = caveats(features)
    return Duplicates(options.path, len(features), identical, similar, comparison, notes)


def _similar(
    options: DuplicateOptions, features: Features, numbers: NDArray[Any], observer: Observer
) -> tuple[tuple[tuple[GroupMember, ...], ...], ComparisonMethod]:
    """Return groups of similar images among the given ones, and how they were compared."""
    space = choose_space(features.vectors(), observer, raw=options.raw)
    vectors = features[numbers].vectors()
    is_exact = _is_exact(options, space, len(vectors))
    least = LEAST_ALONE[space.name] if options.threshold is None else options.threshold
    links, compared = Links(len(vectors)), None
    with _embedded(vectors, space, observer) as embedded:
        search = _PairSearch(embedded, is_exact, observer)
        if options.threshold is not None:
            search.link(links, least)
        else:
            if len(vectors) <= EACH_WITH_EACH:
                pairs = _near_of_few(vectors, embedded, least)
            else:
                pairs = search.near(LEAST_NEAR[space.name] if is_exact else least)
            compared = link_same(links, vectors, pairs, least, observer, options.pictures)
        similar = tuple(_group(vectors, embedded, group) for group in links.groups())
    return similar, ComparisonMethod(space, "exact" if is_exact else "hashed", least, compared)


def _is_exact(options: DuplicateOptions, space: Space, count: int) -> bool:
    """Return whether all pairs are compared; raw vectors need that, because hashing cannot separate them."""
    if options.exact or count <= EXACT_UP_TO:
        return True
    if options.raw:
        raise UsageError(
            f"--raw with {count:,} images: raw vectors are too similar to each other for hashing",
            "compare all pairs with --exact, or leave out --raw",
        )
    return space.name == RAW.name


def _near_of_few(vectors: PooledVectors, embedded: NDArray[Any], least_alone: float) -> Pairs:
    """Return all pairs of few images that may be similar, with their similarities, the highest raw cosine first."""
    raw = RAW.embed(vectors[:])
    cosines, similarities = raw @ raw.T, embedded @ embedded.T
    first, second = np.nonzero(np.triu((cosines >= LEAST_NEAR["raw"]) | (similarities >= least_alone), 1))
    order = np.argsort(-cosines[first, second], kind="stable")
    first, second = first[order], second[order]
    return first, second, similarities[first, second]


class _PairSearch:
    """Finds pairs of near vectors among all pairs or with hashes."""

    def __init__(self, embedded: NDArray[Any], is_exact: bool, observer: Observer) -> None:
        self._embedded = embedded
        self._is_exact = is_exact
        self._observer = observer

    def link(self, links: Links, least: float) -> None:
        """Link all pairs with at least the given similarity."""
        # Rounding must not separate equal vectors, whose cosine is 1 within some 1e-7.
        least = min(least, 1 - 1e-6)
        with self._observer.phase("comparing", "image", len(self._embedded)) as phase:
            if self._is_exact:
                pairs = exact_pairs(self._embedded, least, phase.at)
            else:
                pairs = hashed_pairs(self._embedded, least, links.are_apart, phase.at)
            for first, second, _ in pairs:
                links.add(first, second)

    def near(self, least: float) -> Pairs:
        """Return the nearest pairs of every vector with at least the given similarity, the most similar first."""
        best = BestPairs(len(self._embedded), NEAR_EACH)
        if self._is_exact:
            with self._observer.phase("comparing", "image", len(self._embedded)) as phase:
                for pairs in exact_pairs(self._embedded, least, phase.at):
                    best.add(pairs)
            return best.best_first()
        # Hashing finds connected groups without comparing every pair; the pairs are then found within the groups.
        crowds = Links(len(self._embedded))
        self.link(crowds, least)
        for crowd in crowds.groups():
            for first, second, products in exact_pairs(np.asarray(self._embedded[crowd]), least):
                best.add((crowd[first], crowd[second], products))
        return best.best_first()


def _digests(features: Features) -> NDArray[Any]:
    """Return the SHA-256 of every image's file, [n, 32] uint8."""
    shards = features.shards
    digests = np.zeros((len(features), 32), np.uint8)
    shard_of, row_of = features.places
    for number, shard in enumerate(shards):
        is_here = shard_of == number
        digests[is_here] = shard.digests[row_of[is_here]]
    return digests


def _identical(digests: NDArray[Any]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
    """Return groups of indices with equal digests, and the first index of every digest, both in order.

    Zeros mean that there is no digest; such an image is only identical to itself.
    """
    rows = np.ascontiguousarray(digests).view("V32").ravel()
    _, firsts, inverse = np.unique(rows, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    groups = [group for group in np.split(order, bounds[1:]) if len(group) > 1 and digests[group[0]].any()]
    without = np.flatnonzero(~digests.any(axis=1))
    return sorted(groups, key=lambda group: int(group[0])), np.union1d(firsts, without)


def _group(vectors: PooledVectors, embedded: NDArray[Any], numbers: NDArray[Any]) -> tuple[GroupMember, ...]:
    """Return the images of a group: the largest picture first, then by similarity to it."""
    images = [vectors.image(number) for number in numbers.tolist()]
    largest = max(range(len(images)), key=lambda place: (images[place].width * images[place].height, -place))
    similarities = np.asarray(embedded[numbers]) @ np.asarray(embedded[numbers[largest]])
    similarities[largest] = 2.0  # comes first
    order = np.argsort(-similarities, kind="stable").tolist()
    return tuple(GroupMember(images[place], min(1.0, float(similarities[place]))) for place in order)


@contextmanager
def _embedded(vectors: PooledVectors, space: Space, observer: Observer) -> Iterator[NDArray[Any]]:
    """Embed all vectors, [n, d] float32, in memory or, if they are large, in a temporary file."""
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
