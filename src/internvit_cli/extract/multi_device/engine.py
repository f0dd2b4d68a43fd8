"""Several devices on one plan: a process for each, all writing rows of the same shard, and one parent that commits.

Images go to whichever device has room. Rows of different images share no byte, so the processes need no lock; only the
parent writes digests, CRCs and statuses, after a sync that covers what the processes wrote. When a process dies, its
images are given to the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from internvit_cli.encode.interface import EncoderInfo
from internvit_cli.errors import DeviceError, InternvitError
from internvit_cli.extract.engine import LocalEngine, Workload, decode_options, halved_note
from internvit_cli.extract.multi_device.scheduler import Device, ShardScheduler, error_of
from internvit_cli.extract.multi_device.worker import (
    DeviceSpec,
    Failure,
    Measure,
    serve_device,
)
from internvit_cli.model.accuracy import Accuracy
from internvit_cli.runtime.workers import describe_exit, start_process, usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from internvit_cli.decode.decoder import DecodeJob
    from internvit_cli.extract.encode_loop import EncodeResult
    from internvit_cli.extract.engine import Engine, EngineOptions, ShardJob
    from internvit_cli.extract.results import Tally
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.runtime.signals import Stop

ALL_DEVICES = "all"


def find_devices(names: tuple[str, ...]) -> tuple[str, ...]:
    """The devices behind `--devices`: `all` is every CUDA device that PyTorch sees.

    Raises:
        DeviceError: it sees none.
    """
    if names != (ALL_DEVICES,):
        return names
    from internvit_cli.encode.devices import count_cuda_devices

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
    def info(self) -> EncoderInfo:
        """That of the first device, whose type and batch are those of all, with the names of all."""
        infos = [device.info for device in self._devices if device.info]
        return replace(
            infos[0],
            device_name=", ".join(info.device_name for info in infos),
            kernels="; ".join(dict.fromkeys(info.kernels for info in infos)),
        )

    @property
    def workers(self) -> int:
        """Decode processes of all devices."""
        each = decode_options(self._options, Workload(1 << 30, 1)).workers
        return each * len(self._devices)

    @property
    def notes(self) -> tuple[str, ...]:
        """What went wrong with devices and cost no image."""
        halved = [device.name for device in self._devices if device.info and device.info.halved]
        return tuple(self._notes + [halved_note(", ".join(halved))] * bool(halved))

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:  # noqa: ARG002
        """What the coarse types in use cost, on the first device."""
        first = self._devices[0]
        first.connection.send(Measure(tuple(jobs), decode_options(self._options, workload)))
        message = _answer(first, "while it measured")
        if not isinstance(message, Accuracy):
            raise InternvitError(f"the process of {first.name} gave no figures")
        return message

    def encode(self, job: ShardJob, stop: Stop, on_progress: Callable[[Tally], None]) -> EncodeResult:
        """Have the devices decode, encode and write what is missing in a shard."""
        scheduler = ShardScheduler(self._devices, self._options, job, stop, on_progress)
        try:
            return scheduler.run()
        finally:
            self._notes += scheduler.notes

    def close(self) -> None:
        """End the processes."""
        for device in self._devices:
            device.kill()

    def _load(self, checkpoint: Checkpoint, workload: Workload | None) -> None:
        options = self._options
        decode = None if workload is None else decode_options(options, workload)
        first, *others = self._devices
        encoder = replace(options.encoder, device=first.name, threads=self._threads(first.name))
        first.connection.send(DeviceSpec(checkpoint, encoder, decode))
        first.info = info = _loaded(first)
        for device in others:
            same = replace(
                encoder,
                device=device.name,
                dtype=info.dtype,
                batch_tiles=info.batch_tiles,
                threads=self._threads(device.name),
            )
            device.connection.send(DeviceSpec(checkpoint, same, decode))
        for device in others:
            device.info = _loaded(device)

    def _threads(self, name: str) -> int | None:
        """Of an encoder on a CPU: those that take part in the same processor share it."""
        alike = sum(other.startswith("cpu") for other in self._options.devices)
        if not name.startswith("cpu"):
            return None
        return max(1, (self._options.encoder.threads or usable_cpus()) // alike)


def _loaded(device: Device) -> EncoderInfo:
    """Wait until a device's encoder is loaded."""
    message = _answer(device, "before it was ready")
    assert isinstance(message, EncoderInfo)
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
            f"the process of {device.name} ended {when} ({describe_exit(device.process)})",
            "check that there is memory for one encoder a device",
        ) from error
    if isinstance(message, Failure):
        raise error_of(message, device)
    return message
