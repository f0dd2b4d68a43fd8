"""Write the index as a .csv file (RFC 4180), with one line per image and without features."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from internvit_cli.export.facts import NUMBERS, as_utf8, image_facts, is_utf8
from internvit_cli.export.writer import SequentialFile, UnpublishedResult
from internvit_cli.storage.durable import disk_errors

if TYPE_CHECKING:
    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination
    from internvit_cli.export.selection import RowSelection

FIELDS = ("key", "key_hex", "status", "reason", *NUMBERS, "tiles", "digest", "crc32", "path")
"""The columns; `key_hex` has the bytes of a key that is not UTF-8, and is empty for all others."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Characters with which a spreadsheet begins a formula."""


def as_line(facts: dict[str, Any]) -> bytes:
    """Return one line of the file, in which no text begins a formula."""
    key = facts["key"]
    values = facts | {
        "key": harmless(as_utf8(key), "./"),
        "key_hex": "" if is_utf8(key) else key.encode("utf-8", "surrogateescape").hex(),
        "reason": harmless(as_utf8(facts["reason"]), " "),
        "path": harmless(as_utf8(facts["path"]), "./"),
    }
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerow([values[name] for name in FIELDS])
    return text.getvalue().encode()


def harmless(text: str, prefix: str) -> str:
    """Return text that no spreadsheet runs as a formula: `=1.jpg` becomes `./=1.jpg`."""
    return prefix + text if text.startswith(FORMULA) else text


class CsvWriter:
    """Writes the index of a selection."""

    def __init__(self, selection: RowSelection, destination: Destination) -> None:
        self._selection = selection
        self._destination = destination
        self._file = SequentialFile(destination)
        self._out: Any = None

    def needed_bytes(self) -> int:
        """Return 0, because the file is small."""
        return 0

    def begin(self) -> None:
        """Create the file with its first line."""
        self._out = self._file.create(self._destination.name)
        self._write(",".join(FIELDS).encode() + b"\r\n")

    def add(self, block: RowBlock) -> None:
        """Write one line per image."""
        for position in range(block.first, block.first + len(block)):
            self._write(as_line(image_facts(self._selection, position)))

    def finish(self) -> UnpublishedResult:
        """Sync the file."""
        self._file.sync()
        return UnpublishedResult(
            [self._destination.name], notes=["a .csv does not hold features, only the facts about images"]
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: bytes) -> None:
        with disk_errors(self._destination.path):
            self._out.write(line)
