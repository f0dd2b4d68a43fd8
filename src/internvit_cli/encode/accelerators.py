"""Make the runner for a CUDA or Apple device, and choose the size of its batches."""

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
"""The first size that fits is used. It depends only on the memory, so two cards of the same model store equal bits."""
MEASURED_SIZES = (8, 16, 32, 64, 128, 256)
WORTHWHILE_GAIN = 1.03
"""A doubled batch that speeds up by less than this factor is not worth its memory."""


def accelerator_runner(model: FeatureModel, batch_tiles: int | None, *, measure: bool = False) -> BatchRunner:
    """Return the runner for a CUDA or Apple device, after running one batch of the chosen size.

    Args:
        model: The model, on the device.
        batch_tiles: Tiles per batch; None selects the first of `DECIDED_SIZES` that fits.
        measure: If `batch_tiles` is None, select the fastest size instead (CUDA only), which may differ between runs.

    Raises:
        DeviceError: The memory does not hold half of the given batch, or not even one tile.
    """
    if model.device.type != "cuda":
        return first_that_fits(Launcher(model, model.device), batch_tiles)
    from internvit_cli.encode.cuda import CudaLauncher

    launcher = CudaLauncher(model, model.device)
    return first_that_fits(launcher, measure_batch(launcher.seconds) if measure and not batch_tiles else batch_tiles)


def first_that_fits(launcher: Launcher, batch_tiles: int | None) -> BatchRunner:
    """Return a runner after trying a batch, so that running out of memory shows here and not an hour later.

    Args:
        launcher: The launcher of the device.
        batch_tiles: Tiles per batch, halved once if it does not fit; None selects the first of `DECIDED_SIZES` that
            fits.

    Raises:
        DeviceError: The memory does not hold half of the given batch, or not even one tile.
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
    raise DeviceError(f"{launcher.device}: one tile does not fit into the device's memory", SMALLER_MODEL_HINT)


def measure_batch(seconds: Callable[[int], float]) -> int:
    """Return the batch size after which doubling gains less than 3%, or memory runs out.

    Args:
        seconds: Measures a batch of a number of tiles; raises torch.cuda.OutOfMemoryError if it does not fit.

    Raises:
        DeviceError: Not even the smallest fits.
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
        raise DeviceError(
            f"a batch of {MEASURED_SIZES[0]} tiles does not fit into the device's memory", OUT_OF_MEMORY_HINT
        )
    return best_size
