"""Implement the operations of `Kernels` on CUDA with Triton, with GELU fused into the matrix product before it.

Shapes use the letters of vit.py.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from internvit_cli.model.kernels import triton_attention, triton_norms, triton_tiles
from internvit_cli.model.kernels.fp8 import FP8, scaled_linear
from internvit_cli.model.kernels.interface import Kernels, Linear, Norm, QuantizedRows, Rows, StoredTokens, StorePlan
from internvit_cli.model.kernels.plain import PADDED_PATCH_VALUES, linear, linear_gelu, plain_attention
from internvit_cli.model.kernels.plain import store as plain_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from internvit_cli.model.kernels.plain import Attend


def triton_kernels(dtype: torch.dtype, attend: Attend) -> Kernels:
    """Return the operations for a compute dtype.

    Args:
        dtype: The compute dtype; float8_e4m3fn means fp8 in linear layers and bfloat16 elsewhere.
        attend: Attention for float32, in which Triton's matrix products are slow, and for head sizes without blocks.
    """
    in_fp8, exact = dtype is FP8, dtype is torch.float32
    gelus: dict[torch.dtype, Callable[[Rows, Linear], Rows]] = {FP8: fp8_linear_gelu, torch.float32: linear_gelu}
    return Kernels(
        name="triton",
        patch_columns=PADDED_PATCH_VALUES,
        patches=triton_tiles.patches,
        embed=partial(triton_norms.embed, in_fp8=in_fp8),
        norm=partial(triton_norms.norm_rows, in_fp8=in_fp8),
        residual_norm=partial(triton_norms.residual_norm, in_fp8=in_fp8),
        linear=fp8_linear if in_fp8 else linear,
        linear_gelu=gelus.get(dtype, epilogue_linear_gelu),
        attention=plain_attention(attend) if exact else partial(attention, attend=attend),
        store=store,
    )


def attention(qkv: Tensor, heads: int, norms: tuple[Norm, Norm] | None, *, attend: Attend) -> Tensor:
    """See `Kernels.attention`; q and k are normed in place."""
    if norms is not None:
        qkv = triton_norms.qk_norm(qkv, *norms)
    cut = triton_attention.blocks_for(qkv.shape[-1] // 3 // heads, _capability(qkv))
    return plain_attention(attend)(qkv, heads, None) if cut is None else triton_attention.attention(qkv, heads, cut)


def store(values: Tensor, plan: StorePlan) -> StoredTokens:
    """See `Kernels.store`; scaled types use plain PyTorch, because a scale depends on a whole token."""
    return plain_store(values, plan) if plan.is_scaled else triton_tiles.store(values, plan)


def _capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of a tensor's card, or the newest in Triton's interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else triton_attention.HOPPER


def epilogue_linear_gelu(h: Rows, layer: Linear) -> Tensor:
    """See `Kernels.linear_gelu`; uses the tanh form, fused into the matrix product.

    It is within 5e-4 of the exact form, which is less than the rounding to 16 bits, and saves a pass over the widest
    tensor.
    """
    assert isinstance(h, torch.Tensor)
    assert layer.bias is not None
    rows = h.flatten(0, -2)  # [B*T,K]
    out: Tensor = torch._addmm_activation(
        layer.bias, rows, layer.weight.t(), use_gelu=True
    )  # there is no public function
    return out.view(*h.shape[:-1], -1)


def fp8_linear(h: Rows, layer: Linear) -> Tensor:
    """See `Kernels.linear`; rows that are not in fp8 are quantized."""
    return scaled_linear(h if isinstance(h, QuantizedRows) else triton_norms.quantize(h), layer)


def fp8_linear_gelu(h: Rows, layer: Linear) -> QuantizedRows:
    """See `Kernels.linear_gelu`: the exact GELU, rounded once, to fp8."""
    return triton_norms.quantize(fp8_linear(h, layer), gelu=True)
