"""Small JPEGs of many pictures, decoded in workers: a hostile picture costs its own thumbnail, never the page."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.runtime.workers import FinishedTask
from internvit_cli.viz.photograph import PictureFile, in_workers, load_photograph, lost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUALITY = 72


@dataclass(frozen=True, slots=True)
class SmallPicture:
    """A picture as the page shows it, or why it does not."""

    jpeg: bytes
    """Empty when there is none."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ThumbnailTask:
    """A picture to make small."""

    file: PictureFile
    side: int
    """Its longer side, pixels, at most."""


def shrink(
    wanted: Sequence[ThumbnailTask], workers: int | None, on_progress: Callable[[int], None] = lambda _: None
) -> list[SmallPicture]:
    """Read pictures and make them small, in the order given.

    Args:
        wanted: which, and how small.
        workers: processes at most; None is one per processor.
        on_progress: called with the number of pictures that are done with.
    """
    found: list[SmallPicture] = [SmallPicture(b"")] * len(wanted)
    outcomes = in_workers("internvit_cli.report.pictures:shrinker", wanted, len(wanted), workers)
    for done, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, FinishedTask):
            found[outcome.task_id] = outcome.result
        else:
            found[outcome.task_id] = SmallPicture(b"", lost(wanted[outcome.task_id].file, outcome).note)
        on_progress(done)
    return found


def shrinker() -> Callable[[ThumbnailTask], SmallPicture]:
    """Return what a worker runs."""
    return lambda wanted: small_picture(wanted.file, wanted.side)


def small_picture(file: PictureFile, side: int) -> SmallPicture:
    """Return a picture as a JPEG; none where it is gone or is not the one that was encoded."""
    photograph = load_photograph(file, side)
    if photograph.picture is None:
        return SmallPicture(b"", photograph.note)
    stream = io.BytesIO()
    photograph.picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return SmallPicture(stream.getvalue())
