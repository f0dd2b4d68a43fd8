"""What every target offers, and the little that several of them share."""

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
    """Makes one kind of result, in the folder of its destination."""

    def needed_bytes(self) -> int:
        """About how many bytes the result has, known before any work; 0 where it hardly matters."""
        ...

    def begin(self) -> None:
        """Make the files."""
        ...

    def add(self, block: RowBlock) -> None:
        """Take the images that come next."""
        ...

    def finish(self) -> UnpublishedResult:
        """Complete and sync the files."""
        ...

    def close(self) -> None:
        """Let the files go, finished or not; a second time does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class UnpublishedResult:
    """A result that is complete, and not yet published."""

    names: Sequence[str]
    """In the order in which they get their names."""
    obsolete: Sequence[str] = ()
    """Paths that belonged to what they replace."""
    withdrawn: Sequence[str] = ()
    """Paths that speak for what they replace, and go before anything gets its name."""
    notes: Sequence[str] = field(default=())
    """What the target could not hold as it was."""


class OneFile:
    """A file that is written from front to back."""

    def __init__(self, destination: Destination) -> None:
        self.destination = destination
        self._file: BinaryIO | None = None

    def create(self, name: str) -> BinaryIO:
        """Begin a file of the result; an earlier one is finished."""
        self.sync()
        path = self.destination.staged(name)
        with disk_errors(path):
            self._file = create(path, buffering=1 << 20)
        return self._file

    def sync(self) -> None:
        """Have the file on the disk, and close it."""
        if self._file is not None:
            with disk_errors(self._file.name):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._file = None

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # what cannot be written is dropped with it
                file.close()
