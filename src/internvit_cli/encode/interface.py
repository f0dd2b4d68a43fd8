"""Define the interfaces of an encoder: its facts, the runner of its batches, and a batch in flight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from internvit_cli.config import ComputeDtype
    from internvit_cli.encode.tile_features import TileFeatures, Tiles
    from internvit_cli.plan.tiling import View


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """Facts about a loaded encoder."""

    device_name: str
    """For example `cpu` or `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    dtype: ComputeDtype
    """The type it computes in, never AUTO."""
    batch_tiles: int
    """The maximum tiles of one `submit`; smaller after a batch ran out of memory."""
    batch_tiles_to_record: int
    """The batch that a later run must use for the same bits; 0 on a CPU, which encodes tiles one by one."""
    kernels: str
    """The kernels in use, `triton` or `plain PyTorch`, with the reason if they are not the fastest."""
    halved: bool = False
    """Whether a batch ran out of memory and the size was halved."""
    resizing: str = ""
    """How the device resizes pictures, in words for a message; empty if the decode workers do so."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Tiles that lie on the device already, and their place in a batch."""

    position: int
    """The index in the batch of the first of them."""
    tiles: Tensor
    """uint8 [n,S,S,3] on the device."""


def placed_within(placed: Sequence[Placed], begin: int, count: int) -> tuple[Placed, ...]:
    """Return the tiles that lie at `begin` or up to `count` after it, with places in the batch that begins there."""
    found = []
    for one in placed:
        first, last = max(one.position, begin), min(one.position + len(one.tiles), begin + count)
        if first < last:
            found.append(Placed(first - begin, one.tiles[first - one.position : last - one.position]))
    return tuple(found)


class PendingBatch(Protocol):
    """A batch in flight."""

    def result(self) -> TileFeatures:
        """Wait for the features; every call returns the same object.

        Raises:
            DeviceError: The device ran out of memory.
        """
        ...


class Runner(Protocol):
    """Runs batches on one kind of device."""

    batch_tiles: int
    halved: bool
    fixed_batch: bool
    """Whether a row's last bits depend on the size of batches."""

    @property
    def note(self) -> str:
        """A remark on how batches are run, such as `, in CUDA graphs`; usually empty."""
        ...

    @property
    def device_seconds(self) -> float:
        """Seconds that the device was busy so far."""
        ...

    def buffer(self) -> NDArray[np.uint8]:
        """Return an empty batch, uint8 [batch_tiles,S,S,3], which lets the caller copy tiles only once."""
        ...

    def submit(self, tiles: Tiles, placed: Sequence[Placed] = ()) -> PendingBatch:
        """Start a batch of uint8 [S,S,3] tiles; the first ones of `buffer` are not copied again.

        Tiles at the places of `placed` are not read; what is on the device replaces them.
        """
        ...

    @property
    def resize_problem(self) -> str:
        """Why the device does not resize pictures as fast as it could, or at all; empty if it does."""
        ...

    def cut(self, picture: NDArray[np.uint8], views: Sequence[View]) -> Tensor:
        """Resize a picture [H,W,3] on the device and return its tiles there; `picture` is free when this returns."""
        ...

    def register(self, memory: NDArray[np.uint8]) -> None:
        """Prepare memory in which pictures will lie, so that the device may read it directly; it must be page-aligned.

        Memory that was registered before is not needed any more.
        """
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...
