"""Draw contact sheets of search results and duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted
from internvit_cli.viz.draw.sheet import CELL, Cell, SheetRow, contact_sheet
from internvit_cli.viz.photograph import Photograph, PictureFile, read_photographs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from internvit_cli.similarity.duplicates import Duplicates
    from internvit_cli.similarity.search import SearchResult
    from internvit_cli.storage.read.image import ImageFeatures

MOST_HITS = 95
MOST_CELLS, MOST_ROWS = 12, 100
"""Largest number of groups on a sheet; --json lists all of them."""


@dataclass(frozen=True, slots=True)
class SheetPicture:
    """The place of a picture on a sheet."""

    image: ImageFeatures
    captions: Sequence[str]
    folder: str | None
    """The folder that holds the picture; None means where it was when it was encoded."""
    is_marked: bool = False


def search_sheet(found: SearchResult, folder: str | None = None, observer: Observer = SILENT) -> Image.Image:
    """Draw each query with its hits, best first.

    Args:
        found: The result of the search.
        folder: The folder that holds the pictures of the output; None means where they were when they were encoded.
        observer: Receives progress.
    """
    rows = []
    for answer in found.answers:
        captions = answer.problem or "query", answer.query.key
        query = SheetPicture(answer.query, captions, None if answer.is_picture else folder, is_marked=True)
        hits = [
            SheetPicture(hit.image, (f"{number}.  {hit.similarity:.3f}", hit.image.key), folder)
            for number, hit in enumerate(answer.hits[:MOST_HITS], 1)
        ]
        rows.append((answer.query.key, [query, *hits]))
    return pictures_sheet(rows, found.notes, observer)


def duplicates_sheet(found: Duplicates, folder: str | None = None, observer: Observer = SILENT) -> Image.Image:
    """Draw groups of similar images, then of identical files, as many as fit on a sheet.

    Args:
        found: The groups.
        folder: The folder that holds the pictures; None means where they were when they were encoded.
        observer: Receives progress.
    """
    rows = []
    for number, group in enumerate(found.similar[:MOST_ROWS], 1):
        places = [
            SheetPicture(member.image, (f"{member.similarity:.3f}", member.image.key), folder, is_marked=place == 0)
            for place, member in enumerate(group[:MOST_CELLS])
        ]
        rows.append((f"similar {number}: {counted(len(group), 'image')}", places))
    for number, identical in enumerate(found.identical[:MOST_ROWS], 1):
        places = [SheetPicture(image, ("same bytes", image.key), folder) for image in identical[:MOST_CELLS]]
        rows.append((f"identical {number}: {counted(len(identical), 'file')}", places))
    return pictures_sheet(rows[:MOST_ROWS], found.notes, observer)


def pictures_sheet(
    rows: Sequence[tuple[str, Sequence[SheetPicture]]], notes: Sequence[str], observer: Observer
) -> Image.Image:
    """Draw a sheet of rows with titles, and read the pictures of images that have features.

    Args:
        rows: The title and the pictures of each row.
        notes: Warnings for the viewer, drawn above the rows.
        observer: Receives progress.
    """
    places = [place for _, row in rows for place in row]
    files = [PictureFile.of(place.image, place.folder) for place in places if place.image.is_done]
    with observer.phase("drawing the sheet", "picture", len(files)) as phase:
        photographs = read_photographs(files, CELL, phase.at)
        cells = iter([_cell(place, next(photographs) if place.image.is_done else None) for place in places])
        return contact_sheet([SheetRow(title, [next(cells) for _ in row]) for title, row in rows], notes)


def _cell(place: SheetPicture, photograph: Photograph | None) -> Cell:
    if photograph is None:
        return Cell(None, place.captions, place.is_marked, "no features")
    return Cell(photograph.picture, place.captions, place.is_marked, photograph.problem)
