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

SMALLER_MODEL_HINT = "use --dtype bfloat16, a smaller model, or another device"
DECIDED_SIZES = (32, 16, 8, 4, 2, 1)
"""The first that fits is taken. It depends on the memory alone, so that two cards of a kind store the same bits."""
MEASURED_SIZES = (8, 16, 32, 64, 128, 256)
WORTHWHILE_GAIN = 1.03
"""A doubled batch that gains less than this is not worth its memory."""


def accelerator_runner(model: FeatureModel, batch_tiles: int | None, *, measure: bool = False) -> BatchRunner:
    """Return the runner for a CUDA or Apple device, after one batch of the chosen size.

    Args:
        model: on the device.
        batch_tiles: tiles per batch; None takes the first of `DECIDED_SIZES` that fits.
        measure: where none is given, take the fastest size instead (CUDA only), which may differ from run to run.

    Raises:
        DeviceError: the memory does not hold half of the given batch, or not one tile.
    """
    if model.device.type != "cuda":
        return first_that_fits(Launcher(model, model.device), batch_tiles)
    from internvit_cli.encode.cuda import CudaLauncher

    launcher = CudaLauncher(model, model.device)
    return first_that_fits(launcher, measure_batch(launcher.seconds) if measure and not batch_tiles else batch_tiles)


def first_that_fits(launcher: Launcher, batch_tiles: int | None) -> BatchRunner:
    """Return a runner whose batch has been tried: out of memory shows here, not an hour later.

    Args:
        launcher: of the device.
        batch_tiles: tiles per batch, halved once if it does not fit; None takes the first of `DECIDED_SIZES` that fits.

    Raises:
        DeviceError: the memory does not hold half of the given batch, or not one tile.
    """
    side = launcher.model.spec.tile_size
    black = np.zeros((1, side, side, 3), np.uint8)
    for size in (batch_tiles,) if batch_tiles else DECIDED_SIZES:
        runner = BatchRunner(launcher, size)
        try:
            if batch_tiles:
                runner.submit(black).result()
            else:
                launcher.launch(black, size).result()
        except torch.cuda.OutOfMemoryError:
            launcher.release()
        else:
            launcher.busy_seconds = 0.0
            return runner
    raise DeviceError(f"{launcher.device}: one tile does not fit the device's memory", SMALLER_MODEL_HINT)


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
