"""Read the strings of an HDF5 dataset by position: a million keys in a fraction of a second.

HDF5 itself allocates as much memory as a file claims that a string has, and copies a large string for every row that
refers to it. Here no string is longer than a path, and all strings together are not longer than the file.
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
"""A reference to a string in a dataset: its length in bytes, the collection that holds it, and its number there."""
ROWS = 65536
"""Strings read at a time."""
COLLECTION, OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HHIQ")
"""Headers of a collection (signature, version, bytes) and of each string in it (number, reference count, bytes)."""
COLLECTION_START = b"GCOL\x01\0\0\0"
USUAL_BYTES = 4096
"""Size of most collections."""


def check_collection(descriptor: int, address: int, most: int) -> int:
    """Check that the objects of a collection are contiguous up to its end; return its bytes.

    Raises:
        OSError: They are not, or it has more than `most` bytes.
    """
    head = os.pread(descriptor, COLLECTION.size, address)
    size = COLLECTION.unpack_from(head.ljust(COLLECTION.size))[2]
    if not COLLECTION.size <= size <= most:
        raise OSError(f"a collection of strings in it has {size:,} bytes")
    data, position = os.pread(descriptor, size, address), COLLECTION.size
    while position + OBJECT.size <= len(data):
        index, _, _, length = OBJECT.unpack_from(data, position)
        taken = OBJECT.size + (length + 7 & ~7) if index else length  # the length of free space includes its header
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
            descriptor: Descriptor of the file.
            path: Path of the file, for messages.
            offset: Byte offset of the dataset's rows.
            count: Number of strings.
            longest: Maximum bytes of a string; no string is empty.
        """
        self._descriptor = descriptor
        self._path = path
        self._offset = offset
        self._count = count
        self._longest = longest
        self._size = os.fstat(descriptor).st_size
        self._room = 2 * self._size
        """Bytes of collections that may still be read: they do not overlap, and few are read twice."""

    def places(self) -> Iterator[NDArray[Any]]:
        """Yield the references to the strings in blocks, [k] of `PLACE`."""
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
        """Yield the strings in order."""
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
        """Read collections one after another; return their bytes, and the start of each and the end of the last."""
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
    """Return where strings begin if their collections hold nothing else, contiguously and ordered by number."""
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
    """Return whether strings of these numbers and lengths begin there, in collections that end there."""
    words = np.frombuffer(data, "<u8")
    is_inside = starts + lengths <= ends
    heads = np.where(is_inside, (starts - OBJECT.size) // 8, 0)
    found: NDArray[np.bool_] = is_inside & (words[heads] & 0xFFFF == index) & (words[heads + 1] == lengths)
    return found


def _objects(data: bytes, start: int, stop: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the number of each string of a collection, with its start and its bytes."""
    position = start + COLLECTION.size
    while position + OBJECT.size <= stop:
        index, _, _, size = OBJECT.unpack_from(data, position)
        position += OBJECT.size
        if index == 0 or size > stop - position:  # free space, or damage
            return
        yield index, (position, size)
        position += size + 7 & ~7
