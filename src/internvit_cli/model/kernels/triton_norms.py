"""Compute residual, LayerScale and the next norm in one pass over rows in Triton, with rows in fp8 if needed.

A program holds one whole row in registers. Row numbers have 64 bits, because a large batch has more than 2**31 values.
Triton compiles only for the sizes that a model fixes; the number of rows is only in the grid.

Shapes use the letters of vit.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from internvit_cli.model.kernels.fp8 import FP8, LARGEST_FP8, SMALLEST_ROW
from internvit_cli.model.kernels.interface import Norm, QuantizedRows, Rows

_LARGEST_FP8 = tl.constexpr(LARGEST_FP8)
_SMALLEST_ROW = tl.constexpr(SMALLEST_ROW)


@triton.jit
def _normed(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    CENTERED: tl.constexpr,
) -> tl.tensor:
    """Return LayerNorm (CENTERED) or RMSNorm of a row in float32; columns beyond `width` are 0 and stay 0."""
    inside = columns < width
    if CENTERED:
        x = tl.where(inside, x - tl.sum(x, axis=0) / width, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    x = x * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _write_row(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    columns: tl.tensor,
    width: tl.tensor,
    IN_FP8: tl.constexpr,
) -> None:
    """Store a float32 row, in fp8 with its scale or in the type of `out`. NaNs stay in the values, not in the scale."""
    if IN_FP8:
        largest = tl.maximum(tl.max(tl.abs(x), axis=0), _SMALLEST_ROW)
        tl.store(scales + row, largest * (1 / _LARGEST_FP8))
        x = x * (_LARGEST_FP8 / largest)
    tl.store(out + row * width + columns, x.to(out.dtype.element_ty), mask=columns < width)


@triton.jit
def _residual_norm(
    x: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    out_scales: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    CENTERED: tl.constexpr,
    IN_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write x + y * scale over a row of x, and its norm; without ADD, write only the norm of x."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + at, mask=inside, other=0.0).to(tl.float32) * tl.load(
            scale + columns, mask=inside, other=0.0
        ).to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    value = _normed(value, weight, bias, columns, width, eps, CENTERED)
    _write_row(value, out, out_scales, row, columns, width, IN_FP8)


@triton.jit
def _embed(
    patches: tl.tensor,
    table: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    x: tl.tensor,
    out: tl.tensor,
    out_scales: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    IN_FP8: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Embed a token of a tile: its patch, except for the class token, plus its row of the table, and the first norm."""
    row = tl.program_id(0).to(tl.int64)
    tile, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    patch = (tile * (tokens - 1) + token - 1) * width + columns
    of_patch = columns < tl.where(token > 0, width, 0)
    value = tl.load(patches + patch, mask=of_patch, other=0.0).to(tl.float32)
    value += tl.load(table + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(x.dtype.element_ty)
    tl.store(x + row * width + columns, rounded, mask=inside)
    if NORM:
        value = _normed(rounded.to(tl.float32), weight, bias, columns, width, eps, CENTERED)
        _write_row(value, out, out_scales, row, columns, width, IN_FP8)


@triton.jit
def _qk_norm(
    qkv: tl.tensor, q_weight: tl.tensor, k_weight: tl.tensor, width: tl.tensor, eps: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Apply RMSNorm to q or k of one token over all heads, in place."""
    row, part = tl.program_id(0).to(tl.int64) // 2, tl.program_id(0) % 2
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = qkv + row * (3 * width) + part * width + columns
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    weight = q_weight if part == 0 else k_weight
    value = _normed(value, weight, weight, columns, width, eps, False)
    tl.store(at, value.to(qkv.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    """Return the exact GELU of float32 values, x * Phi(x) with the normal distribution Phi.

    Phi(x) is 1 / (1 + 2**(x * p(x**2))), and p is smooth enough for a polynomial, the best one on 0 <= |x| <= 5 when
    weighted by its effect on the result. Over all numbers, the result is within 4e-7 of the exact one, as it is with
    erf in float32, which takes three times as many instructions; and instructions are what limits this kernel.
    """
    square = tl.minimum(x * x, 25.0)
    power = 3.823487965e-07 - 5.146616209e-09 * square
    power = power * square - 1.141044622e-05
    power = power * square + 1.590902958e-04
    power = power * square + 9.659021473e-05
    power = power * square - 1.048400077e-01
    power = power * square - 2.302206551e00
    root = tl.rsqrt(1.0 + tl.exp2(x * power))  # one instruction, unlike a division
    return x * root * root


@triton.jit
def _quantize(
    x: tl.tensor, out: tl.tensor, out_scales: tl.tensor, width: tl.tensor, GELU: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Quantize a row to fp8, optionally after the exact GELU."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    if GELU:
        value = _gelu(value)
    _write_row(value, out, out_scales, row, columns, width, True)


def residual_norm(x: Tensor, y: Tensor, scale: Tensor, norm: Norm, *, in_fp8: bool) -> tuple[Tensor, Rows]:
    """See `Kernels.residual_norm`; x is overwritten."""
    rows = _new_rows(x, in_fp8=in_fp8)
    _launch_norm(x, y, scale, norm, rows)
    return x, rows


def norm_rows(x: Tensor, norm: Norm, *, in_fp8: bool) -> Rows:
    """See `Kernels.norm`."""
    x = x.contiguous()
    rows = _new_rows(x, in_fp8=in_fp8)
    _launch_norm(x, None, None, norm, rows)
    return rows


def embed(patches: Tensor, table: Tensor, norm: Norm | None, *, in_fp8: bool) -> tuple[Tensor, Rows | None]:
    """See `Kernels.embed`."""
    B, N, C = patches.shape
    x = patches.new_empty(B, 1 + N, C)
    rows = None if norm is None else _new_rows(x, in_fp8=in_fp8)
    values, scales = _targets(x if rows is None else rows)
    block = triton.next_power_of_2(C)
    _embed[(B * (1 + N),)](
        patches,
        table,
        table if norm is None else norm.weight,
        table if norm is None else _bias(norm),
        x,
        values,
        scales,
        1 + N,
        C,
        0.0 if norm is None else norm.eps,
        NORM=norm is not None,
        CENTERED=isinstance(norm, nn.LayerNorm),
        IN_FP8=in_fp8,
        BLOCK=block,
        **_options(block),
    )
    return x, rows


def qk_norm(qkv: Tensor, q_norm: Norm, k_norm: Norm) -> Tensor:
    """Apply RMSNorm to q and k over all heads, in place; packed q, k and v are [B,T,3C], contiguous."""
    width = qkv.shape[-1] // 3
    block = triton.next_power_of_2(width)
    _qk_norm[(2 * qkv.shape[0] * qkv.shape[1],)](
        qkv, q_norm.weight, k_norm.weight, width, q_norm.eps, BLOCK=block, **_options(block)
    )
    return qkv


def quantize(x: Tensor, *, gelu: bool = False) -> QuantizedRows:
    """Return contiguous rows [...,K] in fp8, optionally after the exact GELU."""
    rows = QuantizedRows(torch.empty_like(x, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    _quantize[(x.numel() // width,)](x, *rows, width, GELU=gelu, BLOCK=block, **_options(block, 16))
    return rows


def _launch_norm(x: Tensor, y: Tensor | None, scale: Tensor | None, norm: Norm, rows: Rows) -> None:
    width = x.shape[-1]
    values, scales = _targets(rows)
    block = triton.next_power_of_2(width)
    _residual_norm[(x.numel() // width,)](
        x,
        x if y is None else y,
        norm.weight if scale is None else scale,
        norm.weight,
        _bias(norm),
        values,
        scales,
        width,
        norm.eps,
        ADD=y is not None,
        CENTERED=isinstance(norm, nn.LayerNorm),
        IN_FP8=isinstance(rows, QuantizedRows),
        BLOCK=block,
        **_options(block),
    )


def _new_rows(x: Tensor, *, in_fp8: bool) -> Rows:
    if in_fp8:
        return QuantizedRows(torch.empty_like(x, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
    return torch.empty_like(x)


def _targets(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the tensors for values and scales; even an unused pointer has to be valid."""
    return (rows.values, rows.scale) if isinstance(rows, QuantizedRows) else (rows, rows)


def _bias(norm: Norm) -> Tensor:
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    return norm.weight if bias is None else bias


def _options(block: int, values: int = 8) -> dict[str, int]:
    """Return launch options for some values per thread, up to 16 warps; a load of 16 bytes is eight in 16 bits."""
    return {"num_warps": min(max(block // (32 * values), 1), 16), "enable_fp_fusion": True}
