"""Measure each stage on its own, and predict a run over given pictures, for `internvit bench`."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import ComputeDtype, Status, Tokens
from internvit_cli.decode.decoder import DecodeJob, Decoder, FailedImage, decode_jobs
from internvit_cli.extract.engine import EngineOptions, Workload, decode_options
from internvit_cli.extract.multi_device.engine import find_devices
from internvit_cli.extract.writer_thread import CHECKPOINT_BYTES
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.stand_in import stand_in_checkpoint
from internvit_cli.plan.tiling import decoded_tile_count
from internvit_cli.recipes import encoder_options_of_run
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.workers import usable_cpus
from internvit_cli.storage.durable import disk_errors, free_bytes, reserve, sync_data, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from internvit_cli.commands.plan import Survey
    from internvit_cli.encode.encoder import Encoder
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.options import ExtractOptions

SAMPLE_IMAGES = 512
"""Largest number of pictures that are decoded, evenly spread over the keys."""
WRITE_BYTES = 2_000_000_000
"""Largest number of bytes that are written, and at most an eighth of the free space."""
BATCHES_IN_FLIGHT = 2
LOCAL_ORIGINS = ("directory", "memory")
DEFAULT_BATCHES = (1, 8, 64)
"""Tiles per batch that are tried on a card; on a CPU, tiles are encoded one by one, so the batch does not matter."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The options of a benchmark."""

    seconds: float = 3.0
    """Seconds per measurement; at least one batch or one image is finished."""
    batches: tuple[int, ...] | None = None
    """Tiles per batch; empty means the value of `extract`, None adds others on a card."""
    dtypes: tuple[ComputeDtype, ...] = (ComputeDtype.AUTO,)


@dataclass(frozen=True, slots=True)
class EncoderRate:
    """The speed of the encoder on one device."""

    device: str
    dtype: str
    batch_tiles: int
    tiles_per_second: float


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """The speed of the decode workers when nothing else runs."""

    images: int
    """The number of images that were decoded."""
    workers: int
    images_per_second: float
    """The speed of all workers together."""
    megapixels_per_second: float
    seconds_per_image: float
    """The speed of one worker."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for a run over the given pictures."""

    images: int
    images_per_second: float
    tiles_per_second: float
    seconds: float
    """Seconds for all images, without the start."""
    limit: str
    """The slowest stage: encoder, decode or write."""
    sentence: str
    """A sentence on the slowest stage and what to change."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The result of `bench`."""

    model: str
    cpus: int
    encoder: tuple[EncoderRate, ...]
    """The rates of the encoder, first with the batch that `extract` would use."""
    decode: DecodeRate | None
    """The speed of decoding; None without pictures."""
    write_bytes_per_second: float
    """The speed of writing to the output's disk, with space reserved and synced as in `extract`."""
    prediction: Prediction | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        return asdict(self)


def run_benchmark(options: ExtractOptions, survey: Survey, how: BenchOptions, observer: Observer = SILENT) -> Benchmark:
    """Measure every stage on its own, and predict a run.

    Raises:
        InternvitError: The model, a device or the output's disk cannot be used.
    """
    devices = find_devices(options.run.devices)
    with observer.phase("measuring the encoder"):
        rates = tuple(_encoder_rates(options, survey, how, devices[0]))
    chosen = rates[0]
    jobs = _sample(survey)
    decode = None
    if jobs:
        with observer.phase("measuring the decoding"):
            decode = _decode_rate(options, survey, how, jobs, devices)
    with observer.phase("measuring the disk"):
        write = _write_rate(survey.output.path, how.seconds)
    return Benchmark(
        model=survey.card.name,
        cpus=usable_cpus(),
        encoder=rates,
        decode=decode,
        write_bytes_per_second=write,
        prediction=None if decode is None else predict(survey, chosen, decode, write, len(devices)),
        notes=tuple(_notes(survey, len(devices))),
    )


def _notes(survey: Survey, devices: int) -> Iterator[str]:
    if survey.card.origin not in LOCAL_ORIGINS:
        yield "the weights are random, because speed does not depend on them; nothing was fetched"
    if devices > 1:
        yield f"only the first of {devices} devices was measured; the others are assumed to be equally fast"


# ------------------------------------------------------------------------------------------------------- the encoder


def _encoder_rates(options: ExtractOptions, survey: Survey, how: BenchOptions, device: str) -> Iterator[EncoderRate]:
    from internvit_cli.encode.encoder import Encoder

    checkpoint = _weights(survey)
    base = encoder_options_of_run(options.run, survey.recipe, device)
    for dtype in how.dtypes:
        wanted = replace(base, dtype=dtype if dtype is not ComputeDtype.AUTO else options.run.dtype)
        for batch in _batches(options, how, device):
            with Encoder.load(checkpoint, replace(wanted, batch_tiles=batch)) as encoder:
                yield _encoder_rate(encoder, wanted, how.seconds)


def _weights(survey: Survey) -> Checkpoint:
    """Return the weights of a folder, or random ones for a model on the hub, because speed does not depend on them."""
    is_projected = survey.recipe.tokens is Tokens.PROJECTED
    open_checkpoint = Checkpoint.open if survey.card.origin in LOCAL_ORIGINS else stand_in_checkpoint
    return open_checkpoint(survey.card, layer=survey.recipe.layer, projector=is_projected)


def _batches(options: ExtractOptions, how: BenchOptions, device: str) -> Sequence[int | None]:
    """Return the batch that `extract` would use, then others on a card."""
    own = options.run.batch_tiles
    if how.batches:
        return how.batches
    on_cpu = device == "cpu" or (device == "auto" and not os.path.exists("/dev/nvidiactl"))
    return (own,) if own is not None or on_cpu or how.batches is not None else (None, *DEFAULT_BATCHES)


def _encoder_rate(encoder: Encoder, options: EncoderOptions, seconds: float) -> EncoderRate:
    side = options.tile_size
    random = np.random.default_rng(0)
    tiles = list(random.integers(0, 256, (encoder.info.batch_tiles, side, side, 3), np.uint8))
    encoder.submit(tiles).result()  # work that is done only once: kernels, buffers
    started, finished = time.perf_counter(), 0
    pending = [encoder.submit(tiles)]
    while pending:
        if len(pending) < BATCHES_IN_FLIGHT and time.perf_counter() - started < seconds:
            pending.append(encoder.submit(tiles))
            continue
        pending.pop(0).result()
        finished += 1
    rate = finished * len(tiles) / (time.perf_counter() - started)
    info = encoder.info
    return EncoderRate(info.device_name, info.dtype.value, info.batch_tiles, rate)


# ---------------------------------------------------------------------------------------------------------- decoding


def _sample(survey: Survey) -> list[DecodeJob]:
    """Return jobs for pictures that are spread evenly over the plan."""
    table, sources = survey.table, survey.listing.sources
    rows = np.flatnonzero(table.status == Status.PENDING)
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_IMAGES)).astype(np.int64))]
    return list(decode_jobs(table, rows, sources))


def _decode_rate(
    options: ExtractOptions, survey: Survey, how: BenchOptions, jobs: list[DecodeJob], devices: tuple[str, ...]
) -> DecodeRate:
    rule, run = survey.rule, options.run
    most = max(decoded_tile_count(job.grid, rule) for job in jobs)
    engine = EngineOptions(
        rule=rule,
        encoder=encoder_options_of_run(options.run, survey.recipe, devices[0]),
        devices=devices[:1],
        workers=run.workers,
        decode_timeout=run.decode_timeout,
        worker_memory=run.worker_memory,
    )
    pixels = max(job.header.width * job.header.height for job in jobs)
    decoder = Decoder(decode_options(engine, Workload(len(jobs), most, pixels)))
    try:
        list(_release(decoder.run_uncut(jobs[: len(decoder.pids)])))  # wait until the workers are ready
        before, started = decoder.busy_seconds, time.perf_counter()
        done = list(_release(decoder.run_uncut(_repeated(jobs, started + how.seconds))))
        seconds, busy = time.perf_counter() - started, decoder.busy_seconds - before
        headers = [jobs[row % len(jobs)].header for row in done]
        pixels = sum(header.width * header.height for header in headers)
        return DecodeRate(len(done), len(decoder.pids), len(done) / seconds, pixels / seconds / 1e6, busy / len(done))
    finally:
        decoder.close()


def _repeated(jobs: list[DecodeJob], deadline: float) -> Iterator[DecodeJob]:
    """Yield the jobs repeatedly until the deadline, with new numbers."""
    for number in count():
        yield jobs[number % len(jobs)]._replace(row=number)
        if time.perf_counter() >= deadline:
            return


def _release(images: Any) -> Iterator[int]:
    """Yield the rows of decoded images, and release their slots at once."""
    for image in images:
        if not isinstance(image, FailedImage):
            image.release()
        yield image.row


# ----------------------------------------------------------------------------------------------------------- writing


def _write_rate(output: str, seconds: float) -> float:
    """Return the bytes per second of positioned writes beside the output, synced like checkpoints."""
    folder = os.path.dirname(os.path.abspath(output))
    size = min(WRITE_BYTES, free_bytes(folder) // 8)
    block = np.random.default_rng(0).bytes(4 << 20)
    size -= size % len(block)
    with disk_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".internvit-bench-") as file:
        os.truncate(file.name, size)
        reserve(file.name)
        started, position = time.perf_counter(), 0
        while position < size and time.perf_counter() - started < seconds:
            write_all(file.fileno(), block, position)
            position += len(block)
            if position % CHECKPOINT_BYTES < len(block):
                sync_data(file.fileno())
        sync_data(file.fileno())
        return position / (time.perf_counter() - started)


# -------------------------------------------------------------------------------------------------------- prediction


def predict(survey: Survey, encoder: EncoderRate, decode: DecodeRate, write: float, devices: int) -> Prediction:
    """Predict a run in which the stages work at the same time.

    On a card, the slowest stage decides. On a CPU, the encoder and the workers share the cores, so their times add up.
    """
    images = max(1, int((survey.table.status == Status.PENDING).sum()))
    tiles = survey.decoded_tiles / images
    encoding = tiles / encoder.tiles_per_second / devices
    decoding = decode.seconds_per_image / max(1, decode.workers)
    writing = survey.feature_bytes / images / write if write else 0.0
    times = {"encoder": encoding, "decode": decoding, "write": writing}
    if encoder.device.startswith("cpu"):
        # The encoder had all cores when it was measured alone.
        encoding *= devices
        shared = encoding + decode.seconds_per_image / usable_cpus()
        times |= {"encoder": encoding}
        per_image = max(shared, writing)
        limit = "write" if writing > shared else max(("encoder", "decode"), key=lambda name: times[name])
    else:
        per_image = max(times.values())
        limit = max(times, key=lambda name: times[name])
    return Prediction(
        images=images,
        images_per_second=1 / per_image,
        tiles_per_second=tiles / per_image,
        seconds=images * per_image,
        limit=limit,
        sentence=ADVICE[limit],
    )


ADVICE = {
    "encoder": "The encoder is the limit: use a faster device, more devices (--devices), or fewer tiles.",
    "decode": "Decoding is the limit: use more --workers, or more cores.",
    "write": "Writing is the limit: use a faster disk, or store less (--tokens none, --max-tiles).",
}
