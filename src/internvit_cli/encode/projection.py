"""Project stored visual tokens into the embedding space of a language model, tile by tile."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from internvit_cli.config import ComputeDtype, OnOverflow, StoreDtype
from internvit_cli.encode.devices import device_name, find_fit_device
from internvit_cli.encode.encoder import TORCH_DTYPE
from internvit_cli.errors import UsageError
from internvit_cli.model.features import (
    FITS,
    NOT_A_NUMBER,
    OVERFLOW,
    TORCH_STORE_DTYPE,
    infinite_from,
)
from internvit_cli.model.kernels.choice import base_dtype, plain_for
from internvit_cli.model.kernels.interface import Kernels, StorePlan
from internvit_cli.model.loading import load_projector
from internvit_cli.model.tensors import as_tensor
from internvit_cli.runtime.workers import usable_cpus

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from internvit_cli.config import Recipe
    from internvit_cli.model.projector import OpenProjector
    from internvit_cli.model.vit import Projector

BATCH_TILES = 32
"""Tiles per batch on an accelerator; always as many, so that no result depends on its neighbors."""


class ProjectedTiles(NamedTuple):
    """The projected tokens of n tiles."""

    tokens: NDArray[Any]
    """[n,T,L] in the stored type, bfloat16 as its bits."""
    fits: NDArray[Any]
    """[n] uint8: whether each tile can be stored, as in `TileFeatures.fits`."""


@dataclass(frozen=True, slots=True)
class ProjectionTypes:
    """The recipes between which tokens are projected."""

    source: Recipe
    """That of the visual tokens."""
    wanted: Recipe
    """That of the projected tokens, whose `compute_dtype` is the type in which they are computed."""


class TokenProjector:
    """A projector on its device; close it.

    On a CPU, every tile is a task of one thread, as in the encoder, so that a tile gives the same bits in any run. In
    the type in which the encoder computed, from visual tokens stored in that type, these are the bits that
    `--tokens projected` stores.
    """

    def __init__(self, projector: Projector, types: ProjectionTypes, device: torch.device, threads: int) -> None:
        self.device = device
        self._projector = projector
        self._types = types
        self._dtype = base_dtype(TORCH_DTYPE[types.wanted.compute_dtype])
        self._kernels: Kernels = plain_for(device, self._dtype)
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="project", initializer=torch.set_num_threads, initargs=(1,)
        )

    @classmethod
    def load(
        cls, opened: OpenProjector, types: ProjectionTypes, *, device: str = "auto", threads: int | None = None
    ) -> TokenProjector:
        """Load the weights onto a device.

        Raises:
            DeviceError: The device does not exist, or cannot compute in the type.
            ModelError: The weights cannot be read.
        """
        if types.wanted.store_dtype.is_scaled:
            raise UsageError(
                f"projected tokens are not stored as {types.wanted.store_dtype.value}",
                "choose --store-dtype float16, bfloat16 or float32",
            )
        compute = types.wanted.compute_dtype
        compute = ComputeDtype.BFLOAT16 if compute is ComputeDtype.FP8 else compute
        found = find_fit_device(device, compute, compile=False)
        if found.type == "cuda" and compute is ComputeDtype.FLOAT32:
            torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(1)
        projector = load_projector(opened.tensors, device=found, dtype=TORCH_DTYPE[compute])
        return cls(projector, types, found, threads or usable_cpus())

    @property
    def device_name(self) -> str:
        """The name of the device."""
        return device_name(self.device)

    def project(self, tokens: NDArray[Any]) -> ProjectedTiles:
        """Project the visual tokens of n tiles, [n,T,4C] in the stored type; those of scaled types as float32."""
        size = self._batch_tiles
        cut = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        parts = list(self._pool.map(self._batch, cut))
        return ProjectedTiles(
            np.concatenate([part.tokens for part in parts]), np.concatenate([part.fits for part in parts])
        )

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    @property
    def _batch_tiles(self) -> int:
        return 1 if self.device.type == "cpu" else BATCH_TILES

    def _batch(self, stored: NDArray[Any]) -> ProjectedTiles:
        count = len(stored)
        with torch.inference_mode():  # is per thread
            tokens = self._values(stored)
            if missing := self._batch_tiles - count:
                tokens = torch.cat((tokens, tokens.new_zeros(missing, *tokens.shape[1:])))
            values = self._projector(tokens.to(self.device, self._dtype))
            found = self._kernels.store(values, self._plan(values))
            kept, extremes = found.tokens[:count].cpu(), found.extremes[:count].cpu().numpy()
        bits = kept.view(torch.uint16) if kept.dtype is torch.bfloat16 else kept
        return ProjectedTiles(bits.numpy(), self._verdicts(extremes))

    def _values(self, stored: NDArray[Any]) -> Tensor:
        """Return visual tokens [n,T,4C] in the order of the wanted recipe."""
        source, wanted = self._types.source, self._types.wanted
        tokens = as_tensor(stored, StoreDtype.FLOAT32 if source.store_dtype.is_scaled else source.store_dtype)
        if source.token_order is wanted.token_order:
            return tokens
        n, count, width = tokens.shape
        side = math.isqrt(count)
        return tokens.reshape(n, side, side, width).transpose(1, 2).flatten(1, 2)

    def _plan(self, values: Tensor) -> StorePlan:
        wanted = self._types.wanted
        return StorePlan(
            tokens=values.shape[1],
            token_size=values.shape[2],
            dtype=TORCH_STORE_DTYPE[wanted.store_dtype],
            order=None,
            clamp=wanted.on_overflow is OnOverflow.CLAMP,
            infinite_from=infinite_from(wanted.store_dtype),
            mean=False,
        )

    def _verdicts(self, extremes: NDArray[Any]) -> NDArray[Any]:
        wanted = self._types.wanted
        overflow = np.abs(extremes).max(axis=1) >= infinite_from(wanted.store_dtype)
        if wanted.on_overflow is OnOverflow.CLAMP:
            overflow[:] = False
        nan = np.isnan(extremes).any(axis=1)
        return np.where(nan, NOT_A_NUMBER, np.where(overflow, OVERFLOW, FITS)).astype(np.uint8)
