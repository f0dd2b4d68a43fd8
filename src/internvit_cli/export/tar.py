"""Write features as a tar for WebDataset: a sample per image, with `00000000.json` and one .npy file per dataset.

Headers contain neither users nor times, so the same features give the same bytes.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import UsageError
from internvit_cli.export.blocks import RowSpecs
from internvit_cli.export.facts import (
    attributes_text,
    bits_notes,
    image_facts,
    is_bfloat16,
    stored_type,
    widened,
)
from internvit_cli.export.writer import SequentialFile, UnpublishedResult
from internvit_cli.storage.durable import disk_errors, write_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination
    from internvit_cli.export.selection import RowSelection

BLOCK = 512
END_BYTES = 2 * BLOCK
SERIES = re.compile(r"-\d{6,}\.tar")


def entry_header(name: str, size: int) -> bytes:
    """Return the header of a file; sizes over 8 GiB need a PAX record."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    """Return the zeros up to the next whole block."""
    return bytes(-size % BLOCK)


def closed_size(size: int) -> int:
    """Return the size of a tar that ends after `size` bytes, with two empty blocks and filled to a whole record."""
    return -(-(size + END_BYTES) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def npy_header(array: NDArray[Any]) -> bytes:
    """Return the header of an array in a .npy file."""
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(text, np.lib.format.header_data_from_array_1_0(array))
    return text.getvalue()


class TarWriter:
    """Writes a selection as one tar, or as a series with a list that WebDataset reads."""

    def __init__(
        self, selection: RowSelection, destination: Destination, shard_bytes: int | None, *, widen: bool = False
    ) -> None:
        self._selection = selection
        self._destination = destination
        self._rows = RowSpecs(selection.written_datasets())
        self._most = shard_bytes
        self._widen = widen
        self._file = SequentialFile(destination)
        self._out: Any = None
        self._stem = destination.name.removesuffix(".tar")
        self._written = 0
        self._shards: list[dict[str, Any]] = []
        self._opening = tarfile.TarInfo.create_pax_global_header({"comment": attributes_text(selection)})
        if self._most is not None:
            least = closed_size(len(self._opening))
            if self._most < least:
                raise UsageError(
                    f"--shard-size: {self._most:,} bytes are too few, because an empty tar takes {least:,}",
                    f"give {least:,} or more",
                )
            self._present = self._members()

    @property
    def _is_series(self) -> bool:
        return self._most is not None

    def needed_bytes(self) -> int:
        """Return the approximate size, with headers and padding of their usual size."""
        tiles = self._selection.table.tile_counts[self._selection.is_done]
        features = int(self._rows.image_bytes(tiles).sum()) * (2 if self._widen else 1)
        files = len(self._selection) + len(tiles) * len(self._rows.specs)
        return features + 2 * BLOCK * (files + len(self._selection))

    def begin(self) -> None:
        """Create the first tar."""
        self._next()

    def add(self, block: RowBlock) -> None:
        """Write samples one after the other; a series continues in another tar when one is full."""
        for number in range(len(block)):
            arrays = block.image(number) if block.is_done else {}
            if self._widen:
                arrays = {name: widened(a) if self._is_bits(name) else a for name, a in arrays.items()}
            sample = self._sample(block.first + number, arrays)
            size = self._written + sum(memoryview(part).nbytes for part in sample)
            if self._most is not None and self._shards[-1]["nsamples"] and closed_size(size) > self._most:
                self._end()
                self._next()
            for part in sample:
                self._write(part)
            self._shards[-1]["nsamples"] += 1

    def finish(self) -> UnpublishedResult:
        """Finish the last tar, and list a series in NEW.json, without which it is not complete."""
        self._end()
        notes = bits_notes(self._selection, self._rows.specs, widen=self._widen)
        names = [shard["url"] for shard in self._shards]
        if not self._is_series:
            return UnpublishedResult(names, notes=notes)
        listed = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": self._shards}
        names.append(f"{self._stem}.json")
        write_file(self._destination.staged(names[-1]), json.dumps(listed, indent=1).encode() + b"\n")
        kept = {self._destination.final(name) for name in names}
        # The old list is removed first, because new tars among the old ones must not pass for one series.
        withdrawn = [path for path in self._present if path.endswith(".json")]
        return UnpublishedResult(names, [path for path in self._present if path not in kept], withdrawn, notes)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _members(self) -> list[str]:
        """Return the existing tars of a series with these names, and its list."""
        folder = os.path.dirname(self._destination.path)
        names = [
            name
            for name in os.listdir(folder)
            if name == f"{self._stem}.json"
            or (name.startswith(self._stem) and SERIES.fullmatch(name.removeprefix(self._stem)))
        ]
        paths = [os.path.join(folder, name) for name in sorted(names)]
        for path in paths:
            self._destination.refuse_beside(path)
        return paths

    def _is_bits(self, name: str) -> bool:
        return is_bfloat16(self._selection, name)

    def _next(self) -> None:
        name = f"{self._stem}-{len(self._shards):06d}.tar" if self._is_series else self._destination.name
        self._out = self._file.create(name)
        self._shards.append({"url": name, "nsamples": 0, "filesize": 0})
        self._written = 0
        self._write(self._opening)

    def _end(self) -> None:
        self._write(bytes(closed_size(self._written) - self._written))
        self._shards[-1]["filesize"] = self._written
        self._file.sync()

    def _sample(self, position: int, arrays: dict[str, NDArray[Any]]) -> list[Any]:
        """Return the pieces of an image's sample."""
        name = f"{position:08d}"
        facts = image_facts(self._selection, position)
        facts["arrays"] = {
            dataset: {"shape": list(array.shape), "dtype": self._type_of(dataset)} for dataset, array in arrays.items()
        }
        text = json.dumps(facts).encode()
        parts: list[Any] = [entry_header(f"{name}.json", len(text)) + text + padding(len(text))]
        for dataset, array in arrays.items():
            header = npy_header(array)
            size = len(header) + array.nbytes
            parts.append(entry_header(f"{name}.{dataset}.npy", size) + header)
            parts.append(array.data if array.ndim == 1 else np.ascontiguousarray(array).reshape(-1).data)
            parts.append(padding(size))
        return parts

    def _type_of(self, dataset: str) -> str:
        if self._widen and self._is_bits(dataset):
            return "float32"
        return stored_type(self._selection, dataset, self._rows.specs[dataset])

    def _write(self, data: Any) -> None:
        with disk_errors(self._destination.path):
            self._out.write(data)
        self._written += memoryview(data).nbytes
