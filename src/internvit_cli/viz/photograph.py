"""Read the pictures of rows, but only if they are exactly the files that were encoded.

Whoever wrote a feature file chose its keys, roots, sizes and digests. A picture is therefore shown only if its SHA-256
is the stored one, is not read at all if its size differs, and is decoded in a worker. So a feature file cannot make its
reader publish another picture, and a picture cannot crash the command.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from internvit_cli.config import DEFAULT_MAX_PIXELS, PixelRule, Skipped
from internvit_cli.decode.direct import NO_DIGEST
from internvit_cli.decode.pictures import digested, upright_rgb
from internvit_cli.errors import one_line
from internvit_cli.plan.png_chunks import despite_texts
from internvit_cli.runtime.workers import FinishedTask, LostTask, WorkerPool, WorkerSpec, map_in_workers, usable_cpus
from internvit_cli.sources.files import open_or_skip, pillow_settings, readable_formats, system_failure
from internvit_cli.sources.members import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from internvit_cli.storage.read.image import ImageFeatures

WORKER_BYTES = 4 << 30
WORKER_SECONDS = 30.0
"""The default limits of `extract`."""
PICTURES_PER_WORKER = 8
"""Smallest number of pictures for which starting another worker pays off."""
NOT_STORED = "its SHA-256 is not stored, so it may not be the picture that was encoded"
CHANGED = "it has changed since it was encoded"
OTHER_SIZE = "its size in pixels differs from that of its row"


@dataclass(frozen=True, slots=True)
class PictureFile:
    """The file of an image as its row describes it, which is small enough to be sent to a worker."""

    path: bytes | None
    """The path, or the address of an archive's member; None for a picture without a file."""
    size: int
    """Bytes."""
    sha256: bytes
    """The SHA-256, 32 bytes; zeros if it is not known."""
    width: int
    """The width in pixels, after orientation."""
    height: int
    orientation: int
    """The EXIF orientation to apply."""
    rule: PixelRule
    """How its pixels were read; the tiling does not matter here."""

    @property
    def place(self) -> str:
        """The path on one line; empty for a picture without a file."""
        return "" if self.path is None else one_line(shown(self.path), limit=None)

    @classmethod
    def of(cls, image: ImageFeatures, folder: str | None = None) -> PictureFile:
        """Describe the picture of an image.

        Args:
            image: The image.
            folder: The folder that holds its key; None means where the picture was when it was encoded.
        """
        return cls(
            path=image.place if folder is None else os.fsencode(os.path.join(folder, image.key)),
            size=image.file_size,
            sha256=image.digest,
            width=image.width,
            height=image.height,
            orientation=image.orientation,
            rule=PixelRule(
                background=image.recipe.background,
                max_pixels=max(DEFAULT_MAX_PIXELS, image.width * image.height),
                truncated=image.recipe.truncated,
                grey_range=image.recipe.grey_range,
            ),
        )


@dataclass(frozen=True, slots=True)
class Photograph:
    """A picture, or the reason why it is not shown."""

    picture: Image.Image | None
    """The picture in RGB, upright as it was encoded, and at most as large as requested."""
    problem: str = ""
    """Why the picture is not shown, on one line; empty if it is."""
    path: str = ""
    """The path on one line; empty for a picture without a file."""

    @property
    def note(self) -> str:
        """The path and the problem, such as `/imgs/a.jpg: No such file or directory`."""
        return f"{self.path}: {self.problem}" if self.path else self.problem


def load_photograph(file: PictureFile, side: int) -> Photograph:
    """Read a picture in this process, turned as its row says, if it is the one that was encoded.

    Args:
        file: The picture.
        side: The longer side in pixels; a smaller picture is not enlarged.
    """
    if file.path is None:
        return Photograph(None, "it has no file")
    found = _verified(file, side)
    return Photograph(None, found, file.place) if isinstance(found, str) else Photograph(found, "", file.place)


def read_photographs(
    files: Sequence[PictureFile], side: int, on_progress: Callable[[int], None] = lambda _: None
) -> Iterator[Photograph]:
    """Read pictures in workers, and yield them in order.

    Args:
        files: The pictures.
        side: The longer side in pixels.
        on_progress: Called with the number of finished pictures.
    """
    early: dict[int, Photograph] = {}
    following = 0
    tasks = ((file, side) for file in files)
    for done, outcome in enumerate(
        run_in_workers("internvit_cli.viz.photograph:photograph_reader", tasks, len(files)), 1
    ):
        number = outcome.task_id
        early[number] = outcome.result if isinstance(outcome, FinishedTask) else lost_photograph(files[number], outcome)
        on_progress(done)
        while following in early:
            yield early.pop(following)
            following += 1


def photograph_reader() -> Callable[[tuple[PictureFile, int]], Photograph]:
    """Return the function that a worker of `read_photographs` runs."""
    return lambda task: load_photograph(*task)


def lost_photograph(file: PictureFile, outcome: LostTask) -> Photograph:
    """Return the result for a picture whose worker died or ran out of time."""
    return Photograph(None, f"{outcome.status.word}: {outcome.message}", file.place)


def run_in_workers(
    handler: str, tasks: Iterable[Any], count: int, workers: int | None = None
) -> Iterator[FinishedTask | LostTask]:
    """Yield the outcomes of tasks with one picture each, as they are ready.

    Args:
        handler: The handler of the workers, see `WorkerSpec`.
        tasks: The payloads.
        count: The number of tasks.
        workers: The largest number of processes; None means one per processor.
    """
    if count:
        workers = min(workers or usable_cpus(), math.ceil(count / PICTURES_PER_WORKER))
        with WorkerPool(WorkerSpec(handler, memory_bytes=WORKER_BYTES), workers, WORKER_SECONDS) as pool:
            yield from map_in_workers(pool, tasks)


def _verified(file: PictureFile, side: int) -> Image.Image | str:
    """Return the upright picture, or why it is not shown."""
    if file.sha256 == NO_DIGEST:
        return NOT_STORED
    opened = open_or_skip(file.path or b"")
    if isinstance(opened, Skipped):
        return opened.message
    with os.fdopen(opened.descriptor, "rb", buffering=0):
        stream = opened.stream()
        if opened.status.st_size != file.size:
            return CHANGED
        try:
            digest, data = digested(stream, file.size)
            return _decoded(data, file, side) if digest == file.sha256 else CHANGED
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            return system_failure(error).message


def _decoded(data: BinaryIO, file: PictureFile, side: int) -> Image.Image | str:
    turned = (file.height, file.width) if file.orientation >= 5 else (file.width, file.height)

    def upright(stream: BinaryIO) -> Image.Image | str:
        with Image.open(stream, formats=readable_formats()) as opened:
            is_turned_while_loaded = opened.format == "TIFF"
            if opened.size != turned and not is_turned_while_loaded:
                return OTHER_SIZE
            opened.draft("RGB", (2 * side, 2 * side))  # decode a JPEG no larger than needed
            opened.load()
            if opened.size != turned and is_turned_while_loaded:
                return OTHER_SIZE
            picture = upright_rgb(opened, file.orientation, file.rule)
            picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            picture.info = {}  # do not send metadata to another process
            return picture

    with pillow_settings(file.rule):
        return despite_texts(upright, data)
