"""Contact sheets of what was found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.draw.sheet import CELL, Cell, Row, contact_sheet
from internvit_cli.use.photograph import load_photograph
from internvit_cli.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from internvit_cli.storage.image import ImageFeatures
    from internvit_cli.use.duplicates import Duplicates
    from internvit_cli.use.search import Answer

MOST_HITS = 95
MOST_CELLS, MOST_ROWS = 12, 100
"""Of groups on a sheet; --json has them all."""


def search_sheet(answers: Sequence[Answer]) -> Image.Image:
    """Each query with its hits, best first."""
    rows = []
    for answer in answers:
        query = _cell(answer.query, (answer.problem or "query", answer.query.key), is_marked=True)
        hits = [
            _cell(hit.image, (f"{number}.  {hit.similarity:.3f}", hit.image.key))
            for number, hit in enumerate(answer.hits[:MOST_HITS], 1)
        ]
        rows.append(Row(answer.query.key, [query, *hits]))
    return contact_sheet(rows)


def duplicates_sheet(found: Duplicates) -> Image.Image:
    """Each group of images that look the same, then each of identical files; so many as a sheet has room for."""
    rows = []
    for number, group in enumerate(found.similar, 1):
        cells = [
            _cell(member.image, (f"{member.similarity:.3f}", member.image.key), is_marked=place == 0)
            for place, member in enumerate(group[:MOST_CELLS])
        ]
        rows.append(Row(f"similar {number}: {counted(len(group), 'image')}", cells))
    for number, identical in enumerate(found.identical, 1):
        cells = [_cell(image, ("same bytes", image.key)) for image in identical[:MOST_CELLS]]
        rows.append(Row(f"identical {number}: {counted(len(identical), 'file')}", cells))
    return contact_sheet(rows[:MOST_ROWS])


def _cell(image: ImageFeatures, captions: Sequence[str], *, is_marked: bool = False) -> Cell:
    picture = load_photograph(image, CELL).picture if image.is_done else None
    return Cell(picture, captions, is_marked)
