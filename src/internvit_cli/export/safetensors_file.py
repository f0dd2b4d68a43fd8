"""Write features as one .safetensors file, with every dataset as a tensor, and keys and reasons as bytes.

The header comes first and rows are written at their places, so the file takes one pass and little memory. The
safetensors library reads headers of up to 100 MB, so keys, of which there may be millions, are not in the header.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.export.blocks import RowSpecs
from internvit_cli.export.facts import attributes_text, native_type, stored_type
from internvit_cli.export.writer import UnpublishedResult
from internvit_cli.plan.table import COLUMN_DTYPES
from internvit_cli.storage.durable import create, disk_errors, open_ours, reserve, sync_data, write_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination
    from internvit_cli.export.selection import RowSelection

ALIGNMENT = 4096
"""Alignment of the first tensor, so that a mapped file is aligned to pages."""
TYPES = {
    "<f8": "F64",
    "<f4": "F32",
    "<f2": "F16",
    "<i8": "I64",
    "<i4": "I32",
    "|i1": "I8",
    "|u1": "U8",
    "<u2": "U16",
    "<u4": "U32",
    "<u8": "U64",
}
SIGNED = {"<u2": "<i4", "<u4": "<i8", "<u8": "<i8"}
"""Signed types instead of wide unsigned ones, which not every framework has; they hold all values that occur."""


def tensor_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the first tensor, and the offset of each tensor.

    Args:
        tensors: safetensors type, shape and size in bytes by name; tensors are stored in this order without gaps.
        metadata: Texts by name.

    Returns:
        The header, beginning with its length and padded with blanks, and byte offsets in the file by name.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, starts = 0, {}
    for name, (kind, shape, nbytes) in tensors.items():
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        starts[name] = position
        position += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    header = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    return header, {name: size + start for name, start in starts.items()}


class SafetensorsWriter:
    """Writes a selection as one .safetensors file."""

    def __init__(self, selection: RowSelection, destination: Destination) -> None:
        self._selection = selection
        self._destination = destination
        self._rows = RowSpecs(selection.written_datasets())
        self._index = index_tensors(selection)
        self._path = destination.staged(destination.name)
        self._descriptor: int | None = None
        tensors = self._tensors()
        self._header, self._starts = tensor_header(tensors, self._metadata())
        self._size = len(self._header) + sum(nbytes for _, _, nbytes in tensors.values())

    def needed_bytes(self) -> int:
        """Return the exact size in bytes."""
        return self._size

    def begin(self) -> None:
        """Create the file at full size, with everything except the features."""
        with disk_errors(self._path):
            with create(self._path) as file:
                file.truncate(self._size)
            self._descriptor = open_ours(self._path)
            reserve(self._path)
        self._put(self._header, 0)
        for name, array in self._index.items():
            self._put(np.ascontiguousarray(array), self._starts[name])

    def add(self, block: RowBlock) -> None:
        """Write rows at their places; vectors of skipped images are NaN."""
        tile = int(self._selection.table.tile_offset[block.first])
        for name, spec in self._rows.specs.items():
            is_per_tile = self._rows.is_per_tile(name)
            if name not in block.arrays and not is_per_tile:
                array: NDArray[Any] = np.full((len(block), *spec.shape[1:]), np.nan, spec.dtype)
            elif name in block.arrays:
                array = block.arrays[name]
            else:
                continue  # reserved but not written, as in a feature file
            first = tile if is_per_tile else block.first
            self._put(array, self._starts[name] + first * spec.row_bytes)

    def finish(self) -> UnpublishedResult:
        """Sync the file."""
        assert self._descriptor is not None
        with disk_errors(self._path):
            sync_data(self._descriptor)
        self.close()
        return UnpublishedResult([self._destination.name])

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _put(self, data: Any, offset: int) -> None:
        assert self._descriptor is not None
        if len(data):
            with disk_errors(self._path):
                write_all(self._descriptor, data, offset)

    def _tensors(self) -> dict[str, tuple[str, tuple[int, ...], int]]:
        """Return type, shape and bytes of all tensors, wide types first, so that each is aligned to its size."""
        found = {name: (TYPES[array.dtype.str], array.shape, array.nbytes) for name, array in self._index.items()}
        sizes = {name: array.dtype.itemsize for name, array in self._index.items()}
        images, tiles = len(self._selection), self._selection.table.tiles
        for spec in self._selection.written_datasets(images, tiles):
            kind = native_type(self._selection, spec.name) or TYPES[spec.dtype]
            found[spec.name] = (kind, spec.shape, spec.nbytes)
            sizes[spec.name] = np.dtype(spec.dtype).itemsize
        # Features come first, because the header ends at a page boundary.
        ordered = sorted(found, key=lambda name: (-sizes[name], name in self._index))
        return {name: found[name] for name in ordered}

    def _metadata(self) -> dict[str, str]:
        attributes = json.loads(attributes_text(self._selection))
        types = {name: stored_type(self._selection, name, spec) for name, spec in self._rows.specs.items()}
        return {name: str(value) for name, value in attributes.items()} | {"dtypes": json.dumps(types)}


def index_tensors(selection: RowSelection) -> dict[str, NDArray[Any]]:
    """Return everything that is known about the images except their features.

    Returns:
        Arrays [n] by name, except for `tile_offset` and `key_offset`, [n + 1], `digest`, uint8 [n, 32], and `key_bytes`
        and `skipped_jsonl`, uint8 [bytes].
    """
    table = selection.table
    lengths = np.fromiter((len(key) for key in table.keys), np.int64, len(table))
    columns = {name: getattr(table, name) for name in COLUMN_DTYPES}
    skips = b"".join(json.dumps(entry).encode() + b"\n" for entry in selection.skips)
    tensors = {
        **columns,
        "tile_offset": table.tile_offset,
        "status": table.status,
        "digest": selection.digests,
        "crc32": selection.checksums,
        "key_offset": np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"),
        "key_bytes": np.frombuffer(b"".join(table.keys), np.uint8),
        "skipped_jsonl": np.frombuffer(skips, np.uint8),
    }
    return {name: array.astype(SIGNED.get(array.dtype.str, array.dtype)) for name, array in tensors.items()}
