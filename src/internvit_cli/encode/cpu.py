"""Encode tiles on a CPU: each tile is a task on one thread, and threads encode tiles in parallel."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from internvit_cli.encode.resizing.cutter import Cutter
from internvit_cli.encode.tile_features import TileFeatures
from internvit_cli.encode.to_host import on_host
from internvit_cli.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from internvit_cli.encode.interface import PendingBatch, Placed
    from internvit_cli.encode.tile_features import Tiles
    from internvit_cli.model.features import FeatureModel, FeatureSpec, LayerTensors
    from internvit_cli.plan.tiling import View

CPU_TILES_PER_THREAD = 4
"""Tiles per thread in a batch on a CPU. Throughput does not depend on it, since tiles are encoded one by one. It must
be large enough to cover the submission of the next batch, and small so that little is in flight."""


class CpuRunner:
    """Runs one task per tile and one thread per task."""

    halved = False
    fixed_batch = False
    note = ""

    def __init__(self, model: FeatureModel, *, threads: int, batch_tiles: int | None) -> None:
        self.batch_tiles = batch_tiles or CPU_TILES_PER_THREAD * threads
        self._model = model
        self._threads = threads
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="encode", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._lock = threading.Lock()
        self._busy_seconds = 0.0

    @cached_property
    def cutter(self) -> Cutter:
        """Makes tiles of whole pictures."""
        return Cutter(self._model.device, self._model.spec.tile_size)

    @property
    def device_seconds(self) -> float:
        """Thread seconds spent on tiles, divided by the number of threads."""
        return self._busy_seconds / self._threads

    def buffer(self) -> NDArray[np.uint8]:
        """Return new memory, because the threads read that of a batch until it is done."""
        side = self._model.spec.tile_size
        return np.empty((self.batch_tiles, side, side, 3), np.uint8)

    @property
    def resize_problem(self) -> str:
        """Why pictures are not resized here unless that is asked for."""
        return "it is slower than Pillow"

    def cut(self, picture: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
        """Resize a picture on this thread. That is slower than Pillow, and meant for tests of what devices do."""
        return self.cutter.cut(torch.from_numpy(picture), views)

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Do nothing, because the threads read any memory."""

    def submit(self, tiles: Tiles, placed: Sequence[Placed] = ()) -> PendingBatch:
        """Queue one task per tile."""
        if placed:
            tiles = list(tiles)
            for one in placed:
                tiles[one.position : one.position + len(one.tiles)] = list(one.tiles.numpy())
        return CpuBatch([self._pool.submit(self._encode, tile) for tile in tiles], self._model.spec)

    def close(self) -> None:
        """Finish submitted tiles and end the threads."""
        self._pool.shutdown()

    def _encode(self, tile: np.ndarray) -> tuple[LayerTensors, ...]:
        start = time.perf_counter()
        try:
            with torch.inference_mode():  # is per thread
                features: tuple[LayerTensors, ...] = self._model(torch.from_numpy(tile)[None])
        except RuntimeError as error:
            if "allocate memory" not in str(error):
                raise
            raise DeviceError(
                "cpu: not enough memory to encode a tile", "use fewer threads or a smaller model"
            ) from error
        finally:
            with self._lock:
                self._busy_seconds += time.perf_counter() - start
        return features


class CpuBatch:
    """Tiles whose tasks were queued together."""

    def __init__(self, futures: list[Future[tuple[LayerTensors, ...]]], spec: FeatureSpec) -> None:
        self._futures = futures
        self._spec = spec
        self._result: TileFeatures | None = None

    def result(self) -> TileFeatures:
        """Wait for the features.

        Raises:
            DeviceError: Out of memory.
        """
        if self._result is None:
            self._result = TileFeatures.join([on_host(future.result(), self._spec) for future in self._futures])
            self._futures = []
        return self._result
