"""The strings of an HDF5 dataset, read by position: a million keys in a fraction of a second.

HDF5 itself sets memory aside by the length that a file claims for a string, and gives every row that names one large
string a copy of it. Here no string is longer than a path, and all together are no longer than the file.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.storage.durable import read_exactly

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PLACE = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
"""Where a dataset says that a string is: its bytes, the collection that holds it, and its number in there."""
ROWS = 65536
"""Strings read in one go."""
COLLECTION, OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HHIQ")
"""What a collection begins with: signature, version, bytes. What each string in it does: number, users, bytes."""
COLLECTION_START = b"GCOL\x01\0\0\0"
USUAL_BYTES = 4096
"""Of a collection."""


def check_collection(descriptor: int, address: int, most: int) -> int:
    """Check that the pieces of a collection follow each other to its end; returns its bytes.

    Raises:
        OSError: they do not, or it has more than `most` bytes.
    """
    head = os.pread(descriptor, COLLECTION.size, address)
    size = COLLECTION.unpack_from(head.ljust(COLLECTION.size))[2]
    if not COLLECTION.size <= size <= most:
        raise OSError(f"a collection of strings in it has {size:,} bytes")
    data, position = os.pread(descriptor, size, address), COLLECTION.size
    while position + OBJECT.size <= len(data):
        index, _, _, length = OBJECT.unpack_from(data, position)
        taken = OBJECT.size + (length + 7 & ~7) if index else length  # the room that is left counts its own head
        if not OBJECT.size <= taken <= size - position:
            raise OSError("the strings of its attributes are damaged")
        position += taken
    return int(size)


class StringReader:
    """Reads the strings of one dataset.

    Every method raises a ValueError for strings that are not where the file says.
    """

    def __init__(self, descriptor: int, path: str, offset: int, count: int, longest: int) -> None:
        """Prepare to read; nothing is read yet.

        Args:
            descriptor: of the file.
            path: of the file, for messages.
            offset: where the dataset's rows lie.
            count: how many there are.
            longest: most bytes of one; none is empty.
        """
        self._descriptor = descriptor
        self._path = path
        self._offset = offset
        self._count = count
        self._longest = longest
        self._size = os.fstat(descriptor).st_size
        self._room = 2 * self._size
        """Bytes of collections that are yet to be read: they do not overlap, and few are read twice."""

    def places(self) -> Iterator[NDArray[Any]]:
        """Read where the strings are, some at a time, [k] of `PLACE`."""
        total = 0
        for start in range(0, self._count, ROWS):
            count = min(ROWS, self._count - start)
            offset = self._offset + start * PLACE.itemsize
            data = read_exactly(self._descriptor, count * PLACE.itemsize, offset, self._path)
            places = np.frombuffer(data, PLACE)
            total += int(places["length"].sum(dtype=np.int64))
            if int(places["length"].min()) == 0:
                raise ValueError("a key is empty")
            if int(places["length"].max()) > self._longest:
                raise ValueError(f"a key is longer than {self._longest:,} bytes")
            if total > self._size or int(places["address"].max()) >= self._size:
                raise ValueError("its keys lie outside the file")
            yield places

    def strings(self) -> Iterator[bytes]:
        """Read the strings in their order."""
        for places in self.places():
            yield from self._strings(places)

    def _strings(self, places: NDArray[Any]) -> list[bytes]:
        addresses, collection = np.unique(places["address"], return_inverse=True)
        data, bases = self._collections(addresses.tolist())
        lengths = places["length"].astype(np.int64)
        starts = _expected_starts(collection, places["index"], lengths) + bases[collection]
        is_there = _are_there(data, starts, places["index"], lengths, bases[collection + 1])
        for number in np.unique(collection[~is_there]).tolist():
            found = dict(_objects(data, int(bases[number]), int(bases[number + 1])))
            for row in np.flatnonzero(collection == number).tolist():
                start, length = found.get(int(places["index"][row]), (0, -1))
                if length != lengths[row]:
                    raise ValueError("a key is not where the file says")
                starts[row] = start
        return [data[start:stop] for start, stop in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]

    def _collections(self, addresses: list[int]) -> tuple[bytes, NDArray[np.int64]]:
        """Read collections one behind another; returns where each begins in what was read, and where the last ends."""
        parts, bases = [], [0]
        for address in addresses:
            part = os.pread(self._descriptor, USUAL_BYTES, address)
            signature, version, size = COLLECTION.unpack_from(part.ljust(COLLECTION.size))
            if signature != b"GCOL" or version != 1 or size % 8 or not COLLECTION.size <= size <= self._room:
                raise ValueError("the strings of its keys are damaged")
            self._room -= size
            if size > len(part):
                part += os.pread(self._descriptor, size - len(part), address + len(part))
            parts.append(part[:size].ljust(size, b"\0"))
            bases.append(bases[-1] + size)
        return b"".join(parts), np.array(bases, np.int64)


def _expected_starts(collection: NDArray[Any], index: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Where strings begin in collections that hold them by their numbers, one behind another, and nothing else."""
    order = np.lexsort((index, collection))
    sizes = OBJECT.size + (lengths[order] + 7 & ~7)
    ends = np.cumsum(sizes)
    is_first = np.diff(collection[order], prepend=-1) != 0
    before = np.maximum.accumulate(np.where(is_first, ends - sizes, 0))
    starts = np.empty(len(order), np.int64)
    starts[order] = COLLECTION.size + OBJECT.size + ends - sizes - before
    return starts


def _are_there(
    data: bytes, starts: NDArray[Any], index: NDArray[Any], lengths: NDArray[Any], ends: NDArray[Any]
) -> NDArray[np.bool_]:
    """Whether strings of these numbers and lengths begin there, in collections that end there."""
    words = np.frombuffer(data, "<u8")
    is_inside = starts + lengths <= ends
    heads = np.where(is_inside, (starts - OBJECT.size) // 8, 0)
    found: NDArray[np.bool_] = is_inside & (words[heads] & 0xFFFF == index) & (words[heads + 1] == lengths)
    return found


def _objects(data: bytes, start: int, stop: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Number, start and bytes of each string of a collection."""
    position = start + COLLECTION.size
    while position + OBJECT.size <= stop:
        index, _, _, size = OBJECT.unpack_from(data, position)
        position += OBJECT.size
        if index == 0 or size > stop - position:  # the room that is left, or damage
            return
        yield index, (position, size)
        position += size + 7 & ~7
