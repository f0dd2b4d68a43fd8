"""One device's process: it decodes and encodes the images that it is given, and writes their rows.

What a row's status is, is for the parent alone to say: it hears of each image when its rows are written, syncs the
file, and records it. So however this process ends, nothing is done that is not on the disk.
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
from internvit_cli.extract.row_threads import RowThreads
from internvit_cli.extract.sampling import sample_tiles
from internvit_cli.extract.writer_thread import Sink
from internvit_cli.runtime.workers import ignore_stop_signals
from internvit_cli.storage.write.commit import ImageRows, RowWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from internvit_cli.encode.encoder import Encoder
    from internvit_cli.encode.interface import EncoderInfo
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.extract.writer_thread import FinishedImage
    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.storage.format.layout import Extent


# ---------------------------------------------------------------------------------------------- what the parent sends


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """What the process runs."""

    checkpoint: Checkpoint
    encoder: EncoderOptions
    decode: DecodeOptions | None
    """None when there is nothing to decode."""


@dataclass(frozen=True, slots=True)
class BeginShard:
    """A shard whose images come next."""

    extents: Mapping[str, Extent]
    rules: EncodeRules
    decode: DecodeOptions
    """Larger slots than before, maybe."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Tell what the coarse types in use cost on these pictures; the answer is an `Accuracy`."""

    jobs: tuple[DecodeJob, ...]
    decode: DecodeOptions


@dataclass(frozen=True, slots=True)
class Task:
    """One image of the shard at hand."""

    job: DecodeJob
    key: bytes
    first_tile: int
    """Index of its first tile row."""


@dataclass(frozen=True, slots=True)
class NoMore:
    """The shard has no more images for this device."""

    is_stop: bool
    """Leave those alone, too, that are not in a batch yet."""


# ----------------------------------------------------------------------------------------------- what the parent gets


# First comes the `EncoderInfo`, once the encoder is loaded.


@dataclass(frozen=True, slots=True)
class ShardEnd:
    """All images that were given are finished, or a stop left some of them alone."""

    result: EncodeResult
    info: EncoderInfo
    """Of the encoder now: its batch may have been halved."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The process cannot go on."""

    kind: str
    """Name of a class in `errors`."""
    message: str
    hint: str


# --------------------------------------------------------------------------------------------------------- the process


def serve_device(descriptor: int) -> None:
    """Serve a parent over an inherited socket until it closes it."""
    ignore_stop_signals()
    import internvit_cli.encode.encoder  # noqa: F401 - the slow part of starting, done before there is anything to wait for

    _DeviceProcess(Connection(descriptor)).run()


@dataclass(slots=True)
class _StopFlag:
    signal: int = 0
    """Any number but 0."""


@dataclass(slots=True)
class _Shard:
    """The shard at hand, as its messages arrive."""

    begin: BeginShard
    tasks: queue.SimpleQueue[Task | None] = field(default_factory=queue.SimpleQueue)
    stop: _StopFlag = field(default_factory=_StopFlag)
    given: dict[int, Task] = field(default_factory=dict)

    def jobs(self) -> Iterator[DecodeJob | None]:
        """Jobs as they come, None while there are none."""
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
    """Keys by row, of the images that were given."""

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
        """Load the encoder, then encode shard after shard. Ends with the process."""
        try:
            self._serve()
        except InternvitError as error:
            self.send(Failure(type(error).__name__, error.message, error.hint))
        except (EOFError, OSError):
            pass  # the parent has gone
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            place = traceback.format_exc().strip().splitlines()[-3:]
            self.send(Failure("InternvitError", f"a device's process failed: {error}", " ".join(place)))
        os._exit(0)  # its threads wait for what will never come

    def send(self, message: Any) -> None:
        """Tell the parent; from any thread."""
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
        """Sort what the parent sends, until it closes the connection: then everything ends, whatever it is doing."""
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
        """The workers, started anew where their slots are too small."""
        if self._decoder is None or self._decoder.tiles < options.tiles:
            if self._decoder is not None:
                self._decoder.close()
            self._decoder = Decoder(options)
        return self._decoder


class _ForwardingSink(Sink):
    """Writes rows, and tells the parent of each image, which syncs and commits them."""

    def __init__(self, process: _DeviceProcess, rows: RowWriter, given: dict[int, Task]) -> None:
        self._process = process
        self._given = given
        self._rows = RowThreads(lambda image: rows.write(image, given[image.row].first_tile))
        super().__init__()

    def take(self, image: FinishedImage) -> None:
        """Have its rows written, or pass on that it has none."""
        if isinstance(image, ImageRows):
            self._rows.put(image)
        else:
            self._tell(image)

    def on_idle(self, *, is_end: bool) -> None:
        """Tell the parent what is written."""
        for written in self._rows.written(is_end=is_end):
            self._tell(written)

    def close(self) -> None:
        """Finish what was put and end; no thread writes to the shard after this."""
        try:
            super().close()
        finally:
            self._rows.close()

    def _tell(self, image: FinishedImage) -> None:
        del self._given[image.row]
        self._process.send(image)
