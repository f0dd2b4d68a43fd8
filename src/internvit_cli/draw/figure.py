"""Panels with titles, captions and colour bars, arranged on one sheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from internvit_cli.draw.palette import short_number
from internvit_cli.draw.text import FAINT, INK, PAPER, fitted, line_height, text_width, write

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.draw.palette import Scale

MARGIN = 24
GAP = 8
TITLE, HEADING, BODY = 20, 16, 13
"""Sizes of letters, pixels."""
BAR_HEIGHT = 12
LEAST_WIDTH = 280
"""Of a panel, pixels: captions need room even below a tall picture."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of a figure."""

    name: str
    """One word."""
    title: str
    image: Image.Image
    """RGB."""
    captions: Sequence[str] = ()
    """Lines below it."""
    scale: Scale | None = None
    """Of its colours, drawn as a bar."""


def figure(title: str, subtitle: str, panels: Sequence[Panel], columns: int | None = None) -> Image.Image:
    """One sheet with all panels.

    Args:
        title: what it shows.
        subtitle: a line of facts.
        panels: row by row; at least one.
        columns: panels side by side; None chooses.
    """
    columns = columns or _columns(panels)
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    widths = [
        max(_width(row[column]) for row in rows if column < len(row)) for column in range(min(columns, len(panels)))
    ]
    heights = [max(_height(panel) for panel in row) for row in rows]
    head = line_height(TITLE) + line_height(BODY) + GAP
    width = sum(widths) + MARGIN * (len(widths) + 1)
    sheet = Image.new("RGB", (width, MARGIN + head + sum(heights) + MARGIN * len(heights)), PAPER)
    write(sheet, (MARGIN, MARGIN), fitted(title, TITLE, width - 2 * MARGIN), TITLE)
    write(sheet, (MARGIN, MARGIN + line_height(TITLE)), fitted(subtitle, BODY, width - 2 * MARGIN), BODY, FAINT)
    top = MARGIN + head
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for panel, panel_width in zip(row, widths, strict=False):
            _draw(sheet, panel, (left, top), panel_width)
            left += panel_width + MARGIN
        top += height + MARGIN
    return sheet


def _columns(panels: Sequence[Panel]) -> int:
    """Side by side in one row where they are few or tall, else in two rows."""
    if len(panels) <= 2:
        return len(panels)
    tallest = max(panel.image.height / panel.image.width for panel in panels)
    if len(panels) <= 4 and tallest > 1.2:
        return len(panels)
    return 2 if len(panels) <= 4 else 3


def _width(panel: Panel) -> int:
    return max(panel.image.width, LEAST_WIDTH)


def _height(panel: Panel) -> int:
    bar = BAR_HEIGHT + GAP // 2 + line_height(BODY) if panel.scale else 0
    return line_height(HEADING) + panel.image.height + GAP + bar + line_height(BODY) * len(panel.captions)


def _draw(sheet: Image.Image, panel: Panel, corner: tuple[int, int], width: int) -> None:
    left, top = corner
    write(sheet, (left, top), fitted(panel.title, HEADING, width), HEADING)
    top += line_height(HEADING)
    sheet.paste(panel.image, (left, top))
    top += panel.image.height + GAP
    if panel.scale is not None:
        _draw_bar(sheet, panel.scale, (left, top), panel.image.width)
        top += BAR_HEIGHT + GAP // 2 + line_height(BODY)
    for caption in panel.captions:
        write(sheet, (left, top), fitted(caption, BODY, width), BODY, FAINT)
        top += line_height(BODY)


def _draw_bar(sheet: Image.Image, scale: Scale, corner: tuple[int, int], width: int) -> None:
    left, top = corner
    sheet.paste(Image.fromarray(scale.bar(width, BAR_HEIGHT)), corner)
    ImageDraw.Draw(sheet).rectangle((left, top, left + width - 1, top + BAR_HEIGHT - 1), outline=INK)
    for share in (0.0, 0.5, 1.0):
        label = short_number(scale.low + share * (scale.high - scale.low))
        shift = share * text_width(label, BODY)
        write(sheet, (left + share * width - shift, top + BAR_HEIGHT + GAP // 2), label, BODY)
