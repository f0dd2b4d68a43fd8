"""Resize pictures along one axis in PyTorch, and choose the fastest way on a device that gives the same pixels.

Shapes: a pass reads [outer,n,inner] and writes [outer,m,inner]. For the horizontal pass of a picture [H,W,3], outer is
H and inner is 3; for the vertical pass, outer is 1 and inner is 3 W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from internvit_cli.encode.resizing.coefficients import PRECISION_BITS, coefficients
from internvit_cli.errors import one_line

Pass: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""uint8 [outer,n,inner], int32 [m,1 + taps] from `coefficients` -> uint8 [outer,m,inner]."""

HALF = 1 << (PRECISION_BITS - 1)
"""Added before the shift, which so rounds to the nearest value."""
PROBES = ((1, 1, 448), (37, 5, 14), (5, 640, 448), (3, 1000, 61))
"""Sizes with which a pass is tried: lines, and pixels before and afterwards."""


def plain_pass(pixels: Tensor, table: Tensor) -> Tensor:
    """See `Pass`; one operation per tap, on any device."""
    first, weights = table[:, 0].long(), table[:, 1:]
    total = pixels.new_full((pixels.shape[0], len(table), pixels.shape[2]), HALF, dtype=torch.int32)
    for tap in range(weights.shape[1]):
        read = (first + tap).clamp(max=pixels.shape[1] - 1)  # beyond the picture, the weight is 0
        total += pixels.index_select(1, read).int() * weights[:, tap, None]
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


def table_on(device: torch.device, size: int, target: int) -> Tensor:
    """Return the coefficients of an axis on a device, int32 [target,1 + taps]."""
    return torch.from_numpy(coefficients(size, target)).to(device, non_blocking=True)


def choose_pass(device: torch.device) -> tuple[Pass, str]:
    """Return the fastest pass that works on a device, and why it is not Triton's on a CUDA device; usually empty."""
    if device.type != "cuda":
        return plain_pass, ""
    try:
        from internvit_cli.encode.resizing.triton_pass import triton_pass

        problem = difference(triton_pass, device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:  # noqa: BLE001 -- compilers, drivers and linkers fail with classes of their own
        problem = one_line(str(failure), 200) or type(failure).__name__
    return (plain_pass, problem) if problem else (triton_pass, "")


def difference(candidate: Pass, device: torch.device) -> str:
    """Return in which case a pass differs from the plain one; empty if it never does."""
    generator = torch.Generator().manual_seed(0)
    for lines, size, target in PROBES:
        picture = torch.randint(0, 2, (lines, size, 3), generator=generator, dtype=torch.uint8) * 255
        for pixels in (picture.to(device), picture.to(device).view(1, lines, 3 * size)):
            table = table_on(device, pixels.shape[1], target)
            if not torch.equal(candidate(pixels, table), plain_pass(pixels, table)):
                return f"differs for {pixels.shape[1]} pixels to {target}"
    return ""
