"""`internvit ls`: list the keys of an output."""

from __future__ import annotations

import json as json_module
import os
import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from internvit_cli.cli.completion import complete_keys
from internvit_cli.cli.console import fail, printable_line, write_names, write_raw
from internvit_cli.cli.unfinished import found_output
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.config import Status
from internvit_cli.errors import ExitCode, InternvitError
from internvit_cli.runtime.words import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from internvit_cli.commands.ls import ListedImage

AT_ONCE = 1000
"""Number of images that are written together."""
STATUSES = {
    "done": frozenset({Status.DONE}),
    "pending": frozenset({Status.PENDING}),
    "skipped": frozenset(Status) - {Status.DONE, Status.PENDING},
    **{status.word: frozenset({status}) for status in Status},
}


def statuses(word: str) -> frozenset[Status]:
    """Parse one or more statuses separated by commas: done, pending, skipped, or a reason."""
    names = word.split(",")
    for name in names:
        if name not in STATUSES:
            raise UnusableWordError(f"one of {', '.join(STATUSES)}", did_you_mean(name, STATUSES))
    return frozenset().union(*(STATUSES[name] for name in names))


def ls_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file, a .partial one, or a folder of shards.")],
    words: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Argument(
            metavar="PATTERN...",
            help="Keys, or patterns of keys in quotes; without one, all images are listed.",
            autocompletion=complete_keys,
        ),
    ] = None,
    status: Annotated[
        Optional[list[frozenset[Status]]],  # noqa: UP045
        typer.Option(
            metavar="STATUS",
            help="List only images with this status: done, skipped, pending, or a reason such as truncated.",
            parser=statuses,
            autocompletion=lambda incomplete: [word for word in STATUSES if word.startswith(incomplete)],
        ),
    ] = None,
    long: Annotated[
        bool, typer.Option("-l", "--long", help="Show the status, the grid and the tiles of each image too.")
    ] = False,
    null: Annotated[bool, typer.Option("-0", "--null", help="End each line with NUL instead of a newline.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """List the keys of an output.

    In a pattern, * matches any characters except a slash, ? matches one of them, [a-z] one character of the range, and
    [!a-z] one that is not in it. Between slashes, ** matches any number of folders; at the end, it matches everything
    in them. If a key itself contains such characters, it is matched literally. Unfinished outputs can be listed too.

    Example: internvit ls feats.h5 '2024/**' --status skipped
    """
    from internvit_cli.commands.ls import ImageListing, ListOptions

    wanted = frozenset().union(*status) if status else frozenset(Status)
    path = found_output(path)
    listing = ImageListing(ListOptions(path, tuple(words or ()), wanted))
    if json:
        return _write_json(path, listing)
    print_images(listing, long=long, null=null)
    return int(ExitCode.DONE)


def print_images(listing: Iterable[ListedImage], *, long: bool, null: bool = False) -> None:
    """Print one line per image, until nobody reads any more."""
    end = "\0" if null else "\n"
    for images in _chunks(listing):
        if not write_names("".join(_line(image, long=long) + end for image in images)):
            break


def _line(image: ListedImage, *, long: bool) -> str:
    key = os.fsdecode(image.key)
    key = printable_line(key) if sys.stdout.isatty() else key  # a program gets the bytes of the name
    if not long:
        return key
    return f"{image.status.word:<13} {f'{image.columns}x{image.rows}':>7} {image.tiles:>4}  {key}"


def _write_json(path: str, listing: Iterable[ListedImage]) -> int:
    """Write one JSON object while the images are read, with an error at its end if reading fails."""
    count, code = 0, ExitCode.DONE
    problem: dict[str, str | None] = {"error": None}
    write_raw(f'{{"path": {json_module.dumps(path)}, "images": [')
    try:
        for images in _chunks(listing):
            for image in images:
                write_raw((", " if count else "") + json_module.dumps(image.to_json()))
                count += 1
    except InternvitError as error:
        fail(error)
        code, problem = error.exit_code, {"error": error.message, "hint": error.hint}
    end = {"count": count, "exit_code": int(code)} | problem
    write_raw(f"], {json_module.dumps(end)[1:]}\n")
    return int(code)


def _chunks(images: Iterable[ListedImage]) -> Iterator[list[ListedImage]]:
    """Yield lists of images; if reading fails, the images read so far are yielded first."""
    chunk: list[ListedImage] = []
    try:
        for image in images:
            chunk.append(image)
            if len(chunk) == AT_ONCE:
                yield chunk
                chunk = []
    except InternvitError:
        yield chunk
        raise
    yield chunk
