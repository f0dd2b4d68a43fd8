"""The picture behind a row of features, if it is still there."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from internvit_cli.config import DEFAULT_MAX_PIXELS, PixelRule, Skipped
from internvit_cli.decode.direct import NO_DIGEST, upright_rgb
from internvit_cli.decode.files import classify, open_regular, pillow_limits, readable_formats

if TYPE_CHECKING:
    from internvit_cli.storage.image import ImageFeatures


@dataclass(frozen=True, slots=True)
class Photograph:
    """A picture to look at, or why there is none."""

    picture: Image.Image | None
    """RGB, upright as it was when it was encoded; at most as large as was asked for."""
    problem: str = ""
    """What is the matter with it, such as `it changed since it was encoded`; empty when nothing is."""


def load_photograph(image: ImageFeatures, side: int) -> Photograph:
    """Read an image's picture, turned as its row says.

    Args:
        image: the row.
        side: the longer side wanted, pixels; a smaller picture stays as it is.
    """
    if image.path is None:
        return Photograph(None, "it never was a file")
    opened = open_regular(os.fsencode(image.path))
    if isinstance(opened, Skipped):
        return Photograph(None, f"{image.path} cannot be read: {opened.message}")
    with os.fdopen(opened.descriptor, "rb") as file:
        try:
            data = file.read()
        except OSError as error:
            return Photograph(None, f"{image.path} cannot be read: {error.strerror}")
    is_changed = image.digest not in {NO_DIGEST, hashlib.sha256(data).digest()}
    picture = _decode(data, image, side)
    if isinstance(picture, Skipped):
        return Photograph(None, f"{image.path} cannot be read: {picture.message}")
    if picture is None:
        return Photograph(None, f"{image.path} has another size than when it was encoded")
    return Photograph(picture, f"{image.path} changed since it was encoded" if is_changed else "")


def _decode(data: bytes, image: ImageFeatures, side: int) -> Image.Image | Skipped | None:
    """The upright picture; None when it cannot be the one that was encoded."""
    rule = PixelRule(background=image.recipe.background)
    try:
        with (
            pillow_limits(max(DEFAULT_MAX_PIXELS, image.width * image.height)),
            Image.open(io.BytesIO(data), formats=readable_formats()) as opened,
        ):
            turned = (image.height, image.width) if image.orientation >= 5 else (image.width, image.height)
            if opened.size != turned:
                return None
            opened.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded no larger than needed
            opened.load()
            picture = upright_rgb(opened, image.orientation, rule)
            picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=2.0)
            return picture
    except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
        return classify(error)
