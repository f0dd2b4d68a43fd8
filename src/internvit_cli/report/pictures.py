"""Create small JPEGs of many pictures in workers, so that a hostile picture costs only its own thumbnail."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.runtime.workers import FinishedTask
from internvit_cli.viz.photograph import PictureFile, load_photograph, lost_photograph, run_in_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUALITY = 72


@dataclass(frozen=True, slots=True)
class SmallPicture:
    """A picture for the page, or the reason why it is not shown."""

    jpeg: bytes
    """The JPEG; empty if there is none."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class ThumbnailTask:
    """A picture to shrink."""

    file: PictureFile
    side: int
    """The largest longer side in pixels."""


def shrink(
    wanted: Sequence[ThumbnailTask], workers: int | None, on_progress: Callable[[int], None] = lambda _: None
) -> list[SmallPicture]:
    """Read and shrink pictures, in the given order.

    Args:
        wanted: The pictures and their sizes.
        workers: The largest number of processes; None means one per processor.
        on_progress: Called with the number of finished pictures.
    """
    found: list[SmallPicture] = [SmallPicture(b"")] * len(wanted)
    outcomes = run_in_workers("internvit_cli.report.pictures:shrinker", wanted, len(wanted), workers)
    for done, outcome in enumerate(outcomes, 1):
        if isinstance(outcome, FinishedTask):
            found[outcome.task_id] = outcome.result
        else:
            found[outcome.task_id] = SmallPicture(b"", lost_photograph(wanted[outcome.task_id].file, outcome).note)
        on_progress(done)
    return found


def shrinker() -> Callable[[ThumbnailTask], SmallPicture]:
    """Return the function that a worker runs."""
    return lambda wanted: small_picture(wanted.file, wanted.side)


def small_picture(file: PictureFile, side: int) -> SmallPicture:
    """Return a picture as a JPEG, or the reason if it is gone or not the one that was encoded."""
    photograph = load_photograph(file, side)
    if photograph.picture is None:
        return SmallPicture(b"", photograph.note)
    stream = io.BytesIO()
    photograph.picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return SmallPicture(stream.getvalue())
