"""Decode pictures into tiles in worker processes, so that a crash or a hang costs one image and not the run."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from internvit_cli.config import PixelRule, Skipped, Status
from internvit_cli.decode.pictures import DecodedPicture, decode_picture, decode_tiles
from internvit_cli.decode.slots import Slots, SlotShape
from internvit_cli.plan.headers import Header
from internvit_cli.plan.tiling import Grid, View, decoded_tile_count, largest_resized, views_of
from internvit_cli.runtime.malloc import keep_freed_memory
from internvit_cli.runtime.workers import FinishedTask, LostTask, WorkerPool, WorkerSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from internvit_cli.plan.table import ImageTable
    from internvit_cli.sources.interface import Source

PIXELS_IN_FLIGHT = 256_000_000
"""Source pixels that all workers may hold together, because decoded pictures take most of the memory."""
SPARE_SLOTS = 4
"""Slots beyond those being filled, so that workers can continue while the encoder uses tiles."""
SLOT_POLL_SECONDS = 0.02
RESIZED_BYTES = 256 << 20
"""Bytes of the largest picture that resizing on a device may create on its way; workers resize larger ones."""


class DecodeJob(NamedTuple):
    """One image to decode."""

    row: int
    path: bytes
    header: Header
    """The header from planning; a file that differs now is skipped."""
    grid: Grid


def decode_jobs(table: ImageTable, rows: NDArray[Any], sources: Sequence[Source]) -> Iterator[DecodeJob]:
    """Yield the jobs for some images of a table.

    Args:
        table: The table of the shard.
        rows: The rows of the images, [k] int64.
        sources: The sources to which the `source` column refers.
    """
    for row in rows.tolist():
        yield decode_job(table, row, sources[int(table.source[row])].path(table.keys[row]))


def decode_job(table: ImageTable, row: int, path: bytes) -> DecodeJob:
    """Return the job for one image of a table, whose file is at `path`."""
    header = Header(*(int(getattr(table, name)[row]) for name in Header._fields))
    return DecodeJob(row, path, header, Grid(int(table.columns[row]), int(table.rows[row])))


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The tiles of an image, uint8 [tiles, S, S, 3], in shared memory until `release` is called."""

    row: int
    tiles: NDArray[Any]
    digest: bytes
    """The SHA-256 of the file."""
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class UncutImage:
    """A decoded picture that is still to be resized, in shared memory until `release` is called."""

    row: int
    picture: NDArray[Any]
    """RGB, turned upright, uint8 [H, W, 3]."""
    views: tuple[View, ...]
    """How its tiles are made."""
    digest: bytes
    """The SHA-256 of the file."""
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class FailedImage:
    """An image that could not be decoded, with the reason."""

    row: int
    skipped: Skipped
    tiles: int
    """The number of tiles that the image would have had."""


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How pictures are decoded."""

    rule: PixelRule
    tiles: int
    """The largest number of tiles of an image of this run."""
    workers: int
    timeout_seconds: float
    memory_bytes: int
    pixels_in_flight: int = PIXELS_IN_FLIGHT
    """Source pixels that all workers may hold together; a larger picture is decoded alone."""
    picture_bytes: int = 0
    """Bytes of the largest picture that can be handed over whole, to be resized on a device."""


class _GivenJob(NamedTuple):
    """A job that a worker has."""

    job: DecodeJob
    slot: int
    is_alone: bool
    """Whether no other job runs, so that a death is this job's fault."""
    is_uncut: bool
    """Whether the worker leaves resizing to the device."""


def slots_for(workers: int) -> int:
    """Return the number of slots: two per worker, and some that the encoder reads meanwhile."""
    return workers * 2 + SPARE_SLOTS


class _JobQueue:
    """The jobs that have not begun, with a lookahead of one."""

    def __init__(self, jobs: Iterable[DecodeJob | None]) -> None:
        self._jobs = iter(jobs)
        self._first: DecodeJob | None = None
        self.is_empty = False
        """Whether there will be no further jobs."""

    @property
    def first(self) -> DecodeJob | None:
        """Return the next job without taking it; None if there is none at the moment."""
        if self._first is None and not self.is_empty:
            try:
                self._first = next(self._jobs)
            except StopIteration:
                self.is_empty = True
        return self._first

    def take(self) -> DecodeJob:
        """Take the next job, which has to exist."""
        job, self._first = self._first, None
        assert job is not None
        return job


class Decoder:
    """A pool of decode workers, and the shared memory for their tiles."""

    def __init__(self, options: DecodeOptions) -> None:
        shape = SlotShape(
            slots_for(options.workers), options.tiles, options.rule.tiling.tile_size, options.picture_bytes
        )
        self._slots = Slots.allocate(shape)
        # A deque, whose append and popleft are atomic, because another thread frees the slots.
        self._free = deque(range(shape.slots))
        spec = WorkerSpec(
            "internvit_cli.decode.decoder:tile_decoder",
            (options.rule, shape, self._slots.descriptor),
            descriptors=(self._slots.descriptor,),
            memory_bytes=options.memory_bytes + shape.nbytes,
        )
        self._rule = options.rule
        self._pixels_in_flight = options.pixels_in_flight
        self._pool = WorkerPool(spec, options.workers, options.timeout_seconds)
        self._given: dict[int, _GivenJob] = {}
        self._picture_bytes = options.picture_bytes
        self.tile_size, self.tiles = shape.tile_size, shape.tiles
        self.busy_seconds = 0.0
        """Seconds that all workers together spent on pictures."""

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.pids

    @property
    def memory(self) -> NDArray[Any]:
        """The shared memory of all images, uint8 [slots, bytes]."""
        return self._slots.memory

    def suits(self, options: DecodeOptions) -> bool:
        """Return whether the slots are large enough for other work."""
        return self.tiles >= options.tiles and self._picture_bytes >= options.picture_bytes

    def run(
        self, jobs: Iterable[DecodeJob | None], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[DecodedImage | FailedImage]:
        """Decode all jobs into tiles, and yield the results in the order in which they are ready.

        A None among the jobs means that there is none at the moment. A job whose worker died is tried once more, alone.
        After `stopped` returns true, nothing more is started or yielded.
        """
        for image in self._run(jobs, stopped, uncut=False):
            assert not isinstance(image, UncutImage)
            yield image

    def run_uncut(
        self, jobs: Iterable[DecodeJob | None], stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[DecodedImage | UncutImage | FailedImage]:
        """Do the same as `run`, but leave pictures that fit into a slot whole, for a device to resize."""
        return self._run(jobs, stopped, uncut=True)

    def _run(
        self, jobs: Iterable[DecodeJob | None], stopped: Callable[[], bool], *, uncut: bool
    ) -> Iterator[DecodedImage | UncutImage | FailedImage]:
        waiting = _JobQueue(jobs)
        retries: deque[DecodeJob] = deque()
        while not stopped():
            while (job := waiting.first) is not None and self._has_room(job):
                self._submit(waiting.take(), alone=False, uncut=uncut)
            while retries and self._free:
                self._submit(retries.popleft(), alone=True, uncut=uncut)
            if not self._given:
                if waiting.is_empty and not retries:
                    return
                time.sleep(SLOT_POLL_SECONDS)  # the encoder holds every slot, or there is no job yet
            for outcome in self._pool.wait(0.5 if waiting.is_empty else SLOT_POLL_SECONDS):
                if stopped():
                    return
                given = self._given.pop(outcome.task_id)
                if isinstance(outcome, LostTask) and outcome.status is Status.WORKER_DIED and not given.is_alone:
                    self._free.append(given.slot)
                    retries.append(given.job)
                    continue
                yield self._result(given, outcome)

    def close(self) -> None:
        """End the workers at once, and release the shared memory."""
        self._pool.close()
        self._slots.close()

    def _has_room(self, job: DecodeJob) -> bool:
        if not self._free or self._pool.outstanding >= self._pool.capacity:
            return False
        pixels = sum(given.job.header.width * given.job.header.height for given in self._given.values())
        return not self._given or pixels + job.header.width * job.header.height <= self._pixels_in_flight

    def _submit(self, job: DecodeJob, *, alone: bool, uncut: bool) -> None:
        given = _GivenJob(job, self._free.popleft(), alone, uncut and self._can_be_uncut(job.header))
        self._given[job.row] = given
        self._pool.submit(job.row, (job.path, job.header, job.grid, given.slot, given.is_uncut), alone=alone)

    def _can_be_uncut(self, header: Header) -> bool:
        width, height = header.width, header.height
        fits = width * height * 3 <= self._picture_bytes
        return fits and largest_resized(width, height, self._rule) * 3 <= RESIZED_BYTES

    def _result(self, given: _GivenJob, outcome: FinishedTask | LostTask) -> DecodedImage | UncutImage | FailedImage:
        job, slot = given.job, given.slot
        if isinstance(outcome, LostTask):
            return self._failed(job, slot, Skipped(outcome.status, "", outcome.message))
        self.busy_seconds += outcome.seconds
        if isinstance(outcome.result, Skipped):
            return self._failed(job, slot, outcome.result)
        decoded: DecodedPicture = outcome.result

        def release() -> None:
            self._free.append(slot)

        if not given.is_uncut:
            return DecodedImage(job.row, self._slots.tiles(slot, decoded.tiles), decoded.digest, release)
        size = job.header.width, job.header.height
        views = views_of(*size, job.grid, self._rule)
        return UncutImage(job.row, self._slots.picture(slot, *size), views, decoded.digest, release)

    def _failed(self, job: DecodeJob, slot: int, skipped: Skipped) -> FailedImage:
        self._free.append(slot)
        return FailedImage(job.row, skipped, decoded_tile_count(job.grid, self._rule))


def tile_decoder(rule: PixelRule, shape: SlotShape, descriptor: int) -> Callable[[Any], DecodedPicture | Skipped]:
    """Return the function that a decode worker runs: it decodes (path, header, grid, slot, uncut) into that slot."""
    keep_freed_memory()
    slots = Slots(shape, descriptor)

    def decode(task: tuple[bytes, Header, Grid, int, bool]) -> DecodedPicture | Skipped:
        path, header, grid, slot, is_uncut = task
        if is_uncut:
            return decode_picture(path, header, rule, slots.picture(slot, header.width, header.height))
        return decode_tiles(path, header, grid, rule, slots.tiles(slot, shape.tiles))

    return decode
