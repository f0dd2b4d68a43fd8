"""What pictures look like, as far as it takes to tell whether two show the same: small, gray and square.

They are decoded in workers, where a hostile picture costs its own look and nothing else.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvit_cli.use.alignment import SIDE
from internvit_cli.use.in_memory import without_features
from internvit_cli.use.photograph import load_photograph
from internvit_cli.workers import Finished, WorkerPool, WorkerSpec, map_in_workers, usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from internvit_cli.storage.image import ImageFeatures

WORKER_BYTES = 4 << 30
WORKER_SECONDS = 30.0
"""The limits that `extract` has by default."""
PICTURES_PER_WORKER = 16
"""A worker that would have fewer is not worth its start."""
SMOOTH_FROM = 2 * SIDE
"""Longer side that pictures are decoded to before they are squeezed into a square, pixels."""


def read_looks(
    images: Iterable[ImageFeatures], count: int, on_progress: Callable[[int], None] = lambda _: None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read pictures where they were when they were encoded.

    Args:
        images: whose pictures.
        count: how many there are.
        on_progress: called with the number of pictures that are done with.

    Returns:
        Gray pictures squeezed into squares, [n, 64, 64], and a mask of those that are there: a picture that is gone,
        was changed since it was encoded, or cannot be decoded any more has none.
    """
    looks, is_there = np.zeros((count, SIDE, SIDE), np.uint8), np.zeros(count, bool)
    workers = min(usable_cpus(), math.ceil(count / PICTURES_PER_WORKER))
    if not count:
        return looks, is_there
    spec = WorkerSpec("internvit_cli.use.looks:reader", memory_bytes=WORKER_BYTES)
    with WorkerPool(spec, workers, WORKER_SECONDS) as pool:
        for done, outcome in enumerate(map_in_workers(pool, map(without_features, images)), 1):
            if isinstance(outcome, Finished) and outcome.result is not None:
                looks[outcome.task_id], is_there[outcome.task_id] = outcome.result, True
            on_progress(done)
    return looks, is_there


def reader() -> Callable[[ImageFeatures], NDArray[np.uint8] | None]:
    """What a worker runs."""
    return look_of


def look_of(image: ImageFeatures) -> NDArray[np.uint8] | None:
    """An image's picture, [64, 64]; None where it is gone or is not the one that was encoded."""
    photograph = load_photograph(image, SMOOTH_FROM)
    if photograph.picture is None or photograph.problem:
        return None
    return squeezed(photograph.picture)


def squeezed(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture in gray, squeezed into a square, [64, 64]."""
    small: Any = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
    return np.asarray(small, np.uint8)
