"""Compare the tokens of two outputs tile by tile: how many are equal, and how much the others differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import Tokens
from internvit_cli.export.cka import cosines
from internvit_cli.storage.format.layout import decode_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from internvit_cli.export.selection import RowSelection

TILES_AT_ONCE = 4


@dataclass(slots=True)
class TokenComparison:
    """The result of comparing tokens."""

    equal: int = 0
    """The number of images with equal tokens."""
    numbers: list[int] = field(default_factory=list)
    """The indices of the pairs that were compared."""
    lowest: list[float] = field(default_factory=list)
    """The lowest cosine of tokens of each compared pair."""
    total: float = 0.0
    tokens: int = 0

    @property
    def mean(self) -> float | None:
        """The mean cosine of all pairs of tokens."""
        return self.total / self.tokens if self.tokens else None


class _Tokens(NamedTuple):
    """Dequantized tokens of some tiles of an image in two outputs, [n, C] each."""

    one: NDArray[Any]
    other: NDArray[Any]


def why_not_comparable(one: RowSelection, other: RowSelection) -> str:
    """Return why tokens cannot be compared; empty if they can, or if an output has none."""
    sizes = [(s.shape.tokens, s.shape.tokens_per_tile, s.shape.channels) for s in (one, other)]
    if Tokens.NONE in (one.shape.tokens, other.shape.tokens):
        return ""
    if sizes[0] != sizes[1]:
        return "tokens are not compared: " + " and ".join(f"{k.value} [tiles, {t}, {c}]" for k, t, c in sizes)
    if one.recipe.token_order != other.recipe.token_order:
        return "tokens are not compared, because their orders differ"
    return ""


class LayerPair(NamedTuple):
    """A pair of stored layers, one of each output."""

    one: int
    other: int


def compare_tokens(
    one: RowSelection,
    other: RowSelection,
    pairs: NDArray[Any],
    layers: Sequence[LayerPair],
    on_progress: Callable[[int], None],
) -> TokenComparison:
    """Compare the tokens of images, leaving out those whose tiles differ.

    Args:
        one: An output.
        other: Another output, with tokens of the same shape.
        pairs: Positions of each image in both outputs, [k, 2].
        layers: The layers to compare.
        on_progress: Called with the number of images compared.
    """
    found = TokenComparison()
    grids = [_grids(selection, pairs[:, side]) for side, selection in enumerate((one, other))]
    is_same = (grids[0] == grids[1]).all(axis=1)
    for number, (row, other_row) in enumerate(pairs.tolist()):
        if is_same[number]:
            parts = (part for layer in layers for part in _tiles(one, row, other, other_row, layer))
            _compare_image(found, number, parts)
        on_progress(number + 1)
    return found


def _compare_image(found: TokenComparison, number: int, parts: Iterator[_Tokens]) -> None:
    lowest, is_equal = 1.0, True
    for part in parts:
        if np.array_equal(part.one, part.other):
            values = np.ones(len(part.one))
        else:
            is_equal = False
            values = cosines(part.one, part.other)
        lowest = min(lowest, float(values.min()))
        found.total += float(values.sum())
        found.tokens += len(values)
    found.numbers.append(number)
    found.lowest.append(lowest)
    found.equal += is_equal


def _grids(selection: RowSelection, positions: NDArray[Any]) -> NDArray[Any]:
    table = selection.table
    columns = [getattr(table, name)[positions].astype(np.int64) for name in ("columns", "rows", "thumbnail")]
    return np.stack(columns, axis=1)


def _tiles(one: RowSelection, row: int, other: RowSelection, other_row: int, layer: LayerPair) -> Iterator[_Tokens]:
    count = int(one.table.tile_offset[row + 1]) - int(one.table.tile_offset[row])
    for start in range(0, count, TILES_AT_ONCE):
        stop = min(start + TILES_AT_ONCE, count)
        span = slice(start, stop)
        yield _Tokens(_values(one, row, layer.one, span), _values(other, other_row, layer.other, span))


def _values(selection: RowSelection, position: int, layer: int, span: slice) -> NDArray[Any]:
    """Return the dequantized tokens of some tiles of an image in one layer, [n, C]."""
    shard = selection.shards[int(selection.shard_of[position])]
    first = int(shard.table.tile_offset[int(selection.row_of[position])])
    shape = selection.shape

    def rows(kind: str) -> NDArray[Any]:
        return shard.rows(selection.dataset(kind, layer), first + span.start, first + span.stop)

    scales = rows(shape.tokens.scales_dataset) if shape.store_dtype.is_scaled else None
    values = decode_values(rows(shape.tokens.dataset), shape.store_dtype, scales)
    return values.reshape(-1, values.shape[2])
