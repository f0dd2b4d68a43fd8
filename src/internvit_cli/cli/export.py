"""`internvit export`: write features to other files and formats."""

from __future__ import annotations

import os
import sys
from codecs import BOM_UTF8
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from internvit_cli.cli.arguments import shard_bytes_for
from internvit_cli.cli.completion import complete_keys
from internvit_cli.cli.console import human_bytes, human_seconds, print_json, print_line, say
from internvit_cli.cli.progress import progress
from internvit_cli.cli.result_options import NoLock
from internvit_cli.cli.signals import exit_code_of, stop_on_signals
from internvit_cli.cli.unfinished import found_output
from internvit_cli.cli.values import layers, size
from internvit_cli.errors import ExitCode, StoppedError, UsageError, one_line
from internvit_cli.export.targets import Target, choose_target
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.export.export import ExportResult
    from internvit_cli.runtime.observer import Observer
    from internvit_cli.runtime.signals import StopRequest


def export_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file, a .partial one, or a folder of shards.")],
    new: Annotated[
        str,
        typer.Argument(metavar="NEW", help="A .h5, .parquet, .safetensors, .tar or .csv file, or a folder."),
    ],
    target: Annotated[
        Target | None,
        typer.Option(
            "--format",  # the first name is that of the variable and the key, which extract has too
            "--to",
            metavar="FORMAT",
            help="Write NEW in this format, such as vllm, npy-folder or pt-folder: a folder with one file per image.",
            show_default="by the name of NEW; npy for a folder",
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(
            metavar="SIZE",
            help="Limit the shards of a folder to this size, or split a .tar.",
            parser=size(least=1),
            show_default="4GiB for folders; one .tar",
        ),
    ] = None,
    no_tokens: Annotated[bool, typer.Option("--no-tokens", help="Write vectors only.")] = False,
    layer: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            metavar="INDEX[,INDEX...]",
            help="Write only these layers of an output that holds several, such as -4.",
            parser=layers,
            show_default="all",
        ),
    ] = None,
    widen: Annotated[
        bool,
        typer.Option(
            "--widen", help="Write bfloat16 as float32 in .parquet and .tar files, instead of its bits as uint16."
        ),
    ] = False,
    key: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Option(
            "-k",
            "--key",
            "--keys",
            metavar="KEY",
            help="Write only this image, or the images that a pattern such as '2024/*' matches.",
            autocompletion=complete_keys,
        ),
    ] = None,
    keys_from: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Write only the images of a list with one key per line; - is standard input."
        ),
    ] = None,
    null: Annotated[bool, typer.Option("-0", "--null", help="Expect NUL after each key of a list.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="CHAT",
            help="Refuse tokens that this chat model would not compute, because it has other weights.",
        ),
    ] = None,
    allow_mismatch: Annotated[
        bool,
        typer.Option("--allow-mismatch", help="Write tokens of another tower than that of their projector or CHAT."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace NEW once the new one is complete.")] = False,
    no_lock: NoLock = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Write features to another file or format.

    Every row is checked against its CRC. An .h5 file or a folder of .npy shards holds everything that OUT holds, and
    extract can continue it. NEW appears only when it is complete.

    Example: internvit export feats.h5 feats.parquet
    """
    place = choose_target(new, target)
    shard_bytes = shard_bytes_for(shard_size, has_shards=place.has_shards)
    from internvit_cli.export.export import ExportOptions, WriteOptions, export

    write = WriteOptions(new, target, shard_bytes, overwrite=overwrite, lock=not no_lock, widen=widen)
    keys = tuple(read_keys(keys_from, null_separated=null)) if keys_from is not None else ()
    if keys_from is not None and not keys:
        raise UsageError(f"--keys-from {one_line(keys_from)}: the list names no image", "write one key per line")
    options = ExportOptions(
        source=found_output(path),
        write=write,
        words=tuple(key or ()),
        keys=keys,
        tokens=not no_tokens,
        layers=layer,
        model=model,
        allow_mismatch=allow_mismatch,
    )
    return run_stoppable(lambda stop, observer: export(options, stop, observer), as_json=json, quiet=quiet)


def read_keys(path: str, *, null_separated: bool) -> list[str]:
    """Return the keys of a list, separated by newlines or NUL; a UTF-8 byte order mark before lines is dropped.

    Raises:
        UsageError: The file cannot be read.
    """
    from internvit_cli.sources.discover import STANDARD_INPUT
    from internvit_cli.sources.lists import read_list

    try:
        with nullcontext(sys.stdin.buffer) if path == STANDARD_INPUT else open(path, "rb") as file:
            keys = list(read_list(file, null_separated))
    except OSError as error:
        raise UsageError(f"--keys-from {one_line(path)}: {error.strerror}", "check the path") from error
    if keys and not null_separated:
        keys[0] = keys[0].removeprefix(BOM_UTF8)
    return [os.fsdecode(key) for key in keys if key]


def run_stoppable(work: Callable[[StopRequest, Observer], ExportResult], *, as_json: bool, quiet: bool) -> int:
    """Run an export, print its result and return the exit code; a signal stops it and removes what it wrote."""
    with stop_on_signals() as stop:
        try:
            with progress(quiet=quiet) as observer:
                written = work(stop, observer)
        except StoppedError as stopped:
            say(stopped.message)
            if as_json:
                print_json({"exit_code": exit_code_of(stop.signal), "error": stopped.message})
            return exit_code_of(stop.signal)
    if as_json:
        print_json(written.to_json() | {"exit_code": int(ExitCode.DONE), "error": None})
    elif not quiet:
        _print(written)
    return int(ExitCode.DONE)


def _print(written: ExportResult) -> None:
    images = ", ".join(f"{count:,} {word}" for word, count in written.images.items())
    files = f" in {counted(written.files, 'file')}" if written.files > 1 else ""
    rate = written.bytes / written.seconds if written.seconds else 0.0
    total = counted(sum(written.images.values()), "image")
    print_line(f"{written.output}: {total} ({images}), {counted(written.tiles, 'tile')}")
    print_line(
        f"{human_bytes(written.bytes)} as {written.format}{files} in {human_seconds(written.seconds)}, "
        f"{human_bytes(rate)}/s"
    )
    if written.pending:
        say(f"note: {counted(written.pending, 'image')} left out, because they are not encoded yet")
    for note in written.notes:
        say(f"note: {note}")
