"""Several devices on one plan: a process for each, all writing rows of the same shard, and one parent that commits.

Images go to whichever device has room. Rows of different images share no byte, so the processes need no lock; only the
parent writes digests, CRCs and statuses, after a sync that covers what the processes wrote. When a process dies, its
images are given to the others.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from internvit_cli import errors
from internvit_cli.accuracy import Accuracy
from internvit_cli.device_process import (
    BeginShard,
    DeviceSpec,
    Failure,
    Measure,
    NoMore,
    Ready,
    ShardEnd,
    Task,
    serve_device,
)
from internvit_cli.engine import LocalEngine, Workload, decode_options, halved_note
from internvit_cli.errors import DeviceError, InternvitError
from internvit_cli.filling import Filled
from internvit_cli.observer import Progress
from internvit_cli.report import Stages
from internvit_cli.storage.commit import Recorded
from internvit_cli.storing import ShardSink, SkippedImage
from internvit_cli.tiling import decoded_tile_count
from internvit_cli.workers import ending, start_process, usable_cpus

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from typing_extensions import Self

    from internvit_cli.config import ComputeDtype
    from internvit_cli.decode.decoder import DecodeJob
    from internvit_cli.engine import Engine, EngineOptions, ShardJob
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.stopping import Stop

BATCHES_AHEAD = 3
"""What a device is given: so many batches of tiles, and at least so many images a worker."""
IMAGES_AHEAD = 4
POLL_SECONDS = 0.5
ALL_DEVICES = "all"


def find_devices(names: tuple[str, ...]) -> tuple[str, ...]:
    """The devices behind `--devices`: `all` is every CUDA device that PyTorch sees.

    Raises:
        DeviceError: it sees none.
    """
    if names != (ALL_DEVICES,):
        return names
    from internvit_cli.encoder_devices import count_cuda_devices

    count = count_cuda_devices()
    if not count:
        raise DeviceError("--devices all: PyTorch sees no CUDA device", "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return tuple(f"cuda:{number}" for number in range(count))


def start_engine(checkpoint: Checkpoint, options: EngineOptions, workload: Workload | None) -> Engine:
    """Start decode workers and load the encoder, or one on each of several devices.

    Args:
        checkpoint: the weights.
        options: how to decode and encode.
        workload: what is known of the work; None when there is none, and only the types are of interest.

    Raises:
        InternvitError: a device is not there, or the model does not fit, or its weights cannot be read.
    """
    if len(options.devices) > 1:
        return DeviceEngine.start(checkpoint, options, workload)
    return LocalEngine.start(checkpoint, options, workload)


@dataclass(eq=False, slots=True)
class Device:
    """A device's process and what it has in hand."""

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection
    ready: Ready | None = None
    given: dict[int, Task] = field(default_factory=dict)
    tiles: int = 0
    """Of the images that it was given and has not finished."""
    is_filling: bool = False
    """Whether a shard has begun and not ended."""
    is_told: bool = False
    """Whether it knows that the shard has no more for it."""
    halved: bool = False

    def kill(self) -> None:
        """End it now, whatever it is doing."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class DeviceEngine:
    """An engine of several devices."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._notes: list[str] = []
        self._devices: list[Device] = []

    @classmethod
    def start(cls, checkpoint: Checkpoint, options: EngineOptions, workload: Workload | None) -> Self:
        """Start all processes; the first one's type and batch are those of all, so that all make the same rows.

        Raises:
            InternvitError: a device cannot be used.
        """
        engine = cls(options)
        try:
            for name in options.devices:
                process, connection = start_process(serve_device, is_silent=False)
                engine._devices.append(Device(name, process, connection))
            engine._load(checkpoint, workload)
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def device_name(self) -> str:
        """All of them."""
        return ", ".join(device.ready.device_name for device in self._devices if device.ready)

    @property
    def dtype(self) -> ComputeDtype:
        """That of the first, and of all."""
        return self._first.dtype

    @property
    def batch_tiles(self) -> int:
        """Tiles in a batch of one device."""
        return self._first.batch_tiles

    @property
    def batch_tiles_to_record(self) -> int:
        """What a later run has to use again for the same bits."""
        return self._first.batch_tiles_to_record

    @property
    def kernels(self) -> str:
        """What the devices compute with."""
        return "; ".join(dict.fromkeys(device.ready.kernels for device in self._devices if device.ready))

    @property
    def workers(self) -> int:
        """Decode processes of all devices."""
        each = decode_options(self._options, Workload(1 << 30, 1)).workers
        return each * len(self._devices)

    @property
    def notes(self) -> tuple[str, ...]:
        """What went wrong with devices and cost no image."""
        halved = [device.name for device in self._devices if device.halved]
        return tuple(self._notes + [halved_note(", ".join(halved))] * bool(halved))

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:  # noqa: ARG002
        """What the coarse types in use cost, on the first device."""
        first = self._devices[0]
        first.connection.send(Measure(tuple(jobs), decode_options(self._options, workload)))
        message = _answer(first, "while it measured")
        if not isinstance(message, Accuracy):
            raise InternvitError(f"the process of {first.name} gave no figures")
        return message

    def fill(self, job: ShardJob, stop: Stop, on_progress: Callable[[Progress], None]) -> Filled:
        """Have the devices decode and encode what is missing in a shard, and commit it."""
        dispatch = Dispatch(self._devices, self._options, job, stop, on_progress)
        try:
            return dispatch.run()
        finally:
            self._notes += dispatch.notes

    def close(self) -> None:
        """End the processes."""
        for device in self._devices:
            device.kill()

    @property
    def _first(self) -> Ready:
        ready = self._devices[0].ready
        assert ready is not None
        return ready

    def _load(self, checkpoint: Checkpoint, workload: Workload | None) -> None:
        options = self._options
        decode = None if workload is None else decode_options(options, workload)
        first, *others = self._devices
        encoder = replace(options.encoder, device=first.name, threads=self._threads(first.name))
        first.connection.send(DeviceSpec(checkpoint, encoder, decode))
        first.ready = _ready(first)
        for device in others:
            same = replace(
                encoder,
                device=device.name,
                dtype=first.ready.dtype,
                batch_tiles=first.ready.batch_tiles,
                threads=self._threads(device.name),
            )
            device.connection.send(DeviceSpec(checkpoint, same, decode))
        for device in others:
            device.ready = _ready(device)

    def _threads(self, name: str) -> int | None:
        """Of an encoder on a CPU: those that take part in the same processor share it."""
        alike = sum(other.startswith("cpu") for other in self._options.devices)
        if not name.startswith("cpu"):
            return None
        return max(1, (self._options.encoder.threads or usable_cpus()) // alike)


def _ready(device: Device) -> Ready:
    """Wait until a device's encoder is loaded."""
    message = _answer(device, "before it was ready")
    assert isinstance(message, Ready)
    return message


def _answer(device: Device, when: str) -> Any:
    """What a device's process says next.

    Raises:
        InternvitError: that it failed, or nothing, for it has ended.
    """
    try:
        message = device.connection.recv()
    except (EOFError, OSError) as error:
        raise InternvitError(
            f"the process of {device.name} ended {when} ({ending(device.process)})",
            "check that there is memory for one encoder a device",
        ) from error
    if isinstance(message, Failure):
        raise _error_of(message, device)
    return message


def _error_of(failure: Failure, device: Device) -> InternvitError:
    kind = getattr(errors, failure.kind, InternvitError)
    error: InternvitError = kind(f"{device.name}: {failure.message}", failure.hint)
    return error


class Dispatch:
    """One shard's images on their way to the devices and back."""

    def __init__(
        self,
        devices: list[Device],
        options: EngineOptions,
        job: ShardJob,
        stop: Stop,
        on_progress: Callable[[Progress], None],
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
        self._progress = Progress()
        self._ends: list[ShardEnd] = []
        self._sink: ShardSink

    def run(self) -> Filled:
        """Rounds until no image is left: a second one when a device died and its images came back."""
        started = time.perf_counter()
        self._sink = ShardSink(self._job.writer, self._job.skip_log, self._job.keys)
        try:
            self._round()
            while self._again and not self._is_ending:
                self._round()
        finally:
            self._sink.close()
        return self._filled(time.perf_counter() - started)

    @property
    def _is_ending(self) -> bool:
        """Whether no more images are begun."""
        return bool(self._stop.signal or self._failure)

    def _all_tasks(self) -> Iterator[Task]:
        job = self._job
        for each in job.jobs:
            yield Task(each, job.keys[each.row], int(job.first_tile[each.row]))

    def _round(self) -> None:
        decode = decode_options(self._options, self._job.workload)
        for device in list(self._devices):
            device.is_filling, device.is_told = True, False
            self._send(device, BeginShard(self._job.writer.extents, self._job.rules, decode))
        while filling := [device for device in self._devices if device.is_filling]:
            self._give(filling)
            for connection in wait([device.connection for device in filling], POLL_SECONDS):
                self._receive(next(device for device in filling if device.connection is connection))
        if self._failure is not None:
            raise self._failure
        if not self._devices:
            raise InternvitError("no device is left: " + "; ".join(self.notes), "run the same command to continue")

    def _give(self, devices: list[Device]) -> None:
        """Hand out images while any device has room, and say so when there are no more."""
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
        assert device.ready is not None
        workers = decode_options(self._options, self._job.workload).workers
        return device.tiles < BATCHES_AHEAD * device.ready.batch_tiles or len(device.given) < IMAGES_AHEAD * workers

    def _tiles(self, task: Task) -> int:
        return decoded_tile_count(task.job.grid, self._options.rule)

    def _send(self, device: Device, message: Any) -> None:
        try:
            device.connection.send(message)
        except OSError:
            self._bury(device)

    def _receive(self, device: Device) -> None:
        try:
            message = device.connection.recv()
        except (EOFError, OSError):
            self._bury(device)
            return
        match message:
            case Recorded() | SkippedImage():
                task = device.given.pop(message.row)
                device.tiles -= self._tiles(task)
                self._take(message, self._tiles(task))
            case ShardEnd():
                device.is_filling = False
                device.halved = message.halved
                self._ends.append(message)
                device.given.clear()  # left alone after a stop
                device.tiles = 0
            case Failure():  # the others finish what they have begun, and all of it is committed
                self._failure = self._failure or _error_of(message, device)
                device.is_filling = False

    def _take(self, image: Recorded | SkippedImage, tiles: int) -> None:
        done = Progress(1, 0, tiles) if isinstance(image, Recorded) else Progress(0, 1, 0)
        self._progress = self._progress.plus(done)
        self._sink.put(image)
        self._on_progress(self._progress)

    def _bury(self, device: Device) -> None:
        """A process died: its images go to the others."""
        if device not in self._devices:
            return
        self._devices.remove(device)
        device.is_filling = False
        device.kill()
        self.notes.append(f"the process of {device.name} ended ({ending(device.process)}); the others did its images")
        self._again += device.given.values()

    def _filled(self, wall: float) -> Filled:
        parts = [end.filled for end in self._ends]
        devices = max(1, len(parts))
        stages = Stages(
            wall=wall,
            decode=sum(part.stages.decode for part in parts) / devices,
            device=sum(part.stages.device for part in parts) / devices,
            write=max((part.stages.write for part in parts), default=0.0),
        )
        return Filled(stages, self._progress, sum(part.clamped for part in parts))
