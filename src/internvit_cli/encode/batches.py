"""Run batches of one fixed size on an accelerator: padded, overlapped on CUDA, halved once if memory runs out.

A fixed size makes every batch run the same kernels, so that a tile's features do not depend on the tiles beside it, and
lets every buffer be allocated once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from internvit_cli.encode.interface import placed_within
from internvit_cli.encode.resizing.cutter import Cutter
from internvit_cli.encode.tile_features import TileFeatures
from internvit_cli.encode.to_host import on_host
from internvit_cli.errors import DeviceError
from internvit_cli.model.features import LayerTensors
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.encode.interface import PendingBatch, Placed
    from internvit_cli.encode.tile_features import Tiles
    from internvit_cli.model.features import FeatureModel
    from internvit_cli.plan.tiling import View

OUT_OF_MEMORY_HINT = "give a smaller --batch-size"


class BatchRunner:
    """Splits submitted tiles into batches that fit, and survives one out-of-memory error."""

    fixed_batch = True

    def __init__(self, launcher: Launcher, batch_tiles: int) -> None:
        self.batch_tiles = batch_tiles
        self.halved = False
        self._launcher = launcher

    @property
    def device_seconds(self) -> float:
        """Seconds that the device computed, for batches whose results were fetched."""
        return self._launcher.busy_seconds

    @property
    def note(self) -> str:
        """A remark on how batches are run; usually empty."""
        return self._launcher.note

    def buffer(self) -> NDArray[np.uint8]:
        """Return an empty batch that the launcher does not have to copy."""
        return self._launcher.buffer(self.batch_tiles)

    @property
    def resize_problem(self) -> str:
        """Why the device does not resize pictures as fast as it could, or at all; empty if it does."""
        return self._launcher.resize_problem

    def cut(self, picture: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
        """Resize a picture on the device, and return its tiles there.

        Raises:
            DeviceError: Out of memory.
        """
        try:
            return self._launcher.cut(picture, views)
        except torch.cuda.OutOfMemoryError as error:
            raise DeviceError(
                f"{self._launcher.device}: out of memory for resizing a picture",
                f"use --resize cpu, or {OUT_OF_MEMORY_HINT}",
            ) from error

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Prepare memory in which pictures will lie."""
        self._launcher.register(memory)

    def submit(self, tiles: Tiles, placed: Sequence[Placed] = ()) -> PendingBatch:
        """Start a batch; more tiles than `batch_tiles`, as after a halving, become several batches.

        Raises:
            DeviceError: Out of memory again after a halving.
        """
        parts: list[PendingBatch] = []
        begin = 0
        while begin < len(tiles):
            part = tiles[begin : begin + self.batch_tiles]
            try:
                within = placed_within(placed, begin, len(part))
                parts.append(self._launcher.launch(part, self.batch_tiles, within))
            except torch.cuda.OutOfMemoryError as error:
                self._halve(error)
            else:
                begin += len(part)
        return parts[0] if len(parts) == 1 else JoinedBatches(parts)

    def _halve(self, error: Exception) -> None:
        if self.halved or self.batch_tiles == 1:
            raise DeviceError(
                f"{self._launcher.device}: out of memory with batches of {counted(self.batch_tiles, 'tile')}",
                OUT_OF_MEMORY_HINT,
            ) from error
        self.halved = True
        self.batch_tiles //= 2
        self._launcher.release()

    def close(self) -> None:
        """Fetch the batches in flight and free the buffers."""
        self._launcher.close()


class JoinedBatches:
    """Several batches that were submitted as one."""

    def __init__(self, parts: Sequence[PendingBatch]) -> None:
        self._parts = parts

    def result(self) -> TileFeatures:
        """Wait for all batches."""
        return TileFeatures.join([part.result() for part in self._parts])


def each_part(layer: LayerTensors, change: Callable[[Tensor], Tensor]) -> LayerTensors:
    """Apply a function to each tensor that is not None."""
    return LayerTensors(*(None if part is None else change(part) for part in layer))  # type: ignore[arg-type]


def first_tiles(layer: LayerTensors, count: int) -> LayerTensors:
    """Return the features of the first `count` tiles, as views."""
    return each_part(layer, lambda part: part[:count])


def padded(tiles: Tiles, size: int) -> NDArray[np.uint8]:
    """Return tiles as one array of exactly `size`, padded with black; an array of that size is not copied."""
    if isinstance(tiles, np.ndarray) and len(tiles) == size:
        return tiles
    batch = np.zeros((size, *tiles[0].shape), np.uint8)
    np.stack(list(tiles), out=batch[: len(tiles)])
    return batch


def put(placed: Sequence[Placed], batch: Tensor) -> None:
    """Copy tiles that are on a device to their places in a batch there."""
    for one in placed:
        batch[one.position : one.position + len(one.tiles)].copy_(one.tiles, non_blocking=True)


class Launcher:
    """Runs padded batches on one device. This class works on any device and waits for each batch."""

    note = ""

    def __init__(self, model: FeatureModel, device: torch.device) -> None:
        self.device = device
        self.busy_seconds = 0.0
        self.model = model

    @cached_property
    def cutter(self) -> Cutter:
        """Makes tiles of whole pictures; its kernel is compiled and tried when it is first asked for."""
        return Cutter(self.device, self.model.spec.tile_size)

    @cached_property
    def resize_problem(self) -> str:
        """Why the device does not resize pictures as fast as it could, or at all; empty if it does."""
        return self.cutter.problem

    def buffer(self, size: int) -> NDArray[np.uint8]:
        """Return an empty batch of `size` tiles."""
        side = self.model.spec.tile_size
        return np.empty((size, side, side, 3), np.uint8)

    def cut(self, picture: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
        """Resize a picture [H,W,3] on the device, and return its tiles there, uint8 [n,S,S,3]."""
        with torch.inference_mode():
            return self.cutter.cut(torch.from_numpy(picture).to(self.device), views)

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Do nothing, because this device copies from any memory."""

    def launch(self, tiles: Tiles, size: int, placed: Sequence[Placed] = ()) -> PendingBatch:
        """Encode up to `size` tiles as a batch of exactly `size`; `placed` replaces the tiles at its places."""
        start = time.perf_counter()
        with torch.inference_mode():
            batch = torch.from_numpy(padded(tiles, size)).to(self.device, copy=True)
            put(placed, batch)
            layers: tuple[LayerTensors, ...] = self.model(batch)
            fetched = [first_tiles(each_part(layer, Tensor.cpu), len(tiles)) for layer in layers]
        self.busy_seconds += time.perf_counter() - start
        return FinishedBatch(on_host(fetched, self.model.spec))

    def release(self) -> None:
        """Fetch the batches in flight and free the buffers."""

    def close(self) -> None:
        """Release everything; nothing is launched any more."""
        self.release()


@dataclass(frozen=True)
class FinishedBatch:
    """A batch whose features are ready."""

    features: TileFeatures

    def result(self) -> TileFeatures:
        """Return the features."""
        return self.features
