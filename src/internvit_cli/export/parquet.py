"""Write features as a .parquet file, with one row per image, vectors as lists, and rows per tile as bytes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import OutputError, UsageError
from internvit_cli.export.blocks import RowSpecs
from internvit_cli.export.facts import (
    NUMBERS,
    as_utf8,
    attributes_text,
    bits_notes,
    image_facts,
    is_bfloat16,
    is_utf8,
    stored_type,
    widened,
)
from internvit_cli.export.writer import SequentialFile, UnpublishedResult
from internvit_cli.plan.table import COLUMN_DTYPES
from internvit_cli.storage.durable import disk_errors

if TYPE_CHECKING:
    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination
    from internvit_cli.export.selection import RowSelection

GROUP_BYTES = 32 << 20
"""Bytes of features per row group, unless a single image is larger."""
GROUP_ROWS = 100_000


def import_pyarrow() -> Any:
    """Import pyarrow, which writes the format.

    Raises:
        UsageError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            "parquet files need pyarrow, which is not installed", "pip install 'internvit-cli[parquet]'"
        ) from error
    assert pyarrow.parquet is not None
    return pa


class ParquetWriter:
    """Writes a selection as one .parquet file."""

    def __init__(self, selection: RowSelection, destination: Destination, *, widen: bool = False) -> None:
        self._pa = import_pyarrow()
        self._selection = selection
        self._destination = destination
        self._rows = RowSpecs(selection.written_datasets())
        self._widen = widen
        self._file = SequentialFile(destination)
        self._writer: Any = None
        self._schema = self._pa.schema(self._fields(), metadata=self._metadata())
        self._waiting: dict[str, list[Any]] = {name: [] for name in self._schema.names}
        self._waiting_bytes = 0

    def needed_bytes(self) -> int:
        """Return the approximate size; features are not compressed, because their lowest bits are noise."""
        size = int(self._rows.image_bytes(self._selection.table.tile_counts[self._selection.is_done]).sum())
        return size * (2 if self._widen else 1)

    def begin(self) -> None:
        """Create the file."""
        features = list(self._rows.specs)
        facts = [name for name in self._schema.names if name not in features]
        self._writer = self._pa.parquet.ParquetWriter(
            self._file.create(self._destination.name),
            self._schema,
            compression={name: "none" if name in features else "snappy" for name in self._schema.names},
            use_dictionary=[name for name in facts if name == "status"],
            write_statistics=facts,
        )

    def add(self, block: RowBlock) -> None:
        """Collect rows, and write a row group when there are enough."""
        for number in range(len(block)):
            arrays = block.image(number) if block.is_done else {}
            facts = image_facts(self._selection, block.first + number)
            for name, value in self._cells(facts).items():
                self._waiting[name].append(value)
            for name in self._rows.specs:
                self._waiting[name].append(self._cell(name, arrays))
            self._waiting_bytes += sum(array.nbytes for array in arrays.values())
            if self._waiting_bytes >= GROUP_BYTES or len(self._waiting["key"]) >= GROUP_ROWS:
                self._write_group()

    def finish(self) -> UnpublishedResult:
        """Write the remaining rows and the footer, and sync the file."""
        self._write_group()
        with disk_errors(self._destination.path):
            self._writer.close()
        self._writer = None
        self._file.sync()
        notes = bits_notes(self._selection, self._rows.specs, widen=self._widen)
        return UnpublishedResult([self._destination.name], notes=notes)

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with suppress(OSError, ValueError, self._pa.ArrowException):  # the unfinished file is discarded
                writer.close()
        self._file.close()

    # ----------------------------------------------------------------------------------------------------- the columns

    def _fields(self) -> list[Any]:
        pa = self._pa
        fields = [pa.field("key", pa.string()), pa.field("key_bytes", pa.binary())]
        fields += [pa.field("status", pa.string()), pa.field("reason", pa.string())]
        fields += [pa.field(name, pa.from_numpy_dtype(np.dtype(COLUMN_DTYPES[name]))) for name in NUMBERS]
        fields += [pa.field("tiles", pa.uint32()), pa.field("digest", pa.binary(32)), pa.field("crc32", pa.uint32())]
        fields.append(pa.field("path", pa.string()))
        return fields + [self._feature_field(name) for name in self._rows.specs]

    def _feature_field(self, name: str) -> Any:
        pa, spec = self._pa, self._rows.specs[name]
        if not self._rows.is_per_tile(name):
            return pa.field(name, pa.list_(pa.from_numpy_dtype(np.dtype(spec.dtype)), spec.shape[1]))
        is_widened = self._widen and is_bfloat16(self._selection, name)
        facts = {
            "dtype": "float32" if is_widened else stored_type(self._selection, name, spec),
            "numpy": "<f4" if is_widened else spec.dtype,
            "shape": json.dumps(["tiles", *spec.shape[1:]]),
        }
        return pa.field(name, pa.large_binary(), metadata=facts)

    def _metadata(self) -> dict[str, str]:
        attributes = json.loads(attributes_text(self._selection))
        return {f"internvit.{name}": as_utf8(str(value)) for name, value in attributes.items()}

    def _cells(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the facts about an image for the columns; those that a skipped image lacks are null."""
        key = facts["key"]
        return facts | {
            "key": as_utf8(key),
            "key_bytes": None if is_utf8(key) else os.fsencode(key),
            "reason": as_utf8(facts["reason"]) or None,
            "digest": bytes.fromhex(facts["digest"]) or None,
            "crc32": int(facts["crc32"], 16) if facts["crc32"] else None,
            "path": as_utf8(facts["path"]),
        }

    def _cell(self, name: str, arrays: dict[str, Any]) -> Any:
        if name not in arrays:
            return None
        array = arrays[name]
        if not self._rows.is_per_tile(name):
            return array
        if self._widen and is_bfloat16(self._selection, name):
            array = widened(array)
        return array.tobytes()

    def _write_group(self) -> None:
        if not self._waiting["key"]:
            return
        columns = [self._pa.array(self._waiting[field.name], field.type) for field in self._schema]
        try:
            with disk_errors(self._destination.path):
                self._writer.write_table(
                    self._pa.Table.from_arrays(columns, schema=self._schema), row_group_size=GROUP_ROWS
                )
        except self._pa.ArrowException as error:
            raise OutputError(f"cannot write {self._destination.path}: {error}", "check the disk") from error
        self._waiting = {name: [] for name in self._schema.names}
        self._waiting_bytes = 0
