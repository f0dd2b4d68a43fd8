"""Run the process of one device, which decodes and encodes the images that it receives, and writes their rows.

Only the parent writes statuses: it is told of each image whose rows are written, syncs the file, and records the image.
So no matter how this process ends, an image that is done is on the disk.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from internvit_cli.decode.decoder import DecodeJob, DecodeOptions, Decoder
from internvit_cli.errors import InternvitError
from internvit_cli.extract.encode_loop import EncodeJob, EncodeLoop, EncodeResult, EncodeRules
from internvit_cli.extract.sampling import sample_tiles
from internvit_cli.extract.writer_thread import Sink
from internvit_cli.runtime.workers import ignore_stop_signals
from internvit_cli.storage.write.commit import RowWriter, WrittenImage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from internvit_cli.encode.encoder import Encoder
    from internvit_cli.encode.interface import EncoderInfo
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.extract.writer_thread import SkippedImage
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.storage.format.layout import Extent


# --------------------------------------------------------------------------------------------- messages of the parent


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What the process runs."""

    checkpoint: Checkpoint
    encoder: EncoderOptions
    decode: DecodeOptions | None
    """None if there is nothing to decode."""


@dataclass(frozen=True, slots=True)
class BeginShard:
    """Announces the shard of the next images."""

    extents: Mapping[str, Extent]
    rules: EncodeRules
    decode: DecodeOptions
    """Decoder options, possibly with larger slots than before."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Asks for the accuracy of low-precision types on some pictures; the answer is an `Accuracy`."""

    jobs: tuple[DecodeJob, ...]
    decode: DecodeOptions


@dataclass(frozen=True, slots=True)
class Task:
    """One image of the current shard."""

    job: DecodeJob
    key: bytes
    first_tile: int
    """Index of its first tile row."""


@dataclass(frozen=True, slots=True)
class NoMore:
    """Tells that the shard has no more images for this device."""

    is_stop: bool
    """Whether to drop images that are not in a batch yet."""


# ---------------------------------------------------------------------------------------------- messages to the parent


# The first message is the `EncoderInfo`, once the encoder is loaded.


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """Tells that all given images are finished, or that a stop left some of them."""

    result: EncodeResult
    info: EncoderInfo
    """Current facts about the encoder, whose batch may have been halved."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Tells that the process cannot continue."""

    kind: str
    """Name of a class in `internvit_cli.errors`."""
    message: str
    hint: str


# --------------------------------------------------------------------------------------------------------- the process


def serve_device(descriptor: int) -> None:
    """Serve a parent over an inherited socket until the parent closes it."""
    ignore_stop_signals()
    import internvit_cli.encode.encoder  # noqa: F401 - the slow part of starting, done before any message

    _DeviceProcess(Connection(descriptor)).run()


@dataclass(slots=True)
class _StopFlag:
    signal: int = 0
    """Not 0 after a request to stop."""


@dataclass(slots=True)
class _Shard:
    """The current shard, as its messages arrive."""

    begin: BeginShard
    tasks: queue.SimpleQueue[Task | None] = field(default_factory=queue.SimpleQueue)
    stop: _StopFlag = field(default_factory=_StopFlag)
    given: dict[int, Task] = field(default_factory=dict)

    def jobs(self) -> Iterator[DecodeJob | None]:
        """Yield jobs as they come, and None while there are none."""
        while True:
            try:
                task = self.tasks.get_nowait()
            except queue.Empty:
                yield None
                continue
            if task is None:
                return
            self.given[task.job.row] = task
            yield task.job


class _Keys:
    """Keys of the given images by row."""

    def __init__(self, given: dict[int, Task]) -> None:
        self._given = given

    def __getitem__(self, row: int) -> bytes:
        return self._given[row].key


class _DeviceProcess:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._wanted: queue.SimpleQueue[_Shard | Measure] = queue.SimpleQueue()
        self._decoder: Decoder | None = None

    def run(self) -> None:
        """Load the encoder and encode shard after shard, then end the process."""
        try:
            self._serve()
        except InternvitError as error:
            self.send(Failure(type(error).__name__, error.message, error.hint))
        except (EOFError, OSError):
            pass  # the parent has ended
        except Exception as error:  # noqa: BLE001 - the parent must be told of any error
            place = traceback.format_exc().strip().splitlines()[-3:]
            self.send(Failure("InternvitError", f"a device's process failed: {error}", " ".join(place)))
        os._exit(0)  # its threads wait for messages that will never come

    def send(self, message: Any) -> None:
        """Send a message to the parent, from any thread."""
        with self._sending:
            self._connection.send(message)

    def _serve(self) -> None:
        from internvit_cli.encode.encoder import Encoder

        spec: DeviceSpec = self._connection.recv()
        if spec.decode is not None:
            self._decoder = Decoder(spec.decode)
        encoder = Encoder.load(spec.checkpoint, spec.encoder)
        self.send(encoder.info)
        threading.Thread(target=self._listen, daemon=True, name="listen").start()
        while True:
            match self._wanted.get():
                case Measure(jobs=jobs, decode=decode):
                    self.send(encoder.accuracy(sample_tiles(self._decoder_for(decode), jobs, _StopFlag())))
                case shard:
                    self._encode(shard, encoder)

    def _listen(self) -> None:
        """Distribute the parent's messages until it closes the connection, which ends the process immediately."""
        shard: _Shard | None = None
        try:
            while True:
                match self._connection.recv():
                    case BeginShard() as begin:
                        shard = _Shard(begin)
                        self._wanted.put(shard)
                    case Measure() as measure:
                        self._wanted.put(measure)
                    case Task() as task if shard is not None:
                        shard.tasks.put(task)
                    case NoMore(is_stop=is_stop) if shard is not None:
                        shard.stop.signal = int(is_stop)
                        shard.tasks.put(None)
        except (EOFError, OSError):
            os._exit(0)

    def _encode(self, shard: _Shard, encoder: Encoder) -> None:
        begin = shard.begin
        decoder = self._decoder_for(begin.decode)
        rows = RowWriter(begin.extents)
        try:
            sink = _ForwardingSink(self, rows, shard.given)
            job = EncodeJob(_Keys(shard.given), shard.jobs(), sink, begin.rules)
            result = EncodeLoop(job, decoder, encoder, shard.stop, lambda _: None).run()
        finally:
            rows.close()
        self.send(ShardEnd(result, encoder.info))

    def _decoder_for(self, options: DecodeOptions) -> Decoder:
        """Return the decode workers, restarted if their slots are too small."""
        if self._decoder is None or not self._decoder.suits(options):
            if self._decoder is not None:
                self._decoder.close()
            self._decoder = Decoder(options)
        return self._decoder


class _ForwardingSink(Sink):
    """Writes rows and tells the parent of each image; the parent syncs and commits them."""

    def __init__(self, process: _DeviceProcess, rows: RowWriter, given: dict[int, Task]) -> None:
        self._process = process
        self._given = given
        super().__init__(lambda image: rows.write(image, given[image.row].first_tile))

    def take(self, image: WrittenImage | SkippedImage) -> None:
        """Tell the parent about an image."""
        del self._given[image.row]
        self._process.send(image)

    def on_idle(self, *, is_end: bool) -> None:
        """Do nothing, because the parent makes the checkpoints."""
