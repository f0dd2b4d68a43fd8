"""`internvit report`: write an output as one HTML page."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.console import human_bytes, human_seconds, print_json, print_line, say
from internvit_cli.cli.pictures import PicturesFolder
from internvit_cli.cli.progress import progress
from internvit_cli.cli.signals import compiled_code_may_take_long
from internvit_cli.cli.stored_layer import StoredLayer
from internvit_cli.cli.unfinished import found_output
from internvit_cli.config import Projection
from internvit_cli.errors import ExitCode, one_line
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from internvit_cli.report.build import Report

MOST_MISSING = 5
"""How many pictures without a thumbnail are named; the page and --json name all of them."""


def report_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file, a .partial one, or a folder of shards.")],
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", metavar="FILE.html", help="Write the page to FILE.html, and replace it if it exists."
        ),
    ] = "report.html",
    projection: Annotated[
        Projection,
        typer.Option("--map", metavar="METHOD", help="Lay the images out by this method; umap needs the extra [umap]."),
    ] = Projection.PCA,
    samples: Annotated[int, typer.Option(min=0, max=200, help="Show token maps and neighbors of N images.")] = 12,
    thumbnails: Annotated[int, typer.Option(min=0, max=100_000, help="Show thumbnails of at most N images.")] = 2000,
    thumbnail_size: Annotated[
        int, typer.Option(min=16, max=512, metavar="PIXELS", help="Make thumbnails with this longer side.")
    ] = 112,
    points: Annotated[int, typer.Option(min=1, max=1_000_000, help="Show at most N images on the map.")] = 50_000,
    seed: Annotated[int, typer.Option(min=0, help="Draw other random samples.")] = 0,
    layer: StoredLayer = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Read pictures in N processes.", show_default="one per core")
    ] = None,
    pictures_in: PicturesFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Show no progress, and do not print the name of the file.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Write one HTML page about an output.

    The page shows facts, a map of all images, token maps, duplicates and neighbors, and needs no network. Pictures are
    read from where they were when they were encoded, or from --pictures DIR; those that are missing or changed have no
    thumbnail.

    Example: internvit report feats.h5 -o report.html
    """
    from internvit_cli.report.build import ReportOptions, write_report

    options = ReportOptions(
        path=found_output(path),
        output=output,
        projection=projection,
        samples=samples,
        thumbnails=thumbnails,
        thumbnail_size=thumbnail_size,
        points=points,
        seed=seed,
        workers=workers,
        pictures=pictures_in,
        layer=layer,
    )
    is_compiled = projection is Projection.UMAP
    with progress(quiet=quiet) as observer, compiled_code_may_take_long() if is_compiled else nullcontext():
        report = write_report(options, observer)
    _say_notes(report)
    if json:
        print_json({"path": path} | report.to_json() | {"exit_code": int(ExitCode.DONE), "error": None})
    elif not quiet:
        facts = ", ".join(
            (
                f"{counted(report.points, 'image')} on the map",
                counted(report.thumbnails, "thumbnail"),
                counted(report.token_maps, "token map"),
            )
        )
        print_line(f"{output}: {human_bytes(report.bytes)} in {human_seconds(report.seconds)}; {facts}")
    return int(ExitCode.DONE)


def _say_notes(report: Report) -> None:
    for note in report.notes:
        say(f"note: {note}")
    for key, problem in list(report.missing.items())[:MOST_MISSING]:
        say(f"note: no thumbnail for {one_line(key)}: {problem}")
    if len(report.missing) > MOST_MISSING:
        say(f"note: {counted(len(report.missing), 'image')} without a thumbnail in total")
    if report.missing and not report.thumbnails:
        say("note: if the pictures have moved, --pictures DIR says where they are")
