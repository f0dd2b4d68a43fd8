"""Compare two outputs image by image, for `internvit diff`."""

from __future__ import annotations

import heapq
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Status, Tokens
from internvit_cli.errors import ExitCode
from internvit_cli.export.cka import LinearCka, cosines
from internvit_cli.export.merge import recipe_differences
from internvit_cli.export.selection import RowSelection, select_all_rows
from internvit_cli.export.tokens_compared import LayerPair, TokenComparison, compare_tokens, why_not_comparable
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted, listed
from internvit_cli.storage.format.layout import POOLED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BLOCK_BYTES = 32 << 20
PERCENTILES = (1, 5, 25, 50)


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """The options of a comparison."""

    one: str
    other: str
    tokens: bool = True
    """Whether to compare tokens too, if both outputs have the same number with the same width."""
    worst: int = 10
    """How many of the least similar images to name."""
    threshold: float | None = None
    """The exit code is 1 if a cosine is below this."""


@dataclass(frozen=True, slots=True)
class CosineStatistics:
    """Statistics of the cosines of many images."""

    images: int
    lowest: float
    mean: float
    percentiles: dict[str, float]
    worst: tuple[tuple[str, float], ...]
    """Keys and cosines of the least similar images, the worst first."""


@dataclass(frozen=True, slots=True)
class DiffResult:
    """The result of a comparison."""

    one: str
    other: str
    recipe: dict[str, tuple[str, str]]
    """The fields of the recipes that differ, with both values."""
    only_one: tuple[str, ...]
    """Keys of images that only the first output has."""
    only_other: tuple[str, ...]
    statuses: dict[str, tuple[str, str]]
    """The two statuses of images by key, if they differ."""
    pictures: tuple[str, ...]
    """Keys of images whose pictures are different files."""
    common: int
    """The number of images that are done in both outputs."""
    layers: tuple[LayerPair, ...]
    """The compared layers of both outputs; for each image, the least similar pair counts."""
    equal_vectors: int
    """The number of images whose vectors are equal bit for bit in all compared layers."""
    equal_tokens: int | None
    """The number of images whose tokens are equal; None if tokens were not compared."""
    pooled: CosineStatistics | None
    """Cosines of vectors; None if there are no common images, or vectors have different widths."""
    tokens: CosineStatistics | None
    """The lowest cosine of tokens per image."""
    token_mean: float | None
    """Mean cosine of all pairs of tokens."""
    cka: float | None
    """Linear centered kernel alignment of the vectors of two models in the deepest compared layer, 0 to 1; None if both
    have the same model."""
    threshold: float | None
    notes: tuple[str, ...]

    @property
    def is_identical(self) -> bool:
        """Whether everything that was compared is identical."""
        alike = not (self.recipe or self.only_one or self.only_other or self.statuses or self.pictures)
        return alike and self.equal_vectors == self.common and self.equal_tokens in (None, self.common)

    @property
    def exit_code(self) -> ExitCode:
        """1 if a cosine is below a given threshold or cannot be computed, otherwise 0."""
        if self.threshold is None:
            return ExitCode.DONE
        lowest = [spread.lowest for spread in (self.pooled, self.tokens) if spread is not None]
        is_below = any(value < self.threshold for value in lowest) or not lowest
        return ExitCode.CANNOT_RUN if is_below else ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        values = {name: getattr(self, name) for name in self.__slots__}
        for name in ("pooled", "tokens"):
            spread = values[name]
            values[name] = None if spread is None else {key: getattr(spread, key) for key in CosineStatistics.__slots__}
        return values | {"identical": self.is_identical}


def diff(options: DiffOptions, observer: Observer = SILENT) -> DiffResult:
    """Compare two outputs.

    Args:
        options: The outputs, and how to compare them.
        observer: Receives progress.

    Raises:
        OutputError: An output is damaged, or does not exist.
    """
    return _OutputComparison(options, observer).run()


class _OutputComparison:
    """The state of a comparison: the images that both outputs have."""

    def __init__(self, options: DiffOptions, observer: Observer) -> None:
        self._options = options
        self._observer = observer
        with observer.phase("reading the outputs"):
            self._one, self._other = select_all_rows(options.one), select_all_rows(options.other)
        places = {key: position for position, key in enumerate(self._other.table.keys)}
        keys = self._one.table.keys
        there = np.fromiter((places.get(key, -1) for key in keys), np.int64, len(keys))
        self._pairs = np.stack([np.flatnonzero(there >= 0), there[there >= 0]], axis=1)
        """Positions in both outputs of their common images, [k, 2]."""
        is_done = self._one.is_done[self._pairs[:, 0]] & self._other.is_done[self._pairs[:, 1]]
        self._done = self._pairs[is_done]
        """Positions in both outputs of images with features in both, [k, 2]."""
        self._notes: list[str] = []
        self._layers = self._comparable_layers()

    def run(self) -> DiffResult:
        """Compare keys, then vectors, then tokens."""
        one, other = self._one, self._other
        is_one_model = one.recipe.weights_digest == other.recipe.weights_digest
        self._note_pending()
        equal_vectors, pooled, cka = self._vectors(with_cka=not is_one_model)
        compared, tokens = self._tokens()
        digests = (one.digests[self._done[:, 0]] != other.digests[self._done[:, 1]]).any(axis=1)
        return DiffResult(
            one=self._options.one,
            other=self._options.other,
            recipe=dict(recipe_differences(one.recipe, other.recipe)),
            only_one=_missing(one, self._pairs[:, 0]),
            only_other=_missing(other, self._pairs[:, 1]),
            statuses=self._statuses(),
            pictures=tuple(self._keys(np.flatnonzero(digests))),
            common=len(self._done),
            layers=tuple(self._layers),
            equal_vectors=equal_vectors,
            equal_tokens=compared.equal if compared else None,
            pooled=pooled,
            tokens=tokens,
            token_mean=compared.mean if compared else None,
            cka=cka,
            threshold=self._options.threshold,
            notes=tuple(self._notes),
        )

    def _comparable_layers(self) -> list[LayerPair]:
        """Return the layers that both outputs hold, ascending, or the deepest of each if there are none."""
        held = [selection.recipe.layers for selection in (self._one, self._other)]
        shared = sorted(set(held[0]) & set(held[1]))
        if held[0] == held[1] or (len(held[0]) == len(held[1]) == 1):
            return [LayerPair(*pair) for pair in zip(*held, strict=True)]
        compared = [LayerPair(layer, layer) for layer in shared] or [LayerPair(held[0][-1], held[1][-1])]
        what = f"only layer {listed(shared)}" if shared else f"layer {held[0][-1]} with {held[1][-1]}"
        self._notes.append(
            f"{self._options.one} holds layer {listed(held[0])}, {self._options.other} {listed(held[1])}; compared is "
            f"{what}"
        )
        return compared

    def _note_pending(self) -> None:
        for selection, path in ((self._one, self._options.one), (self._other, self._options.other)):
            if selection.pending:
                self._notes.append(
                    f"{counted(selection.pending, 'image')} of {path} left out, because they are not encoded yet"
                )

    def _keys(self, numbers: NDArray[Any]) -> Iterator[str]:
        return (os.fsdecode(self._one.table.keys[int(self._done[number, 0])]) for number in numbers.tolist())

    def _statuses(self) -> dict[str, tuple[str, str]]:
        status = self._one.table.status[self._pairs[:, 0]], self._other.table.status[self._pairs[:, 1]]
        return {
            os.fsdecode(self._one.table.keys[int(self._pairs[number, 0])]): (
                Status(int(status[0][number])).word,
                Status(int(status[1][number])).word,
            )
            for number in np.flatnonzero(status[0] != status[1]).tolist()
        }

    # --------------------------------------------------------------------------------------------------------- vectors

    def _vectors(self, *, with_cka: bool) -> tuple[int, CosineStatistics | None, float | None]:
        """Return the number of equal vectors, their cosines, and the alignment of two models."""
        widths = self._one.shape.pooled_width, self._other.shape.pooled_width
        is_comparable = widths[0] == widths[1]
        if not is_comparable:
            self._notes.append(f"vectors have {widths[0]} and {widths[1]} values, so their cosine is not defined")
        kernels = LinearCka(*widths) if with_cka and len(self._done) else None
        found, equal = np.ones(len(self._done)), 0
        step = max(1, BLOCK_BYTES // (4 * max(widths)))
        with self._observer.phase("comparing vectors", "image", len(self._done)) as phase:
            for start in range(0, len(self._done), step):
                pairs = self._done[start : start + step]
                lowest, is_equal = found[start : start + len(pairs)], np.ones(len(pairs), bool)
                for layer in self._layers:
                    first = _vectors_of(self._one, pairs[:, 0], layer.one)
                    second = _vectors_of(self._other, pairs[:, 1], layer.other)
                    if kernels is not None and layer == self._layers[-1]:
                        kernels.add(first, second)
                    if is_comparable:
                        np.minimum(lowest, cosines(first, second), out=lowest)
                        is_equal &= (first.view(np.uint32) == second.view(np.uint32)).all(axis=1)
                equal += int(is_equal.sum()) if is_comparable else 0
                phase.at(start + len(pairs))
        spread = self._spread(found, np.arange(len(found))) if is_comparable else None
        return equal, spread, kernels.alignment if kernels is not None else None

    def _spread(self, values: NDArray[Any], numbers: NDArray[Any]) -> CosineStatistics | None:
        """Return statistics of cosines of common images; None if there are none."""
        if not len(values):
            return None
        worst = heapq.nsmallest(self._options.worst, range(len(values)), key=values.__getitem__)
        keys = self._keys(numbers[worst])
        return CosineStatistics(
            images=len(values),
            lowest=float(values.min()),
            mean=float(values.mean()),
            percentiles={f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES},
            worst=tuple(zip(keys, values[worst].tolist(), strict=True)),
        )

    # ---------------------------------------------------------------------------------------------------------- tokens

    def _tokens(self) -> tuple[TokenComparison | None, CosineStatistics | None]:
        """Return the comparison of tokens, and the statistics of the lowest cosine per image."""
        one, other = self._one, self._other
        has_none = Tokens.NONE in (one.shape.tokens, other.shape.tokens)
        if has_none or not self._options.tokens or not len(self._done):
            return None, None
        if why := why_not_comparable(one, other):
            self._notes.append(why)
            return None, None
        with self._observer.phase("comparing tokens", "image", len(self._done)) as phase:
            found = compare_tokens(one, other, self._done, self._layers, phase.at)
        if left_out := len(self._done) - len(found.numbers):
            self._notes.append(f"tokens of {counted(left_out, 'image')} not compared, because their tiles differ")
        return found, self._spread(np.array(found.lowest), np.array(found.numbers, np.int64))


def _vectors_of(selection: RowSelection, positions: NDArray[Any], layer: int) -> NDArray[Any]:
    """Return the vectors of some images in one layer, [k, d] float32."""
    name = selection.dataset(POOLED, layer)
    vectors = np.empty((len(positions), selection.shape.pooled_width), np.float32)
    shard_of, row_of = selection.shard_of[positions], selection.row_of[positions]
    for number in np.unique(shard_of).tolist():
        is_here = shard_of == number
        vectors[is_here] = selection.shards[number].mapped(name)[row_of[is_here]]
    return vectors


def _missing(selection: RowSelection, found: NDArray[Any]) -> tuple[str, ...]:
    """Return the keys of images that are not among the found positions."""
    is_found = np.zeros(len(selection), bool)
    is_found[found] = True
    return tuple(os.fsdecode(selection.table.keys[row]) for row in np.flatnonzero(~is_found).tolist())
