"""Run every operation of a table of kernels on small random inputs, to compare two tables.

Shapes use the letters of vit.py.
"""

# ruff: noqa: N806  (shape letters)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from internvit_cli.config import PATCH_SIZE
from internvit_cli.model.kernels.fp8 import FP8, Fp8Linear, dequantize
from internvit_cli.model.kernels.interface import Kernels, Linear, Norm, QuantizedRows, Rows, StorePlan
from internvit_cli.model.kernels.plain import PADDED_PATCH_VALUES

if TYPE_CHECKING:
    from internvit_cli.model.card import VisionConfig

TILES = 2

LARGEST_DIFFERENCE = {
    torch.float32: 1e-4,
    torch.float16: 2.0**-8,
    torch.bfloat16: 2.0**-5,
    FP8: 2.0**-3,
}
"""Allowed difference of a kernel from its plain version, relative to the largest magnitude: a few roundings of the
type, or one step of fp8. A wrong index or a lost row is far above it."""

Probe = Callable[[Kernels], list[Tensor]]
"""A function that runs one operation of a table, always with the same inputs."""


@dataclass(frozen=True)
class ProbeSizes:
    """The sizes with which kernels are tried, which are those of the run, so that Triton compiles each kernel once."""

    vision: VisionConfig
    side: int
    """The number of patches along a side of a tile."""
    plan: StorePlan | None = None
    """How tokens are stored; None if none are."""


class _Inputs:
    """Random tensors for a case, which are always the same."""

    def __init__(self, case: ProbeSizes, device: torch.device, dtype: torch.dtype) -> None:
        self.vision, self.case, self.device = case.vision, case, device
        self.dtype = dtype
        self.base = torch.bfloat16 if dtype is FP8 else dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(self.base)

    def tiles(self) -> Tensor:
        side = self.case.side * PATCH_SIZE
        shape = (TILES, side, side, 3)
        return torch.randint(0, 256, shape, generator=self._generator, device=self.device, dtype=torch.uint8)

    def norm(self, kind: str) -> Norm:
        module = nn.RMSNorm if kind == "rms_norm" else nn.LayerNorm
        norm = module(self.vision.hidden_size, self.vision.eps, device=self.device, dtype=self.base)
        for parameter in norm.requires_grad_(False).parameters():
            parameter.copy_(self.random(*parameter.shape))
        return norm

    def linear(self) -> Linear:
        layer = nn.Linear(self.vision.hidden_size, self.vision.mlp_size, device=self.device, dtype=self.base)
        layer.requires_grad_(False)
        layer.weight.copy_(self.random(*layer.weight.shape) * self.vision.hidden_size**-0.5)
        return Fp8Linear(layer) if self.dtype is FP8 else layer


def probes(case: ProbeSizes, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Probe, float]]:
    """Return by field of `Kernels` how to run the operation, and the allowed difference.

    Args:
        case: The sizes.
        device: The device.
        dtype: The compute dtype, float8_e4m3fn for fp8.
    """
    make = _Inputs(case, device, dtype)
    N, C, heads = case.side**2, case.vision.hidden_size, case.vision.num_heads
    x, y, scale = make.random(TILES, 1 + N, C), make.random(TILES, 1 + N, C), make.random(C)
    patches, table, qkv = make.random(TILES, N, C), make.random(1 + N, C), make.random(TILES, 1 + N, 3 * C)
    tiles, norm, layer = make.tiles(), make.norm(case.vision.norm), make.linear()
    qk_norms = (make.norm("rms_norm"), make.norm("rms_norm")) if case.vision.qk_norm else None
    in_base, in_rows = LARGEST_DIFFERENCE[make.base], LARGEST_DIFFERENCE[dtype]
    found: dict[str, tuple[Probe, float]] = {
        "patches": (lambda k: [k.patches(tiles, PADDED_PATCH_VALUES, make.base)], in_base),
        "embed": (lambda k: _tensors(*k.embed(patches, table, norm)), in_rows),
        "norm": (lambda k: _tensors(k.norm(x, norm)), in_rows),
        "residual_norm": (lambda k: _tensors(*k.residual_norm(x.clone(), y, scale, norm)), in_rows),
        "linear": (lambda k: _tensors(k.linear(x, layer)), in_base),
        "linear_gelu": (lambda k: _tensors(k.linear_gelu(x, layer)), in_rows),
        "attention": (lambda k: [k.attention(qkv.clone(), heads, qk_norms)], in_base),
    }
    plan = case.plan
    if plan is not None:
        n, width = (N, C) if plan.tokens * plan.token_size == N * C else (plan.tokens, plan.token_size)
        values = make.random(TILES, 1 + n, width)[:, 1:]
        found["store"] = (lambda k: _tensors(*k.store(values, plan)), in_base)
    return found


def _tensors(*outputs: Rows | None) -> list[Tensor]:
    """Return outputs as tensors that can be compared; rows in fp8 are dequantized."""
    return [
        dequantize(output) if isinstance(output, QuantizedRows) else output for output in outputs if output is not None
    ]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference relative to the largest magnitude over all tensors; infinite for NaN."""
    worst = 0.0
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        share = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)
        worst = max(worst, float(share.nan_to_num(nan=float("inf"))))
    return worst
