"""`internvit merge`: several outputs as one."""

from __future__ import annotations

from typing import Annotated

import typer

from internvit_cli.cli.arguments import parse_size
from internvit_cli.cli.console import Bar
from internvit_cli.cli.export import run_stoppable
from internvit_cli.config import Format
from internvit_cli.errors import UsageError


def merge_command(
    paths: Annotated[
        list[str], typer.Argument(metavar="OUT...", help="Feature files, .partial ones, or folders of shards.")
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", help="all.h5 for one file, all/ for shards.", show_default=False)
    ] = "",
    prefer: Annotated[
        str | None,
        typer.Option(metavar="first|last", help="Which counts where two have different pictures by one key."),
    ] = None,
    shard_format: Annotated[
        Format | None, typer.Option("--format", help="Of the shards of a folder. (default: npy)")
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes of a shard of a folder. (default: 4GiB)")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there when the new one is complete.")
    ] = False,
    no_lock: Annotated[bool, typer.Option("--no-lock", help="For filesystems without locks.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="No progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Put the rows of several outputs of one recipe into one, each row held to its CRC on the way.

    A key that several have counts once: done before skipped, else the last; two pictures by one key are refused.

    Example: internvit merge monday.h5 tuesday.h5 -o week.h5
    """
    if not output:
        raise UsageError("no output given", "add -o all.h5 for one file, or -o all/ for shards")
    if prefer not in (None, "first", "last"):
        raise UsageError(f"--prefer {prefer}: neither first nor last", "say --prefer first or --prefer last")
    shard_bytes = None if shard_size is None else parse_size("--shard-size", shard_size, least=1)
    from internvit_cli.exchange.export import WriteOptions
    from internvit_cli.exchange.merge import MergeOptions, Prefer, merge
    from internvit_cli.exchange.targets import Target

    target = None if shard_format is None else Target(shard_format.value)
    write = WriteOptions(output, target, shard_bytes, overwrite=overwrite, lock=not no_lock)
    options = MergeOptions(tuple(paths), write, None if prefer is None else Prefer(prefer))
    with Bar(quiet=quiet) as bar:
        return run_stoppable(lambda stop: merge(options, stop, bar.progress), as_json=json, quiet=quiet)
