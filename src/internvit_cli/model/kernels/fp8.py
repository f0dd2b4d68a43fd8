"""Compute linear layers in fp8 (e4m3), with a scale per row of activations and of weights.

On CUDA, the product is `torch._scaled_mm`. Elsewhere the same arithmetic is done slowly in float32, so that the fp8
network can be built and tested on any machine. Shapes use the letters of vit.py; K is the number of inputs of a layer.
"""

# ruff: noqa: N812  (the name that everyone gives torch.nn.functional)

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit_cli.model.kernels import plain
from internvit_cli.model.kernels.interface import Kernels, Linear, Norm, QuantizedRows, Rows
from internvit_cli.model.kernels.plain import Attend, attend_fused, plain_kernels

if TYPE_CHECKING:
    from typing import Protocol

    class ScaledLinear(Linear, Protocol):
        """A linear layer with fp8 weights."""

        scale: Tensor


FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
SMALLEST_ROW = 1e-12
"""Smallest magnitude for the scale of a row, so that rows of zeros stay zeros."""

FAST_ACCUMULATION = True
"""Use the shorter accumulators of the matrix units, which are a fifth faster on Hopper. The measured accuracy of an
output includes their error."""


def quantize(x: Tensor) -> QuantizedRows:
    """Return rows [...,K] in fp8, each divided by 1/448 of its largest magnitude; a NaN stays NaN."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ROW)  # [...,1]
    return QuantizedRows((x * (LARGEST_FP8 / largest)).to(FP8), largest * (1 / LARGEST_FP8))


def dequantize(rows: Rows) -> Tensor:
    """Return rows [...,K] of any type as float32."""
    return rows.values.float() * rows.scale if isinstance(rows, QuantizedRows) else rows.float()


class Fp8Linear(nn.Module):
    """A linear layer with fp8 weights and a scale per output."""

    weight: Tensor
    """float8_e4m3fn [rows,K]."""
    scale: Tensor
    """float32 [rows]."""
    bias: Tensor | None
    """[rows], in the dtype of the original layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = quantize(layer.weight)
        self.register_buffer("weight", weight.values, persistent=False)
        self.register_buffer("scale", weight.scale[:, 0].contiguous(), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)


def quantize_linears(model: nn.Module) -> None:
    """Replace every nn.Linear of a module by one in fp8, one by one, so that no second model is in memory."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, Fp8Linear(child))
        else:
            quantize_linears(child)


def scaled_linear(h: Rows, layer: Linear) -> Tensor:
    """Compute `Kernels.linear` for an Fp8Linear or a part of one as bfloat16 [...,rows]; quantize rows if needed."""
    rows = h if isinstance(h, QuantizedRows) else quantize(h)
    if not rows.values.is_cuda:
        return emulated_linear(rows, layer)
    values, scale = rows.values.flatten(0, -2), rows.scale.view(-1, 1)  # [B*T,K], [B*T,1]
    fp8 = cast("ScaledLinear", layer)
    product: Tensor = torch._scaled_mm(  # PyTorch's only access to these matrix units
        values,
        fp8.weight.t(),
        scale_a=scale,
        scale_b=fp8.scale[None, :],
        bias=fp8.bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return product.view(*rows.values.shape[:-1], -1)


def emulated_linear(h: Rows, layer: Linear) -> Tensor:
    """Compute `scaled_linear` in float32, rounded once."""
    rows = h if isinstance(h, QuantizedRows) else quantize(h)
    fp8 = cast("ScaledLinear", layer)
    product = F.linear(rows.values.float(), fp8.weight.float()) * rows.scale * fp8.scale
    return (product if fp8.bias is None else product + fp8.bias.float()).to(torch.bfloat16)


def plain_fp8_kernels(attend: Attend = attend_fused, name: str = "plain PyTorch") -> Kernels:
    """Return `plain_kernels` with linear layers in fp8, for which norms and GELU are rounded to fp8."""
    base = plain_kernels(attend, name)
    return Kernels(
        name=name,
        patch_columns=base.patch_columns,
        patches=base.patches,
        embed=embed,
        norm=norm,
        residual_norm=residual_norm,
        linear=scaled_linear,
        linear_gelu=linear_gelu,
        attention=base.attention,
        store=base.store,
    )


def embed(patches: Tensor, table: Tensor, following: Norm | None) -> tuple[Tensor, QuantizedRows | None]:
    """See `Kernels.embed`."""
    x, _ = plain.embed(patches, table, None)
    return x, None if following is None else norm(x, following)


def norm(x: Tensor, norm: Norm) -> QuantizedRows:
    """See `Kernels.norm`: rounded once, from float32 to fp8."""
    weight = norm.weight.float()
    if isinstance(norm, nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.float()
        return quantize(F.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps))
    return quantize(F.rms_norm(x.float(), norm.normalized_shape, weight, norm.eps))


def residual_norm(x: Tensor, y: Tensor, scale: Tensor, following: Norm) -> tuple[Tensor, QuantizedRows]:
    """See `Kernels.residual_norm`."""
    x = torch.addcmul(x, y, scale)  # [B,T,C]
    return x, norm(x, following)


def linear_gelu(h: Rows, layer: Linear) -> QuantizedRows:
    """See `Kernels.linear_gelu`: the exact (erf) GELU, rounded once."""
    return quantize(F.gelu(scaled_linear(h, layer).float()))
