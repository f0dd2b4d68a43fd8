"""Run several devices, each in a process that writes rows of the same shard, with one parent that commits.

Images go to any device with room. Rows of different images do not overlap, so the processes need no lock. Only the
parent writes digests, CRCs and statuses, after a sync of what the processes wrote. If a process dies, its images go to
the others.
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
    """Return the devices for `--devices`; `all` means every CUDA device that PyTorch sees.

    Raises:
        DeviceError: PyTorch sees none.
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
        checkpoint: The weights.
        options: How to decode and encode.
        workload: The amount of work; None if there is none, and only the compute type is needed.

    Raises:
        InternvitError: A device does not exist, the model does not fit, or its weights cannot be read.
    """
    if len(options.devices) > 1:
        return DeviceEngine.start(checkpoint, options, workload)
    return LocalEngine.start(checkpoint, options, workload)


class DeviceEngine:
    """An engine for several devices."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._notes: list[str] = []
        self._devices: list[Device] = []
        self._infos: list[EncoderInfo] = []
        """What all devices were when they started, also those that died since."""

    @classmethod
    def start(cls, checkpoint: Checkpoint, options: EngineOptions, workload: Workload | None) -> Self:
        """Start all processes with the type and batch of the first device, so that all compute the same rows.

        Raises:
            InternvitError: A device cannot be used.
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
        """Facts about the first device's encoder, whose type and batch all share, with the names of all devices."""
        return replace(
            self._infos[0],
            device_name=", ".join(info.device_name for info in self._infos),
            kernels="; ".join(dict.fromkeys(info.kernels for info in self._infos)),
        )

    @property
    def workers(self) -> int:
        """The number of decode processes of all devices."""
        each = decode_options(self._options, Workload(1 << 30, 1)).workers
        return each * len(self._devices)

    @property
    def notes(self) -> tuple[str, ...]:
        """Problems of devices that cost no image."""
        halved = [device.name for device in self._devices if device.info and device.info.halved]
        return tuple(self._notes + [halved_note(", ".join(halved))] * bool(halved))

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:  # noqa: ARG002
        """Measure the accuracy of low-precision types on the first device."""
        first = self._devices[0]
        first.connection.send(Measure(tuple(jobs), decode_options(self._options, workload)))
        message = _answer(first, "while it measured the accuracy")
        if not isinstance(message, Accuracy):
            raise InternvitError(f"the process of {first.name} returned no accuracy")
        return message

    def encode(self, job: ShardJob, stop: Stop, on_progress: Callable[[Tally], None]) -> EncodeResult:
        """Let the devices decode, encode and write what is missing in a shard."""
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
        self._infos = [device.info for device in self._devices if device.info is not None]

    def _threads(self, name: str) -> int | None:
        """Return the threads of an encoder on a CPU, which several encoders share."""
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
    """Return the next message of a device's process.

    Raises:
        InternvitError: The process reports a failure, or has ended.
    """
    try:
        message = device.connection.recv()
    except (EOFError, OSError) as error:
        raise InternvitError(
            f"the process of {device.name} ended {when} ({describe_exit(device.process)})",
            "check that there is enough memory for one encoder per device",
        ) from error
    if isinstance(message, Failure):
        raise error_of(message, device)
    return message
