"""The principal components of sampled images' tokens, one pixel a token, to be laid over their photographs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from internvit_cli.config import Tokens
from internvit_cli.viz.maps import TokenMap, fit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from internvit_cli.storage.read.image import ImageFeatures


@dataclass(frozen=True, slots=True)
class TokenMapImage:
    """One image's tokens as colors."""

    png: bytes
    """One pixel a token."""
    box: tuple[float, float, float, float]
    """Where it lies on the photograph: left, top, width, height as shares of it."""


@dataclass(frozen=True, slots=True)
class TokenMaps:
    """Maps of several images in the same colors."""

    maps: tuple[TokenMapImage, ...]
    explained: tuple[float, ...]
    """Shares of the variance that red, green and blue stand for."""


def draw_token_maps(images: Sequence[ImageFeatures], on_progress: Callable[[int], None] = lambda _: None) -> TokenMaps:
    """Fit the components to all the images together, and draw each; one image's tokens are in memory at a time.

    Args:
        images: that have features; without tokens there are no maps.
        on_progress: called with the number of images that are drawn.
    """
    if not images or images[0].recipe.tokens is Tokens.NONE:
        return TokenMaps((), ())
    fitted = fit((TokenMap.of(image.token_map()) for image in images), len(images))
    maps = []
    for number, image in enumerate(images, 1):
        stream = io.BytesIO()
        Image.fromarray(fitted.colors(TokenMap.of(image.token_map()))).save(stream, "PNG", optimize=True)
        maps.append(TokenMapImage(stream.getvalue(), _shares(image)))
        on_progress(number)
    return TokenMaps(tuple(maps), fitted.explained)


def _shares(image: ImageFeatures) -> tuple[float, float, float, float]:
    left, top, right, bottom = image.covered
    width, height = image.width, image.height
    return left / width, top / height, (right - left) / width, (bottom - top) / height
