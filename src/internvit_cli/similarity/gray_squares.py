"""Read pictures as small gray squares, which are enough to decide whether two show the same.

They are decoded in workers, so that a hostile picture costs only its own result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvit_cli.runtime.workers import FinishedTask
from internvit_cli.similarity.alignment import SIDE
from internvit_cli.viz.photograph import PictureFile, load_photograph, run_in_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

SMOOTH_FROM = 2 * SIDE
"""Longer side to which pictures are decoded before they are resized to a square, in pixels."""


def read_gray_squares(
    files: Iterable[PictureFile], count: int, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read pictures that have not changed since they were encoded.

    Args:
        files: The pictures.
        count: The number of pictures.
        on_progress: Called with the number of finished pictures.

    Returns:
        Gray pictures resized to squares, [n, 64, 64], and a mask of those that could be read: a picture that is gone,
        was changed since it was encoded, or cannot be decoded any more is not in the mask.
    """
    squares, is_there = np.zeros((count, SIDE, SIDE), np.uint8), np.zeros(count, bool)
    for done, outcome in enumerate(
        run_in_workers("internvit_cli.similarity.gray_squares:gray_square_reader", files, count), 1
    ):
        if isinstance(outcome, FinishedTask) and outcome.result is not None:
            squares[outcome.task_id], is_there[outcome.task_id] = outcome.result, True
        on_progress(done)
    return squares, is_there


def gray_square_reader() -> Callable[[PictureFile], NDArray[np.uint8] | None]:
    """Return the function that a worker runs."""
    return gray_square_of


def gray_square_of(file: PictureFile) -> NDArray[np.uint8] | None:
    """Return an image's picture as a gray square, [64, 64]; None if it is gone or not the one that was encoded."""
    picture = load_photograph(file, SMOOTH_FROM).picture
    return None if picture is None else to_gray_square(picture)


def to_gray_square(picture: Image.Image) -> NDArray[np.uint8]:
    """Convert a picture to gray and resize it to a square, [64, 64]."""
    small: Any = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(small, np.uint8)
