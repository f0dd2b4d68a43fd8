"""`internvit search`: the images of an output that are most like some pictures."""

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
"""Images that patterns of keys may mean."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What to look for, and how."""

    path: str
    pictures: Sequence[str] = ()
    """Files to find the like of."""
    keys: Sequence[str] = ()
    """Keys of images of the output to find the like of, and patterns of keys."""
    count: int = 10
    """Hits for each."""
    raw: bool = False
    """Compare the vectors as they are stored."""
    index: bool = False
    """Ask an approximate index, and make it where it is missing or stale."""
    model: str | None = None
    """Where the weights are; None is what the output names."""
    device: str = "auto"
    layer: int | None = None
    """Which of several stored layers to compare; None is the deepest."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One image found."""

    image: ImageFeatures
    similarity: float
    """Cosine in the space of the search, -1 to 1."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What is most like one picture."""

    query: ImageFeatures
    is_picture: bool
    """Whether it was given as a file, not as a key."""
    hits: tuple[Hit, ...]

    @property
    def problem(self) -> str:
        """Why there are no hits; empty when there are."""
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
    """Whose vectors were compared."""
    space: Space
    answers: tuple[QueryResult, ...]
    how: str
    """`exact`, or `approximate` through an index."""
    index_is_new: bool
    seconds: float
    """Of the comparison, without encoding the pictures."""
    notes: tuple[str, ...]
    """What a reader should know first."""

    @property
    def exit_code(self) -> ExitCode:
        """0; 3 when some pictures cannot be used; 1 when none can."""
        bad = sum(bool(answer.problem) for answer in self.answers)
        if not bad:
            return ExitCode.DONE
        return ExitCode.CANNOT_RUN if bad == len(self.answers) else ExitCode.SKIPPED

    def to_json(self) -> dict[str, Any]:
        """The object of `--json`."""
        facts: dict[str, Any] = {"path": self.path, "images": self.images, "layer": self.layer, "how": self.how}
        facts["seconds"] = round(self.seconds, 3)
        facts["notes"] = list(self.notes)
        return facts | self.space.facts() | {"queries": [_answer_json(answer) for answer in self.answers]}


def search(options: SearchOptions, observer: Observer = SILENT) -> SearchResult:
    """Find the images most like each picture and each key.

    Args:
        options: what to look for.
        observer: told how it goes.

    Raises:
        UsageError: nothing to look for, a picture that is no file, or a key or a layer that is not there.
        ModelError: the weights are not those of the output.
        OutputError: the output has no vectors, or is damaged.
        InternvitError: no index is to be had.
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
    comparison = _Comparison(options, features, vectors, observer)
    usable = [query for query in queries if query.is_done]
    # One more than asked for, since an image of the output finds itself.
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


class _Comparison:
    """Queries against all vectors of an output, exactly or through an index."""

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
        """Numbers and similarities of the most similar vectors, [q, k] each."""
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
    """Refuse, before weights are loaded, a query that is no picture: words above all.

    Raises:
        UsageError: there is no such file, or it is a folder.
    """
    if os.path.isdir(picture):
        raise UsageError(f"{picture!r} is a folder", f"name the pictures to search for, such as {picture}/*.jpg")
    if os.path.lexists(picture):
        return
    is_key = features.get(picture) is not None
    raise UsageError(
        f"{picture!r} is no file: search finds images that are like a picture, and InternViT reads no text",
        f"it is an image of the output: --key {picture!r}"
        if is_key
        else "name a picture file, or an image of the output with --key (internvit ls OUT lists them)",
    )


def _encode(features: Features, options: SearchOptions, observer: Observer) -> list[ImageFeatures]:
    """The pictures' features under the output's recipe; the vector does not depend on which tokens are stored."""
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
    """The best hits, all but the image of the key `own`."""
    found = zip(numbers.tolist(), similarities.tolist(), strict=True)
    hits = [Hit(vectors.image(number), similarity) for number, similarity in found]
    return tuple([hit for hit in hits if hit.image.key != own][:count])


def _answer_json(answer: QueryResult) -> dict[str, Any]:
    hits = [
        {"key": hit.image.key, "similarity": round(hit.similarity, 6), "path": hit.image.path} for hit in answer.hits
    ]
    kind = "picture" if answer.is_picture else "key"
    return {kind: answer.query.key, "hits": hits, "problem": answer.problem or None}
