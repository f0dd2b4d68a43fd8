"""Linear layers in fp8 (e4m3): every row of activations and of weights has a scale of its own, found as it is made.

On CUDA the product is `torch._scaled_mm`. Elsewhere the same arithmetic is done in float32, slowly, so that the fp8
network can be built and tested on any machine. Letters in shapes as in vit.py; K values of a row that a layer takes.
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
        """A layer whose weights are in fp8."""

        scale: Tensor


FP8 = torch.float8_e4m3fn
LARGEST_FP8 = 448.0
SMALLEST_ROW = 1e-12
"""Rows whose largest magnitude is below this are scaled as if it were this: zeros stay zeros."""

FAST_ACCUMULATION = True
"""Sum products in the matrix units' own, shorter accumulators: a fifth faster on Hopper. `Encoder.accuracy` is
measured with it."""


def quantize(x: Tensor) -> QuantizedRows:
    """Rows [...,K] in fp8, each divided by a 448th of its largest magnitude; a NaN in a row stays NaN."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ROW)  # [...,1]
    return QuantizedRows((x * (LARGEST_FP8 / largest)).to(FP8), largest * (1 / LARGEST_FP8))


def dequantize(rows: Rows) -> Tensor:
    """Rows [...,K] as float32, whatever they are in."""
    return rows.values.float() * rows.scale if isinstance(rows, QuantizedRows) else rows.float()


class Fp8Linear(nn.Module):
    """A linear layer whose weights are fp8, one scale an output."""

    weight: Tensor
    """float8_e4m3fn [rows,K]."""
    scale: Tensor
    """float32 [rows]."""
    bias: Tensor | None
    """[rows], in the dtype of the layer it was made from."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = quantize(layer.weight)
        self.register_buffer("weight", weight.values, persistent=False)
        self.register_buffer("scale", weight.scale[:, 0].contiguous(), persistent=False)
        self.register_buffer("bias", layer.bias, persistent=False)


def quantize_linears(model: nn.Module) -> None:
    """Replace every nn.Linear in a module by one in fp8, one after another, so that no second model is in memory."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, Fp8Linear(child))
        else:
            quantize_linears(child)


def scaled_linear(h: Rows, layer: Linear) -> Tensor:
    """`Kernels.linear` of an Fp8Linear, or of a part of one: bfloat16 [...,rows]. Rows not in fp8 are quantized."""
    rows = h if isinstance(h, QuantizedRows) else quantize(h)
    if not rows.values.is_cuda:
        return emulated_linear(rows, layer)
    values, scale = rows.values.flatten(0, -2), rows.scale.view(-1, 1)  # [B*T,K], [B*T,1]
    fp8 = cast("ScaledLinear", layer)
    product: Tensor = torch._scaled_mm(  # the only way to these matrix units there is in PyTorch
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
    """The same in float32, rounded once."""
    rows = h if isinstance(h, QuantizedRows) else quantize(h)
    fp8 = cast("ScaledLinear", layer)
    product = F.linear(rows.values.float(), fp8.weight.float()) * rows.scale * fp8.scale
    return (product if fp8.bias is None else product + fp8.bias.float()).to(torch.bfloat16)


def plain_fp8_kernels(attend: Attend = attend_fused, name: str = "plain PyTorch") -> Kernels:
    """`plain_kernels` whose linear layers are in fp8: norms and GELU are rounded to fp8 instead of to bfloat16."""
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
