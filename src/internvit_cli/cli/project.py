"""`internvit project`: turn stored visual tokens into tokens of a language model, without pictures."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.arguments import shard_bytes_for
from internvit_cli.cli.console import human_seconds, print_json, print_line, say
from internvit_cli.cli.progress import progress
from internvit_cli.cli.result_options import NoLock, ShardFormat, ShardSize
from internvit_cli.cli.signals import exit_code_of, stop_on_signals
from internvit_cli.cli.unfinished import found_output
from internvit_cli.config import StoreDtype
from internvit_cli.errors import ExitCode, StoppedError, UsageError
from internvit_cli.runtime.words import counted
from internvit_cli.storage.output_names import is_single_file

if TYPE_CHECKING:
    from internvit_cli.export.project import ProjectResult


def project_command(
    path: Annotated[
        str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards, with visual tokens.")
    ],
    new: Annotated[str, typer.Argument(metavar="NEW", help="One file if the name ends in .h5, otherwise a folder.")],
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="CHAT",
            help="Use the projector of this chat model, or of a .safetensors file that holds a projector alone.",
        ),
    ] = None,
    store_dtype: Annotated[
        StoreDtype | None,
        typer.Option(
            help="Store projected tokens in this type: float16, bfloat16 or float32.",
            show_default="that of OUT; float16 for int8 and fp8",
        ),
    ] = None,
    allow_mismatch: Annotated[
        bool,
        typer.Option("--allow-mismatch", help="Project tokens of another tower than the one of the chat model."),
    ] = False,
    shard_format: ShardFormat = None,
    shard_size: ShardSize = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Compute on this device: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Compute with N threads on a CPU.", show_default="one per core")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace NEW if it has another recipe, once the new one is complete.")
    ] = False,
    no_lock: NoLock = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Turn visual tokens into tokens of a language model.

    The projector of a chat model is applied to stored tokens, without pictures and without the tower. NEW holds the
    images of OUT, and its recipe says which weights projected them. Run the same command again to continue an
    interrupted run, or to project images that are new in OUT.

    Example: internvit project feats.h5 chat.h5 --model OpenGVLab/InternVL3-1B-hf
    """
    if not model:
        raise UsageError("no chat model given", "add --model OpenGVLab/InternVL3-1B-hf, for example")
    from internvit_cli.export.project import ProjectOptions, project

    options = ProjectOptions(
        source=found_output(path),
        output=new,
        model=model,
        format=shard_format,
        shard_bytes=shard_bytes_for(shard_size, has_shards=not is_single_file(new)),
        store_dtype=store_dtype,
        device=device,
        threads=threads,
        allow_mismatch=allow_mismatch,
        overwrite=overwrite,
        lock=not no_lock,
    )
    with stop_on_signals() as stop:
        try:
            with progress(quiet=quiet) as observer:
                result = project(options, stop, observer)
        except StoppedError as stopped:
            say(f"{stopped.message}; run the same command again")
            if json:
                print_json({"exit_code": exit_code_of(stop.signal), "error": stopped.message})
            return exit_code_of(stop.signal)
    finished = ExitCode.SKIPPED if result.skipped else ExitCode.DONE
    code = exit_code_of(result.stopped_by) if result.stopped_by else int(finished)
    if json:
        print_json(result.to_json() | {"exit_code": code, "error": None})
    elif not quiet:
        _print(result)
    return code


def _print(result: ProjectResult) -> None:
    images = ", ".join(f"{count:,} {word}" for word, count in result.images.items())
    print_line(f"{result.output}: {counted(sum(result.images.values()), 'image')} ({images})")
    if result.projected:
        print_line(
            f"projected {counted(result.projected, 'image')}, {counted(result.tiles, 'tile')} to {result.token_size:,} "
            f"values per token by {result.projector} in {human_seconds(result.seconds)}"
        )
    elif not result.stopped_by:
        print_line("nothing new to project")
    if result.skipped:
        print_line(f"skipped: {counted(result.skipped, 'image')} with tokens that do not fit into the stored type")
    for note in result.notes:
        say(f"note: {note}")
    if result.stopped_by:
        say(f"stopped by {signal.Signals(result.stopped_by).name}; run the same command to continue")
