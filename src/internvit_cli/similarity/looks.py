"""What pictures look like, as far as it takes to tell whether two show the same: small, gray and square.

They are decoded in workers, where a hostile picture costs its own look and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvit_cli.runtime.workers import FinishedTask
from internvit_cli.similarity.alignment import SIDE
from internvit_cli.viz.photograph import PictureFile, in_workers, load_photograph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

SMOOTH_FROM = 2 * SIDE
"""Longer side that pictures are decoded to before they are squeezed into a square, pixels."""


def read_looks(
    files: Iterable[PictureFile], count: int, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read pictures that are still as they were when they were encoded.

    Args:
        files: the pictures.
        count: how many there are.
        on_progress: called with the number of pictures that are done with.

    Returns:
        Gray pictures squeezed into squares, [n, 64, 64], and a mask of those that are there: a picture that is gone,
        was changed since it was encoded, or cannot be decoded any more has none.
    """
    looks, is_there = np.zeros((count, SIDE, SIDE), np.uint8), np.zeros(count, bool)
    for done, outcome in enumerate(in_workers("internvit_cli.similarity.looks:reader", files, count), 1):
        if isinstance(outcome, FinishedTask) and outcome.result is not None:
            looks[outcome.task_id], is_there[outcome.task_id] = outcome.result, True
        on_progress(done)
    return looks, is_there


def reader() -> Callable[[PictureFile], NDArray[np.uint8] | None]:
    """What a worker runs."""
    return look_of


def look_of(file: PictureFile) -> NDArray[np.uint8] | None:
    """An image's picture, [64, 64]; None where it is gone or is not the one that was encoded."""
    picture = load_photograph(file, SMOOTH_FROM).picture
    return None if picture is None else squeezed(picture)


def squeezed(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture in gray, squeezed into a square, [64, 64]."""
    small: Any = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(small, np.uint8)
