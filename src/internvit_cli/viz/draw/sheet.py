"""Draw a contact sheet: rows of small pictures with captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from internvit_cli.viz.draw.text import FAINT, INK, PAPER, line_height, shortened_to_width, wrap_text, write_line

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN, GAP = 20, 12
HEADING, BODY = 16, 12
CELL = 190
"""Side of a picture's place in pixels."""
ACROSS = 6
EDGE = (178, 24, 43)
EMPTY = (228, 228, 228)
INSET = 10
"""Margin of text in an empty place, in pixels."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A small picture with captions."""

    picture: Image.Image | None
    """The picture in RGB, of any size; None if there is none."""
    captions: Sequence[str]
    """Lines below the picture; the first is darker."""
    is_marked: bool = False
    problem: str = ""
    """Why there is no picture."""


@dataclass(frozen=True, slots=True)
class SheetRow:
    """A row of pictures that belong together."""

    title: str
    cells: Sequence[Cell]


def contact_sheet(rows: Sequence[SheetRow], notes: Sequence[str] = ()) -> Image.Image:
    """Arrange all rows on one sheet, and wrap long ones.

    Args:
        rows: The rows from top to bottom.
        notes: Warnings for the viewer, drawn above the rows.
    """
    across = min(ACROSS, max((len(row.cells) for row in rows), default=1))
    lines = [
        _Line(row.title if start == 0 else "", row.cells[start : start + across])
        for row in rows
        for start in range(0, max(1, len(row.cells)), across)
    ]
    room = across * CELL + (across - 1) * GAP
    said = [part for note in notes for part in wrap_text(note, BODY, room)]
    head = len(said) * line_height(BODY) + (GAP if said else 0)
    height = 2 * MARGIN + head + sum(line.height for line in lines)
    sheet = Image.new("RGB", (room + 2 * MARGIN, height), PAPER)
    for number, part in enumerate(said):
        write_line(sheet, (MARGIN, MARGIN + number * line_height(BODY)), part, BODY, INK)
    top = MARGIN + head
    for line in lines:
        line.draw(sheet, top)
        top += line.height
    return sheet


class _Line:
    """Cells that are drawn side by side."""

    def __init__(self, title: str, cells: Sequence[Cell]) -> None:
        self._title = title
        self._cells = cells
        self._pictures = [_small(cell) for cell in cells]
        self._picture_height = max((picture.height for picture in self._pictures), default=0)
        self._head = line_height(HEADING) + GAP // 2 if title else 0
        captions = max((len(cell.captions) for cell in cells), default=0)
        self.height = self._head + self._picture_height + GAP // 2 + captions * line_height(BODY) + GAP

    def draw(self, sheet: Image.Image, top: int) -> None:
        """Draw the line with its upper edge at `top` pixels."""
        write_line(sheet, (MARGIN, top), shortened_to_width(self._title, HEADING, sheet.width - 2 * MARGIN), HEADING)
        for number, (cell, picture) in enumerate(zip(self._cells, self._pictures, strict=True)):
            left = MARGIN + number * (CELL + GAP)
            at = left + (CELL - picture.width) // 2, top + self._head + self._picture_height - picture.height
            sheet.paste(picture, at)
            if cell.is_marked:
                box = (*at, at[0] + picture.width - 1, at[1] + picture.height - 1)
                ImageDraw.Draw(sheet).rectangle(box, outline=EDGE, width=4)
            below = top + self._head + self._picture_height + GAP // 2
            for place, caption in enumerate(cell.captions):
                color = FAINT if place else INK
                write_line(
                    sheet,
                    (left, below + place * line_height(BODY)),
                    shortened_to_width(caption, BODY, CELL),
                    BODY,
                    color,
                )


def _small(cell: Cell) -> Image.Image:
    """Return a picture that fits its place, or a text that says why there is none."""
    if cell.picture is not None:
        small = cell.picture.copy()
        small.thumbnail((CELL, CELL), Image.Resampling.BICUBIC)
        return small
    empty = Image.new("RGB", (CELL, CELL * 3 // 4), EMPTY)
    most = (empty.height - 2 * INSET) // line_height(BODY)
    lines = wrap_text(f"picture not shown: {cell.problem}", BODY, CELL - 2 * INSET)[:most]
    top = (empty.height - len(lines) * line_height(BODY)) // 2
    for number, line in enumerate(lines):
        write_line(empty, (INSET, top + number * line_height(BODY)), line, BODY, FAINT)
    return empty
