"""`internvit export`: an output in another format, streamed, each row held to its CRC on the way."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Tokens
from internvit_cli.errors import StoppedError, UsageError
from internvit_cli.export.blocks import read_blocks
from internvit_cli.export.destination import Destination
from internvit_cli.export.selection import RowSelection, select_all
from internvit_cli.export.targets import Place, Target, choose_target
from internvit_cli.plan.table import count_statuses
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.signals import Interruption
from internvit_cli.storage.durable import check_space, disk_errors, unsynced_folder

if TYPE_CHECKING:
    from internvit_cli.export.writer import UnpublishedResult, Writer
    from internvit_cli.runtime.signals import StopRequest


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """Where a result goes, and how it is written."""

    path: str
    target: Target | None = None
    """None goes by the name."""
    shard_bytes: int | None = None
    """Of a folder, or of a series of tars; other files are one, as with `extract`."""
    overwrite: bool = False
    lock: bool = True
    widen: bool = False
    """Store float32 where the target has no bfloat16, instead of its bits."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What to export, and where to."""

    source: str
    write: WriteOptions
    words: tuple[str, ...] = ()
    """Only the images that these keys and patterns mean."""
    keys: tuple[str, ...] = ()
    """And those with these keys, whatever is in them; neither words nor keys: all."""
    tokens: bool = True
    """Write tokens; otherwise vectors only."""
    layers: tuple[int, ...] | None = None
    """Which of several stored layers to write, as `Features.at_layer` takes them; None is all."""


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was made."""

    sources: tuple[str, ...]
    output: str
    format: str
    images: dict[str, int]
    """By status."""
    pending: int
    """Images that were left out, for they are not encoded yet."""
    tiles: int
    bytes: int
    files: int
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The flat object of `--json`."""
        return asdict(self)


def export(options: ExportOptions, stop: StopRequest, observer: Observer = SILENT) -> ExportResult:
    """Write an output in another format.

    Args:
        options: what, and where to.
        stop: a signal ends the work at once; only publishing is not interrupted.
        observer: told how it goes.

    Raises:
        StoppedError: a signal came; nothing has the result's name.
        UsageError: options mean nothing for the target, or a layer is not stored.
        InternvitError: the output is damaged, or the result cannot be written; nothing has its name.
    """
    place = choose_target(options.write.path, options.write.target)
    check_options(place, options.write)
    destination = Destination(place, [options.source], overwrite=options.write.overwrite, lock=options.write.lock)
    try:
        with observer.phase("reading the output"):
            selection = select_all(options.source)
        if options.words or options.keys:
            selection = selection.take(selection.positions_of(options.words, options.keys, options.source))
        if not options.tokens:
            selection = selection.without_tokens()
        if options.layers is not None:
            selection = selection.with_layers(options.layers, options.source)
            _check_layers(selection, place)
        return write(selection, Job(place, destination, options.write, (options.source,)), stop, observer)
    except Interruption:
        raise StoppedError("stopped before all was written; nothing is left") from None


def _check_layers(selection: RowSelection, place: Place) -> None:
    """Refuse a feature file without the deepest layer: its recipe and the digest of its weights are of that layer.

    Raises:
        UsageError: that is asked for.
    """
    if place.target.is_feature_file and not selection.keeps_deepest:
        deepest = selection.recipe.layer
        raise UsageError(
            f"--layer: {place.path} would be a feature file without layer {deepest}, the deepest",
            f"add {deepest} to --layer, name a .parquet, .safetensors or .tar file, or extract with this --layer alone",
        )


@dataclass(frozen=True, slots=True)
class Job:
    """A result that is to be made."""

    place: Place
    destination: Destination
    options: WriteOptions
    sources: tuple[str, ...]


def check_options(place: Place, options: WriteOptions) -> None:
    """Refuse options that mean nothing for a target.

    Raises:
        UsageError: one does.
    """
    if options.shard_bytes is not None and not (place.is_folder or place.target is Target.TAR):
        raise UsageError(
            f"--shard-size: {place.path} is one file, and has no shards", "leave it out, or name a folder or a .tar"
        )
    if options.widen and place.target not in (Target.PARQUET, Target.TAR):
        raise UsageError(
            f"--widen: {place.target.value} holds bfloat16 as it is, or no tokens", "leave it out, or choose another"
        )


def write(selection: RowSelection, job: Job, stop: StopRequest, observer: Observer) -> ExportResult:
    """Stream a selection to its destination, and publish it.

    Raises:
        NoSpaceError: it does not fit; nothing was written.
        InternvitError: a row is damaged, or the disk failed; nothing has the result's name.
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


def _stream(selection: RowSelection, writer: Writer, job: Job, observer: Observer) -> None:
    with observer.phase("writing", "image", len(selection)) as phase:
        writer.begin()
        for block in read_blocks(selection, is_index=job.place.target is Target.CSV):
            writer.add(block)
            phase.at(block.first + len(block))


def open_writer(selection: RowSelection, job: Job) -> Writer:
    """What writes a target; its module is loaded only now."""
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
        case _:
            from internvit_cli.export.feature_files import FeatureFileWriter

            return FeatureFileWriter(selection, destination, job.place.target.shard_format, options.shard_bytes)


def _size(destination: Destination, made: UnpublishedResult) -> tuple[int, int]:
    """Bytes and number of the files that were made."""
    paths = [destination.staged(name) for name in made.names]
    files = [
        file
        for path in paths
        for file in ([entry.path for entry in os.scandir(path)] if os.path.isdir(path) else [path])
    ]
    return sum(map(os.path.getsize, files)), len(files)
