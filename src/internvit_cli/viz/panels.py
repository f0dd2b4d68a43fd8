"""The pictures of a figure: tiles, components, lengths, similarity, each laid over the photograph."""

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
"""Stands for a photograph that cannot be shown."""
DIMMED = 0.35
"""How much of the photograph is left where a mask hides the map."""
MARK = (255, 0, 170)
MOST_LABELLED = 60
LEAST_SIDE = 120
"""Pixels of a map's shorter side, where the longer one has room for it."""
WIDEST = 2.5
"""How much longer than asked for a map may become for that."""


@dataclass(frozen=True, slots=True)
class Canvas:
    """The photograph at the size at which everything about an image is drawn."""

    image: ImageFeatures
    photograph: Image.Image
    """RGB; one flat color when the picture cannot be shown."""
    opacity: float
    """Of maps over the photograph, 0 to 1."""

    @classmethod
    def of(cls, image: ImageFeatures, photograph: Image.Image | None, side: int, opacity: float) -> Canvas:
        """A canvas whose longer side has so many pixels, or more where the shorter one would be a mere strip."""
        longer, shorter = max(image.width, image.height), min(image.width, image.height)
        factor = max(side / longer, min(LEAST_SIDE / shorter, WIDEST * side / longer))
        size = max(8, round(image.width * factor)), max(8, round(image.height * factor))
        if photograph is None:
            return cls(image, Image.new("RGB", size, GONE), 1.0)
        return cls(image, photograph.resize(size, Image.Resampling.BICUBIC), opacity)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Where the tokens lie: left, top, right, bottom, pixels of the canvas."""
        across, down = self.photograph.width / self.image.width, self.photograph.height / self.image.height
        left, top, right, bottom = self.image.covered
        return round(left * across), round(top * down), round(right * across), round(bottom * down)

    def tiles(self) -> Image.Image:
        """The photograph with the edges and numbers of its tiles."""
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
        """A map over the photograph in grey; outside of the mask the photograph alone, dimmed.

        Args:
            colors: [h, w, 3] uint8, one color a token.
            mask: [h, w] bool.
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

    def centre(self, shape: tuple[int, ...], row: int, column: int) -> tuple[float, float]:
        """The middle of a token of an [h, w] map on the canvas."""
        left, top, right, bottom = self.box
        height, width = shape
        return left + (column + 0.5) * (right - left) / width, top + (row + 0.5) * (bottom - top) / height

    def cell(self, shape: tuple[int, ...]) -> float:
        """The smaller side of a token of an [h, w] map, pixels."""
        left, top, right, bottom = self.box
        return min((right - left) / shape[1], (bottom - top) / shape[0])


def mark_outliers(canvas: Canvas, picture: Image.Image, outliers: NDArray[Any]) -> None:
    """Ring every token of a mask, [h, w] bool."""
    draw, radius = ImageDraw.Draw(picture), max(3.0, 0.7 * canvas.cell(outliers.shape))
    for row, column in np.argwhere(outliers).tolist():
        x, y = canvas.centre(outliers.shape, row, column)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=MARK, width=2)


def mark_point(picture: Image.Image, x: float, y: float) -> None:
    """A cross that shows on any color."""
    draw, arm = ImageDraw.Draw(picture), 11
    for width, color in ((5, (0, 0, 0)), (2, (255, 255, 255))):
        draw.line((x - arm, y, x + arm, y), fill=color, width=width)
        draw.line((x, y - arm, x, y + arm), fill=color, width=width)


def outlier_caption(lengths: NDArray[Any], outlier: float) -> str:
    """What is marked, in words."""
    count = int((lengths > outlier).sum())
    if not count:
        return f"no outliers (longer than {short_number(outlier)})"
    noun = "outlier" if count == 1 else "outliers"
    longest = short_number(float(lengths.max()))
    return f"{count:,} {noun} ringed (longer than {short_number(outlier)}; longest {longest})"
