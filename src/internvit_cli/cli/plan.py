"""`internvit plan`: print what a run of extract would do."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.arguments import require_sources, takes_extract_options
from internvit_cli.cli.console import human_bytes, human_seconds, print_json, print_line, say
from internvit_cli.cli.progress import progress
from internvit_cli.errors import ExitCode
from internvit_cli.options import ExtractOptions
from internvit_cli.runtime.words import listed

if TYPE_CHECKING:
    from internvit_cli.commands.bench import Prediction
    from internvit_cli.extract.results import PlanSummary

BAR_WIDTH = 40


@takes_extract_options
def plan_command(
    options: ExtractOptions,
    bench: Annotated[
        bool,
        typer.Option("--bench", help="Measure this machine for a few seconds, and predict how long the run will take."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Show what a run of extract would do, without encoding.

    The command counts images, tiles and exact bytes from the headers of the pictures. It takes the options of extract.
    Without -o it plans one HDF5 file in the working directory.

    Example: internvit plan ./imgs --max-tiles 6
    """
    return show_plan(options, with_bench=bench, as_json=json, quiet=quiet)


def show_plan(options: ExtractOptions, *, with_bench: bool = False, as_json: bool, quiet: bool) -> int:
    """Print the plan of an extraction, optionally with its expected duration, and return the exit code."""
    from internvit_cli.commands.plan import summarize_plan, survey

    require_sources(options)
    options = with_output(options)
    expected = None
    with progress(quiet=quiet) as observer:
        found = survey(options, observer, sys.stdin.buffer)
        planned = summarize_plan(found)
        if with_bench:
            from internvit_cli.commands.bench import BenchOptions, run_benchmark

            expected = run_benchmark(options, found, BenchOptions(seconds=1.0, batches=()), observer).prediction
    if as_json:
        values = planned.to_json() | {"expected": asdict(expected) if expected else None}
        print_json(values | {"exit_code": int(ExitCode.DONE), "error": None})
    else:
        print_plan(planned)
        if expected is not None:
            print_expected(expected)
    return int(ExitCode.DONE)


def with_output(options: ExtractOptions) -> ExtractOptions:
    """Return the options with an output to plan for; if none is named, a folder if a shard size was given."""
    if options.store.output:
        return options
    output = "feats.h5" if options.store.shard_bytes is None else "feats/"
    return replace(options, store=replace(options.store, output=output))


def print_expected(expected: Prediction) -> None:
    """Print how long a run would take."""
    print_line(
        f"time     about {human_seconds(expected.seconds)}: {expected.images_per_second:,.1f} images/s, "
        f"{expected.tiles_per_second:,.1f} tiles/s"
    )
    print_line(f"         {expected.sentence}")


def print_plan(planned: PlanSummary) -> None:
    """Print a plan, with a histogram of the tiles per image."""
    skipped = f" + {planned.skipped:,} skipped" if planned.skipped else ""
    print_line(f"images   {planned.images:,} found = {planned.images - planned.skipped:,} to encode{skipped}")
    for reason, count in sorted(planned.reasons.items()):
        print_line(f"         {count:,} {reason}")
    for line in planned.left_out.lines:
        print_line(f"left out {line}")
    print_line(f"tiles    {planned.tiles:,}, including thumbnails")
    most = max(planned.histogram.values(), default=1)
    for tiles, images in planned.histogram.items():
        bar = "#" * max(1, round(BAR_WIDTH * images / most))
        tiles_word, images_word = "tile" if tiles == 1 else "tiles", "image" if images == 1 else "images"
        print_line(f"  {tiles:4d} {tiles_word:<5} {images:9,d} {images_word:<6}  {bar}")
    print_line(f"model    {planned.model}")
    if len(planned.layers) > 1:
        print_line(f"layers   {listed(planned.layers)}")
    print_line(f"output   {planned.output}: {planned.bytes:,} bytes ({human_bytes(planned.bytes)})")
    fits = "" if planned.bytes <= planned.free_bytes else ": NOT ENOUGH"
    print_line(f"free     {planned.free_bytes:,} bytes ({human_bytes(planned.free_bytes)}){fits}")
    for note in planned.notes:
        say(f"note: {note}")
