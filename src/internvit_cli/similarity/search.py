"""Find the images of an output that are most similar to some pictures, for `internvit search`."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import ExitCode, OutputError, UsageError
from internvit_cli.model.caveats import caveats
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.similarity.ann_index import open_index
from internvit_cli.similarity.nearest import nearest
from internvit_cli.similarity.similarity_space import Space, choose_space
from internvit_cli.storage.read.reader import Features, bounded, open_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from internvit_cli.storage.read.image import ImageFeatures
    from internvit_cli.storage.read.row_index import PooledVectors

MOST_QUERIES = 1000
"""Largest number of images that patterns of keys may match."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """The options of a search."""

    path: str
    pictures: Sequence[str] = ()
    """Files of pictures to search for."""
    keys: Sequence[str] = ()
    """Keys, and patterns of keys, of images of the output to search for."""
    count: int = 10
    """The number of hits per query."""
    raw: bool = False
    """Whether to compare vectors as they are stored."""
    index: bool = False
    """Whether to use an approximate index, which is built if it is missing or stale."""
    model: str | None = None
    """Where the weights are; None means where the output says."""
    device: str = "auto"
    layer: int | None = None
    """The stored layer to compare; None means the deepest."""


@dataclass(frozen=True, slots=True)
class Hit:
    """An image that was found."""

    image: ImageFeatures
    similarity: float
    """The cosine in the space of the search, -1 to 1."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The hits for one query."""

    query: ImageFeatures
    is_picture: bool
    """Whether the query was given as a file instead of a key."""
    hits: tuple[Hit, ...]

    @property
    def problem(self) -> str:
        """Why there are no hits; empty if there are."""
        query = self.query
        if query.is_done:
            return ""
        return f"{query.status.word}: {query.reason}" if query.reason else query.status.word


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The result of a search."""

    path: str
    images: int
    """Compared with."""
    layer: int
    """The number of images whose vectors were compared."""
    space: Space
    answers: tuple[QueryResult, ...]
    how: str
    """`exact`, or `approximate` through an index."""
    index_is_new: bool
    seconds: float
    """The time of the comparison in seconds, without encoding the pictures."""
    notes: tuple[str, ...]
    """Warnings for the reader."""

    @property
    def exit_code(self) -> ExitCode:
        """0; 3 if some pictures cannot be used; 1 if none can be used."""
        bad = sum(bool(answer.problem) for answer in self.answers)
        if not bad:
            return ExitCode.DONE
        return ExitCode.CANNOT_RUN if bad == len(self.answers) else ExitCode.SKIPPED

    def to_json(self) -> dict[str, Any]:
        """Return the object of `--json`."""
        facts: dict[str, Any] = {"path": self.path, "images": self.images, "layer": self.layer, "how": self.how}
        facts["seconds"] = round(self.seconds, 3)
        facts["notes"] = list(self.notes)
        return facts | self.space.facts() | {"queries": [_answer_json(answer) for answer in self.answers]}


def search(options: SearchOptions, observer: Observer = SILENT) -> SearchResult:
    """Find the images that are most similar to each picture and each key.

    Args:
        options: What to search for.
        observer: Receives progress.

    Raises:
        UsageError: There are no queries, or a picture, a key or a layer does not exist.
        ModelError: The weights are not those of the output.
        OutputError: The output has no vectors, or is damaged.
        InternvitError: The index cannot be used or built.
    """
    if not options.pictures and not options.keys:
        raise UsageError("nothing to search for", "name a picture, or an image of the output with --key")
    with observer.phase("reading the output"):
        features = open_features(options.path, options.layer)
        vectors = features.vectors()
    if not len(vectors):
        raise OutputError(
            f"{options.path} has no image with features", f"internvit ls -l {options.path} lists the images by status"
        )
    for picture in options.pictures:
        _check_query(picture, features)
    stored = list(bounded(features, options.keys, MOST_QUERIES).values()) if options.keys else []
    encoded = _encode(features, options, observer) if options.pictures else []
    queries = [*encoded, *stored]
    started = time.perf_counter()
    comparison = _QueryComparison(options, features, vectors, observer)
    usable = [query for query in queries if query.is_done]
    # One more than requested, because an image of the output finds itself.
    numbers, similarities = comparison.nearest(usable, options.count + bool(stored))
    rows = iter(zip(numbers, similarities, strict=True))
    answers = []
    for number, query in enumerate(queries):
        is_picture = number < len(encoded)
        own = None if is_picture else query.key
        hits = _hits(vectors, own, options.count, *next(rows)) if query.is_done else ()
        answers.append(QueryResult(query, is_picture, hits))
    seconds = time.perf_counter() - started
    return SearchResult(
        path=options.path,
        images=len(vectors),
        layer=features.layer,
        space=comparison.space,
        answers=tuple(answers),
        how="approximate" if options.index else "exact",
        index_is_new=comparison.index_is_new,
        seconds=seconds,
        notes=caveats(features),
    )


class _QueryComparison:
    """Compares queries with all vectors of an output, exactly or with an index."""

    def __init__(self, options: SearchOptions, features: Features, vectors: PooledVectors, observer: Observer) -> None:
        self._vectors = vectors
        self._raw = options.raw
        self._observer = observer
        self._index = None
        self.index_is_new = False
        if options.index:
            name = "raw" if options.raw else "chosen"
            name = name if features.layer == features.layers[-1] else f"{name}-layer-{features.layer}"
            self._index = open_index(features, vectors, self._choose, name, observer)
            self.space, self.index_is_new = self._index.space, self._index.is_new
        else:
            self.space = self._choose()

    def nearest(self, queries: Sequence[ImageFeatures], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the indices and similarities of the most similar vectors, [q, k] each."""
        if not queries:
            return np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)
        embedded = self.space.embed(np.stack([query.pooled for query in queries]))
        if self._index is not None:
            return self._index.nearest(self._vectors, embedded, count)
        with self._observer.phase("comparing", "image", len(self._vectors)) as phase:
            return nearest(self._vectors, self.space, embedded, count, phase.at)

    def _choose(self) -> Space:
        return choose_space(self._vectors, self._observer, raw=self._raw)


def _check_query(picture: str, features: Features) -> None:
    """Refuse a query that is not a picture file, such as words, before weights are loaded.

    Raises:
        UsageError: There is no such file, or it is a folder.
    """
    if os.path.isdir(picture):
        raise UsageError(f"{picture!r} is a folder", f"name the pictures to search for, such as {picture}/*.jpg")
    if os.path.lexists(picture):
        return
    is_key = features.get(picture) is not None
    raise UsageError(
        f"{picture!r} is not a file: search finds images similar to a picture, because InternViT does not read text",
        f"to search for this image of the output, use --key {picture!r}"
        if is_key
        else "name a picture file, or an image of the output with --key (internvit ls OUT lists them)",
    )


def _encode(features: Features, options: SearchOptions, observer: Observer) -> list[ImageFeatures]:
    """Encode the pictures with the output's recipe; the vector does not depend on which tokens are stored."""
    from internvit_cli.api.extractor import Extractor

    with observer.phase("loading the model"):
        extractor = Extractor.like(
            features, tokens="none", model=options.model, device=options.device, observer=observer
        )
    encoded = []
    with extractor, observer.phase("encoding", "picture", len(options.pictures)) as phase:
        for image in extractor.stream(options.pictures):
            encoded.append(image.at_layer(features.layer))
            phase.at(len(encoded))
    return encoded


def _hits(
    vectors: PooledVectors, own: str | None, count: int, numbers: NDArray[Any], similarities: NDArray[Any]
) -> tuple[Hit, ...]:
    """Return the best hits without the image with the key `own`."""
    found = zip(numbers.tolist(), similarities.tolist(), strict=True)
    hits = [Hit(vectors.image(number), similarity) for number, similarity in found]
    return tuple([hit for hit in hits if hit.image.key != own][:count])


def _answer_json(answer: QueryResult) -> dict[str, Any]:
    hits = [
        {"key": hit.image.key, "similarity": round(hit.similarity, 6), "path": hit.image.path} for hit in answer.hits
    ]
    kind = "picture" if answer.is_picture else "key"
    return {kind: answer.query.key, "hits": hits, "problem": answer.problem or None}
