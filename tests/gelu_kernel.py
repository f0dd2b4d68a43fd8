"""A kernel that gives only the GELU of Triton's kernels, in float32, which otherwise never leaves the registers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from internvit_cli.model.kernels.triton_norms import _gelu

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1024


@triton.jit
def _gelu_of(x: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, _gelu(tl.load(x + at, mask=at < count, other=0.0)), mask=at < count)


def gelu(x: Tensor) -> Tensor:
    """Return the GELU of float32 numbers [n]."""
    out = x.new_empty(x.shape)
    _gelu_of[(-(-len(x) // BLOCK),)](x, out, len(x), BLOCK=BLOCK)
    return out
