"""Choose the grid of tiles for a picture's size: the official `dynamic_preprocess` rule in integer arithmetic.

Source: `find_closest_aspect_ratio` and `dynamic_preprocess` in OpenGVLab/InternVL,
internvl_chat/internvl/train/dataset.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.config import Preprocess

if TYPE_CHECKING:
    from internvit_cli.config import PixelRule, TilingRule


class Grid(NamedTuple):
    """The number of columns and rows of tiles."""

    columns: int
    rows: int


ONE_TILE = Grid(1, 1)


class View(NamedTuple):
    """A picture that is resized as a whole, and the tiles that are cut from it."""

    width: int
    """The width in pixels after resizing."""
    height: int
    left: int
    """The column of the resized picture at which the first tile begins."""
    top: int
    columns: int
    """The number of columns of tiles."""
    rows: int

    @property
    def tiles(self) -> int:
        """The number of tiles."""
        return self.columns * self.rows


def choose_grid(width: int, height: int, rule: TilingRule) -> Grid:
    """Return the grid whose aspect ratio is closest to that of the picture.

    Args:
        width: The width in pixels after orientation, at least 1.
        height: The height in pixels after orientation, at least 1.
        rule: The limits on the number of tiles, and the side of a tile.

    Returns:
        The grid; 1x1 for `squash` and `clip`, which make a single view.
    """
    if rule.preprocess is not Preprocess.TILES:
        return ONE_TILE
    return _closest_grid(width, height, rule.min_tiles, rule.max_tiles, rule.tile_size)


def has_thumbnail(grid: Grid, thumbnail: bool) -> bool:
    """Return whether a thumbnail follows: only if it is asked for and the grid has several tiles."""
    return thumbnail and grid != ONE_TILE


def tile_count(grid: Grid, thumbnail: bool) -> int:
    """Return the number of tiles of a picture, including its thumbnail."""
    return grid.columns * grid.rows + has_thumbnail(grid, thumbnail)


def decoded_tile_count(grid: Grid, rule: PixelRule) -> int:
    """Return the number of tiles that decoding produces, which is one if only the global view is needed."""
    return 1 if rule.global_view_only else tile_count(grid, rule.tiling.thumbnail)


def views_of(width: int, height: int, grid: Grid, rule: PixelRule) -> tuple[View, ...]:
    """Return how the tiles of a picture are made, in the order of its tiles; the thumbnail is the last view.

    Args:
        width: The width in pixels after orientation, at least 1.
        height: The height in pixels after orientation, at least 1.
        grid: The result of `choose_grid` for that size.
        rule: Everything that decides the pixels.
    """
    side = rule.tiling.tile_size
    if rule.tiling.preprocess is Preprocess.CLIP:
        new_width, new_height = clip_size(width, height, side)
        return (View(new_width, new_height, (new_width - side) // 2, (new_height - side) // 2, 1, 1),)
    thumbnail = View(side, side, 0, 0, 1, 1)
    if rule.global_view_only:
        return (thumbnail,)
    whole = View(grid.columns * side, grid.rows * side, 0, 0, grid.columns, grid.rows)
    return (whole, thumbnail) if has_thumbnail(grid, rule.tiling.thumbnail) else (whole,)


def clip_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Return width and height in pixels after CLIPImageProcessor resizes the shorter edge to `side`, before its crop.

    Source: `get_resize_output_image_size` in transformers, image_transforms.py.
    """
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def covered_box(width: int, height: int, preprocess: Preprocess, side: int) -> tuple[float, float, float, float]:
    """Return the part of a picture that the encoder sees: left, top, right, bottom, in pixels of the upright picture.

    That is the whole picture, except for `clip`, which crops the center.
    """
    if preprocess is not Preprocess.CLIP:
        return 0.0, 0.0, float(width), float(height)
    new_width, new_height = clip_size(width, height, side)
    left, top = (new_width - side) // 2, (new_height - side) // 2
    across, down = width / new_width, height / new_height
    return left * across, top * down, (left + side) * across, (top + side) * down


def largest_resized(width: int, height: int, rule: PixelRule) -> int:
    """Return the pixels of the largest picture that resizing creates on its way; the horizontal pass comes first.

    A picture of 1 x 1,000,000 pixels is small until it is made 448 pixels wide.
    """
    views = views_of(width, height, choose_grid(width, height, rule.tiling), rule)
    return max(view.width * max(height, view.height) for view in views)


@lru_cache(maxsize=1 << 16)
def _closest_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> Grid:
    ratio = width / height
    best, best_difference = ONE_TILE, float("inf")
    for grid in _candidates(min_tiles, max_tiles):
        difference = abs(ratio - grid.columns / grid.rows)
        if difference < best_difference:
            best, best_difference = grid, difference
        # The official rule: of equal ratios, the larger grid wins only if the picture fills half of its area.
        elif difference == best_difference and width * height > 0.5 * tile_size * tile_size * grid.columns * grid.rows:
            best = grid
    return best


@lru_cache(maxsize=64)
def _candidates(min_tiles: int, max_tiles: int) -> tuple[Grid, ...]:
    """Return all grids of `min_tiles` to `max_tiles` tiles, sorted by area, then by columns.

    The official order of grids with one area is that of a Python set. With `min_tiles` 1, no choice depends on it
    (54,404 sizes were compared); with a higher value, it decides a few exact ties, such as 5 x 21 pixels in 21 tiles.
    """
    grids = [
        Grid(columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid.columns * grid.rows))
