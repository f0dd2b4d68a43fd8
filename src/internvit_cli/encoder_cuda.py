"""Batches on a CUDA device: bytes in, computation and features out overlap, by pinned buffers and three streams."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

from internvit_cli.encoder_batches import OUT_OF_MEMORY_HINT, Launcher, to_host
from internvit_cli.errors import DeviceError
from internvit_cli.model.features import Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from internvit_cli.encoder import PendingBatch, TileFeatures
    from internvit_cli.model.features import FeatureModel

IN_FLIGHT = 3
"""Batches with buffers of their own: one being filled, one on the device, one whose results are being fetched."""


class CudaLauncher(Launcher):
    """A ring of slots; a slot's batch is fetched, at the latest, when the slot's turn comes again."""

    def __init__(self, model: FeatureModel, device: torch.device) -> None:
        super().__init__(model, device)
        torch.cuda.set_device(device)  # or pinning would open a context on device 0
        self._copy_in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots: list[Slot] = []
        self._turn = 0
        self._size = 0
        torch.cuda.synchronize(device)  # the weights were copied on the default stream

    def launch(self, tiles: Sequence[np.ndarray], size: int) -> PendingBatch:
        """Start a batch of exactly `size`, of which the first tiles are these; returns at once."""
        if size != self._size:
            self._allocate(size)
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % IN_FLIGHT
        slot.free()
        slot.fill(tiles)
        with torch.inference_mode():
            self._enqueue(slot)
        return slot.hand_out(len(tiles))

    def seconds(self, size: int) -> float:
        """How long the device takes for a batch of so many tiles, the faster of two after a warm-up."""
        side = self.model.spec.tile_size
        times = []
        try:
            with torch.inference_mode():
                tiles = torch.zeros((size, side, side, 3), dtype=torch.uint8, device=self.device)
                for _ in range(3):
                    torch.cuda.synchronize(self.device)
                    start = time.perf_counter()
                    self.model(tiles)
                    torch.cuda.synchronize(self.device)
                    times.append(time.perf_counter() - start)
        finally:
            torch.cuda.empty_cache()
        return min(times[1:])

    def release(self) -> None:
        """Fetch what is in flight, free the buffers and the allocator's cache."""
        for slot in self._slots:
            slot.free()
        self._slots, self._size, self._turn = [], 0, 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _allocate(self, size: int) -> None:
        self.release()
        self._slots = [Slot(self, size) for _ in range(IN_FLIGHT)]
        self._size = size

    def _enqueue(self, slot: Slot) -> None:
        """Queue copy in, computation and copy out, each on its stream and after the one before."""
        with torch.cuda.stream(self._copy_in):
            slot.device_tiles.copy_(slot.host_tiles, non_blocking=True)
            slot.copied.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(slot.copied)
            slot.started.record()
            features: Features = self.model(slot.device_tiles)
            slot.computed.record()
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(slot.computed)
            for target, source in zip(slot.host_features, features, strict=True):
                if target is not None and source is not None:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(self._copy_out)  # or its memory would be reused before it is read
            slot.finished.record()


class Slot:
    """Buffers and events of one batch in flight."""

    def __init__(self, launcher: CudaLauncher, size: int) -> None:
        self._launcher = launcher
        model = launcher.model
        side, shapes = model.spec.tile_size, model.shapes
        self.device_tiles = torch.empty((size, side, side, 3), dtype=torch.uint8, device=launcher.device)
        self.host_tiles = _pinned((size, side, side, 3), torch.uint8)
        tokens = _pinned((size, shapes.tokens, shapes.token_size), model.store_dtype) if shapes.tokens else None
        self.host_features = Features(
            tokens,
            _pinned((size, shapes.pooled_size), torch.float32),
            _pinned((size, 2), torch.float32),
            _pinned((size,), torch.int64),
        )
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.computed = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.finished = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._batch: CudaBatch | None = None

    def fill(self, tiles: Sequence[np.ndarray]) -> None:
        """Copy tiles into the pinned buffer; the rest of it is black."""
        for target, tile in zip(self.host_tiles, tiles, strict=False):
            target.copy_(torch.from_numpy(tile))
        self.host_tiles[len(tiles) :].zero_()

    def hand_out(self, count: int) -> CudaBatch:
        """The batch that was just queued."""
        self._batch = CudaBatch(self, count)
        return self._batch

    def free(self) -> None:
        """Make sure that nobody needs the buffers any more."""
        if self._batch is not None:
            self._batch.result()
            self._batch = None

    def fetch(self, count: int) -> TileFeatures:
        """Wait for the copy out and take the first features."""
        self.finished.synchronize()
        self._launcher.busy_seconds += self.started.elapsed_time(self.computed) / 1000
        return to_host(self.host_features, count, self._launcher.model.spec)


class CudaBatch:
    """A batch on its way; its result is taken once, by whichever thread comes first."""

    def __init__(self, slot: Slot, count: int) -> None:
        self._slot: Slot | None = slot
        self._count = count
        self._lock = threading.Lock()
        self._result: TileFeatures | None = None

    def result(self) -> TileFeatures:
        """Wait for the features."""
        with self._lock:
            if self._slot is not None:
                self._result = self._slot.fetch(self._count)
                self._slot = None
            assert self._result is not None
            return self._result


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:  # the driver's refusal has no class of its own
        raise DeviceError("not enough host memory for the batch's pinned buffers", OUT_OF_MEMORY_HINT) from error
