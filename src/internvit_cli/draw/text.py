"""Text in pictures, in the font that Pillow brings along."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from internvit_cli.errors import one_line

if TYPE_CHECKING:
    from internvit_cli.draw.palette import Color

INK: Color = (34, 34, 34)
FAINT: Color = (110, 110, 110)
PAPER: Color = (255, 255, 255)
ELLIPSIS = "..."


@lru_cache(maxsize=16)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, of so many pixels; one fixed small size where Pillow was built without FreeType."""
    try:
        return ImageFont.load_default(size)
    except ImportError:
        return ImageFont.load_default()


def drawable(text: str) -> str:
    """The text on one line; what Pillow's font has no letters for, all beyond ASCII, is written out."""
    return one_line(text, limit=None).encode("ascii", "backslashreplace").decode("ascii")


def text_width(text: str, size: int) -> float:
    """Pixels that a text takes from left to right."""
    return float(font(size).getlength(drawable(text)))


def line_height(size: int) -> int:
    """Pixels from one line to the next."""
    return round(size * 1.35)


def fitted(text: str, size: int, width: float) -> str:
    """The text, or so much of its beginning and its end as fits; what tells keys apart is at their end."""
    text = drawable(text)
    if text_width(text, size) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        head = kept // 3
        shortened = text[:head] + ELLIPSIS + text[len(text) - (kept - head) :]
        if text_width(shortened, size) <= width:
            return shortened
    return ""


def write(image: Image.Image, place: tuple[float, float], text: str, size: int, color: Color = INK) -> None:
    """Write one line, its upper left corner at a place."""
    ImageDraw.Draw(image).text(place, drawable(text), fill=color, font=font(size))


def write_outlined(image: Image.Image, place: tuple[float, float], text: str, size: int) -> None:
    """White letters with a dark edge, legible on any picture."""
    draw, chosen = ImageDraw.Draw(image), font(size)
    edge = 1 if isinstance(chosen, ImageFont.FreeTypeFont) else 0
    draw.text(place, drawable(text), fill=PAPER, font=chosen, stroke_width=edge, stroke_fill=INK)
