"""Decide which files of a folder are taken, by their names, the patterns and, with `--sniff`, their first bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.sources.extensions import looks_like_picture
from internvit_cli.sources.left_out import LeftOut, LeftOutCounter
from internvit_cli.sources.rules import WholePaths, make_rules
from internvit_cli.sources.signatures import first_bytes, is_picture

if TYPE_CHECKING:
    import os

    from internvit_cli.sources.interface import DiscoverOptions


class FileSelection:
    """Decides on every file and folder that a walk meets, and counts what it leaves out."""

    def __init__(self, options: DiscoverOptions) -> None:
        """Compile the patterns of the options.

        Raises:
            UsageError: A pattern cannot match anything.
        """
        patterns = options.exclude, options.include
        self._rules = make_rules(*patterns, defaults=options.default_excludes)
        self._whole_paths = WholePaths(self._rules)
        self._of_named = WholePaths(make_rules(*patterns, defaults=False)) if any(patterns) else None
        self._asks_of_every_file = self._rules.asks_of_every_file
        self._sniffs = options.sniff
        self._counter = LeftOutCounter()

    @property
    def left_out(self) -> LeftOut:
        """The files that were left out so far."""
        return self._counter.result(sniffed=self._sniffs)

    def enters(self, path: bytes, *, wanted: bool) -> bool | None:
        """Return whether the files in a folder are wanted, or None if the folder is not walked.

        Args:
            path: Its path relative to the folder of the source.
            wanted: Whether an `--include` matches a folder above it.
        """
        excluding, wanted = self._rules.folder(path, wanted=wanted)
        if excluding:
            self._counter.excluded(excluding)
            return None
        return wanted

    def takes(self, path: bytes, entry: os.DirEntry[bytes], *, wanted: bool, may_open: bool = True) -> bool:
        """Return whether a file is taken.

        Args:
            path: Its path relative to the folder of the source.
            entry: The file, or a link to one.
            wanted: Whether an `--include` matches a folder above it.
            may_open: Whether its first bytes may be read.
        """
        name = entry.name
        is_asked = self._asks_of_every_file or name.startswith(b".")
        if is_asked and (excluding := self._rules.file(path, wanted=wanted)):
            self._counter.excluded(excluding)
            return False
        if looks_like_picture(name):
            return True
        if not may_open or not entry.is_file():
            return False
        if self._sniffs and is_picture(first_bytes(entry.path), name):
            return True
        self._counter.unread(name)
        return False

    def takes_member(self, path: bytes) -> bool:
        """Return whether a member of an archive is taken, by its name.

        Args:
            path: Its path in the archive.
        """
        if excluding := self._whole_paths.file(path):
            self._counter.excluded(excluding)
            return False
        if looks_like_picture(path.rpartition(b"/")[2]):
            return True
        self._counter.unread(path.rpartition(b"/")[2])
        return False

    def takes_named(self, path: bytes) -> bool:
        """Return whether a file that the user named is taken, which only the user's patterns decide.

        Args:
            path: Its path relative to its root.
        """
        excluding = self._of_named.file(path) if self._of_named else ""
        if excluding:
            self._counter.excluded(excluding)
        return not excluding

    def excludes(self, path: bytes) -> bool:
        """Return whether a walk would exclude a file because of a pattern, without counting it.

        Args:
            path: Its path relative to the folder of the source.
        """
        return bool(self._whole_paths.file(path))
