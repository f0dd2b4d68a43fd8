"""From uint8 tiles to what is stored: tokens in their stored type, a pooled vector, and whether the values fit.

Letters in shapes as in vit.py; T tokens a tile of size C each (`FeatureShapes`), d values of the pooled vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from internvit_cli.config import OnOverflow, Pool, StoreDtype, Tokens
from internvit_cli.model.card import FeatureShapes, feature_shapes
from internvit_cli.model.loading import load_projector, load_vit
from internvit_cli.model.vit import InternViT, Projector, TileEmbedding, pixel_unshuffle, unshuffle_view

if TYPE_CHECKING:
    from internvit_cli.model.card import ModelCard
    from internvit_cli.model.checkpoint import Checkpoint

FITS, OVERFLOW, NOT_A_NUMBER = 0, 1, 2
"""Verdicts on a tile; the last two are never stored."""

TORCH_STORE_DTYPE = {
    StoreDtype.FLOAT16: torch.float16,
    StoreDtype.BFLOAT16: torch.bfloat16,
    StoreDtype.FLOAT32: torch.float32,
}

# The smallest magnitude that rounds to infinity: the largest value plus half its last place.
_ROUNDS_TO_INFINITY = {
    StoreDtype.FLOAT16: 65504.0 + 16.0,
    StoreDtype.BFLOAT16: (2 - 2.0**-7) * 2.0**127 + 2.0**119,
    StoreDtype.FLOAT32: float("inf"),
}


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Which features are taken from the hidden state, and how they are stored."""

    tokens: Tokens
    pool: Pool
    tile_size: int
    token_order: str
    store_dtype: StoreDtype
    on_overflow: OnOverflow = OnOverflow.SKIP


class Features(NamedTuple):
    """Features of B tiles on the device they were computed on."""

    tokens: Tensor | None
    """[B,T,C] in the stored type; None when none are stored."""
    pooled: Tensor
    """[B,d] float32."""
    extremes: Tensor
    """[B,2] float32: smallest and largest token value before storing; NaN when any token value is."""
    clamped: Tensor
    """[B] int64: token values that were clamped."""


class FeatureModel(nn.Module):
    """The tower, the optional projector, and the choice of what to keep."""

    def __init__(
        self, card: ModelCard, vit: InternViT, projector: Projector | None, spec: FeatureSpec, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.spec = spec
        self.shapes: FeatureShapes = feature_shapes(card, spec.tokens, spec.pool, spec.tile_size)
        self.embedding = TileEmbedding(
            vit.embeddings, mean=card.mean, std=card.std, tile_size=spec.tile_size, dtype=dtype
        )
        self.encoder = vit.encoder
        self.projector = projector
        self.store_dtype = TORCH_STORE_DTYPE[spec.store_dtype]

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, spec: FeatureSpec, *, device: torch.device, dtype: torch.dtype
    ) -> FeatureModel:
        """Read a checkpoint's weights to the device.

        Raises:
            ModelError: a weights file can't be read.
            UsageError: the spec does not fit the model.
        """
        feature_shapes(checkpoint.card, spec.tokens, spec.pool, spec.tile_size)
        vit = load_vit(checkpoint, device=device, dtype=dtype)
        projected = spec.tokens is Tokens.PROJECTED
        projector = load_projector(checkpoint, device=device, dtype=dtype) if projected else None
        return cls(checkpoint.card, vit, projector, spec, dtype)

    def forward(self, tiles: Tensor) -> Features:
        """Features of uint8 RGB tiles [B,S,S,3] on the model's device."""
        hidden = self.encoder(self.embedding(tiles))  # [B,1+N,C]
        patches = hidden[:, 1:]  # [B,N,C]
        pooled = self._pooled(hidden)
        values = patches if self.projector is None else self.projector(pixel_unshuffle(patches, self.spec.token_order))
        if self.spec.tokens is Tokens.NONE:
            extremes = torch.stack((pooled.amin(1), pooled.amax(1)), dim=1)
            return Features(None, pooled, extremes, torch.zeros(len(tiles), dtype=torch.int64, device=tiles.device))
        low, high = torch.aminmax(values.flatten(1), dim=1)  # NaN wins
        extremes = torch.stack((low, high), dim=1).float()
        values, clamped = self._clamped(values)
        return Features(self._stored(values), pooled, extremes, clamped)

    def _pooled(self, hidden: Tensor) -> Tensor:
        """[B,1+N,C] -> float32 [B,d]."""
        cls = hidden[:, 0].float()
        if self.spec.pool is Pool.CLS:
            return cls
        mean = hidden[:, 1:].mean(dim=1, dtype=torch.float32)
        return mean if self.spec.pool is Pool.MEAN else torch.cat((cls, mean), dim=1)

    def _clamped(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Token values limited to what the stored type holds, when that was asked for, and how many were not."""
        if self.spec.on_overflow is OnOverflow.SKIP:
            return values, torch.zeros(len(values), dtype=torch.int64, device=values.device)
        beyond = values.float().abs() >= _ROUNDS_TO_INFINITY[self.spec.store_dtype]  # False for NaN
        limit = torch.finfo(self.store_dtype).max
        return values.float().clamp(-limit, limit), beyond.flatten(1).sum(1)

    def _stored(self, values: Tensor) -> Tensor:
        """Token values in their final order, [B,T,C] in the stored type: one pass over them."""
        stored = values.new_empty((len(values), self.shapes.tokens, self.shapes.token_size), dtype=self.store_dtype)
        if self.spec.tokens is Tokens.VISUAL:
            view = unshuffle_view(values, self.spec.token_order)
            stored.view(view.shape).copy_(view)
        else:
            stored.copy_(values)
        return stored


def verdicts(extremes: np.ndarray, pooled: np.ndarray, spec: FeatureSpec) -> np.ndarray:
    """Whether each tile can be stored: uint8 [n] of FITS, OVERFLOW or NOT_A_NUMBER.

    Args:
        extremes: float32 [n,2].
        pooled: float32 [n,d].
        spec: with clamping, only the pooled vector can overflow.
    """
    limit = float("inf") if spec.on_overflow is OnOverflow.CLAMP else _ROUNDS_TO_INFINITY[spec.store_dtype]
    too_large = np.abs(extremes).max(axis=1) >= limit
    if spec.on_overflow is OnOverflow.CLAMP:
        too_large[:] = False
    overflow = too_large | np.isinf(pooled).any(axis=1)
    nan = np.isnan(extremes).any(axis=1) | np.isnan(pooled).any(axis=1)
    return np.where(nan, NOT_A_NUMBER, np.where(overflow, OVERFLOW, FITS)).astype(np.uint8)
