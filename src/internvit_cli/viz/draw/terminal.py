"""Draw pictures in a terminal with kitty's or iTerm2's protocol, sixels, or half blocks in 24-bit color."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from internvit_cli.config import Graphics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

ESCAPE = "\x1b"
STRING_END = f"{ESCAPE}\\"
KITTY_CHUNK = 4096
SIXEL_COLORS = 255
CELL_WIDTH = 10
"""Pixels per character if the terminal does not report them; sharp enough on most."""


def detect(environment: Mapping[str, str]) -> Graphics:
    """Return the protocol of a terminal from its environment; half blocks if it is unknown or within a multiplexer."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux")) or "TMUX" in environment or "STY" in environment:
        return Graphics.BLOCKS
    if "KITTY_WINDOW_ID" in environment or "kitty" in term or "ghostty" in {term.removeprefix("xterm-"), program}:
        return Graphics.KITTY
    if program in {"iTerm.app", "WezTerm", "mintty"}:
        return Graphics.ITERM2
    if term.startswith(("foot", "mlterm", "contour", "yaft")):
        return Graphics.SIXEL
    return Graphics.BLOCKS


def render(image: Image.Image, graphics: Graphics, columns: int, pixel_width: int = 0) -> str:
    """Return a picture as text for a terminal, ending with a newline.

    Args:
        image: The picture in RGB.
        graphics: The protocol.
        columns: The largest width in characters.
        pixel_width: The width of all columns in pixels; 0 if the terminal does not report it.
    """
    if graphics is Graphics.BLOCKS:
        return _blocks(_within(image, columns))
    fitted = _within(image, pixel_width or columns * CELL_WIDTH)
    if graphics is Graphics.SIXEL:
        return _sixel(fitted)
    encoded = _png(fitted)
    return _kitty(encoded) if graphics is Graphics.KITTY else _iterm2(encoded)


def _within(image: Image.Image, width: int) -> Image.Image:
    if image.width <= width:
        return image
    return image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.BOX)


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue())


def _kitty(encoded: bytes) -> str:
    """Return a PNG that is transmitted and shown (a=T) in pieces, without an answer of the terminal (q=2)."""
    pieces = [encoded[start : start + KITTY_CHUNK].decode() for start in range(0, len(encoded), KITTY_CHUNK)]
    text = []
    for number, piece in enumerate(pieces):
        control = "a=T,f=100,q=2," if number == 0 else ""
        text.append(f"{ESCAPE}_G{control}m={int(number < len(pieces) - 1)};{piece}{STRING_END}")
    return "".join(text) + "\n"


def _iterm2(encoded: bytes) -> str:
    return f"{ESCAPE}]1337;File=inline=1;size={len(encoded) * 3 // 4}:{encoded.decode()}\a\n"


def _blocks(image: Image.Image) -> str:
    """Return two pixels per character: the upper half as foreground, the lower half as background."""
    pixels = np.asarray(image.convert("RGB"))
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = (
            f"{ESCAPE}[38;2;{above[0]};{above[1]};{above[2]};48;2;{below[0]};{below[1]};{below[2]}m\u2580"
            for above, below in zip(upper, lower, strict=True)
        )
        lines.append("".join(cells) + f"{ESCAPE}[0m")
    return "\n".join(lines) + "\n"


def _sixel(image: Image.Image) -> str:
    """Return the picture as sixels: bands of six rows, color by color."""
    indexed = image.quantize(SIXEL_COLORS)
    palette = np.array(indexed.getpalette() or [], np.int64).reshape(-1, 3)
    pixels = np.asarray(indexed)
    height, width = pixels.shape
    text = [f'{ESCAPE}Pq"1;1;{width};{height}']
    text += [f"#{number};2;" + ";".join(str(round(part * 100 / 255)) for part in c) for number, c in enumerate(palette)]
    for top in range(0, height, 6):
        band = pixels[top : top + 6]
        rows = [f"#{color}{_sixel_row(band == color)}" for color in np.unique(band).tolist()]
        text.append("$".join(rows) + "-")
    return "".join(text) + STRING_END + "\n"


def _sixel_row(is_color: NDArray[Any]) -> str:
    """Return one color of a band, [up to 6, width] bool, with six pixels per character, run-length encoded."""
    bits = (is_color * (1 << np.arange(len(is_color)))[:, None]).sum(axis=0) + 63
    starts = np.flatnonzero(np.diff(bits, prepend=-1))
    lengths = np.diff(starts, append=len(bits))
    runs = zip(bits[starts].tolist(), lengths.tolist(), strict=True)
    return "".join(f"!{length}{chr(bit)}" if length > 3 else chr(bit) * length for bit, length in runs)
