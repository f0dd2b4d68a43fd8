"""Make the runner for a CUDA or Apple device, and choose the size of its batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from internvit_cli.encode.batches import OUT_OF_MEMORY_HINT, BatchRunner, Launcher
from internvit_cli.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

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
    launcher = Launcher(model, model.device)
    sizes: Sequence[int] = DECIDED_SIZES
    if model.device.type == "cuda":
        from internvit_cli.encode.cuda import CudaLauncher

        launcher = CudaLauncher(model, model.device)
        if measure and not batch_tiles:
            sizes = sizes_below(measure_batch(launcher.seconds))
    return given_batch(launcher, batch_tiles) if batch_tiles else first_that_fits(launcher, sizes)


def given_batch(launcher: Launcher, batch_tiles: int) -> BatchRunner:
    """Return a runner of a given batch after one batch, so that running out of memory shows now, not an hour later.

    Raises:
        DeviceError: The memory does not even hold half of the batch.
    """
    runner = BatchRunner(launcher, batch_tiles)
    runner.submit(_black_tile(launcher)).result()
    launcher.busy_seconds = 0.0
    return runner


def first_that_fits(launcher: Launcher, sizes: Sequence[int] = DECIDED_SIZES) -> BatchRunner:
    """Return a runner of the first batch size that the memory holds, with all the buffers of a run.

    Raises:
        DeviceError: The memory holds none.
    """
    for size in sizes:
        if _fits(launcher, size):
            launcher.busy_seconds = 0.0
            return BatchRunner(launcher, size)
    raise DeviceError(f"{launcher.device}: one tile does not fit into the device's memory", SMALLER_MODEL_HINT)


def _fits(launcher: Launcher, size: int) -> bool:
    try:
        launcher.launch(_black_tile(launcher), size).result()
    except torch.cuda.OutOfMemoryError:
        launcher.release()
        return False
    return True


def sizes_below(size: int) -> list[int]:
    """Return a batch size and its halves down to 1, for a measurement that left no room for the buffers of a run."""
    return [size >> halvings for halvings in range(size.bit_length())]


def _black_tile(launcher: Launcher) -> NDArray[np.uint8]:
    side = launcher.model.spec.tile_size
    return np.zeros((1, side, side, 3), np.uint8)


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
