"""Run batches on a CUDA device; pinned buffers and streams overlap copy in, computation and copy out.

A `buffer` is memory that the card reads directly, and features are returned in memory that the card wrote, which is
reused when no array over it is left. So the host copies a tile once, and its features never.

Whole pictures are read by the card where the decode workers wrote them, and are resized and cut there, before the batch
that holds their tiles.

A small batch takes the card less time than Python needs to start its kernels one by one. So it is captured as a CUDA
graph, one per slot, and started as a whole.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
import weakref
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from internvit_cli.encode.batches import OUT_OF_MEMORY_HINT, Launcher, first_tiles, put
from internvit_cli.encode.resizing.cutter import Cutter
from internvit_cli.encode.to_host import on_host
from internvit_cli.errors import DeviceError, one_line
from internvit_cli.model.features import LayerTensors
from internvit_cli.plan.tiling import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from internvit_cli.encode.interface import PendingBatch, Placed
    from internvit_cli.encode.tile_features import LayerFeatures, TileFeatures, Tiles
    from internvit_cli.model.features import FeatureModel
    from internvit_cli.model.kernels.interface import StorePlan

LayerShapes: TypeAlias = "tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]"
"""Shape and type of each of `LayerTensors`; None for those that are None."""

IN_FLIGHT = 3
"""Batches with their own buffers: one being filled, one on the device, one whose results are being fetched."""

LARGEST_GRAPH = 16
"""Tiles of the largest batch that becomes a graph. Kernels of larger batches take longer than their starts, and their
graphs would waste memory."""

PROBE_WIDTH, PROBE_HEIGHT = 457, 123
"""Pixels of the pictures with which resizing is tried."""
TIMED_SECONDS = 1.0
"""A batch that takes longer than this is not timed twice."""


class CudaLauncher(Launcher):
    """A ring of slots; a slot's batch is fetched at the latest when the slot is used again."""

    def __init__(self, model: FeatureModel, device: torch.device) -> None:
        super().__init__(model, device)
        torch.cuda.set_device(device)  # otherwise pinning would open a context on device 0
        # Resizing also runs here. Its short kernels go first, or each would wait for a whole matrix product.
        self._copy_in = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._upload = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots: list[Slot] = []
        self._pools: list[FeaturePool] = []
        """Host memory of features, layer by layer."""
        self._turn = 0
        self._size = 0
        self._registered: NDArray[np.uint8] | None = None
        """Memory that the card reads directly."""
        torch.cuda.synchronize(device)  # the weights were copied on the default stream

    def buffer(self, size: int) -> NDArray[np.uint8]:
        """Return the pinned tiles of the next slot, once the card no longer needs them."""
        with torch.cuda.device(self.device), torch.inference_mode():
            return self._next_slot(size).tiles

    def cut(self, picture: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
        """Copy a picture to the card, and queue its resizing; the tiles are ready on the stream of copies in."""
        with torch.cuda.device(self.device), torch.inference_mode():
            with torch.cuda.stream(self._upload):
                pixels = torch.from_numpy(picture).to(self.device, non_blocking=True)
            self._upload.synchronize()  # from here on, the caller may overwrite the picture
            with torch.cuda.stream(self._copy_in):
                tiles = self.cutter.cut(pixels, views)
            pixels.record_stream(self._copy_in)  # otherwise its memory would be reused before it is read
            return tiles

    @cached_property
    def resize_problem(self) -> str:
        """Why pictures are better resized on the host: the kernel or the way to it does not work; empty if it does."""
        if self.cutter.problem:
            return f"plain PyTorch: {self.cutter.problem}"
        try:
            return self._cut_problem()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as failure:  # noqa: BLE001 -- drivers fail with classes of their own
            return one_line(str(failure), 200) or type(failure).__name__

    def _cut_problem(self) -> str:
        """Cut pictures that follow each other in one piece of memory, as in a run, and compare them with the host's."""
        side = self.model.spec.tile_size
        views = View(2 * side, side, 0, 0, 2, 1), View(side, side, 0, 0, 1, 1)
        by_host, random = Cutter(torch.device("cpu"), side), np.random.default_rng(0)
        memory = np.frombuffer(mmap.mmap(-1, PROBE_HEIGHT * PROBE_WIDTH * 3), np.uint8)
        picture = memory.reshape(PROBE_HEIGHT, PROBE_WIDTH, 3)
        self.register(memory)
        expected, found = [], []
        for _ in range(3):
            picture[:] = random.integers(0, 256, picture.shape, np.uint8)
            expected.append(by_host.cut(torch.from_numpy(picture), views))
            found.append(self.cut(picture, views))
        torch.cuda.synchronize(self.device)
        is_right = all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))
        return "" if is_right else "tiles that were cut on the card are wrong"

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Let the card read memory directly. If the driver refuses, PyTorch copies it to memory of its own first."""
        if memory is self._registered:
            return
        with torch.cuda.device(self.device):
            self._unregister()
            driver = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if int(driver.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)) == 0:
                self._registered = memory
            else:
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self.device)  # takes the error away, which the next kernel would report

    def _unregister(self) -> None:
        if self._registered is not None:
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self._registered.ctypes.data)  # type: ignore[no-untyped-call]
            self._registered = None

    def launch(self, tiles: Tiles, size: int, placed: Sequence[Placed] = ()) -> PendingBatch:
        """Start a batch of exactly `size` that begins with these tiles, and return at once."""
        with torch.cuda.device(self.device), torch.inference_mode():  # both are per thread
            slot = self._next_slot(size)
            self._turn = (self._turn + 1) % IN_FLIGHT
            slot.fill(tiles, placed)
            self._enqueue(slot)
        return slot.hand_out(len(tiles))

    def _next_slot(self, size: int) -> Slot:
        if size != self._size:
            self._allocate(size)
        slot = self._slots[self._turn]
        slot.free()
        return slot

    def seconds(self, size: int) -> float:
        """Return the seconds of a batch of `size` tiles: the faster of two, after a warm-up."""
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
        """Return the seconds of one batch on the device."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        self.model(tiles)
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def lend(self, layers: list[LayerTensors], count: int) -> TileFeatures:
        """Return features as arrays over the pools' memory, which returns to the pools with the last array."""
        features = on_host([first_tiles(layer, count) for layer in layers], self.model.spec)
        for pool, tensors, arrays in zip(self._pools, layers, features.layers, strict=True):
            pool.lend(tensors, arrays)
        return features

    def release(self) -> None:
        """Fetch the batches in flight, and free the buffers and the allocator's cache."""
        for slot in self._slots:
            slot.free()
        self._slots, self._pools, self._size, self._turn = [], [], 0, 0
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Release everything, and the memory that the card reads directly."""
        self.release()
        with torch.cuda.device(self.device):
            self._unregister()

    def _allocate(self, size: int) -> None:
        self.release()
        self._slots = [Slot(self, size) for _ in range(IN_FLIGHT)]
        self._pools = [FeaturePool(self.model, size) for _ in (None, *self.model.spec.earlier_layers)]
        self._size = size
        self.note = ""
        if size <= LARGEST_GRAPH:
            self._capture()

    def _capture(self) -> None:
        """Make every slot's computation a graph; if that fails, kernels are started one by one."""
        try:
            for slot in self._slots:
                slot.graph, slot.layers = self._graph(slot.device_tiles)
            self.note = ", in CUDA graphs"
        except RuntimeError as error:  # of CUDA and PyTorch, including out of memory
            for slot in self._slots:
                slot.graph = slot.layers = None
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            self.note = f" (no CUDA graphs: {' '.join(str(error).split())[:200]})"

    def _graph(self, tiles: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[LayerTensors, ...]]:
        """Return a graph of the computation of a buffer's tiles, and the tensors that will hold its features."""
        with torch.cuda.stream(self._compute):
            self.model(tiles)  # compiles kernels and allocates workspaces, which a capture must not do
        self._compute.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Each graph has its own memory: in a shared pool, another graph would overwrite features that are being copied.
        with torch.cuda.graph(graph, stream=self._compute, capture_error_mode="thread_local"):
            layers: tuple[LayerTensors, ...] = self.model(tiles)
        return graph, layers

    def _enqueue(self, slot: Slot) -> None:
        """Queue copy in, computation and copy out, each on its own stream and after the previous one."""
        with torch.cuda.stream(self._copy_in):
            if sum(len(one.tiles) for one in slot.placed) < slot.count:
                slot.device_tiles.copy_(slot.host_tiles, non_blocking=True)
            put(slot.placed, slot.device_tiles)
            slot.placed = ()
            slot.copied.record()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(slot.copied)
            slot.started.record()
            layers = self._compute_features(slot)
            slot.computed.record()
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(slot.computed)
            slot.host_layers = [pool.take() for pool in self._pools]
            for targets, sources in zip(slot.host_layers, layers, strict=True):
                self._copy_layer(targets, sources, is_graph=slot.graph is not None)
            slot.finished.record()

    def _copy_layer(self, targets: LayerTensors, sources: LayerTensors, *, is_graph: bool) -> None:
        """Queue the copy of one layer's features to the host on the current stream."""
        for target, source in zip(targets, sources, strict=True):
            if target is not None and source is not None:
                target.copy_(source, non_blocking=True)
                if not is_graph:
                    source.record_stream(self._copy_out)  # otherwise its memory would be reused before it is read

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
        """Features that the graph writes, layer by layer."""
        self.host_tiles = _pinned((size, side, side, 3), torch.uint8)
        self.tiles: NDArray[np.uint8] = self.host_tiles.numpy()
        """The same memory."""
        self.placed: Sequence[Placed] = ()
        """Tiles that are on the card already."""
        self.count = 0
        """Tiles of the batch; what follows is not used."""
        self.host_layers: list[LayerTensors] = []
        """Host memory for the features of the batch in flight, layer by layer."""
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.computed = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.finished = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._batch: CudaBatch | None = None

    def fill(self, tiles: Tiles, placed: Sequence[Placed]) -> None:
        """Copy tiles into the pinned buffer unless they are already there; pad it with black."""
        self.placed, self.count = placed, len(tiles)
        if not (isinstance(tiles, np.ndarray) and tiles.ctypes.data == self.tiles.ctypes.data):
            np.stack(list(tiles), out=self.tiles[: len(tiles)])
        self.tiles[len(tiles) :] = 0

    def hand_out(self, count: int) -> CudaBatch:
        """Return the batch that was just queued."""
        self._batch = CudaBatch(self, count)
        return self._batch

    def free(self) -> None:
        """Wait until the buffers are no longer needed."""
        if self._batch is not None:
            self._batch.result()
            self._batch = None

    def fetch(self, count: int) -> TileFeatures:
        """Wait for the copy out and return the features of the first tiles, in the memory that the card wrote."""
        self.finished.synchronize()
        self._launcher.busy_seconds += self.started.elapsed_time(self.computed) / 1000
        layers, self.host_layers = self.host_layers, []
        self._batch = None  # otherwise its memory would be kept until the slot is used again
        return self._launcher.lend(layers, count)


class CudaBatch:
    """A batch in flight; the first thread that asks fetches its result, once."""

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


class FeaturePool:
    """Pinned memory for one layer's features, for as many batches as are in use at the same time.

    It is bounded by what may be in flight and wait for the disk (`writer_thread.MOST_WAITING`). Memory is reused,
    because pinning takes longer than a batch.
    """

    def __init__(self, model: FeatureModel, size: int) -> None:
        shapes = model.shapes
        self._shapes: LayerShapes = (
            ((size, shapes.tokens, shapes.token_size), model.store_dtype) if shapes.tokens else None,
            ((size, shapes.pooled_size), torch.float32),
            ((size, 2), torch.float32),
            ((size,), torch.int64),
            None if model.plan is None else _scales_shape(model.plan, size),
        )
        self._free: tuple[deque[Tensor], ...] = tuple(deque() for _ in self._shapes)

    def take(self) -> LayerTensors:
        """Return memory that is not in use; allocate it if there is none."""
        return LayerTensors(*map(self._take, self._shapes, self._free))  # type: ignore[arg-type]

    def lend(self, tensors: LayerTensors, arrays: LayerFeatures) -> None:
        """Take each tensor back once no array over its memory is left, or at once if there is no array.

        Args:
            tensors: Tensors from `take`.
            arrays: Arrays over the memory of some of them.
        """
        lent = {0: arrays.tokens, 1: arrays.pooled, 4: arrays.scales}
        for number, (tensor, free) in enumerate(zip(tensors, self._free, strict=True)):
            if tensor is None:
                continue
            # All views of an array keep that array alive (numpy's `base`).
            array = lent.get(number)
            if array is None:
                free.append(tensor)
            else:
                weakref.finalize(array, free.append, tensor).atexit = False

    @staticmethod
    def _take(shape: tuple[tuple[int, ...], torch.dtype] | None, free: deque[Tensor]) -> Tensor | None:
        if shape is None:
            return None
        try:
            return free.popleft()
        except IndexError:
            return _pinned(*shape)


def _scales_shape(plan: StorePlan, size: int) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Return the shape and type of the scales of `size` tiles; None if tokens have none."""
    if not plan.is_scaled:
        return None
    if plan.scales_per_token:
        return (size, plan.tokens, plan.scales_per_token), torch.float16
    return (size, plan.tokens), torch.float32


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:  # the driver's refusal has no specific class
        raise DeviceError("not enough host memory for the batch's pinned buffers", OUT_OF_MEMORY_HINT) from error
