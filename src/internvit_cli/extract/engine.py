"""Define the engine that turns pictures into features: decode workers and encoders, on one or more devices."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from internvit_cli.config import Resize
from internvit_cli.decode.decoder import PIXELS_IN_FLIGHT, DecodeJob, DecodeOptions, Decoder, slots_for
from internvit_cli.extract.encode_loop import EncodeLoop
from internvit_cli.extract.sampling import sample_tiles
from internvit_cli.runtime.workers import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from typing_extensions import Self

    from internvit_cli.config import PixelRule
    from internvit_cli.encode.encoder import Encoder
    from internvit_cli.encode.interface import EncoderInfo
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.extract.encode_loop import EncodeJob, EncodeResult
    from internvit_cli.extract.results import Tally
    from internvit_cli.model.accuracy import Accuracy
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.runtime.signals import Stop
    from internvit_cli.storage.format.layout import Extent


PICTURE_MEMORY = 1 << 30
"""Bytes of shared memory for pictures that a device resizes, for all devices together."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How pictures are decoded and encoded."""

    rule: PixelRule
    encoder: EncoderOptions
    """Options of the encoder; with several devices, those of the first."""
    devices: tuple[str, ...]
    """Names for `find_device`; several devices share the work."""
    workers: int | None
    """Decode processes for all devices together; None chooses the number."""
    decode_timeout: float
    """Seconds per image."""
    worker_memory: int
    """Bytes of memory per decode process."""


@dataclass(frozen=True, slots=True)
class Workload:
    """The amount of work, which decides the number of processes and the size of their slots."""

    images: int
    most_tiles: int
    """The number of decoded tiles of the largest image."""
    most_pixels: int = 0
    """The number of pixels of the largest picture."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """The images that are missing in a shard."""

    workload: Workload
    images: EncodeJob
    first_tile: NDArray[Any]
    """The index of each image's first tile row, by row."""
    extents: Mapping[str, Extent]
    """The places of the shard's rows by dataset, for processes that write rows themselves."""


class Engine(Protocol):
    """Decodes and encodes shard after shard."""

    @property
    def info(self) -> EncoderInfo:
        """Facts about the encoders; with several devices, the batch is that of each."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the work so far."""
        ...

    @property
    def workers(self) -> int:
        """The number of decode processes."""
        ...

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:
        """Measure the accuracy of low-precision types on the tiles of some pictures.

        Raises:
            InternvitError: A device or the workers fail.
        """
        ...

    def encode(self, job: ShardJob, stop: Stop, on_progress: Callable[[Tally], None]) -> EncodeResult:
        """Decode, encode and store what is missing in a shard, until it is complete or a stop is requested.

        Everything that was encoded has been passed to the job's sink when this returns or raises.

        Raises:
            InternvitError: The disk, a device or the workers fail, or an image cannot be used and the run is strict.
        """
        ...

    def close(self) -> None:
        """End processes and release devices."""
        ...


class LocalEngine:
    """An engine with decode workers and one encoder in this process."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._decoder: Decoder | None = None
        self._encoder: Encoder

    @classmethod
    def start(cls, checkpoint: Checkpoint, options: EngineOptions, workload: Workload | None) -> Self:
        """Start the decode workers, and while they start, import PyTorch and load the encoder."""
        engine = cls(options)
        if workload is not None:
            engine._start_decoder(workload)
        try:
            from internvit_cli.encode.encoder import Encoder

            engine._encoder = Encoder.load(checkpoint, options.encoder)
        except BaseException:
            engine._close_decoder()
            raise
        return engine

    @property
    def info(self) -> EncoderInfo:
        """Facts about the encoder."""
        return self._encoder.info

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if a batch ran out of memory and its size was halved."""
        return (halved_note(self.info.device_name),) if self.info.halved else ()

    @property
    def workers(self) -> int:
        """Decode processes."""
        return len(self._decoder.pids) if self._decoder else 0

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:
        """Measure the accuracy of low-precision types on the tiles of some pictures."""
        return self._encoder.accuracy(sample_tiles(self._decoder_for(workload), jobs, stop))

    def encode(self, job: ShardJob, stop: Stop, on_progress: Callable[[Tally], None]) -> EncodeResult:
        """Decode, encode and store what is missing in a shard."""
        return EncodeLoop(job.images, self._decoder_for(job.workload), self._encoder, stop, on_progress).run()

    def close(self) -> None:
        """End the workers and release the device."""
        self._close_decoder()
        self._encoder.close()

    def _decoder_for(self, workload: Workload) -> Decoder:
        """Return the workers, which are restarted if their slots are too small."""
        if self._decoder is None or not self._decoder.suits(decode_options(self._options, workload)):
            return self._start_decoder(workload)
        return self._decoder

    def _start_decoder(self, workload: Workload) -> Decoder:
        self._close_decoder()
        self._decoder = decoder = Decoder(decode_options(self._options, workload))
        return decoder

    def _close_decoder(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = None


def halved_note(devices: str) -> str:
    """Return the note for a batch whose size was halved."""
    return (
        f"{devices}: a batch ran out of memory and the size was halved: "
        "rows may differ by rounding from those of full batches"
    )


def decode_options(options: EngineOptions, workload: Workload) -> DecodeOptions:
    """Return the options for decoding one device's share of the pictures."""
    workers = options.workers or default_workers(options.devices[0])
    workers = max(1, min(workers // len(options.devices), workload.images))
    return DecodeOptions(
        rule=options.rule,
        tiles=workload.most_tiles,
        workers=workers,
        timeout_seconds=options.decode_timeout,
        memory_bytes=options.worker_memory,
        pixels_in_flight=PIXELS_IN_FLIGHT // len(options.devices),
        picture_bytes=_picture_bytes(options, workload, workers),
    )


def _picture_bytes(options: EngineOptions, workload: Workload, workers: int) -> int:
    """Return the bytes of the largest picture that decode workers may leave to the device to resize."""
    resize = options.encoder.resize
    if resize is Resize.CPU or (resize is Resize.AUTO and not _is_card(options.devices[0])):
        return 0
    most = PICTURE_MEMORY // len(options.devices) // slots_for(workers)
    return min(3 * workload.most_pixels, most)


def default_workers(device: str) -> int:
    """Return the default number of decode processes.

    With a card, every core decodes. On a CPU, the encoder needs the cores, and workers use what its threads leave.
    """
    cpus = usable_cpus()
    return min(cpus, 64) if _is_card(device) else max(1, cpus // 2)


def _is_card(device: str) -> bool:
    """Return whether a device is an NVIDIA card, as far as can be told without PyTorch."""
    return device.startswith("cuda") or (device == "auto" and os.path.exists("/dev/nvidiactl"))
