"""Define the table of operations that the network needs, which is chosen once per device, so that `vit.py` need not.

Shapes use the letters of vit.py; K is the number of inputs of a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from internvit_cli.config import scales_per_token

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.config import TokenOrder

Norm = nn.LayerNorm | nn.RMSNorm
"""A norm over the last axis, computed in float32 and rounded once."""


class QuantizedRows(NamedTuple):
    """Rows in fp8; `values * scale` approximates the original rows."""

    values: Tensor
    """float8_e4m3fn [...,K]."""
    scale: Tensor
    """float32 [...,1], from the largest magnitude of each row."""


Rows = Tensor | QuantizedRows
"""Inputs of a linear layer, [...,K], in the compute dtype or in fp8."""


class Linear(Protocol):
    """Weights of a linear layer: an nn.Linear, one in fp8, or some rows of either."""

    @property
    def weight(self) -> Tensor:
        """[rows,K]."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """[rows]."""
        ...


class LinearPart(NamedTuple):
    """Some outputs of a linear layer."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    """float32 [rows] if the weights are in fp8."""


def linear_part(layer: Linear, rows: slice) -> LinearPart:
    """Return the outputs `rows` of a layer as a layer, without copying weights."""
    scale = getattr(layer, "scale", None)
    bias = None if layer.bias is None else layer.bias[rows]
    return LinearPart(layer.weight[rows], bias, None if scale is None else scale[rows])


def class_rows(h: Rows) -> Rows:
    """Return the class tokens of [B,T,K] as [B,1,K]."""
    if isinstance(h, QuantizedRows):
        return QuantizedRows(h.values[:, :1].contiguous(), h.scale[:, :1].contiguous())
    return h[:, :1].contiguous()


@dataclass(frozen=True, slots=True)
class StorePlan:
    """How token values are stored."""

    tokens: int
    """T: stored tokens per tile."""
    token_size: int
    """Values per token."""
    dtype: torch.dtype
    order: TokenOrder | None
    """The order of pixel unshuffle, v1 or v2; None means no pixel unshuffle."""
    clamp: bool
    """Whether to limit values to the range of `dtype`, and count those that it would round to infinity."""
    infinite_from: float
    """The smallest magnitude that rounds to infinity in `dtype`."""
    mean: bool
    """Whether to compute the mean over the rows of a tile."""
    values_per_scale: int = 0
    """The number of values of a token that share a float16 scale; 0 for one float32 scale per token, or none."""

    @property
    def is_scaled(self) -> bool:
        """Whether tokens have scales: int8, or uint8 that holds the bits of float8 e4m3."""
        return self.dtype in (torch.int8, torch.uint8)

    @property
    def scales_per_token(self) -> int:
        """The number of float16 scales of a token; 0 for one float32 scale, or none."""
        return scales_per_token(self.token_size, self.values_per_scale) if self.values_per_scale else 0

    @property
    def largest(self) -> float:
        """The largest magnitude that can be stored."""
        if not self.is_scaled:
            return torch.finfo(self.dtype).max
        largest_scale = torch.finfo(torch.float16 if self.values_per_scale else torch.float32).max
        return min(torch.finfo(torch.float32).max, largest_scale * steps_of(self.dtype))


def steps_of(dtype: torch.dtype) -> float:
    """Return the largest number of a scaled type: int8, or uint8 that holds the bits of float8 e4m3."""
    return 127.0 if dtype is torch.int8 else torch.finfo(torch.float8_e4m3fn).max


class StoredTokens(NamedTuple):
    """Tokens of B tiles in their stored form, with statistics."""

    tokens: Tensor
    """Tokens [B,T,token_size] in the stored type."""
    mean: Tensor | None
    """float32 [B,C]: means of the rows of each tile before storing."""
    extremes: Tensor
    """float32 [B,2]: smallest and largest value before storing; NaN if any value is NaN."""
    clamped: Tensor
    """int64 [B]: numbers of clamped values."""
    scales: Tensor | None = None
    """Scales of the tokens, float32 [B,T] or float16 [B,T,scales_per_token]; None if the type has no scales."""


@dataclass(frozen=True)
class Kernels:
    """An implementation of every operation. In an fp8 table, rows for linear layers are quantized."""

    name: str
    """The name in reports, such as `triton`."""
    patch_columns: int
    """Columns of a patch and of its weights: 588, or more (padded with zeros) if that is faster on a device."""

    patches: Callable[[Tensor, int, torch.dtype], Tensor]
    """uint8 tiles [B,S,S,3], columns, dtype -> [B,N,columns]: values - 128 in a tile's order (y, x, channel)."""
    embed: Callable[[Tensor, Tensor, Norm | None], tuple[Tensor, Rows | None]]
    """Embedded patches [B,N,C], table [1+N,C], first norm -> hidden states [B,1+N,C], and normed rows with a norm."""
    norm: Callable[[Tensor, Norm], Rows]
    """[...,C] -> rows [...,C]."""
    residual_norm: Callable[[Tensor, Tensor, Tensor, Norm], tuple[Tensor, Rows]]
    """x, y [B,T,C], LayerScale [C], next norm -> x + y * scale, and its normed rows. May overwrite x."""
    linear: Callable[[Rows, Linear], Tensor]
    """Rows [...,K] -> [...,rows of the weights]."""
    linear_gelu: Callable[[Rows, Linear], Rows]
    """GELU of a linear layer's output, as rows for the next."""
    attention: Callable[[Tensor, int, tuple[Norm, Norm] | None], Tensor]
    """Packed q, k and v [B,T,3C], heads, norms of q and of k over all heads joined -> [B,T,C]. May overwrite qkv."""
    store: Callable[[Tensor, StorePlan], StoredTokens]
    """Rows [B,n,C], a view with whole rows, -> what is stored of them."""
