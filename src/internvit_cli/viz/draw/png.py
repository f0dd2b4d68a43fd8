"""Encode figures and sheets as PNG files with internvit's mark."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL.PngImagePlugin import PngInfo

from internvit_cli.config import DRAWN_BY

if TYPE_CHECKING:
    from PIL import Image


def encode_png(image: Image.Image) -> bytes:
    """Return a drawing as a PNG file with the mark at the position that planning checks (`plan/headers`)."""
    mark, stream = PngInfo(), io.BytesIO()
    mark.add_text(*DRAWN_BY)
    image.save(stream, "PNG", optimize=False, pnginfo=mark, icc_profile=None)
    return stream.getvalue()
