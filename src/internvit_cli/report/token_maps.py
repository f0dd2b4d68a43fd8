"""Draw the principal components of sampled images' tokens with one pixel per token, to lay over photographs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from internvit_cli.config import Tokens
from internvit_cli.viz.maps import TokenMap, fit_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from internvit_cli.storage.read.image import ImageFeatures


@dataclass(frozen=True, slots=True)
class TokenMapImage:
    """The tokens of an image as colors."""

    png: bytes
    """The picture, with one pixel per token."""
    box: tuple[float, float, float, float]
    """Its area on the photograph: left, top, width and height, relative to the photograph."""


@dataclass(frozen=True, slots=True)
class TokenMaps:
    """The maps of several images in the same colors."""

    maps: tuple[TokenMapImage, ...]
    explained: tuple[float, ...]
    """The shares of the variance of red, green and blue."""


def draw_token_maps(images: Sequence[ImageFeatures], on_progress: Callable[[int], None] = lambda _: None) -> TokenMaps:
    """Fit the components to all images together, and draw each map, with the tokens of one image in memory at a time.

    Args:
        images: Images with features; without tokens there are no maps.
        on_progress: Called with the number of drawn images.
    """
    if not images or images[0].recipe.tokens is Tokens.NONE:
        return TokenMaps((), ())
    fitted = fit_maps((TokenMap.of(image.token_map()) for image in images), len(images))
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
