"""Convert tiles to patches, and hidden states to stored tokens, in Triton.

Shapes use the letters of vit.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit_cli.config import PATCH_SIZE, TokenOrder
from internvit_cli.model.kernels.interface import StoredTokens, StorePlan
from internvit_cli.model.kernels.plain import PATCH_VALUES

_P = tl.constexpr(PATCH_SIZE)
_PATCH_VALUES = tl.constexpr(PATCH_VALUES)
_PATCH_BLOCK = tl.constexpr(1024)

STORE_ROWS = 32
"""Rows per program of `store`; their sums and extremes are joined afterwards, always in the same order."""
_STEP = 4
_STORE_BLOCK = 512
_ORDERS = {None: 0, TokenOrder.V1: 1, TokenOrder.V2: 2}


@triton.jit
def _patches(tiles: tl.tensor, out: tl.tensor, side: tl.tensor, COLUMNS: tl.constexpr) -> None:
    """Copy a patch of a tile."""
    row = tl.program_id(0).to(tl.int64)
    tile, patch = row // (side * side), row % (side * side)
    values = tl.arange(0, _PATCH_BLOCK)
    line, rest = values // (3 * _P), values % (3 * _P)
    stride = side * (3 * _P)  # bytes per line of the tile
    corner = tile * (side * _P * stride) + patch // side * (_P * stride) + patch % side * (3 * _P)
    inside = values < _PATCH_VALUES
    pixels = tl.load(tiles + corner + line * stride + rest, mask=inside, other=0).to(tl.float32) - 128.0
    # Masked bytes of a word that is read in part hold whatever the card makes of them; columns beyond are zeros.
    pixels = tl.where(inside, pixels, 0.0)
    tl.store(out + row * COLUMNS + values, pixels.to(out.dtype.element_ty), mask=values < COLUMNS)


@triton.jit
def _store(
    rows: tl.tensor,
    tokens: tl.tensor,
    sums: tl.tensor,
    extremes: tl.tensor,
    clamped: tl.tensor,
    count: tl.tensor,
    tile_stride: tl.tensor,
    width: tl.tensor,
    side: tl.tensor,
    largest: tl.tensor,
    infinite_from: tl.tensor,
    ORDER: tl.constexpr,
    CLAMP: tl.constexpr,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Store some rows and columns of a tile, and compute their sums and extremes."""
    chunks, blocks = tl.cdiv(count, ROWS), tl.num_programs(1)
    tile, chunk = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([STEP, BLOCK], tl.float32)
    low = tl.full([STEP, BLOCK], float("inf"), tl.float32)
    high = tl.full([STEP, BLOCK], float("-inf"), tl.float32)
    nans = tl.zeros([STEP, BLOCK], tl.int32)
    beyond = tl.zeros([STEP, BLOCK], tl.int32)
    for start in range(0, ROWS, STEP):
        row = chunk * ROWS + start + tl.arange(0, STEP)
        inside = (row < count)[:, None] & (columns < width)[None, :]
        at = rows + tile * tile_stride + row[:, None] * width + columns[None, :]
        value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if MEAN:
            total += value
        low = tl.minimum(low, tl.where(inside, value, float("inf")))  # both functions ignore NaN
        high = tl.maximum(high, tl.where(inside, value, float("-inf")))
        nans += (value != value).to(tl.int32)
        if CLAMP:
            beyond += (tl.abs(value) >= infinite_from).to(tl.int32)
            value = tl.where(value > largest, largest, value)
            value = tl.where(value < -largest, -largest, value)
        place = row
        if ORDER != 0:
            y, x = row // side, row % side
            token = (x // 2) * (side // 2) + y // 2 if ORDER == 1 else (y // 2) * (side // 2) + x // 2
            place = 4 * token + 2 * (y % 2) + x % 2
        target = tokens + tile * count * width + place[:, None] * width + columns[None, :]
        tl.store(target, value.to(tokens.dtype.element_ty), mask=inside)

    if MEAN:
        at = sums + (tile * chunks + chunk) * width + columns
        tl.store(at, tl.sum(total, axis=0), mask=columns < width)
    part = (tile * chunks + chunk) * blocks + tl.program_id(1)
    is_nan = tl.sum(tl.sum(nans, axis=1), axis=0) > 0
    tl.store(extremes + 2 * part, tl.where(is_nan, float("nan"), tl.min(tl.min(low, axis=1), axis=0)))
    tl.store(extremes + 2 * part + 1, tl.where(is_nan, float("nan"), tl.max(tl.max(high, axis=1), axis=0)))
    if CLAMP:
        tl.store(clamped + part, tl.sum(tl.sum(beyond, axis=1), axis=0))


def patches(tiles: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """See `Kernels.patches`; `columns` is at most 1024."""
    B, side = len(tiles), tiles.shape[1] // PATCH_SIZE
    out = torch.empty((B, side * side, columns), dtype=dtype, device=tiles.device)
    _patches[(B * side * side,)](tiles.contiguous(), out, side, COLUMNS=columns, num_warps=4, enable_fp_fusion=True)
    return out


def store(values: Tensor, plan: StorePlan) -> StoredTokens:
    """See `Kernels.store`; makes one pass over the values, and joins the sums and extremes of the programs."""
    B, n, C = values.shape
    chunks, block = triton.cdiv(n, STORE_ROWS), min(triton.next_power_of_2(C), _STORE_BLOCK)
    blocks = triton.cdiv(C, block)
    tokens = values.new_empty((B, plan.tokens, plan.token_size), dtype=plan.dtype)
    sums = values.new_empty((B, chunks, C) if plan.mean else (1,), dtype=torch.float32)
    extremes = values.new_empty((B, chunks * blocks, 2), dtype=torch.float32)
    clamped = values.new_zeros((B, chunks * blocks), dtype=torch.int32)
    _store[(B * chunks, blocks)](
        values,
        tokens,
        sums,
        extremes,
        clamped,
        n,
        values.stride(0),
        C,
        math.isqrt(n),
        torch.finfo(plan.dtype).max,
        plan.infinite_from,
        ORDER=_ORDERS[plan.order],
        CLAMP=plan.clamp,
        MEAN=plan.mean,
        ROWS=STORE_ROWS,
        STEP=_STEP,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    mean = sums.sum(dim=1) / n if plan.mean else None
    joined = torch.stack((extremes[..., 0].amin(dim=1), extremes[..., 1].amax(dim=1)), dim=1)  # NaN wins
    return StoredTokens(tokens, mean, joined, clamped.sum(dim=1))
