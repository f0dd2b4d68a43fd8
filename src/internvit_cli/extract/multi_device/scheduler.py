"""Distribute the images of a shard over several devices.

Images go to any device with room. If a process dies, its images go to the others.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from internvit_cli import errors
from internvit_cli.errors import InternvitError
from internvit_cli.extract.encode_loop import EncodeResult
from internvit_cli.extract.engine import decode_options
from internvit_cli.extract.multi_device.worker import BeginShard, Failure, NoMore, ShardEnd, Task
from internvit_cli.extract.results import Stages, Tally
from internvit_cli.extract.writer_thread import SkippedImage
from internvit_cli.plan.tiling import decoded_tile_count
from internvit_cli.runtime.workers import describe_exit
from internvit_cli.storage.write.commit import WrittenImage

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from multiprocessing.connection import Connection

    from internvit_cli.encode.interface import EncoderInfo
    from internvit_cli.extract.engine import EngineOptions, ShardJob
    from internvit_cli.runtime.signals import Stop

BATCHES_AHEAD = 3
"""Work that a device holds: this many batches of tiles, and at least this many images per worker."""
IMAGES_AHEAD = 4
POLL_SECONDS = 0.5


@dataclass(eq=False, slots=True)
class Device:
    """The process of a device, and the images that it holds."""

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection
    info: EncoderInfo | None = None
    """None until its encoder is loaded."""
    given: dict[int, Task] = field(default_factory=dict)
    tiles: int = 0
    """The number of tiles of its unfinished images."""
    is_filling: bool = False
    """Whether a shard has begun but not ended."""
    is_told: bool = False
    """Whether it was told that the shard has no more images."""

    def kill(self) -> None:
        """End the process at once."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


def error_of(failure: Failure, device: Device) -> InternvitError:
    """Return the failure of a device's process as an error that names the device."""
    kind = getattr(errors, failure.kind, InternvitError)
    message = failure.message if device.name in failure.message else f"{device.name}: {failure.message}"
    error: InternvitError = kind(message, failure.hint)
    return error


class ShardScheduler:
    """Distributes the images of a shard over the devices, and receives the results."""

    def __init__(
        self,
        devices: list[Device],
        options: EngineOptions,
        job: ShardJob,
        stop: Stop,
        on_progress: Callable[[Tally], None],
    ) -> None:
        self.notes: list[str] = []
        self._devices = devices
        self._options = options
        self._job = job
        self._stop = stop
        self._on_progress = on_progress
        self._tasks = self._all_tasks()
        self._again: deque[Task] = deque()
        self._failure: InternvitError | None = None
        self._tally = Tally()
        self._ends: list[ShardEnd] = []

    def run(self) -> EncodeResult:
        """Run rounds until no image is left; a second one is needed if a device died and its images came back."""
        started = time.perf_counter()
        try:
            self._round()
            while self._again and not self._is_ending:
                self._round()
        finally:
            self._job.images.sink.close()
        return self._result(time.perf_counter() - started)

    @property
    def _is_ending(self) -> bool:
        """Return whether no more images are started."""
        return bool(self._stop.signal or self._failure)

    def _all_tasks(self) -> Iterator[Task]:
        images = self._job.images
        for job in images.jobs:
            if job is not None:
                yield Task(job, images.keys[job.row], int(self._job.first_tile[job.row]))

    def _round(self) -> None:
        decode = decode_options(self._options, self._job.workload)
        for device in list(self._devices):
            device.is_filling, device.is_told = True, False
            self._send(device, BeginShard(self._job.extents, self._job.images.rules, decode))
        while filling := [device for device in self._devices if device.is_filling]:
            self._give(filling)
            filling = [device for device in filling if device.is_filling]  # those that did not die meanwhile
            for connection in wait([device.connection for device in filling], POLL_SECONDS):
                self._receive(next(device for device in filling if device.connection is connection))
        if self._failure is not None:
            raise self._failure
        if not self._devices:
            raise InternvitError("no device is left: " + "; ".join(self.notes), "run the same command to continue")

    def _give(self, devices: list[Device]) -> None:
        """Distribute images while a device has room, and tell the devices when there are no more."""
        while not self._is_ending:
            able = [device for device in devices if device.is_filling and not device.is_told and self._has_room(device)]
            if not able:
                return
            task = self._again.popleft() if self._again else next(self._tasks, None)
            if task is None:
                break
            device = min(able, key=lambda device: device.tiles)
            device.given[task.job.row] = task
            device.tiles += self._tiles(task)
            self._send(device, task)
        for device in devices:
            if device.is_filling and not device.is_told:
                device.is_told = True
                self._send(device, NoMore(is_stop=self._is_ending))

    def _has_room(self, device: Device) -> bool:
        assert device.info is not None
        workers = decode_options(self._options, self._job.workload).workers
        return device.tiles < BATCHES_AHEAD * device.info.batch_tiles or len(device.given) < IMAGES_AHEAD * workers

    def _tiles(self, task: Task) -> int:
        return decoded_tile_count(task.job.grid, self._options.rule)

    def _send(self, device: Device, message: Any) -> None:
        try:
            device.connection.send(message)
        except OSError:
            self._drop_device(device)

    def _receive(self, device: Device) -> None:
        try:
            message = device.connection.recv()
        except (EOFError, OSError):
            self._drop_device(device)
            return
        match message:
            case WrittenImage() | SkippedImage():
                task = device.given.pop(message.row)
                device.tiles -= self._tiles(task)
                self._take(message, self._tiles(task))
            case ShardEnd():
                device.is_filling = False
                device.info = message.info
                self._ends.append(message)
                device.given.clear()  # not encoded because of a stop
                device.tiles = 0
            case Failure():  # the others finish what they started, and it is committed
                self._failure = self._failure or error_of(message, device)
                device.is_filling = False

    def _take(self, image: WrittenImage | SkippedImage, tiles: int) -> None:
        is_done = isinstance(image, WrittenImage)
        self._tally = self._tally.plus(Tally(1, 0, tiles) if is_done else Tally(skipped=1, skipped_tiles=tiles))
        self._job.images.sink.put(image)
        self._on_progress(self._tally)

    def _drop_device(self, device: Device) -> None:
        """Remove a device whose process died, and give its images to the others."""
        if device not in self._devices:
            return
        self._devices.remove(device)
        device.is_filling = False
        device.kill()
        self.notes.append(
            f"the process of {device.name} ended ({describe_exit(device.process)}); the others did its images"
        )
        self._again += device.given.values()

    def _result(self, wall: float) -> EncodeResult:
        parts = [end.result for end in self._ends]
        devices = max(1, len(parts))
        stages = Stages(
            wall=wall,
            decode=sum(part.stages.decode for part in parts) / devices,
            device=sum(part.stages.device for part in parts) / devices,
            write=max((part.stages.write for part in parts), default=0.0),
            host=max((part.stages.host for part in parts), default=0.0),
        )
        return EncodeResult(stages, self._tally, sum(part.clamped for part in parts))
