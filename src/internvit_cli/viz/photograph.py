"""The pictures behind rows of features, shown only where they are the very files that were encoded.

Keys, roots, sizes and digests are whatever the maker of a feature file wrote. A picture is therefore shown only if its
SHA-256 is stored and agrees, is not read at all if its size differs, and is decoded in a worker: a feature file cannot
make its reader publish some other picture, and a picture cannot take down the command.
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
from internvit_cli.sources.files import classify, open_regular, pillow_settings, readable_formats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from internvit_cli.storage.read.image import ImageFeatures

WORKER_BYTES = 4 << 30
WORKER_SECONDS = 30.0
"""The limits that `extract` has by default."""
PICTURES_PER_WORKER = 8
"""A worker that would have fewer is not worth its start."""
NOT_STORED = "its SHA-256 is not stored, so nothing tells whether this is the picture that was encoded"
CHANGED = "it changed since it was encoded"
OTHER_SIZE = "it has another size in pixels than its row says"


@dataclass(frozen=True, slots=True)
class PictureFile:
    """The file of an image, as its row describes it: small enough to be sent to a worker."""

    path: bytes | None
    """None for a picture that never was a file."""
    size: int
    """Bytes."""
    sha256: bytes
    """32 bytes; zeros where it is not known."""
    width: int
    """After orientation, pixels."""
    height: int
    orientation: int
    """EXIF's number of the turn that sets it upright."""
    rule: PixelRule
    """How its pixels were read; its tiles do not matter here."""

    @property
    def place(self) -> str:
        """The path on one line; empty for a picture that never was a file."""
        return "" if self.path is None else one_line(os.fsdecode(self.path), limit=None)

    @classmethod
    def of(cls, image: ImageFeatures, folder: str | None = None) -> PictureFile:
        """Describe the picture of an image.

        Args:
            image: the row.
            folder: where to look for its key; None is where the picture was when it was encoded.
        """
        path = image.path if folder is None else os.path.join(folder, image.key)
        return cls(
            path=None if path is None else os.fsencode(path),
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
    """A picture to look at, or why there is none."""

    picture: Image.Image | None
    """RGB, upright as it was when it was encoded; at most as large as was asked for."""
    problem: str = ""
    """Why there is none, in words on one line; empty when there is one."""
    path: str = ""
    """Where it was looked for, on one line; empty for a picture that never was a file."""

    @property
    def note(self) -> str:
        """The problem and where it is, such as `/imgs/a.jpg: No such file or directory`."""
        return f"{self.path}: {self.problem}" if self.path else self.problem


def load_photograph(file: PictureFile, side: int) -> Photograph:
    """Read a picture in this process, turned as its row says, if it is the one that was encoded.

    Args:
        file: the picture.
        side: the longer side wanted, pixels; a smaller picture stays as it is.
    """
    if file.path is None:
        return Photograph(None, "it never was a file")
    found = _verified(file, side)
    return Photograph(None, found, file.place) if isinstance(found, str) else Photograph(found, "", file.place)


def read_photographs(
    files: Sequence[PictureFile], side: int, on_progress: Callable[[int], None] = lambda _: None
) -> Iterator[Photograph]:
    """Yield pictures in order, read in workers.

    Args:
        files: the pictures.
        side: the longer side wanted, pixels.
        on_progress: called with the number of pictures that are done with.
    """
    early: dict[int, Photograph] = {}
    following = 0
    tasks = ((file, side) for file in files)
    for done, outcome in enumerate(in_workers("internvit_cli.viz.photograph:reader", tasks, len(files)), 1):
        number = outcome.task_id
        early[number] = outcome.result if isinstance(outcome, FinishedTask) else lost(files[number], outcome)
        on_progress(done)
        while following in early:
            yield early.pop(following)
            following += 1


def reader() -> Callable[[tuple[PictureFile, int]], Photograph]:
    """Return what a worker of `read_photographs` runs."""
    return lambda task: load_photograph(*task)


def lost(file: PictureFile, outcome: LostTask) -> Photograph:
    """Return what there is of a picture whose worker died or ran out of time."""
    return Photograph(None, f"{outcome.status.word}: {outcome.message}", file.place)


def in_workers(
    handler: str, tasks: Iterable[Any], count: int, workers: int | None = None
) -> Iterator[FinishedTask | LostTask]:
    """Yield the outcomes of tasks about one picture each, as they come.

    Args:
        handler: what a worker runs, see `WorkerSpec`.
        tasks: the payloads.
        count: how many there are.
        workers: processes at most; None is one per processor.
    """
    if count:
        workers = min(workers or usable_cpus(), math.ceil(count / PICTURES_PER_WORKER))
        with WorkerPool(WorkerSpec(handler, memory_bytes=WORKER_BYTES), workers, WORKER_SECONDS) as pool:
            yield from map_in_workers(pool, tasks)


def _verified(file: PictureFile, side: int) -> Image.Image | str:
    """Return the upright picture, or why it is not shown."""
    if file.sha256 == NO_DIGEST:
        return NOT_STORED
    opened = open_regular(file.path or b"")
    if isinstance(opened, Skipped):
        return opened.message
    with os.fdopen(opened.descriptor, "rb") as stream:
        if opened.status.st_size != file.size:
            return CHANGED
        try:
            digest, data = digested(stream, file.size)
            return _decoded(data, file, side) if digest == file.sha256 else CHANGED
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            return classify(error).message


def _decoded(data: BinaryIO, file: PictureFile, side: int) -> Image.Image | str:
    turned = (file.height, file.width) if file.orientation >= 5 else (file.width, file.height)

    def upright(stream: BinaryIO) -> Image.Image | str:
        with Image.open(stream, formats=readable_formats()) as opened:
            is_turned_while_loaded = opened.format == "TIFF"
            if opened.size != turned and not is_turned_while_loaded:
                return OTHER_SIZE
            opened.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded no larger than needed
            opened.load()
            if opened.size != turned and is_turned_while_loaded:
                return OTHER_SIZE
            picture = upright_rgb(opened, file.orientation, file.rule)
            picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            picture.info = {}  # metadata need not be sent to another process
            return picture

    with pillow_settings(file.rule):
        return despite_texts(upright, data)
