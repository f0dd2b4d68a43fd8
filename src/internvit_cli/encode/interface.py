"""The contracts of an encoder: what it says of itself, what runs its batches, and a batch in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from internvit_cli.config import ComputeDtype
    from internvit_cli.encode.tile_features import TileFeatures, Tiles


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What a loaded encoder says of itself."""

    device_name: str
    """Such as `cpu` or `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    dtype: ComputeDtype
    """The type it computes in, never AUTO."""
    batch_tiles: int
    """The most tiles of one `submit`; smaller after a batch ran out of memory."""
    batch_tiles_to_record: int
    """The batch that a later run must use again for the same bits; 0 on a CPU, which encodes tiles one by one."""
    kernels: str
    """What computes: `triton` or `plain PyTorch`, and why where that is not the fastest."""
    halved: bool = False
    """Whether a batch ran out of memory and the size was halved."""


class PendingBatch(Protocol):
    """A batch in flight."""

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

    def buffer(self) -> NDArray[np.uint8]:
        """Return an empty batch, uint8 [batch_tiles,S,S,3], for whoever wants to copy tiles but once."""
        ...

    def submit(self, tiles: Tiles) -> PendingBatch:
        """Start a batch of uint8 [S,S,3] tiles; the first ones of `buffer` are not copied again."""
        ...

    def close(self) -> None:
        """Give up threads and memory."""
        ...
