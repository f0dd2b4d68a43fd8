"""Small JPEGs of many pictures, decoded in workers: a hostile picture costs its own thumbnail, never the page."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.errors import one_line
from internvit_cli.use.in_memory import without_features
from internvit_cli.use.photograph import load_photograph
from internvit_cli.workers import Finished, WorkerPool, WorkerSpec, map_in_workers, usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from internvit_cli.storage.image import ImageFeatures

QUALITY = 72
WORKER_BYTES = 4 << 30
WORKER_SECONDS = 30.0
"""The limits that `extract` has by default."""
PICTURES_PER_WORKER = 8
"""A worker that would have fewer is not worth its start."""


@dataclass(frozen=True, slots=True)
class SmallPicture:
    """A picture as the page shows it, or why it does not."""

    jpeg: bytes
    """Empty when there is none."""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A picture to make small."""

    image: ImageFeatures
    side: int
    """Its longer side, pixels, at most."""


def shrink(
    wanted: Sequence[Wanted], workers: int | None, on_progress: Callable[[int], None] = lambda _: None
) -> list[SmallPicture]:
    """Read pictures and make them small, in the order given.

    Args:
        wanted: which, and how small.
        workers: processes; None is one a processor.
        on_progress: called with the number of pictures that are done with.
    """
    if not wanted:
        return []
    count = min(workers or usable_cpus(), math.ceil(len(wanted) / PICTURES_PER_WORKER))
    found: list[SmallPicture] = [SmallPicture(b"")] * len(wanted)
    spec = WorkerSpec("internvit_cli.use.report.pictures:shrinker", memory_bytes=WORKER_BYTES)
    payloads = (Wanted(without_features(one.image), one.side) for one in wanted)
    with WorkerPool(spec, count, WORKER_SECONDS) as pool:
        for done, outcome in enumerate(map_in_workers(pool, payloads), 1):
            found[outcome.task_id] = (
                outcome.result
                if isinstance(outcome, Finished)
                else SmallPicture(b"", f"{outcome.status.word}: {outcome.message}")
            )
            on_progress(done)
    return found


def shrinker() -> Callable[[Wanted], SmallPicture]:
    """What a worker runs."""
    return lambda wanted: small_picture(wanted.image, wanted.side)


def small_picture(image: ImageFeatures, side: int) -> SmallPicture:
    """An image's picture as a JPEG; none where it is gone or is not the one that was encoded."""
    photograph = load_photograph(image, side)
    if photograph.picture is None or photograph.problem:
        return SmallPicture(b"", one_line(photograph.problem, limit=None))
    stream = io.BytesIO()
    photograph.picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return SmallPicture(stream.getvalue())
