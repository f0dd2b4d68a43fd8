"""Write an output in another format and check the CRC of each image, for `internvit export`."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Tokens
from internvit_cli.errors import ModelError, StoppedError, UsageError
from internvit_cli.export.blocks import read_blocks
from internvit_cli.export.destination import Destination
from internvit_cli.export.selection import RowSelection, select_all_rows
from internvit_cli.export.targets import ResultPlace, Target, choose_target
from internvit_cli.model.matching import ALLOW_MISMATCH, match_weights, mismatch_error
from internvit_cli.plan.table import count_statuses
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.signals import Interruption
from internvit_cli.storage.durable import check_space, disk_errors, unsynced_folder
from internvit_cli.storage.format.layout import PROJECTOR, PROJECTOR_TOWER

if TYPE_CHECKING:
    from internvit_cli.export.writer import UnpublishedResult, Writer
    from internvit_cli.runtime.signals import StopRequest


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """The place of a result, and how it is written."""

    path: str
    target: Target | None = None
    """The format; None means that the name decides."""
    shard_bytes: int | None = None
    """Largest size of the shards of a folder or of a series of tars; other results are a single file."""
    overwrite: bool = False
    lock: bool = True
    widen: bool = False
    """Whether to store float32 instead of the bits of bfloat16 if the target has no bfloat16."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of an export."""

    source: str
    write: WriteOptions
    words: tuple[str, ...] = ()
    """Keys and patterns of the images to export."""
    keys: tuple[str, ...] = ()
    """Literal keys of further images; without `words` and `keys`, all images are exported."""
    tokens: bool = True
    """Whether to write tokens; otherwise only vectors are written."""
    layers: tuple[int, ...] | None = None
    """The layers to write, as for `Features.at_layer`; None means all."""
    model: str | None = None
    """The chat model that is to read the tokens, whose weights must be those behind them; None means that it is not
    checked."""
    allow_mismatch: bool = False
    """Whether to write tokens of another tower than that of the projector or of `model`."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of an export."""

    sources: tuple[str, ...]
    output: str
    format: str
    images: dict[str, int]
    """By status."""
    pending: int
    """The number of images that were left out because they are not encoded yet."""
    tiles: int
    bytes: int
    files: int
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        return asdict(self)


def export(options: ExportOptions, stop: StopRequest, observer: Observer = SILENT) -> ExportResult:
    """Write an output in another format.

    Args:
        options: What to export, and where to.
        stop: A signal ends the work at once; only publishing is not interrupted.
        observer: Receives progress.

    Raises:
        StoppedError: A signal stopped the export, and no result exists.
        UsageError: Options do not apply to the target, or a layer is not stored.
        InternvitError: The output is damaged, or the result cannot be written; no result exists.
    """
    place = choose_target(options.write.path, options.write.target)
    check_options(place, options.write)
    destination = Destination(place, [options.source], overwrite=options.write.overwrite, lock=options.write.lock)
    try:
        with observer.phase("reading the output"):
            selection = select_all_rows(options.source)
        if options.words or options.keys:
            selection = selection.take(selection.positions_of(options.words, options.keys, options.source))
        _refuse_mismatch(options, selection, observer)
        if not options.tokens:
            selection = selection.without_tokens()
        if options.layers is not None:
            selection = selection.with_layers(options.layers, options.source)
            _check_layers(selection, place)
        return write_selection(
            selection, ExportJob(place, destination, options.write, (options.source,)), stop, observer
        )
    except Interruption:
        raise StoppedError("stopped before everything was written; nothing was kept") from None


def _refuse_mismatch(options: ExportOptions, selection: RowSelection, observer: Observer) -> None:
    """Refuse tokens that a chat model would misread, because another tower made them.

    Raises:
        ModelError: The tokens were projected by the projector of another tower, or `options.model` has other weights.
    """
    if options.allow_mismatch or not options.tokens:
        return
    attributes = selection.attributes()
    own = attributes.get(PROJECTOR_TOWER, "")
    if own and own != selection.recipe.weights_digest:
        raise ModelError(
            f"the tokens of {options.source} come from another tower than that of {attributes[PROJECTOR]}, whose "
            "projector was applied to them",
            f"extract with that model, or {ALLOW_MISMATCH} if that is what you want",
        )
    if options.model is not None:
        match = match_weights(selection.recipe, attributes, options.model, observer)
        if not match.matches:
            raise mismatch_error(match)


def _check_layers(selection: RowSelection, place: ResultPlace) -> None:
    """Refuse a feature file without the deepest layer, to which its recipe and the digest of its weights belong.

    Raises:
        UsageError: The deepest layer is left out.
    """
    if place.target.is_feature_file and not selection.keeps_deepest:
        deepest = selection.recipe.layer
        raise UsageError(
            f"--layer: {place.path} would be a feature file without layer {deepest}, the deepest",
            f"add {deepest} to --layer, name a .parquet, .safetensors or .tar file, or extract with only this --layer",
        )


@dataclass(frozen=True, slots=True)
class ExportJob:
    """A result to create: its destination and options."""

    place: ResultPlace
    destination: Destination
    options: WriteOptions
    sources: tuple[str, ...]


def check_options(place: ResultPlace, options: WriteOptions) -> None:
    """Refuse options that do not apply to a target.

    Raises:
        UsageError: An option does not apply.
    """
    if options.shard_bytes is not None and not place.has_shards:
        what = "has a file per image" if place.is_folder else "is one file"
        raise UsageError(
            f"--shard-size: {place.path} {what}, and has no shards", "leave it out, or name a folder or a .tar"
        )
    if options.widen and place.target not in (Target.PARQUET, Target.TAR):
        raise UsageError(
            f"--widen: {place.target.value} stores bfloat16 unchanged, or no tokens", "leave it out, or choose another"
        )


def write_selection(selection: RowSelection, job: ExportJob, stop: StopRequest, observer: Observer) -> ExportResult:
    """Stream a selection to its destination, and publish it.

    Raises:
        NoSpaceError: The result does not fit on the disk; nothing was written.
        InternvitError: A row is damaged, or the disk failed; no result exists.
    """
    started = time.monotonic()
    with job.destination.open():
        unsynced = unsynced_folder(os.path.dirname(job.destination.path))
        writer = open_writer(selection, job)
        with disk_errors(job.destination.path):  # such as a limit on the size of files
            needed = writer.needed_bytes()
        check_space(
            job.destination.path, needed, "--no-tokens" if selection.shape.tokens is not Tokens.NONE else "--key"
        )
        try:
            _stream(selection, writer, job, observer)
            with observer.phase("finishing"):
                made = writer.finish()
        finally:
            writer.close()
        stop.is_working = True
        nbytes, files = _size(job.destination, made)
        with observer.phase("publishing"):
            job.destination.publish(made.names, made.obsolete, made.withdrawn)
    return ExportResult(
        sources=job.sources,
        output=job.place.path,
        format=job.place.target.value,
        images={status.word: count for status, count in count_statuses(selection.table.status).items()},
        pending=selection.pending,
        tiles=selection.table.tiles,
        bytes=nbytes,
        files=files,
        seconds=time.monotonic() - started,
        notes=(*made.notes, *([unsynced] if unsynced else [])),
    )


def _stream(selection: RowSelection, writer: Writer, job: ExportJob, observer: Observer) -> None:
    with observer.phase("writing", "image", len(selection)) as phase:
        writer.begin()
        for block in read_blocks(selection, is_index=job.place.target is Target.CSV):
            writer.add(block)
            phase.at(block.first + len(block))


def open_writer(selection: RowSelection, job: ExportJob) -> Writer:
    """Return the writer for a target, and load its module only now."""
    destination, options = job.destination, job.options
    match job.place.target:
        case Target.PARQUET:
            from internvit_cli.export.parquet import ParquetWriter

            return ParquetWriter(selection, destination, widen=options.widen)
        case Target.SAFETENSORS:
            from internvit_cli.export.safetensors_file import SafetensorsWriter

            return SafetensorsWriter(selection, destination)
        case Target.TAR:
            from internvit_cli.export.tar import TarWriter

            return TarWriter(selection, destination, options.shard_bytes, widen=options.widen)
        case Target.CSV:
            from internvit_cli.export.csv_index import CsvWriter

            return CsvWriter(selection, destination)
        case Target.VLLM | Target.NPY_FOLDER | Target.PT_FOLDER:
            from internvit_cli.export.sample_folder import SampleFolderWriter

            return SampleFolderWriter(selection, destination, job.place.target)
        case _:
            from internvit_cli.export.feature_files import FeatureFileWriter

            return FeatureFileWriter(selection, destination, job.place.target.shard_format, options.shard_bytes)


def _size(destination: Destination, made: UnpublishedResult) -> tuple[int, int]:
    """Return the total size in bytes and the number of the files."""
    paths = [destination.staged(name) for name in made.names]
    files = [
        file
        for path in paths
        for file in ([entry.path for entry in os.scandir(path)] if os.path.isdir(path) else [path])
    ]
    return sum(map(os.path.getsize, files)), len(files)
