"""What turns pictures into features: decode workers and encoders, on one device or on several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from internvit_cli.decode.decoder import PIXELS_IN_FLIGHT, DecodeJob, DecodeOptions, Decoder
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


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How pictures are decoded and encoded."""

    rule: PixelRule
    encoder: EncoderOptions
    """Of the first device, where there are several."""
    devices: tuple[str, ...]
    """Names as `find_device` takes them; several share the work."""
    workers: int | None
    """Decode processes, for all devices together; None chooses."""
    decode_timeout: float
    """Seconds an image."""
    worker_memory: int
    """Bytes a decode process may use."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What there is to decode: how many processes are worth starting, and how large their slots have to be."""

    images: int
    most_tiles: int
    """Decoded tiles of the largest image."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What is missing in one shard."""

    workload: Workload
    images: EncodeJob
    first_tile: NDArray[Any]
    """By row, the index of an image's first tile row."""
    extents: Mapping[str, Extent]
    """Where the shard's rows lie, by dataset, for processes that write them by themselves."""


class Engine(Protocol):
    """Decodes and encodes shard after shard."""

    @property
    def info(self) -> EncoderInfo:
        """What its encoders are; with several devices, the batch is that of each."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of how it went."""
        ...

    @property
    def workers(self) -> int:
        """Decode processes."""
        ...

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:
        """What the coarse types in use cost, on the tiles of some pictures.

        Raises:
            InternvitError: a device or the workers fail.
        """
        ...

    def encode(self, job: ShardJob, stop: Stop, on_progress: Callable[[Tally], None]) -> EncodeResult:
        """Decode, encode and store what is missing in a shard, or as much of it as there is time for before `stop`.

        Everything that was encoded has gone to the job's sink when this returns, and also when it raises.

        Raises:
            InternvitError: the disk, a device or the workers fail; or an image cannot be used, and the run is strict.
        """
        ...

    def close(self) -> None:
        """End processes and let devices go."""
        ...


class LocalEngine:
    """Decode workers, and one encoder in this process."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._decoder: Decoder | None = None
        self._encoder: Encoder

    @classmethod
    def start(cls, checkpoint: Checkpoint, options: EngineOptions, workload: Workload | None) -> Self:
        """Start the decode workers, and while they start, load the encoder."""
        from internvit_cli.encode.encoder import Encoder

        engine = cls(options)
        if workload is not None:
            engine._start_decoder(workload)
        try:
            engine._encoder = Encoder.load(checkpoint, options.encoder)
        except BaseException:
            engine._close_decoder()
            raise
        return engine

    @property
    def info(self) -> EncoderInfo:
        """What the encoder is."""
        return self._encoder.info

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether a batch ran out of memory and the size was halved."""
        return (halved_note(self.info.device_name),) if self.info.halved else ()

    @property
    def workers(self) -> int:
        """Decode processes."""
        return len(self._decoder.pids) if self._decoder else 0

    def measure(self, jobs: Sequence[DecodeJob], workload: Workload, stop: Stop) -> Accuracy:
        """What the coarse types in use cost, on the tiles of some pictures."""
        return self._encoder.accuracy(sample_tiles(self._decoder_for(workload), jobs, stop))

    def encode(self, job: ShardJob, stop: Stop, on_progress: Callable[[Tally], None]) -> EncodeResult:
        """Decode, encode and store what is missing in a shard."""
        return EncodeLoop(job.images, self._decoder_for(job.workload), self._encoder, stop, on_progress).run()

    def close(self) -> None:
        """End the workers and let the device go."""
        self._close_decoder()
        self._encoder.close()

    def _decoder_for(self, workload: Workload) -> Decoder:
        """The workers, started anew where their slots are too small."""
        if self._decoder is None or self._decoder.tiles < workload.most_tiles:
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
    """What a user should know of a batch that was halved."""
    return (
        f"{devices}: a batch ran out of memory and the size was halved: "
        "rows may differ by rounding from those of full batches"
    )


def decode_options(options: EngineOptions, workload: Workload) -> DecodeOptions:
    """How one device's share of the pictures is decoded."""
    workers = options.workers or default_workers(options.devices[0])
    return DecodeOptions(
        rule=options.rule,
        tiles=workload.most_tiles,
        workers=max(1, min(workers // len(options.devices), workload.images)),
        timeout_seconds=options.decode_timeout,
        memory_bytes=options.worker_memory,
        pixels_in_flight=PIXELS_IN_FLIGHT // len(options.devices),
    )


def default_workers(device: str) -> int:
    """Decode processes, when the user names no number.

    With a card every core decodes. On a CPU the encoder needs the cores, and workers fill what its threads leave.
    """
    cpus = usable_cpus()
    on_card = device.startswith("cuda") or (device == "auto" and os.path.exists("/dev/nvidiactl"))
    return min(cpus, 64) if on_card else max(1, cpus // 2)
