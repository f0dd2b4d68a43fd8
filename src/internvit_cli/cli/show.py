"""`internvit show`: pictures of tokens."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from internvit_cli.cli.completion import complete_keys
from internvit_cli.cli.console import one_line, print_json, print_line, say, write_raw
from internvit_cli.config import Graphics, TokenMapKind
from internvit_cli.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.use.show import Shown


def show_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards.")],
    keys: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Argument(metavar="KEY...", help="Images of it.", show_default=False, autocompletion=complete_keys),
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Where the PNGs go.")] = ".",
    maps: Annotated[
        Optional[list[TokenMapKind]],  # noqa: UP045
        typer.Option("--map", help="Draw this one only; may be repeated. (default: all there are)"),
    ] = None,
    point: Annotated[
        str | None, typer.Option(metavar="X,Y", help="Likeness to this place of the first picture, pixels.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Components of the foreground; the rest is dimmed.")
    ] = False,
    position: Annotated[
        bool, typer.Option(help="Leave in the tokens what they owe to their place in the tile.")
    ] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Plain cosines, the mean not taken off.")] = False,
    separate: Annotated[bool, typer.Option("--separate", help="A PNG for every map.")] = False,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of maps over the photograph.")] = 0.75,
    size: Annotated[int, typer.Option(min=100, max=4000, help="Longer side of a map, pixels.")] = 640,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal too.")] = False,
    graphics: Annotated[
        Optional[Graphics],  # noqa: UP045
        typer.Option(help="Of --terminal; named outright also where no terminal reads. (default: by terminal)"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print no names of files.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Draw the tokens of images over their photographs, as PNGs: tiles, principal components, lengths, likeness.

    Components, colours and limits are fitted to all named images together, so that they can be compared.

    Example: internvit show feats.h5 cat.jpg dog.jpg --point 320,240
    """
    if json and terminal:
        raise UsageError("--json and --terminal both write to standard output", "choose one")
    from internvit_cli.use.show import ShowOptions, show

    options = ShowOptions(
        path=path,
        keys=tuple(keys or ()),
        maps=tuple(maps or ()),
        point=None if point is None else parse_point(point),
        foreground=foreground,
        position=position,
        raw=raw,
        opacity=opacity,
        size=size,
    )
    chosen = _chosen_graphics(graphics) if terminal else None
    images: list[dict[str, Any]] = []
    for shown in show(options):
        written = _write(shown, output, separate=separate)
        for note in shown.notes:
            say(f"note: {note}")
        if chosen is not None:
            _draw(shown, chosen)
        if not (json or quiet):
            for file in written:
                print_line(file)
        images.append({"key": shown.key, "files": written, "notes": list(shown.notes)} | shown.facts)
    skipped = _skipped(options.keys, images)
    code = ExitCode.SKIPPED if skipped else ExitCode.DONE
    for key in skipped:
        say(f"note: {one_line(key)} has no features and is not drawn")
    if json:
        print_json({"path": path, "images": images, "skipped": skipped, "exit_code": int(code), "error": None})
    return int(code)


def parse_point(text: str) -> tuple[float, float]:
    """X and y of `--point 320,240`."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        x = y = float("nan")
    if not (x >= 0 and y >= 0):
        raise UsageError(f"--point {text}: not X,Y", "give pixels from the upper left corner, such as --point 320,240")
    return x, y


def _skipped(keys: Sequence[str], images: Sequence[dict[str, Any]]) -> list[str]:
    drawn = {image["key"] for image in images}
    return [key for key in dict.fromkeys(keys) if key not in drawn]


def _write(shown: Shown, folder: str, *, separate: bool) -> list[str]:
    """Write the figure, or each of its maps; returns the files' names."""
    from internvit_cli.draw.figure import figure
    from internvit_cli.use.show import file_name, save_png

    pictures = {file_name(shown.key): shown.figure}
    if separate:
        pictures = {file_name(shown.key, panel.name): figure(shown.key, panel.title, [panel]) for panel in shown.panels}
    paths = [os.path.join(folder, name) for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        save_png(picture, path)
    return paths


def _chosen_graphics(named: Graphics | None) -> Graphics:
    """How to draw in this terminal.

    Raises:
        UsageError: there is none, and no way to draw was named outright.
    """
    from internvit_cli.draw.terminal import detect

    if named is not None:
        return named
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        raise UsageError(
            "--terminal: standard output is no terminal", "name a way to draw all the same, such as --graphics blocks"
        )
    return detect(os.environ)


def _draw(shown: Shown, graphics: Graphics) -> None:
    """The whole figure, or where letters would not be legible, map after map with its title."""
    from internvit_cli.draw.terminal import render

    columns, pixels = _terminal_width()
    print_line(shown.key)
    if graphics is not Graphics.BLOCKS:
        write_raw(render(shown.figure, graphics, columns, pixels))
        return
    for panel in shown.panels:
        print_line("; ".join((panel.title, *panel.captions)))
        write_raw(render(panel.image, graphics, columns))


def _terminal_width() -> tuple[int, int]:
    """Characters and pixels across; 0 pixels where the terminal does not tell."""
    import fcntl
    import shutil
    import struct
    import termios

    columns = shutil.get_terminal_size().columns
    try:
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    except OSError:  # not a terminal, or not even a file
        return columns, 0
    return columns, int(struct.unpack("HHHH", size)[2])
