"""`internvit search`: list the images that are most similar to a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from internvit_cli.cli.completion import complete_keys
from internvit_cli.cli.console import fail, print_json, print_line, say
from internvit_cli.cli.pictures import PicturesFolder
from internvit_cli.cli.progress import progress
from internvit_cli.cli.stored_layer import StoredLayer
from internvit_cli.cli.unfinished import found_output
from internvit_cli.errors import ExitCode, InternvitError
from internvit_cli.runtime.words import counted
from internvit_cli.storage.output_names import check_file_name

if TYPE_CHECKING:
    from internvit_cli.similarity.search import SearchResult


def search_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards.")],
    pictures: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Argument(metavar="IMAGE...", help="Files of pictures to search for."),
    ] = None,
    key: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "-k",
            "--key",
            "--keys",
            metavar="KEY",
            help="Search for this image of OUT, or for the images that a pattern such as '2024/*' matches.",
            autocompletion=complete_keys,
        ),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=100_000, help="Find N images for each query.")] = 10,
    raw: Annotated[bool, typer.Option("--raw", help="Compare vectors as they are stored.")] = False,
    index: Annotated[
        bool, typer.Option("--index", help="Use an approximate index beside OUT, and build it if there is none.")
    ] = False,
    layer: StoredLayer = None,
    sheet: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw queries and hits on one sheet.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="Take the weights from here.",
            show_default="the model that OUT names",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Encode pictures on this device: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    pictures_in: PicturesFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Find the images of an output that are most similar to a picture.

    Pictures are encoded with the recipe and the weights of OUT; --key searches for an image of OUT itself. The
    similarity is a cosine of pooled vectors. The last line names the space in which it is computed: balanced (0 is as
    similar as any two images of OUT), or raw if OUT holds only a few images, or images that are nearly the same.

    Example: internvit search feats.h5 holiday.jpg --sheet found.png
    """
    if sheet is not None:
        check_file_name(sheet, (".png",), "--sheet", "PNG")
    from internvit_cli.similarity.contact_sheet import search_sheet
    from internvit_cli.similarity.search import SearchOptions, search
    from internvit_cli.viz.show import save_png

    options = SearchOptions(
        path=found_output(path),
        pictures=tuple(pictures or ()),
        keys=tuple(key or ()),
        count=count,
        raw=raw,
        index=index,
        model=model,
        device=device,
        layer=layer,
    )
    with progress(quiet=quiet) as observer:
        found = search(options, observer)
        if sheet is not None:
            save_png(search_sheet(found, pictures_in, observer), sheet)
    code = found.exit_code
    error = (
        InternvitError("no picture can be used", "the reasons are listed with the pictures")
        if code == ExitCode.CANNOT_RUN
        else None
    )
    if json:
        extra = {"sheet": sheet, "exit_code": int(code), "error": error.message if error else None}
        print_json(found.to_json() | extra)
    else:
        _print(found)
        if sheet is not None and not quiet:
            print_line(f"sheet: {sheet}")
    return fail(error) if error else int(code)


def _print(found: SearchResult) -> None:
    for answer in found.answers:
        kind = "picture" if answer.is_picture else "key"
        print_line(f"{kind} {answer.query.key}" + (f": {answer.problem}" if answer.problem else ""))
        for rank, hit in enumerate(answer.hits, 1):
            print_line(f"{rank:4d}  {hit.similarity:7.4f}  {hit.image.key}")
    built = " (the index is new)" if found.index_is_new else ""
    images = counted(found.images, "image")
    say(f"{images} compared in {found.seconds:.1f} s, {found.how}{built}; similarity is the {found.space.words}")
    for note in found.notes:
        say(f"note: {note}")
