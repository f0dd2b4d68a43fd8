"""Provide the shared memory in which decode workers pass tiles or pictures to the parent without a copy.

The segment is an anonymous memory file that is passed by descriptor and allocated up front, so that a small /dev/shm
cannot break a run, and nothing is left behind when a process is killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import InternvitError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LESS_MEMORY_HINT = "lower --workers or --max-tiles"


@dataclass(frozen=True, slots=True)
class SlotShape:
    """The size of the segment: `slots` times `tiles` RGB tiles of `tile_size` x `tile_size` pixels, uint8."""

    slots: int
    tiles: int
    tile_size: int
    picture_bytes: int = 0
    """Bytes of the largest picture that a slot holds whole; 0 if slots are only for tiles."""

    @property
    def slot_bytes(self) -> int:
        """The size of one slot in bytes, whose start is that of a page, as for drivers of devices."""
        tiles = self.tiles * self.tile_size * self.tile_size * 3
        return -(-max(tiles, self.picture_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE

    @property
    def nbytes(self) -> int:
        """The size of the segment in bytes."""
        return self.slots * self.slot_bytes


class Slots:
    """Slots that each hold the tiles of one image, or the whole picture."""

    def __init__(self, shape: SlotShape, descriptor: int) -> None:
        self.shape = shape
        self.descriptor = descriptor
        memory = mmap.mmap(descriptor, shape.nbytes)
        self.memory: NDArray[Any] = np.frombuffer(memory, np.uint8).reshape(shape.slots, shape.slot_bytes)
        """All slots, uint8 [slots, bytes]."""

    @classmethod
    def allocate(cls, shape: SlotShape) -> Slots:
        """Create a segment with every page reserved.

        Raises:
            InternvitError: There is not enough memory.
        """
        descriptor = _anonymous_file()
        try:
            os.ftruncate(descriptor, shape.nbytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, shape.nbytes)
        except OSError as error:
            os.close(descriptor)
            raise InternvitError(
                f"no memory for {shape.nbytes / 1e6:.0f} MB of tiles between decoding and encoding: {error.strerror}",
                "lower --workers or --max-tiles, or use --resize cpu" if shape.picture_bytes else LESS_MEMORY_HINT,
            ) from error
        return cls(shape, descriptor)

    def tiles(self, slot: int, count: int) -> NDArray[Any]:
        """Return the first `count` tiles of a slot as a view of shared memory, uint8 [count, S, S, 3]."""
        side = self.shape.tile_size
        return self.memory[slot, : count * side * side * 3].reshape(count, side, side, 3)

    def picture(self, slot: int, width: int, height: int) -> NDArray[Any]:
        """Return a slot as a picture, a view of shared memory, uint8 [height, width, 3]."""
        return self.memory[slot, : width * height * 3].reshape(height, width, 3)

    def close(self) -> None:
        """Close the descriptor; the memory is freed with its last view."""
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("internvit-tiles")
    descriptor, path = tempfile.mkstemp(prefix="internvit-tiles")
    os.unlink(path)
    return descriptor
