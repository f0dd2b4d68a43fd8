"""Implement every operation of `Kernels` in plain PyTorch, as a reference and for devices without a faster one.

Shapes use the letters of vit.py.
"""

# ruff: noqa: N806, N812  (shape letters, and the name that everyone gives torch.nn.functional)

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit_cli.config import PATCH_SIZE
from internvit_cli.model.kernels.interface import Kernels, Linear, Norm, Rows, StoredTokens, StorePlan, steps_of
from internvit_cli.model.unshuffle import unshuffle_view

PATCH_VALUES = 3 * PATCH_SIZE**2  # 588 numbers in a patch
PADDED_PATCH_VALUES = 592
"""With four zeros rows of 16-bit numbers begin at multiples of 16 bytes, which matrix products need to be fast."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function from q, k and v [B,H,T,D] to [B,H,T,D]."""


def attend_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with PyTorch's fused operation; all shapes are [B,H,T,D]."""
    return F.scaled_dot_product_attention(q, k, v)


def attend_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention one head at a time, so that its scores stay in the cache; all shapes are [B,H,T,D].

    In bfloat16, this takes half the time of the fused operation on CPUs without AMX, and 1.5 times as long with AMX.
    """
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D)
    for b in range(B):
        for h in range(H):
            scores = torch.matmul(q[b, h] * D**-0.5, k[b, h].t())  # [T,T]
            torch.matmul(torch.softmax(scores, dim=-1), v[b, h], out=out[b, :, h])  # [T,D]
    return out.transpose(1, 2)


def best_attention(device: torch.device, dtype: torch.dtype) -> Attend:
    """Return the faster attention by a fixed rule, not a measurement, because the two differ in their last bits."""
    by_head = device.type == "cpu" and dtype is torch.bfloat16 and platform.machine() == "x86_64" and not _has_amx()
    return attend_by_head if by_head else attend_fused


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch 2.5 and later
    return supported is None or bool(supported())


def plain_kernels(attend: Attend = attend_fused, name: str = "plain PyTorch") -> Kernels:
    """Return the table of all operations of this module.

    Args:
        attend: The function that computes attention.
        name: The name in reports, with the reason if faster operations cannot be used.
    """
    return Kernels(
        name=name,
        patch_columns=PATCH_VALUES,
        patches=patches,
        embed=embed,
        norm=norm,
        residual_norm=residual_norm,
        linear=linear,
        linear_gelu=linear_gelu,
        attention=plain_attention(attend),
        store=store,
    )


def patches(tiles: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """See `Kernels.patches`."""
    B, side = len(tiles), tiles.shape[1] // PATCH_SIZE
    pixels = tiles.reshape(B, side, PATCH_SIZE, side, PATCH_SIZE, 3).transpose(2, 3)  # [B,side,side,P,P,3]
    values = pixels.reshape(B, side * side, PATCH_VALUES).to(dtype).sub_(128)  # [B,N,588]
    return values if columns == PATCH_VALUES else F.pad(values, (0, columns - PATCH_VALUES))


def embed(patches: Tensor, table: Tensor, norm: Norm | None) -> tuple[Tensor, Tensor | None]:
    """See `Kernels.embed`."""
    B, N, C = patches.shape
    x = patches.new_empty(B, 1 + N, C)
    x[:, 0] = table[0]
    torch.add(patches, table[1:], out=x[:, 1:])
    return x, None if norm is None else norm(x)


def norm(x: Tensor, norm: Norm) -> Tensor:
    """See `Kernels.norm`."""
    normed: Tensor = norm(x)
    return normed


def residual_norm(x: Tensor, y: Tensor, scale: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """See `Kernels.residual_norm`."""
    x = torch.addcmul(x, y, scale)  # [B,T,C]
    return x, norm(x)


def linear(h: Rows, layer: Linear) -> Tensor:
    """See `Kernels.linear`."""
    assert isinstance(h, Tensor)
    return F.linear(h, layer.weight, layer.bias)


def linear_gelu(h: Rows, layer: Linear) -> Tensor:
    """See `Kernels.linear_gelu`: the exact (erf) GELU."""
    gelu: Tensor = torch.ops.aten.gelu_(linear(h, layer))  # in place, because it is the widest tensor
    return gelu


def plain_attention(attend: Attend) -> Callable[[Tensor, int, tuple[Norm, Norm] | None], Tensor]:
    """Return `Kernels.attention` for a function of q, k and v [B,H,T,D]."""

    def attention(qkv: Tensor, heads: int, norms: tuple[Norm, Norm] | None) -> Tensor:
        B, T, width = qkv.shape
        q, k, v = qkv.chunk(3, dim=-1)  # [B,T,C] each
        if norms is not None:
            q, k = norms[0](q), norms[1](k)  # over all heads joined, before the split
        out = attend(*(part.reshape(B, T, heads, -1).transpose(1, 2) for part in (q, k, v)))  # [B,H,T,D]
        return out.transpose(1, 2).reshape(B, T, width // 3)

    return attention


def attend_class(q: Tensor, kv: Tensor, heads: int, norms: tuple[Norm, Norm] | None) -> Tensor:
    """Compute attention for the query of the class token: q [B,1,C], packed keys and values [B,T,2C] -> [B,1,C]."""
    B, T, width = kv.shape
    k, v = kv.chunk(2, dim=-1)  # [B,T,C] each
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    q = q.reshape(B, 1, heads, -1).transpose(1, 2)  # [B,H,1,D]
    k, v = (part.reshape(B, T, heads, -1).transpose(1, 2) for part in (k, v))  # [B,H,T,D]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, 1, width // 2)


def store(values: Tensor, plan: StorePlan) -> StoredTokens:
    """See `Kernels.store`: one pass for the extremes, and one that stores."""
    mean = values.mean(dim=1, dtype=torch.float32) if plan.mean else None
    low, high = torch.aminmax(values.flatten(1), dim=1)  # NaN wins
    extremes = torch.stack((low, high), dim=1).float()
    values, clamped = _clamped(values, plan)
    view = values if plan.order is None else unshuffle_view(values, plan.order)
    shape = len(values), plan.tokens, plan.token_size
    if plan.is_scaled:
        tokens, scales = quantize_tokens(view.float().reshape(shape), plan.dtype, plan.scales_per_token)
        return StoredTokens(tokens, mean, extremes, clamped, scales)
    tokens = values.new_empty(shape, dtype=plan.dtype)
    tokens.view(view.shape).copy_(view)
    return StoredTokens(tokens, mean, extremes, clamped)


def quantize_tokens(tokens: Tensor, dtype: torch.dtype, scales_per_token: int = 0) -> tuple[Tensor, Tensor]:
    """Quantize tokens symmetrically; the largest magnitude of a scale becomes the largest of the type.

    With several scales per token, value i has scale i % s: then copies of a channel in the patches that a visual token
    joins share a scale, and an outlier channel makes few scales coarse.

    Args:
        tokens: float32 [...,C], finite, and for several scales not above `StorePlan.largest`.
        dtype: int8, or uint8 for the bits of float8 e4m3.
        scales_per_token: The number of scales s; 0 for one float32 scale.

    Returns:
        Tokens of that type [...,C], and scales, float32 [...] or float16 [...,s]. No value is off by more than half a
        step.
    """
    steps = steps_of(dtype)
    if scales_per_token:
        rows = _by_scale(tokens, scales_per_token)  # [...,r,s]
        scales = _rounded_up(rows.abs().amax(dim=-2) / steps)
        multiples = (rows / scales.float()[..., None, :]).flatten(-2)[..., : tokens.shape[-1]]
    else:
        scales = (tokens.abs().amax(dim=-1) / steps).clamp_min(torch.finfo(torch.float32).tiny)
        multiples = tokens / scales[..., None]
    if dtype is torch.int8:
        return multiples.round_().clamp_(-steps, steps).to(dtype), scales
    return multiples.clamp_(-steps, steps).to(torch.float8_e4m3fn).view(dtype), scales


def dequantize_tokens(tokens: Tensor, scales: Tensor) -> Tensor:
    """Return quantized tokens [...,C] as float32; the reverse of `quantize_tokens`."""
    values = (tokens.view(torch.float8_e4m3fn) if tokens.dtype is torch.uint8 else tokens).float()
    if scales.ndim < tokens.ndim:
        return values * scales[..., None]
    rows = _by_scale(values, scales.shape[-1]) * scales.float()[..., None, :]
    return rows.flatten(-2)[..., : tokens.shape[-1]]


def _by_scale(tokens: Tensor, scales: int) -> Tensor:
    """Return tokens [...,C] as rows [...,r,scales], padded with zeros if they do not fill the last one."""
    missing = -tokens.shape[-1] % scales
    padded = F.pad(tokens, (0, missing)) if missing else tokens
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // scales, scales)


def _rounded_up(scales: Tensor) -> Tensor:
    """Return positive scales in float16, rounded up, so that no value is more than the largest of the type."""
    nearest = scales.clamp_min(torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps).half()
    bits = nearest.view(torch.int16)  # ordered as the values
    return (bits + (nearest.float() < scales)).view(torch.float16)


def _clamped(values: Tensor, plan: StorePlan) -> tuple[Tensor, Tensor]:
    """Clamp token values to the stored type if requested, and return them with the number of clamped ones."""
    if not plan.clamp:
        return values, torch.zeros(len(values), dtype=torch.int64, device=values.device)
    beyond = values.float().abs() >= plan.infinite_from  # False for NaN
    return values.float().clamp(-plan.largest, plan.largest), beyond.flatten(1).sum(1)
