"""Define the interface of all targets, and the code that several of them share."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Protocol

from internvit_cli.storage.durable import create, disk_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination


class Writer(Protocol):
    """Writes one kind of result, in the working folder of its destination."""

    def needed_bytes(self) -> int:
        """Return the approximate size of the result in bytes, before any work; 0 if it is small."""
        ...

    def begin(self) -> None:
        """Create the files."""
        ...

    def add(self, block: RowBlock) -> None:
        """Write the next images."""
        ...

    def finish(self) -> UnpublishedResult:
        """Complete and sync the files."""
        ...

    def close(self) -> None:
        """Close the files, finished or not; calling it again does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class UnpublishedResult:
    """A result that is complete but not published yet."""

    names: Sequence[str]
    """The names of the files, in the order in which they are renamed."""
    obsolete: Sequence[str] = ()
    """Paths of the replaced result, which are removed afterwards."""
    withdrawn: Sequence[str] = ()
    """Paths that describe the replaced result, which are removed before anything is renamed."""
    notes: Sequence[str] = field(default=())
    """Notes on what the target cannot hold unchanged."""


class SequentialFile:
    """A file that is written sequentially."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self._file: BinaryIO | None = None

    def create(self, name: str) -> BinaryIO:
        """Create a file of the result, after the previous one is finished."""
        self.sync()
        path = self.destination.staged(name)
        with disk_errors(path):
            self._file = create(path, buffering=1 << 20)
        return self._file

    def sync(self) -> None:
        """Sync the file to the disk, and close it."""
        if self._file is not None:
            with disk_errors(self._file.name):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # the unfinished file is discarded
                file.close()
