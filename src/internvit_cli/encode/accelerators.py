"""The runner for a CUDA or Apple device, with the size of its batches chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from internvit_cli.encode.batches import OUT_OF_MEMORY_HINT, BatchRunner, Launcher
from internvit_cli.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.model.features import FeatureModel

MEASURED_SIZES = (8, 16, 32, 64, 128, 256)
WORTHWHILE_GAIN = 1.03
"""A doubled batch that gains less than this is not worth its memory."""

DEFAULT_BATCH = 8
"""Where nothing is measured."""


def accelerator_runner(model: FeatureModel, batch_tiles: int | None) -> BatchRunner:
    """The runner for a CUDA or Apple device, with its batch size measured when none is given, and tried once.

    Raises:
        DeviceError: not even half a batch fits.
    """
    launcher = Launcher(model, model.device)
    if model.device.type == "cuda":
        from internvit_cli.encode.cuda import CudaLauncher

        launcher = CudaLauncher(model, model.device)
        batch_tiles = batch_tiles or measure_batch(launcher.seconds)
    runner = BatchRunner(launcher, batch_tiles or DEFAULT_BATCH)
    size = model.spec.tile_size
    runner.submit([np.zeros((size, size, 3), np.uint8)]).result()  # out of memory shows here, not an hour later
    launcher.busy_seconds = 0.0
    return runner


def measure_batch(seconds: Callable[[int], float]) -> int:
    """The batch size after which doubling gains less than 3 %, or memory ends.

    Args:
        seconds: how long a batch of so many tiles takes; raises torch.cuda.OutOfMemoryError when it does not fit.

    Raises:
        DeviceError: not even the smallest fits.
    """
    best_size, best_rate = 0, 0.0
    for size in MEASURED_SIZES:
        try:
            rate = size / seconds(size)
        except torch.cuda.OutOfMemoryError:
            break
        if rate < best_rate * WORTHWHILE_GAIN:
            break
        best_size, best_rate = size, rate
    if not best_size:
        raise DeviceError(f"a batch of {MEASURED_SIZES[0]} tiles does not fit the device's memory", OUT_OF_MEMORY_HINT)
    return best_size
