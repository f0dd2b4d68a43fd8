"""Resize pictures along one axis in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit_cli.encode.resizing.coefficients import PRECISION_BITS
from internvit_cli.encode.resizing.passes import HALF

_BITS = tl.constexpr(PRECISION_BITS)
_HALF = tl.constexpr(HALF)
BLOCK = 512
"""Bytes that a program writes, consecutive ones, whose inputs lie close together too."""


# Sizes differ from picture to picture, and must not have the kernel compiled anew.
@triton.jit(do_not_specialize=["count", "size", "target", "inner", "taps"])
def _resize(
    pixels: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    target: tl.tensor,
    inner: tl.tensor,
    taps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write a block of bytes; each is a weighted sum of `taps` pixels that are `inner` bytes apart."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    line = place // inner
    row = table + (line % target) * (1 + taps)
    first = tl.load(row, mask=inside, other=0)
    source = pixels + (line // target) * size * inner + place % inner
    total = tl.full([BLOCK], _HALF, tl.int32)
    for tap in range(taps):
        weight = tl.load(row + 1 + tap, mask=inside, other=0)
        read = tl.minimum(first + tap, size - 1).to(tl.int64)
        total += tl.load(source + read * inner, mask=inside, other=0).to(tl.int32) * weight
    value = tl.minimum(tl.maximum(total >> _BITS, 0), 255)
    tl.store(out + place, value.to(tl.uint8), mask=inside)


def triton_pass(pixels: Tensor, table: Tensor) -> Tensor:
    """See `passes.Pass`."""
    outer, size, inner = pixels.shape
    target, columns = table.shape
    out = torch.empty((outer, target, inner), dtype=torch.uint8, device=pixels.device)
    grid = (triton.cdiv(out.numel(), BLOCK),)
    _resize[grid](
        pixels.contiguous(),
        table.contiguous(),
        out,
        out.numel(),
        size,
        target,
        inner,
        columns - 1,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
