"""Decode images, encode them in batches across images, and store their rows, all at the same time.

decode thread -> images -> main thread: batches -> encoder -> rows of images -> sink: a thread that stores them
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from internvit_cli.config import Skipped, Status
from internvit_cli.decode.decoder import DecodedImage, DecodeJob, Decoder, FailedImage, UncutImage
from internvit_cli.encode.interface import Placed
from internvit_cli.encode.tile_features import UNFIT
from internvit_cli.errors import InternvitError, one_line
from internvit_cli.extract.results import Stages, Tally
from internvit_cli.extract.writer_thread import SkippedImage
from internvit_cli.storage.image_rows import image_arrays
from internvit_cli.storage.write.commit import ImageRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from internvit_cli.config import Recipe
    from internvit_cli.encode.encoder import Encoder
    from internvit_cli.encode.interface import PendingBatch
    from internvit_cli.encode.tile_features import TileFeatures
    from internvit_cli.extract.writer_thread import Sink
    from internvit_cli.runtime.signals import Stop

_Decoded: TypeAlias = DecodedImage | UncutImage | FailedImage
_Decode: TypeAlias = "Callable[[Iterable[DecodeJob | None], Callable[[], bool]], Iterator[_Decoded]]"

BATCHES_IN_FLIGHT = 2
"""One batch that the device works on and one that waits, so that the device is never idle."""
LAG_SECONDS = 2.0
"""A batch that is not full after this time is encoded anyway, so that slow decoding does not delay finished images."""
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class EncodeRules:
    """How features of an image are stored, and what happens to an image that cannot be used."""

    recipe: Recipe
    """Decides what is stored."""
    is_begun: bool = False
    """Whether the output has rows: then a value that is too large skips its image and does not end the run."""
    strict: bool = False
    """Whether to end at the first image that cannot be used, which stays pending."""


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Images to be encoded, and the sink that stores them."""

    keys: Any
    """The images' keys, by row."""
    jobs: Iterable[DecodeJob | None]
    """None means that no job is available now, but more may come."""
    sink: Sink
    rules: EncodeRules


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """The outcome of a job."""

    stages: Stages
    tally: Tally
    clamped: int
    """Number of values that were clamped to the range of the stored type."""


@dataclass(slots=True)
class _Assembly:
    """An image whose tiles are being encoded."""

    row: int
    digest: bytes
    missing: int
    """Number of tiles whose features are outstanding."""
    parts: list[TileFeatures] = field(default_factory=list)
    """Features of consecutive tiles."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive tiles of one image in one batch."""

    assembly: _Assembly
    start: int
    count: int


class EncodeLoop:
    """Decodes, encodes and stores the images of one job, in batches across images."""

    def __init__(
        self, job: EncodeJob, decoder: Decoder, encoder: Encoder, stop: Stop, on_progress: Callable[[Tally], None]
    ) -> None:
        """Prepare the batches; nothing runs yet."""
        self._job = job
        self._decoder = decoder
        self._encoder = encoder
        self._stop = stop
        self._on_progress = on_progress
        self._rules = job.rules
        self._buffer: NDArray[np.uint8] | None = None
        """The current batch; None until there is a tile for it."""
        self._spans: list[_Span] = []
        self._placed: list[Placed] = []
        """Tiles of the current batch that were cut on the device."""
        self._filled = 0
        self._in_flight: deque[tuple[PendingBatch, list[_Span]]] = deque()
        self._submitted = time.monotonic()
        self._tally = Tally()
        self._clamped = 0

    def run(self) -> EncodeResult:
        """Encode all images, or as many as possible before `stop`.

        Whether this returns or raises, everything that was encoded has gone to the sink, and the sink is closed.

        Raises:
            InternvitError: The disk, the device or the workers fail; with `strict`, also if an image cannot be used.
        """
        started, host_before = time.perf_counter(), time.thread_time()
        decode_before, device_before = self._decoder.busy_seconds, self._encoder.device_seconds
        try:
            self._encode_all()
        finally:
            self._job.sink.close()
        stages = Stages(
            wall=time.perf_counter() - started,
            decode=(self._decoder.busy_seconds - decode_before) / max(1, len(self._decoder.pids)),
            device=self._encoder.device_seconds - device_before,
            write=self._job.sink.busy_seconds,
            host=time.thread_time() - host_before,
        )
        return EncodeResult(stages, self._tally, self._clamped)

    @property
    def _decode(self) -> _Decode:
        """The decoder's way to decode that suits the encoder."""
        if not self._encoder.resizes:
            return self._decoder.run
        self._encoder.register(self._decoder.memory)
        return self._decoder.run_uncut

    def _encode_all(self) -> None:
        decoded = _DecodeThread(self._decode, self._job.jobs, self._stop)
        try:
            for item in decoded:
                if isinstance(item, FailedImage):
                    self._skip(item.row, item.skipped, item.tiles)
                elif item is not None:
                    self._encode(item)
                if time.monotonic() - self._submitted >= LAG_SECONDS:
                    self._catch_up()
            if not self._stop.signal:
                self._submit()
            while self._in_flight:
                self._finish_oldest()
        finally:
            decoded.close()

    def _encode(self, image: DecodedImage | UncutImage) -> None:
        """Put an image's tiles into the current batch, and submit each batch that becomes full."""
        if isinstance(image, UncutImage):
            tiles = self._encoder.cut(image.picture, image.views)
            image.release()
            self._put(image, tiles, self._place)
        else:
            self._put(image, image.tiles, self._copy)
            image.release()

    def _put(self, image: DecodedImage | UncutImage, tiles: Any, add: Callable[[Any], None]) -> None:
        """Let `add` put as many tiles into the current batch as fit, until all are in one."""
        assembly = _Assembly(image.row, image.digest, len(tiles))
        position = 0
        while position < len(tiles):
            if self._buffer is None:
                self._buffer = self._encoder.buffer()
            count = min(len(tiles) - position, len(self._buffer) - self._filled)
            add(tiles[position : position + count])
            self._spans.append(_Span(assembly, self._filled, count))
            self._filled += count
            position += count
            if self._filled == len(self._buffer):
                self._submit()

    def _copy(self, tiles: NDArray[np.uint8]) -> None:
        assert self._buffer is not None
        self._buffer[self._filled : self._filled + len(tiles)] = tiles

    def _place(self, tiles: Tensor) -> None:
        self._placed.append(Placed(self._filled, tiles))

    def _catch_up(self) -> None:
        """Fetch all batches from the encoder; if there are none, submit a batch that is not full."""
        if self._in_flight:
            self._finish_oldest()
        else:
            self._submit()

    def _submit(self) -> None:
        if self._buffer is None:
            return
        if len(self._in_flight) == BATCHES_IN_FLIGHT:
            self._finish_oldest()
        pending = self._encoder.submit(self._buffer[: self._filled], self._placed)
        self._in_flight.append((pending, self._spans))
        self._buffer, self._spans, self._placed, self._filled = None, [], [], 0
        self._submitted = time.monotonic()

    def _finish_oldest(self) -> None:
        pending, spans = self._in_flight.popleft()
        features = pending.result()
        self._clamped += features.clamped
        for span in spans:
            part = slice(span.start, span.start + span.count)
            span.assembly.parts.append(features.take(part))
            span.assembly.missing -= span.count
            if not span.assembly.missing:
                self._store(span.assembly)

    def _store(self, assembly: _Assembly) -> None:
        row, parts = assembly.row, assembly.parts
        tiles = sum(map(len, parts))
        if (unfit := _unfit(parts)) is not None:
            is_first = not (self._tally.images or self._rules.is_begun)
            if is_first and unfit.exception == "OverflowError":
                raise InternvitError(
                    f"{one_line(self._job.keys[row])}: {unfit.message}",
                    "store with --store-dtype bfloat16 (or float32), or --on-overflow clamp",
                )
            self._skip(row, unfit, tiles)
            return
        arrays = image_arrays([part.layers for part in parts], self._rules.recipe)
        self._job.sink.put(ImageRows(row, assembly.digest, arrays))
        self._count(Tally(images=1, tiles=tiles))

    def _skip(self, row: int, skipped: Skipped, tiles: int) -> None:
        if self._rules.strict:
            raise strict_error(self._job.keys[row], skipped)
        self._job.sink.put(SkippedImage(row, skipped))
        self._count(Tally(skipped=1, skipped_tiles=tiles))

    def _count(self, image: Tally) -> None:
        self._tally = self._tally.plus(image)
        self._on_progress(self._tally)


def _unfit(parts: list[TileFeatures]) -> Skipped | None:
    """Return why an image's features cannot be stored; None if they can."""
    worst = max(int(part.fits.max()) for part in parts)
    if worst == 0:
        return None
    return Skipped(Status.OVERFLOW, "OverflowError" if worst == 1 else "ArithmeticError", UNFIT[worst])


def strict_error(key: bytes, skipped: Skipped) -> InternvitError:
    """Return the error with which `--strict` ends a run."""
    return InternvitError(
        f"{one_line(key)}: {skipped.status.word}: {skipped.message}",
        "run without --strict to skip such images and list them",
    )


class _DecodeThread:
    """Runs the decoder beside the encoder, some images ahead of it."""

    def __init__(self, decode: _Decode, jobs: Iterable[DecodeJob | None], stop: Stop) -> None:
        self._results: queue.SimpleQueue[_Decoded | BaseException | None] = queue.SimpleQueue()
        self._closed = False
        self._stop = stop
        self._thread = threading.Thread(target=self._run, args=(decode, jobs), name="decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[_Decoded | None]:
        """Yield images as they come, and None from time to time while there are none."""
        while True:
            try:
                item = self._results.get(timeout=POLL_SECONDS)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None or self._stop.signal:
                return
            yield item

    def close(self) -> None:
        self._closed = True
        self._thread.join()

    def _run(self, decode: _Decode, jobs: Iterable[DecodeJob | None]) -> None:
        try:
            # Slots bound the queue, because an image keeps its slot until its tiles are copied.
            for item in decode(jobs, lambda: self._closed or bool(self._stop.signal)):
                self._results.put(item)
        except BaseException as error:  # noqa: BLE001 - raised again where the results are read
            self._results.put(error)
        self._results.put(None)
