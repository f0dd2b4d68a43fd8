"""What of a folder is taken: one place that asks the names, the patterns and, on request, the first bytes."""

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
        """Translate the patterns of the options.

        Raises:
            UsageError: one of them can fit nothing.
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
        """What was left out so far."""
        return self._counter.result(sniffed=self._sniffs)

    def enters(self, path: bytes, *, wanted: bool) -> bool | None:
        """Return whether all that lies in a folder is wanted, or None when the folder is not walked.

        Args:
            path: relative to the folder of the source.
            wanted: whether an `--include` fits a folder that it lies in.
        """
        excluding, wanted = self._rules.folder(path, wanted=wanted)
        if excluding:
            self._counter.excluded(excluding)
            return None
        return wanted

    def takes(self, path: bytes, entry: os.DirEntry[bytes], *, wanted: bool, may_open: bool = True) -> bool:
        """Return whether a file is taken.

        Args:
            path: relative to the folder of the source.
            entry: the file, or a link to one.
            wanted: whether an `--include` fits a folder that it lies in.
            may_open: whether its first bytes may be looked at.
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

    def takes_named(self, path: bytes) -> bool:
        """Return whether a file that is named outright is taken: the user's patterns alone decide.

        Args:
            path: relative to its root.
        """
        excluding = self._of_named.file(path) if self._of_named else ""
        if excluding:
            self._counter.excluded(excluding)
        return not excluding

    def excludes(self, path: bytes) -> bool:
        """Return whether a walk would leave out a file because of a pattern; counts nothing.

        Args:
            path: relative to the folder of the source.
        """
        return bool(self._whole_paths.file(path))
