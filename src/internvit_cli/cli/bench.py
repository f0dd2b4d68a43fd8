"""`internvit bench`: measure each stage on this machine, and predict how long a run would take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.arguments import MOST_TILES, takes_extract_options
from internvit_cli.cli.console import human_bytes, print_json, print_line, say
from internvit_cli.cli.plan import print_expected, with_output
from internvit_cli.cli.progress import progress
from internvit_cli.cli.values import UnusableWordError, member
from internvit_cli.config import ComputeDtype
from internvit_cli.errors import ExitCode
from internvit_cli.options import ExtractOptions
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from internvit_cli.commands.bench import Benchmark


def batch_list(word: str) -> tuple[int, ...]:
    """Parse a list of batch sizes, in tiles."""
    parts = word.split(",")
    if not all(part.isascii() and part.isdigit() and 1 <= int(part[:9]) <= MOST_TILES for part in parts):
        raise UnusableWordError("a list of numbers of tiles", "give a list such as 1,8,64")
    return tuple(map(int, parts))


def dtype_list(word: str) -> tuple[ComputeDtype, ...]:
    """Parse a list of compute types."""
    return tuple(member(ComputeDtype, name) for name in word.split(","))


@takes_extract_options
def bench_command(
    options: ExtractOptions,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=600, metavar="SECONDS", help="Take this long for each measurement.")
    ] = 3.0,
    batch_sizes: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            metavar="LIST",
            help="Measure these batch sizes, in tiles, such as 1,8,64.",
            parser=batch_list,
            show_default="powers of two",
        ),
    ] = None,
    dtypes: Annotated[
        tuple[ComputeDtype, ...],
        typer.Option(
            metavar="LIST",
            help="Measure these types, such as bfloat16,float32.",
            parser=dtype_list,
            show_default="that of --dtype",
        ),
    ] = (ComputeDtype.AUTO,),
    json: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Measure encoder, decoding and disk, and predict a run's duration.

    The command takes the options of extract, and leaves no files. Without SOURCES it measures only the encoder and the
    disk. The disk is that of -o, or of the working directory.

    Example: internvit bench ./imgs -o /data/feats.h5
    """
    from internvit_cli.commands.bench import BenchOptions, run_benchmark
    from internvit_cli.commands.plan import survey

    how = BenchOptions(seconds, batch_sizes, dtypes)
    options = with_output(options)
    with progress(quiet=quiet) as observer:
        found = survey(options, observer, sys.stdin.buffer)
        benchmark = run_benchmark(options, found, how, observer)
    if json:
        print_json(benchmark.to_json() | {"exit_code": int(ExitCode.DONE), "error": None})
    else:
        print_benchmark(benchmark)
    return int(ExitCode.DONE)


def print_benchmark(benchmark: Benchmark) -> None:
    """Print the measurements as a table."""
    print_line(f"model    {benchmark.model}")
    print_line(f"cores    {benchmark.cpus}")
    print_line("encoder  type       batch    tiles/s   device")
    for rate in benchmark.encoder:
        print_line(f"         {rate.dtype:<9} {rate.batch_tiles:6d} {rate.tiles_per_second:10.1f}   {rate.device}")
    if decode := benchmark.decode:
        print_line(
            f"decode   {decode.images_per_second:,.1f} images/s, {decode.megapixels_per_second:,.0f} megapixels/s with "
            f""
            f"{counted(decode.workers, 'worker')} ({counted(decode.images, 'image')})"
        )
    print_line(f"write    {human_bytes(benchmark.write_bytes_per_second)}/s")
    if benchmark.prediction is not None:
        print_line(f"images   {benchmark.prediction.images:,} to encode")
        print_expected(benchmark.prediction)
    for note in benchmark.notes:
        say(f"note: {note}")
