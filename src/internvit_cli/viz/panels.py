"""Draw the panels of a figure over the photograph: tiles, components, lengths and similarity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from internvit_cli.viz.draw.palette import short_number
from internvit_cli.viz.draw.text import write_outlined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.storage.read.image import ImageFeatures

GONE = (214, 214, 214)
"""Color that replaces a photograph that cannot be shown."""
DIMMED = 0.35
"""Brightness of the photograph where a mask hides the map."""
MARK = (255, 0, 170)
MOST_LABELLED = 60
LEAST_SIDE = 120
"""Smallest shorter side of a map in pixels, if the longer side may grow for it."""
WIDEST = 2.5
"""Largest factor by which the longer side may grow for that."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """The photograph at the size of the maps of an image."""

    image: ImageFeatures
    photograph: Image.Image
    """The photograph in RGB; a single color if it cannot be shown."""
    opacity: float
    """The opacity of maps over the photograph, 0 to 1."""

    @classmethod
    def of(cls, image: ImageFeatures, photograph: Image.Image | None, side: int, opacity: float) -> Canvas:
        """Return a canvas with a longer side of `side` pixels, or more if the shorter one would be too small."""
        longer, shorter = max(image.width, image.height), min(image.width, image.height)
        factor = max(side / longer, min(LEAST_SIDE / shorter, WIDEST * side / longer))
        size = max(8, round(image.width * factor)), max(8, round(image.height * factor))
        if photograph is None:
            return cls(image, Image.new("RGB", size, GONE), 1.0)
        return cls(image, photograph.resize(size, Image.Resampling.BICUBIC), opacity)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The area of the tokens: left, top, right, bottom, in pixels of the canvas."""
        across, down = self.photograph.width / self.image.width, self.photograph.height / self.image.height
        left, top, right, bottom = self.image.covered
        return round(left * across), round(top * down), round(right * across), round(bottom * down)

    def tiles(self) -> Image.Image:
        """Draw the photograph with the edges and numbers of its tiles."""
        picture, grid = self.photograph.copy(), self.image.grid
        left, top, right, bottom = self.box
        draw = ImageDraw.Draw(picture)
        across, down = (right - left) / grid.columns, (bottom - top) / grid.rows
        for number in range(grid.columns * grid.rows):
            row, column = divmod(number, grid.columns)
            corner = left + column * across, top + row * down
            end = min(corner[0] + across, right) - 1, min(corner[1] + down, bottom) - 1
            draw.rectangle((*corner, *end), outline=(0, 0, 0), width=3)
            draw.rectangle((corner[0] + 1, corner[1] + 1, end[0] - 1, end[1] - 1), outline=(255, 255, 255))
            if grid.columns * grid.rows <= MOST_LABELLED:
                write_outlined(picture, (corner[0] + 7, corner[1] + 5), str(number), 16)
        return picture

    def overlay(self, colors: NDArray[np.uint8], mask: NDArray[Any] | None = None) -> Image.Image:
        """Draw a map over the photograph in gray, and only the dimmed photograph outside the mask.

        Args:
            colors: One color per token, [h, w, 3] uint8.
            mask: The tokens to draw, [h, w] bool; None for all.
        """
        left, top, right, bottom = self.box
        size = right - left, bottom - top
        base = self.photograph.convert("L").convert("RGB")
        dimmed = Image.blend(Image.new("RGB", base.size), base, DIMMED)
        drawn = Image.fromarray(colors).resize(size, Image.Resampling.NEAREST)
        shown = Image.blend(base.crop(self.box), drawn, self.opacity)
        picture = base if mask is None and self.box == (0, 0, *base.size) else dimmed
        stencil = None if mask is None else Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)
        picture.paste(shown, (left, top), stencil)
        return picture

    def center(self, shape: tuple[int, ...], row: int, column: int) -> tuple[float, float]:
        """Return the center of a token of an [h, w] map on the canvas."""
        left, top, right, bottom = self.box
        height, width = shape
        return left + (column + 0.5) * (right - left) / width, top + (row + 0.5) * (bottom - top) / height

    def cell(self, shape: tuple[int, ...]) -> float:
        """Return the shorter side of a token of an [h, w] map in pixels."""
        left, top, right, bottom = self.box
        return min((right - left) / shape[1], (bottom - top) / shape[0])


def mark_outliers(canvas: Canvas, picture: Image.Image, outliers: NDArray[Any]) -> None:
    """Draw a ring around every token of a mask, [h, w] bool."""
    draw, radius = ImageDraw.Draw(picture), max(3.0, 0.7 * canvas.cell(outliers.shape))
    for row, column in np.argwhere(outliers).tolist():
        x, y = canvas.center(outliers.shape, row, column)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=MARK, width=2)


def mark_point(picture: Image.Image, x: float, y: float) -> None:
    """Draw a cross that is visible on any color."""
    draw, arm = ImageDraw.Draw(picture), 11
    for width, color in ((5, (0, 0, 0)), (2, (255, 255, 255))):
        draw.line((x - arm, y, x + arm, y), fill=color, width=width)
        draw.line((x, y - arm, x, y + arm), fill=color, width=width)


def outlier_caption(lengths: NDArray[Any], outlier: float) -> str:
    """Return a caption for the outliers."""
    count = int((lengths > outlier).sum())
    if not count:
        return f"no outliers (longer than {short_number(outlier)})"
    noun = "outlier" if count == 1 else "outliers"
    longest = short_number(float(lengths.max()))
    return f"{count:,} {noun} ringed (longer than {short_number(outlier)}; longest {longest})"
