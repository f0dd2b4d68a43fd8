"""Compute what is stored from uint8 tiles: tokens in their stored type, pooled vectors, and whether the values fit.

Shapes use the letters of vit.py; T is the number of tokens per tile, C their size (`FeatureShapes`), d that of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from internvit_cli.config import PATCH_SIZE, OnOverflow, Pool, StoreDtype, TokenOrder, Tokens
from internvit_cli.model.card import FeatureShapes, feature_shapes
from internvit_cli.model.kernels.choice import base_dtype, kernels_for
from internvit_cli.model.kernels.interface import Kernels, StorePlan
from internvit_cli.model.kernels.probes import ProbeSizes
from internvit_cli.model.loading import load_projector, load_vit
from internvit_cli.model.unshuffle import pixel_unshuffle
from internvit_cli.model.vit import InternViT, Projector, TileEmbedding

if TYPE_CHECKING:
    from internvit_cli.model.card import ModelCard
    from internvit_cli.model.checkpoint import Checkpoint

FITS, OVERFLOW, NOT_A_NUMBER = 0, 1, 2
"""Whether a tile can be stored; tiles with the last two values are not stored."""

TORCH_STORE_DTYPE = {
    StoreDtype.FLOAT16: torch.float16,
    StoreDtype.BFLOAT16: torch.bfloat16,
    StoreDtype.FLOAT32: torch.float32,
    StoreDtype.INT8: torch.int8,
    StoreDtype.FP8: torch.uint8,
}
"""The storage types; fp8 is stored as its bits."""

# The smallest magnitude that rounds to infinity: the largest value plus half a unit in its last place.
_ROUNDS_TO_INFINITY = {
    StoreDtype.FLOAT16: 65504.0 + 16.0,
    StoreDtype.BFLOAT16: (2 - 2.0**-7) * 2.0**127 + 2.0**119,
    StoreDtype.FLOAT32: float("inf"),
    StoreDtype.INT8: float("inf"),
    StoreDtype.FP8: float("inf"),
}


_ABOVE_FLOAT16_SCALES = 65504.0 * 127 + 0.5
"""The next float32 after the largest number of int8 times the largest scale in float16."""


def infinite_from(dtype: StoreDtype, values_per_scale: int = 0) -> float:
    """Return the smallest magnitude that rounds to infinity in a stored type.

    Args:
        dtype: The stored type.
        values_per_scale: As in the recipe; only float16 scales are limited.
    """
    return _ABOVE_FLOAT16_SCALES if dtype is StoreDtype.INT8 and values_per_scale else _ROUNDS_TO_INFINITY[dtype]


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Which features are computed from hidden states, and how they are stored."""

    tokens: Tokens
    pool: Pool
    tile_size: int
    token_order: TokenOrder
    store_dtype: StoreDtype
    on_overflow: OnOverflow = OnOverflow.SKIP
    earlier_layers: tuple[int, ...] = ()
    """Layers whose features are stored in addition to those of the last block that runs, ascending."""
    values_per_scale: int = 0
    """The number of values of a token that share a float16 scale; 0 for one float32 scale per token, or none."""

    @property
    def infinite_from(self) -> float:
        """The smallest magnitude of a token value that rounds to infinity when it is stored."""
        return infinite_from(self.store_dtype, self.values_per_scale)


class LayerTensors(NamedTuple):
    """Features of B tiles from one layer, on the device that computed them."""

    tokens: Tensor | None
    """Tokens [B,T,C] in the stored type; None if none are stored."""
    pooled: Tensor
    """[B,d] float32."""
    extremes: Tensor
    """[B,2] float32: smallest and largest token value before storing; NaN if any token value is NaN."""
    clamped: Tensor
    """[B] int64: number of token values that were clamped."""
    scales: Tensor | None = None
    """Scales of tokens in a scaled type, as in `StoredTokens`; None for other types."""


class FeatureModel(nn.Module):
    """The tower, the optional projector, and the selection of features to keep."""

    def __init__(
        self, card: ModelCard, vit: InternViT, projector: Projector | None, spec: FeatureSpec, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec = spec
        self.kernels: Kernels = vit.encoder.kernels
        self.shapes: FeatureShapes = feature_shapes(card, spec.tokens, spec.pool, spec.tile_size)
        self.plan = store_plan(card, spec)
        self.embedding = TileEmbedding(
            vit.embeddings,
            normalization=card.normalization,
            tile_size=spec.tile_size,
            dtype=base_dtype(dtype),
            kernels=self.kernels,
        )
        self.encoder = vit.encoder
        self.projector = projector
        self.store_dtype = TORCH_STORE_DTYPE[spec.store_dtype]

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return self.embedding.table.device

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        spec: FeatureSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        fused: bool = True,
    ) -> FeatureModel:
        """Load the weights of a checkpoint onto a device.

        Args:
            checkpoint: The checkpoint, opened for the blocks that run.
            spec: The features to keep.
            device: The device.
            dtype: The compute dtype; float8_e4m3fn means fp8 in linear layers and bfloat16 elsewhere (emulated on
                CPUs).
            fused: Whether Triton's kernels are used where they work.

        Raises:
            DeviceError: The CUDA card does not support fp8.
            ModelError: A file of weights cannot be read.
            UsageError: The spec does not fit the model.
        """
        if device.type == "cuda" and dtype is torch.float32:
            torch.set_float32_matmul_precision("highest")  # no TF32, whatever was set before
        plan = store_plan(checkpoint.card, spec)
        case = ProbeSizes(checkpoint.card.vision, spec.tile_size // PATCH_SIZE, plan)
        kernels = kernels_for(device, dtype, case if fused else None)
        vit = load_vit(checkpoint, device=device, dtype=dtype, kernels=kernels, earlier_layers=spec.earlier_layers)
        projected = spec.tokens is Tokens.PROJECTED
        projector = load_projector(checkpoint, device=device, dtype=base_dtype(dtype)) if projected else None
        return cls(checkpoint.card, vit, projector, spec, dtype)

    def forward(self, tiles: Tensor) -> tuple[LayerTensors, ...]:
        """Return features of uint8 RGB tiles [B,S,S,3] on the model's device: main layer, then earlier layers."""
        if self.spec.tokens is Tokens.NONE and self.spec.pool is Pool.CLS:
            x, h = self.embedding.with_norm(tiles, self.encoder.first_norm)
            return tuple(self._pooled_only(row[:, 0].float()) for row in self.encoder.of_class(x, h))
        return tuple(map(self._features, self.hidden(tiles)))

    def hidden(self, tiles: Tensor) -> tuple[Tensor, ...]:
        """Return the hidden states [B,1+N,C] of uint8 RGB tiles [B,S,S,3]: the main layer, then earlier layers."""
        x, h = self.embedding.with_norm(tiles, self.encoder.first_norm)
        states: tuple[Tensor, ...] = self.encoder(x, h)
        return states

    def _features(self, hidden: Tensor) -> LayerTensors:
        """Return the features to keep from the hidden states [B,1+N,C] of one layer."""
        if self.plan is None:
            return self._pooled_only(self._pooled(hidden, None))
        stored = self.kernels.store(self.token_values(hidden), self.plan)
        pooled = self._pooled(hidden, stored.mean)
        return LayerTensors(stored.tokens, pooled, stored.extremes, stored.clamped, stored.scales)

    def token_values(self, hidden: Tensor) -> Tensor:
        """Return the values to store from hidden states [B,1+N,C]: patches [B,N,C], or projected tokens [B,N/4,L]."""
        patches = hidden[:, 1:]
        if self.projector is None:
            return patches
        projected: Tensor = self.projector(pixel_unshuffle(patches, self.spec.token_order))
        return projected

    def _pooled(self, hidden: Tensor, mean: Tensor | None) -> Tensor:
        """Pool [B,1+N,C] to float32 [B,d], with the mean of its patches if it is known."""
        cls = hidden[:, 0].float()
        if self.spec.pool is Pool.CLS:
            return cls
        if mean is None:
            mean = hidden[:, 1:].mean(dim=1, dtype=torch.float32)
        return mean if self.spec.pool is Pool.MEAN else torch.cat((cls, mean), dim=1)

    @staticmethod
    def _pooled_only(pooled: Tensor) -> LayerTensors:
        extremes = torch.stack((pooled.amin(1), pooled.amax(1)), dim=1)
        return LayerTensors(None, pooled, extremes, torch.zeros(len(pooled), dtype=torch.int64, device=pooled.device))


def store_plan(card: ModelCard, spec: FeatureSpec) -> StorePlan | None:
    """Return how token values are stored; None if none are.

    Raises:
        UsageError: The spec does not fit the model.
    """
    shapes = feature_shapes(card, spec.tokens, spec.pool, spec.tile_size)
    if spec.tokens is Tokens.NONE:
        return None
    return StorePlan(
        tokens=shapes.tokens,
        token_size=shapes.token_size,
        dtype=TORCH_STORE_DTYPE[spec.store_dtype],
        order=spec.token_order if spec.tokens is Tokens.VISUAL else None,
        clamp=spec.on_overflow is OnOverflow.CLAMP,
        infinite_from=spec.infinite_from,
        mean=spec.pool is not Pool.CLS and spec.tokens is not Tokens.PROJECTED,
        values_per_scale=spec.values_per_scale,
    )


def check_tiles(extremes: np.ndarray, pooled: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Return whether each tile can be stored: uint8 [n] of FITS, OVERFLOW or NOT_A_NUMBER.

    Args:
        extremes: Smallest and largest token values, float32 [n,2].
        pooled: Pooled vectors, float32 [n,d].
        spec: The features; with clamping, only the pooled vector can overflow.
    """
    limit = float("inf") if spec.on_overflow is OnOverflow.CLAMP else spec.infinite_from
    too_large = np.abs(extremes).max(axis=1) >= limit
    if spec.on_overflow is OnOverflow.CLAMP:
        too_large[:] = False
    overflow = too_large | np.isinf(pooled).any(axis=1)
    nan = np.isnan(extremes).any(axis=1) | np.isnan(pooled).any(axis=1)
    return np.where(nan, NOT_A_NUMBER, np.where(overflow, OVERFLOW, FITS)).astype(np.uint8)
