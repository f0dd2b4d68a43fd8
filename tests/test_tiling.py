"""Sizes become grids as the official code makes them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from internvit_cli.config import PixelRule, Preprocess, TilingRule
from internvit_cli.plan.tiling import Grid, choose_grid, decoded_tile_count, has_thumbnail, tile_count

if TYPE_CHECKING:
    from pathlib import Path

sides = st.integers(1, 70_000)
bounds = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted)


def official_grid(width: int, height: int, min_num: int, max_num: int, image_size: int) -> tuple[int, int]:
    """The body of the official code, copied line by line."""
    ratios = {
        (i, j)
        for n in range(min_num, max_num + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_num <= i * j <= max_num
    }
    best_difference, best = float("inf"), (1, 1)
    for i, j in sorted(ratios, key=lambda x: x[0] * x[1]):
        difference = abs(width / height - i / j)
        if difference < best_difference:
            best_difference, best = difference, (i, j)
        elif difference == best_difference and width * height > 0.5 * image_size * image_size * i * j:
            best = (i, j)
    return best


def test_every_reference_grid_is_reproduced(reference: Path) -> None:
    stored = json.loads((reference / "tiling_grids.json").read_text())
    assert len(stored["rows"]) == 2517
    for width, height, least, most, columns, rows in stored["rows"]:
        rule = TilingRule(tile_size=stored["tile_size"], min_tiles=least, max_tiles=most)
        assert choose_grid(width, height, rule) == (columns, rows), (width, height, least, most)


@given(sides, sides, st.integers(1, 40), st.sampled_from([224, 448, 616]))
def test_the_grid_is_the_official_one_for_any_size(width: int, height: int, most: int, tile_size: int) -> None:
    rule = TilingRule(tile_size=tile_size, max_tiles=most)
    assert choose_grid(width, height, rule) == official_grid(width, height, 1, most, tile_size)


@given(sides, sides, bounds)
@example(5, 21, [21, 21])
def test_with_a_lower_bound_only_exact_ties_within_an_area_may_differ(
    width: int, height: int, bounds: list[int]
) -> None:
    """Python's set order decides them in the official code: 5 x 21 pixels in 21 tiles is 3x7 there and 1x21 here."""
    least, most = bounds
    found = choose_grid(width, height, TilingRule(min_tiles=least, max_tiles=most))
    columns, rows = official_grid(width, height, least, most, 448)
    differences = {abs(width / height - i / j) for i, j in (found, (columns, rows))}
    assert len(differences) == 1
    assert found.columns * found.rows == columns * rows


@given(sides, sides, bounds)
def test_the_number_of_tiles_stays_within_the_bounds(width: int, height: int, bounds: list[int]) -> None:
    least, most = bounds
    grid = choose_grid(width, height, TilingRule(min_tiles=least, max_tiles=most))
    assert least <= grid.columns * grid.rows <= most


@pytest.mark.parametrize("preprocess", [Preprocess.SQUASH, Preprocess.CLIP])
def test_a_single_view_has_a_single_tile(preprocess: Preprocess) -> None:
    assert choose_grid(4000, 300, TilingRule(preprocess=preprocess)) == Grid(1, 1)


def test_only_an_exact_tie_looks_at_the_area() -> None:
    assert choose_grid(300, 200, TilingRule()) == Grid(3, 2)
    assert choose_grid(800, 800, TilingRule()) == Grid(2, 2)
    assert choose_grid(600, 600, TilingRule()) == Grid(1, 1)


def test_a_thumbnail_follows_only_a_grid_of_several_tiles() -> None:
    assert not has_thumbnail(Grid(1, 1), True)
    assert has_thumbnail(Grid(1, 2), True)
    assert [tile_count(Grid(3, 4), wanted) for wanted in (True, False)] == [13, 12]
    assert tile_count(Grid(1, 1), True) == 1


def test_a_global_view_alone_is_one_tile() -> None:
    assert decoded_tile_count(Grid(3, 4), PixelRule(global_view_only=True)) == 1
    assert decoded_tile_count(Grid(3, 4), PixelRule()) == 13
