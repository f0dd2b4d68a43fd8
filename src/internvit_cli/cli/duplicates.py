"""`internvit duplicates`: print groups of identical files and of similar images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.console import print_json, print_line, say
from internvit_cli.cli.pictures import PicturesFolder
from internvit_cli.cli.progress import progress
from internvit_cli.cli.stored_layer import StoredLayer
from internvit_cli.cli.unfinished import found_output
from internvit_cli.errors import ExitCode
from internvit_cli.runtime.words import counted
from internvit_cli.storage.output_names import check_file_name

if TYPE_CHECKING:
    from internvit_cli.similarity.duplicates import ComparisonMethod, Duplicates


def duplicates_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards.")],
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="COSINE",
            help="Group pairs that are at least this similar, without comparing their pictures.",
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Compare vectors as they are stored.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare all pairs, even of more than 100,000 images.")
    ] = False,
    bytes_only: Annotated[
        bool, typer.Option("--bytes-only", help="Find identical files only, without reading vectors.")
    ] = False,
    layer: StoredLayer = None,
    sheet: Annotated[str | None, typer.Option(metavar="FILE.png", help="Draw the groups on one sheet.")] = None,
    pictures_in: PicturesFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Find identical files and pictures that show the same.

    Images with similar pooled vectors are candidates. Their pictures, read from where they were encoded, decide: a copy
    may be saved again, resized, or cropped by up to a tenth at each border. Without its picture, an image is judged by
    its vector alone.

    Example: internvit duplicates feats.h5 --sheet same.png
    """
    if sheet is not None:
        check_file_name(sheet, (".png",), "--sheet", "PNG")
    from internvit_cli.similarity.contact_sheet import duplicates_sheet
    from internvit_cli.similarity.duplicates import DuplicateOptions, find_duplicates
    from internvit_cli.viz.show import save_png

    options = DuplicateOptions(found_output(path), threshold, raw, exact, bytes_only, pictures_in, layer)
    with progress(quiet=quiet) as observer:
        found = find_duplicates(options, observer)
        is_drawn = sheet is not None and bool(found.similar or found.identical)
        if sheet is not None and is_drawn:
            save_png(duplicates_sheet(found, pictures_in, observer), sheet)
    if json:
        extra = {"sheet": sheet if is_drawn else None, "exit_code": int(ExitCode.DONE), "error": None}
        print_json(found.to_json() | extra)
    else:
        _print(found)
        if is_drawn and not quiet:
            print_line(f"sheet: {sheet}")
    return int(ExitCode.DONE)


def _print(found: Duplicates) -> None:
    for number, identical in enumerate(found.identical, 1):
        print_line(f"identical {number}: {counted(len(identical), 'file')}")
        for image in identical:
            print_line(f"          {image.key}")
    for number, group in enumerate(found.similar, 1):
        print_line(f"similar {number}: {counted(len(group), 'image')}")
        for member in group:
            size = f"{member.image.width} x {member.image.height}"
            print_line(f"  {member.similarity:.4f}  {member.image.key}  ({size})")
    groups = [f"{counted(len(found.identical), 'group')} of identical files"]
    if found.comparison is not None:
        groups.append(f"{counted(len(found.similar), 'group')} of similar images")
    print_line(f"{counted(found.images, 'image')}: {', '.join(groups)}; {counted(found.redundant, 'redundant image')}")
    if found.comparison is not None:
        print_line(_how(found.comparison))
    for note in found.notes:
        say(f"note: {note}")


def _how(comparison: ComparisonMethod) -> str:
    """Return one line that says how similar images were found."""
    by = f"compared by {comparison.space.words}, {comparison.how}"
    pictures = comparison.pictures
    if pictures is None:
        return f"{by}: {comparison.threshold:g} and more counts as similar; no picture was read"
    near = counted(pictures.same + pictures.different, "near pair")
    told = f"{by}; pictures of {near} were compared, {pictures.same:,} of them show the same"
    if pictures.unseen:
        unseen = counted(pictures.unseen, "pair")
        told += f"; {unseen} lacked a picture, and count as similar from a cosine of {comparison.threshold:g}"
    return told
