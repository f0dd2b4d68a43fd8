"""Pixel unshuffle: turn each 2 x 2 neighborhood of patch tokens into one visual token.

Shapes use the letters of vit.py.
"""

# ruff: noqa: N806  (shape letters)

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from internvit_cli.config import TokenOrder

if TYPE_CHECKING:
    from torch import Tensor


def unshuffle_view(patch_tokens: Tensor, order: TokenOrder) -> Tensor:
    """Return patch tokens of square tiles [B,N,C] as a view [B,h/2,w/2,2,2,C] of 2 x 2 neighborhoods.

    Args:
        patch_tokens: The tokens row by row, without the class token; N is the square of an even number.
        order: The order of the neighborhoods.
    """
    B, N, C = patch_tokens.shape
    side = math.isqrt(N)
    if side * side != N or side % 2:
        raise ValueError(f"{N} patches have no pixel unshuffle: {N} is not the square of an even number")
    x = patch_tokens.reshape(B, side // 2, 2, side // 2, 2, C)  # [B,h/2,2,w/2,2,C], a view
    rows, columns = (1, 3) if order is TokenOrder.V2 else (3, 1)
    return x.permute(0, rows, columns, 2, 4, 5)


def pixel_unshuffle(patch_tokens: Tensor, order: TokenOrder) -> Tensor:
    """Turn patch tokens [B,N,C] into visual tokens [B,N/4,4C], in the order (0,0), (0,1), (1,0), (1,1)."""
    return unshuffle_view(patch_tokens, order).flatten(3).flatten(1, 2)
