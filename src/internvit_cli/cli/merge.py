"""`internvit merge`: combine several outputs into one."""

from __future__ import annotations

from typing import Annotated

import typer

from internvit_cli.cli.arguments import shard_bytes_for
from internvit_cli.cli.export import run_stoppable
from internvit_cli.cli.result_options import NoLock, ShardFormat, ShardSize
from internvit_cli.cli.unfinished import found_output
from internvit_cli.cli.values import one_of
from internvit_cli.errors import UsageError
from internvit_cli.storage.output_names import is_single_file


def merge_command(
    paths: Annotated[
        list[str], typer.Argument(metavar="OUT...", help="Feature files, .partial ones, or folders of shards.")
    ],
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", metavar="NEW", help="Write to NEW: one file if the name ends in .h5, otherwise a folder."
        ),
    ] = "",
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="first|last",
            help="Take the row of the first or the last output if two outputs have different pictures with one key.",
            parser=one_of("first", "last"),
        ),
    ] = None,
    shard_format: ShardFormat = None,
    shard_size: ShardSize = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace NEW once the new one is complete.")] = False,
    no_lock: NoLock = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Combine several outputs with the same recipe into one.

    Every row is checked against its CRC. A key that several outputs have is written once: a done row wins over a
    skipped one, and of several done rows the last one wins. Two different pictures with one key are an error unless
    --prefer chooses.

    Example: internvit merge monday.h5 tuesday.h5 -o week.h5
    """
    if not output:
        raise UsageError("no output given", "add -o all.h5 for one file, or -o all/ for shards")
    from internvit_cli.export.export import WriteOptions
    from internvit_cli.export.merge import MergeOptions, Prefer, merge
    from internvit_cli.export.targets import Target

    target = None if shard_format is None else Target(shard_format.value)
    shard_bytes = shard_bytes_for(shard_size, has_shards=not is_single_file(output))
    write = WriteOptions(output, target, shard_bytes, overwrite=overwrite, lock=not no_lock)
    options = MergeOptions(tuple(map(found_output, paths)), write, None if prefer is None else Prefer(prefer))
    return run_stoppable(lambda stop, observer: merge(options, stop, observer), as_json=json, quiet=quiet)
