"""Arrange panels with titles, captions and color bars on one sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from internvit_cli.viz.draw.palette import short_number
from internvit_cli.viz.draw.text import (
    FAINT,
    INK,
    PAPER,
    line_height,
    shortened_to_width,
    text_width,
    wrap_text,
    write_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from internvit_cli.viz.draw.palette import Color, Scale

MARGIN = 24
GAP = 8
TITLE, HEADING, BODY = 20, 16, 13
"""Font sizes in pixels."""
BAR_HEIGHT = 12
LEAST_WIDTH = 280
"""Smallest width of a panel in pixels, because captions need room even below a tall picture."""
BEST_SHAPE = 1.6
"""Aspect ratio for which sheets are arranged, which is that of a screen."""
LEGEND = "How to read this figure"


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of a figure, with its texts."""

    name: str
    """One word."""
    title: str
    image: Image.Image
    """RGB."""
    captions: Sequence[str] = ()
    """Sentences below the picture, which are wrapped."""
    scale: Scale | None = None
    """The scale of its colors, drawn as a bar."""
    meaning: str = ""
    """A sentence on how to read it, for a legend if the figure has room for one."""


def figure(title: str, subtitle: str, panels: Sequence[Panel]) -> Image.Image:
    """Arrange all panels on one sheet.

    An empty place in the last row becomes a legend if the panels have meanings.

    Args:
        title: The title of the figure.
        subtitle: A line of facts.
        panels: The panels row by row, at least one.
    """
    placed = [_Placed(panel, max(panel.image.width, LEAST_WIDTH)) for panel in panels]
    columns = _columns(placed)
    rows = [placed[start : start + columns] for start in range(0, len(placed), columns)]
    widths = [max(row[column].width for row in rows if column < len(row)) for column in range(columns)]
    heights = [max(one.height for one in row) for row in rows]
    room = sum(widths) + MARGIN * (columns - 1)
    facts = wrap_text(subtitle, BODY, room)
    head = line_height(TITLE) + line_height(BODY) * len(facts) + GAP
    sheet = Image.new("RGB", (room + 2 * MARGIN, MARGIN + head + sum(heights) + MARGIN * len(heights)), PAPER)
    write_line(sheet, (MARGIN, MARGIN), shortened_to_width(title, TITLE, room), TITLE)
    _write_lines(sheet, (MARGIN, MARGIN + line_height(TITLE)), facts)
    top = MARGIN + head
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for one, width in zip(row, widths, strict=False):
            one.draw(sheet, (left, top))
            left += width + MARGIN
        if len(row) < columns and any(panel.meaning for panel in panels):
            _draw_legend(sheet, panels, (left, top), room + MARGIN - left, height)
        top += height + MARGIN
    return sheet


class _Placed:
    """A panel with captions wrapped for a width."""

    def __init__(self, panel: Panel, width: int) -> None:
        self._panel = panel
        self.width = width
        self._title = wrap_text(panel.title, HEADING, width)
        self._captions = [line for caption in panel.captions for line in wrap_text(caption, BODY, width)]
        bar = BAR_HEIGHT + GAP // 2 + line_height(BODY) if panel.scale else 0
        self._above = line_height(HEADING) * len(self._title)
        self.height = self._above + panel.image.height + GAP + bar + line_height(BODY) * len(self._captions)

    def draw(self, sheet: Image.Image, corner: tuple[int, int]) -> None:
        """Draw the panel with its upper left corner at a position."""
        left, top = corner
        panel = self._panel
        _write_lines(sheet, corner, self._title, HEADING)
        top += self._above
        sheet.paste(panel.image, (left, top))
        top += panel.image.height + GAP
        if panel.scale is not None:
            _draw_bar(sheet, panel.scale, (left, top), self.width)
            top += BAR_HEIGHT + GAP // 2 + line_height(BODY)
        _write_lines(sheet, (left, top), self._captions)


def _columns(panels: Sequence[_Placed]) -> int:
    """Return the number of columns that fits a screen best and leaves few empty places."""

    def cost(columns: int) -> float:
        rows = math.ceil(len(panels) / columns)
        width = columns * (max(panel.width for panel in panels) + MARGIN)
        height = rows * (max(panel.height for panel in panels) + MARGIN)
        free = columns * rows - len(panels)
        return abs(math.log(width / height / BEST_SHAPE)) + 0.7 * free

    return min(range(1, len(panels) + 1), key=cost)


def _draw_legend(sheet: Image.Image, panels: Sequence[Panel], corner: tuple[int, int], width: int, height: int) -> None:
    """Draw sentences on how to read the panels, as many as fit completely."""
    left, top = corner
    write_line(sheet, corner, shortened_to_width(LEGEND, HEADING, width), HEADING)
    bottom = top + height
    top += line_height(HEADING) + GAP
    for panel in panels:
        title, sentences = wrap_text(panel.title, BODY, width), wrap_text(panel.meaning, BODY, width)
        needed = line_height(BODY) * (len(title) + len(sentences)) + GAP
        if not panel.meaning or top + needed > bottom:
            continue
        _write_lines(sheet, (left, top), title, BODY, INK)
        _write_lines(sheet, (left, top + line_height(BODY) * len(title)), sentences)
        top += needed


def _write_lines(
    sheet: Image.Image, corner: tuple[int, int], lines: Iterable[str], size: int = BODY, color: Color | None = None
) -> None:
    left, top = corner
    for number, line in enumerate(lines):
        ink = color or (FAINT if size == BODY else INK)
        write_line(sheet, (left, top + number * line_height(size)), line, size, ink)


def _draw_bar(sheet: Image.Image, scale: Scale, corner: tuple[int, int], width: int) -> None:
    left, top = corner
    sheet.paste(Image.fromarray(scale.bar(width, BAR_HEIGHT)), corner)
    ImageDraw.Draw(sheet).rectangle((left, top, left + width - 1, top + BAR_HEIGHT - 1), outline=INK)
    for share in (0.0, 0.5, 1.0):
        label = short_number(scale.low + share * (scale.high - scale.low))
        shift = share * text_width(label, BODY)
        write_line(sheet, (left + share * width - shift, top + BAR_HEIGHT + GAP // 2), label, BODY)
