"""`internvit bench`: what each stage does on this machine alone, and what that makes of a run over given pictures."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import ComputeDtype, Status, Tokens
from internvit_cli.decode.decoder import DecodedImage, DecodeJob, Decoder, decode_jobs
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
"""At most so many pictures of a folder are decoded, evenly spread over its keys."""
WRITE_BYTES = 2_000_000_000
"""At most so much is written, and no more than an eighth of what is free."""
BATCHES_IN_FLIGHT = 2
LOCAL_ORIGINS = ("directory", "memory")
DEFAULT_BATCHES = (1, 8, 64)
"""Tiles a batch that are tried on a card; on a CPU tiles are encoded one by one, whatever the batch."""


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure, and for how long."""

    seconds: float = 3.0
    """Of each measurement; one batch or one image is finished in any case."""
    batches: tuple[int, ...] | None = None
    """Tiles a batch; empty is the one that `extract` would use, None has others beside it on a card."""
    dtypes: tuple[ComputeDtype, ...] = (ComputeDtype.AUTO,)


@dataclass(frozen=True, slots=True)
class EncoderRate:
    """What one device encodes."""

    device: str
    dtype: str
    batch_tiles: int
    tiles_per_second: float


@dataclass(frozen=True, slots=True)
class DecodeRate:
    """What the decode workers do when nothing else runs."""

    images: int
    """Decoded for the figure."""
    workers: int
    images_per_second: float
    """All workers together."""
    megapixels_per_second: float
    seconds_per_image: float
    """Of one worker."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run over the given pictures would come to."""

    images: int
    images_per_second: float
    tiles_per_second: float
    seconds: float
    """For all images, without starting up."""
    limit: str
    """The stage that decides: encoder, decode or write."""
    sentence: str
    """The same for a person, with what to change."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The result of `bench`."""

    model: str
    cpus: int
    encoder: tuple[EncoderRate, ...]
    """The one that `extract` would use comes first."""
    decode: DecodeRate | None
    """None without pictures."""
    write_bytes_per_second: float
    """To the output's disk, with the space set aside and synced as `extract` does."""
    prediction: Prediction | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The flat object of `--json`."""
        return asdict(self)


def run_benchmark(options: ExtractOptions, survey: Survey, how: BenchOptions, observer: Observer = SILENT) -> Benchmark:
    """Measure every stage on its own, and predict.

    Raises:
        InternvitError: the model, a device or the output's disk cannot be had.
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
        yield "the weights are made up: speed does not depend on them, and nothing was fetched"
    if devices > 1:
        yield f"the first of {devices} devices was measured; the others are taken to be like it"


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
    """Those of a folder; of a model on the hub made-up ones, for speed does not depend on them."""
    is_projected = survey.recipe.tokens is Tokens.PROJECTED
    open_checkpoint = Checkpoint.open if survey.card.origin in LOCAL_ORIGINS else stand_in_checkpoint
    return open_checkpoint(survey.card, layer=survey.recipe.layer, projector=is_projected)


def _batches(options: ExtractOptions, how: BenchOptions, device: str) -> Sequence[int | None]:
    """The batch that `extract` would use, then others; on a CPU the others make no difference."""
    own = options.run.batch_tiles
    if how.batches:
        return how.batches
    on_cpu = device == "cpu" or (device == "auto" and not os.path.exists("/dev/nvidiactl"))
    return (own,) if own is not None or on_cpu or how.batches is not None else (None, *DEFAULT_BATCHES)


def _encoder_rate(encoder: Encoder, options: EncoderOptions, seconds: float) -> EncoderRate:
    side = options.tile_size
    random = np.random.default_rng(0)
    tiles = list(random.integers(0, 256, (encoder.info.batch_tiles, side, side, 3), np.uint8))
    encoder.submit(tiles).result()  # what is done once only: kernels, buffers
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
    """Pictures spread evenly over the plan."""
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
    decoder = Decoder(decode_options(engine, Workload(len(jobs), most)))
    try:
        list(_release(decoder.run(jobs[: len(decoder.pids)])))  # the workers are up
        before, started = decoder.busy_seconds, time.perf_counter()
        done = list(_release(decoder.run(_repeated(jobs, started + how.seconds))))
        seconds, busy = time.perf_counter() - started, decoder.busy_seconds - before
        headers = [jobs[row % len(jobs)].header for row in done]
        pixels = sum(header.width * header.height for header in headers)
        return DecodeRate(len(done), len(decoder.pids), len(done) / seconds, pixels / seconds / 1e6, busy / len(done))
    finally:
        decoder.close()


def _repeated(jobs: list[DecodeJob], deadline: float) -> Iterator[DecodeJob]:
    """The jobs, over and over until time is up, numbered anew."""
    for number in count():
        yield jobs[number % len(jobs)]._replace(row=number)
        if time.perf_counter() >= deadline:
            return


def _release(images: Any) -> Iterator[int]:
    """Rows of decoded images, their slots given back at once."""
    for image in images:
        if isinstance(image, DecodedImage):
            image.release()
        yield image.row


# ----------------------------------------------------------------------------------------------------------- writing


def _write_rate(output: str, seconds: float) -> float:
    """Bytes a second of positioned writes beside the output, synced as checkpoints are."""
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
    """What the stages make of a run in which they work at the same time.

    On a card they do, and the slowest decides. On a CPU encoder and workers share the cores, and their times add up.
    """
    images = max(1, int((survey.table.status == Status.PENDING).sum()))
    tiles = survey.decoded_tiles / images
    encoding = tiles / encoder.tiles_per_second / devices
    decoding = decode.seconds_per_image / max(1, decode.workers)
    writing = survey.feature_bytes / images / write if write else 0.0
    times = {"encoder": encoding, "decode": decoding, "write": writing}
    if encoder.device.startswith("cpu"):
        # Measured alone, the encoder had all cores.
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
    "encoder": "The encoder is the limit: a faster device, more of them (--devices), or fewer tiles help.",
    "decode": "Decoding is the limit: take more --workers, or more cores.",
    "write": "Writing is the limit: take a faster disk, or store less (--tokens none, --max-tiles).",
}
