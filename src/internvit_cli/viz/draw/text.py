"""Write text into pictures, in the font that comes with Pillow."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from internvit_cli.errors import one_line

if TYPE_CHECKING:
    from internvit_cli.viz.draw.palette import Color

INK: Color = (34, 34, 34)
FAINT: Color = (110, 110, 110)
PAPER: Color = (255, 255, 255)
ELLIPSIS = "..."
SPACE = 0.32
"""Width of a space relative to the font size; the font's own, 3 pixels at sizes up to 16, is hardly visible."""


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's font in a size in pixels, or its small fixed font if Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except ImportError:
        return ImageFont.load_default()


def drawable(text: str) -> str:
    """Return a text on one line, with characters outside ASCII escaped, because Pillow's font lacks them."""
    return one_line(text, limit=None).encode("ascii", "backslashreplace").decode("ascii")


def text_width(text: str, size: int) -> float:
    """Return the width of a text in pixels."""
    return _set(drawable(text), size)[1]


def _set(text: str, size: int) -> tuple[list[tuple[str, float]], float]:
    """Return the words of a text with their positions, and its width."""
    words, left = [], 0.0
    for word in text.split(" "):
        words.append((word, left))
        left += float(font(size).getlength(word)) + round(SPACE * size)
    return words, left - round(SPACE * size)


def line_height(size: int) -> int:
    """Return the distance between lines in pixels."""
    return round(size * 1.35)


def shortened_to_width(text: str, size: int, width: float) -> str:
    """Return a text, shortened in the middle if it does not fit, because the end of a key identifies it."""
    text = drawable(text)
    if text_width(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        head = kept // 3
        shortened = text[:head] + ELLIPSIS + text[len(text) - (kept - head) :]
        if text_width(shortened, size) <= width:
            return shortened
    return ""


def wrap_text(text: str, size: int, width: float) -> list[str]:
    """Break a text into lines that fit, between words where possible."""
    lines = [""]
    for word in drawable(text).split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if text_width(joined, size) <= width:
            lines[-1] = joined
            continue
        lines += [""] * bool(lines[-1])
        for letter in word:
            if lines[-1] and text_width(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def write_line(image: Image.Image, place: tuple[float, float], text: str, size: int, color: Color = INK) -> None:
    """Write one line with its upper left corner at a position."""
    draw = ImageDraw.Draw(image)
    for word, left in _set(drawable(text), size)[0]:
        draw.text((place[0] + left, place[1]), word, fill=color, font=font(size))


def write_outlined(image: Image.Image, place: tuple[float, float], text: str, size: int) -> None:
    """Write white letters with a dark edge, which are legible on any picture."""
    draw, chosen = ImageDraw.Draw(image), font(size)
    edge = 1 if isinstance(chosen, ImageFont.FreeTypeFont) else 0
    draw.text(place, drawable(text), fill=PAPER, font=chosen, stroke_width=edge, stroke_fill=INK)
