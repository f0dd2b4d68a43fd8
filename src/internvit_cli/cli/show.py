"""`internvit show`: draw the tokens of images."""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from internvit_cli.cli.completion import complete_keys
from internvit_cli.cli.console import print_json, print_line, printable_line, say, write_raw
from internvit_cli.cli.pictures import PicturesFolder
from internvit_cli.cli.progress import progress
from internvit_cli.cli.stored_layer import StoredLayer
from internvit_cli.cli.unfinished import found_output
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.config import Graphics, TokenMapKind
from internvit_cli.errors import ExitCode, UsageError
from internvit_cli.storage.output_names import check_folder_name

if TYPE_CHECKING:
    from internvit_cli.viz.show import FigureResult


def pixel(word: str) -> tuple[float, float]:
    """Parse a pixel, x and y, such as `320,240`."""
    try:
        x, y = (float(part) for part in word.split(","))
    except ValueError:
        x = y = math.nan
    if not (0 <= x < math.inf and 0 <= y < math.inf):
        raise UnusableWordError("X,Y", "give pixels from the upper left corner, such as 320,240")
    return x, y


def show_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards.")],
    keys: Annotated[
        Optional[list[str]],  # noqa: UP045 - Typer on Python 3.10 reads it
        typer.Argument(
            metavar="KEY...", help="Keys of images in OUT, or patterns such as '2024/*'.", autocompletion=complete_keys
        ),
    ] = None,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="Write the PNGs into DIR.")] = ".",
    maps: Annotated[
        Optional[list[TokenMapKind]],  # noqa: UP045
        typer.Option("--map", metavar="MAP", help="Draw this map.", show_default="all that the file allows"),
    ] = None,
    point: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="X,Y",
            help="Color every token by its similarity to the one at this pixel of the first picture.",
            parser=pixel,
        ),
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Fit the principal components to the foreground, and dim the rest.")
    ] = False,
    position: Annotated[
        bool, typer.Option(help="Keep the part of each token that depends only on its position in the tile.")
    ] = True,
    raw: Annotated[bool, typer.Option("--raw", help="Compare tokens without subtracting their mean.")] = False,
    separate: Annotated[bool, typer.Option("--separate", help="Write one PNG per map.")] = False,
    opacity: Annotated[
        float, typer.Option(min=0, max=1, help="Draw maps over the photograph with this opacity.")
    ] = 0.75,
    size: Annotated[
        int, typer.Option(min=100, max=4000, metavar="PIXELS", help="Draw maps with this longer side.")
    ] = 640,
    terminal: Annotated[bool, typer.Option("--terminal", help="Draw in the terminal too.")] = False,
    graphics: Annotated[
        Optional[Graphics],  # noqa: UP045
        typer.Option(
            metavar="PROTOCOL",
            help="Draw for --terminal in this way, even if standard output is not a terminal.",
            show_default="detected",
        ),
    ] = None,
    pictures_in: PicturesFolder = None,
    layer: StoredLayer = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Do not print the names of files.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Draw the tokens of images over their photographs.

    Each image becomes a PNG that shows its tiles, the principal components of its tokens as colors, the lengths of the
    tokens, and with --point their similarity to one of them. Components and color scales are fitted to all named images
    together, so that colors can be compared.

    Example: internvit show feats.h5 cat.jpg dog.jpg --point 320,240
    """
    if json and terminal:
        raise UsageError("--json and --terminal both write to standard output", "choose one")
    check_folder_name(output, "-o")
    from internvit_cli.viz.show import ShowOptions, show

    options = ShowOptions(
        path=found_output(path),
        keys=tuple(keys or ()),
        maps=tuple(maps or ()),
        point=point,
        foreground=foreground,
        position=position,
        raw=raw,
        opacity=opacity,
        size=size,
        pictures=pictures_in,
        layer=layer,
    )
    chosen = _chosen_graphics(graphics) if terminal else None
    images: list[dict[str, Any]] = []
    with progress(quiet=quiet) as observer:
        figures = show(options, observer)
        for note in figures.notes:
            say(f"note: {note}")
        for shown in figures:
            written = _write(shown, output, separate=separate)
            for note in shown.notes:
                say(f"note: {note}")
            if chosen is not None:
                _draw(shown, chosen)
            if not (json or quiet):
                for file in written:
                    print_line(file)
            images.append({"key": shown.key, "files": written, "notes": list(shown.notes)} | shown.facts)
    code = ExitCode.SKIPPED if figures.skipped else ExitCode.DONE
    for key in figures.skipped:
        say(f"note: {printable_line(key)} has no features and is not drawn")
    if json:
        facts = {"path": path, "images": images, "skipped": list(figures.skipped), "notes": list(figures.notes)}
        print_json(facts | {"exit_code": int(code), "error": None})
    return int(code)


def _write(shown: FigureResult, folder: str, *, separate: bool) -> list[str]:
    """Write the figure, or one file per map, and return the names of the files."""
    from internvit_cli.viz.draw.figure import figure
    from internvit_cli.viz.show import file_name, save_png

    pictures = {file_name(shown.key): shown.figure}
    if separate:
        pictures = {file_name(shown.key, panel.name): figure(shown.key, panel.title, [panel]) for panel in shown.panels}
    paths = [os.path.join(folder, name) for name in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        save_png(picture, path)
    return paths


def _chosen_graphics(named: Graphics | None) -> Graphics:
    """Return the way to draw in this terminal.

    Raises:
        UsageError: Standard output is not a terminal, and no way to draw was named.
    """
    from internvit_cli.viz.draw.terminal import detect

    if named is not None:
        return named
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        raise UsageError(
            "--terminal: standard output is not a terminal", "to draw anyway, name a way, such as --graphics blocks"
        )
    return detect(os.environ)


def _draw(shown: FigureResult, graphics: Graphics) -> None:
    """Draw the whole figure, or one map after the other if letters would not be legible."""
    from internvit_cli.viz.draw.terminal import render

    columns, pixels = _terminal_width()
    print_line(shown.key)
    if graphics is not Graphics.BLOCKS:
        write_raw(render(shown.figure, graphics, columns, pixels))
        return
    for panel in shown.panels:
        print_line("; ".join((panel.title, *panel.captions)))
        write_raw(render(panel.image, graphics, columns))


def _terminal_width() -> tuple[int, int]:
    """Return the width in characters and in pixels; 0 pixels if the terminal does not report them."""
    import fcntl
    import shutil
    import struct
    import termios

    columns = shutil.get_terminal_size().columns
    try:
        size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, bytes(8))
    except OSError:  # not a terminal, or no file descriptor
        return columns, 0
    return columns, int(struct.unpack("HHHH", size)[2])
