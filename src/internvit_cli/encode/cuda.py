"""Batches on a CUDA device: bytes in, computation and features out overlap, by pinned buffers and three streams.

A small batch takes the card less time than Python needs to start its kernels one by one, so it is captured as a CUDA
graph, one for each slot, and started as a whole.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch

from internvit_cli.encode.batches import OUT_OF_MEMORY_HINT, Launcher, taken
from internvit_cli.errors import DeviceError
from internvit_cli.model.features import LayerTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from internvit_cli.encode.interface import PendingBatch
    from internvit_cli.encode.tile_features import TileFeatures
    from internvit_cli.model.features import FeatureModel

IN_FLIGHT = 3
"""Batches with buffers of their own: one being filled, one on the device, one whose results are being fetched."""

LARGEST_GRAPH = 16
"""Tiles of the largest batch that becomes a graph: above, kernels take longer than their starts, and every graph would
hold memory of its own for nothing."""

TIMED_SECONDS = 1.0
"""A batch that takes longer than this is not timed twice."""


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
        with torch.cuda.device(self.device), torch.inference_mode():  # both belong to the thread that calls
            if size != self._size:
                self._allocate(size)
            slot = self._slots[self._turn]
            self._turn = (self._turn + 1) % IN_FLIGHT
            slot.free()
            slot.fill(tiles)
            self._enqueue(slot)
        return slot.hand_out(len(tiles))

    def seconds(self, size: int) -> float:
        """How long the device takes for a batch of so many tiles, the faster of two after a warm-up."""
        side = self.model.spec.tile_size
        try:
            with torch.cuda.device(self.device), torch.inference_mode():
                tiles = torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8, device=self.device)
                self._timed(tiles)
                first = self._timed(tiles)
                return first if first > TIMED_SECONDS else min(first, self._timed(tiles))
        finally:
            torch.cuda.empty_cache()

    def _timed(self, tiles: Tensor) -> float:
        """Seconds of one batch on the device."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        self.model(tiles)
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

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
        self.note = ""
        if size <= LARGEST_GRAPH:
            self._capture()

    def _capture(self) -> None:
        """Make every slot's computation a graph; where that fails, kernels are started one by one as ever."""
        try:
            for slot in self._slots:
                slot.graph, slot.layers = self._graph(slot.device_tiles)
            self.note = ", in CUDA graphs"
        except RuntimeError as error:  # of CUDA and of PyTorch, out of memory among them
            for slot in self._slots:
                slot.graph = slot.layers = None
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            self.note = f" (no CUDA graphs: {' '.join(str(error).split())[:200]})"

    def _graph(self, tiles: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[LayerTensors, ...]]:
        """The computation of tiles in a buffer as a graph, and the buffers that its features will be in."""
        with torch.cuda.stream(self._compute):
            self.model(tiles)  # compiles kernels and makes workspaces, which a capture must not
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Memory of its own: in a shared pool another slot's graph would overwrite features that are being copied out.
        with torch.cuda.graph(graph, stream=self._compute, capture_error_mode="thread_local"):
            layers: tuple[LayerTensors, ...] = self.model(tiles)
        return graph, layers

    def _enqueue(self, slot: Slot) -> None:
        """Queue copy in, computation and copy out, each on its stream and after the one before."""
        with torch.cuda.stream(self._copy_in):
            slot.device_tiles.copy_(slot.host_tiles, non_blocking=True)
            slot.copied.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(slot.copied)
            slot.started.record()
            layers = self._compute_features(slot)
            slot.computed.record()
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(slot.computed)
            for targets, sources in zip(slot.host_layers, layers, strict=True):
                self._copy_layer(targets, sources, is_graph=slot.graph is not None)
            slot.finished.record()

    def _copy_layer(self, targets: LayerTensors, sources: LayerTensors, *, is_graph: bool) -> None:
        """Queue the copy of one layer's features to the host on the current stream."""
        for target, source in zip(targets, sources, strict=True):
            if target is not None and source is not None:
                target.copy_(source, non_blocking=True)
                if not is_graph:
                    source.record_stream(self._copy_out)  # or its memory would be reused before it is read

    def _compute_features(self, slot: Slot) -> tuple[LayerTensors, ...]:
        """Queue a slot's computation on the current stream."""
        if slot.graph is None or slot.layers is None:
            layers: tuple[LayerTensors, ...] = self.model(slot.device_tiles)
            return layers
        slot.graph.replay()
        return slot.layers


class Slot:
    """Buffers and events of one batch in flight."""

    def __init__(self, launcher: CudaLauncher, size: int) -> None:
        self._launcher = launcher
        model = launcher.model
        side = model.spec.tile_size
        self.device_tiles = torch.zeros((size, side, side, 3), dtype=torch.uint8, device=launcher.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.layers: tuple[LayerTensors, ...] | None = None
        """Where the graph leaves its features, layer by layer."""
        self.host_tiles = _pinned((size, side, side, 3), torch.uint8)
        self.host_layers = [_pinned_features(model, size) for _ in (None, *model.spec.earlier_layers)]
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
        return taken(self.host_layers, count, self._launcher.model.spec)


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


def _pinned_features(model: FeatureModel, size: int) -> LayerTensors:
    """Buffers on the host for one layer's features of so many tiles."""
    shapes = model.shapes
    is_scaled = model.plan is not None and model.plan.is_scaled
    return LayerTensors(
        _pinned((size, shapes.tokens, shapes.token_size), model.store_dtype) if shapes.tokens else None,
        _pinned((size, shapes.pooled_size), torch.float32),
        _pinned((size, 2), torch.float32),
        _pinned((size,), torch.int64),
        _pinned((size, shapes.tokens), torch.float32) if is_scaled else None,
    )


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:  # the driver's refusal has no class of its own
        raise DeviceError("not enough host memory for the batch's pinned buffers", OUT_OF_MEMORY_HINT) from error
