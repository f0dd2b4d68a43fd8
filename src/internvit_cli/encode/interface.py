"""What runs batches on one kind of device, and a batch on its way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from internvit_cli.encode.tile_features import TileFeatures


class PendingBatch(Protocol):
    """A batch on its way."""

    def result(self) -> TileFeatures:
        """Wait for the features; the same object however often it is called.

        Raises:
            DeviceError: the device ran out of memory.
        """
        ...


class Runner(Protocol):
    """What does the work on one kind of device."""

    batch_tiles: int
    halved: bool
    fixed_batch: bool
    """Whether a row's last bits depend on the size of batches."""

    @property
    def note(self) -> str:
        """How batches are run, where that is worth telling; such as `, in CUDA graphs`."""
        ...

    @property
    def device_seconds(self) -> float:
        """Time the device was busy so far, seconds."""
        ...

    def submit(self, tiles: Sequence[np.ndarray]) -> PendingBatch:
        """Start a batch of uint8 [S,S,3] tiles."""
        ...

    def close(self) -> None:
        """Give up threads and memory."""
        ...
