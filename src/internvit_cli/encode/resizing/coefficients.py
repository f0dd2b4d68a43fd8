"""Compute the fixed-point coefficients with which Pillow resizes 8-bit pictures by its bicubic filter.

Source: `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow, src/libImaging/Resample.c. All arithmetic is that of
C doubles in the same order, because a coefficient that is off by one changes pixels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRECISION_BITS = 22
"""Coefficients are integers, in units of 2 ** -22."""
_SUPPORT = 2.0
"""Pixels on each side that the bicubic filter weighs when a picture is enlarged."""
_A = -0.5
"""The parameter of the bicubic filter in Pillow."""


def taps(size: int, target: int) -> int:
    """Return how many pixels at most have a weight in one resized pixel.

    Args:
        size: Pixels along the axis before.
        target: Pixels along the axis afterwards.
    """
    return math.ceil(_SUPPORT * max(size / target, 1.0)) * 2 + 1


@lru_cache(maxsize=256)
def coefficients(size: int, target: int) -> NDArray[np.int32]:
    """Return the weights of one axis, int32 [target, 1 + taps]. It is shared and must not be changed.

    The first column is the first pixel that has a weight, and the others are the weights of that pixel and those after
    it, in units of 2 ** -22. Weights of pixels beyond the picture are 0.

    Args:
        size: Pixels along the axis before, at least 1.
        target: Pixels along the axis afterwards, at least 1.
    """
    scale = size / target
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    center = (np.arange(target) + 0.5) * scale
    # Casts in C truncate towards zero, and so does astype.
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), size) - first
    pixels = np.arange(taps(size, target))
    weights = _bicubic((pixels + first[:, None] - center[:, None] + 0.5) * (1.0 / filter_scale))
    weights[pixels >= count[:, None]] = 0.0
    total = np.cumsum(weights, axis=1)[:, -1:]  # one after the other; np.sum would add in pairs and round differently
    weights = np.divide(weights, total, out=weights, where=total != 0.0)
    scaled = weights * (1 << PRECISION_BITS)
    table = np.empty((target, 1 + len(pixels)), np.int32)
    table[:, 0] = first
    table[:, 1:] = np.where(scaled < 0, scaled - 0.5, scaled + 0.5)
    return table


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((_A + 2.0) * x - (_A + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * _A
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
