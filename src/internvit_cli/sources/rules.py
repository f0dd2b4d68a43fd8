"""Decide by name which files and folders are left out: the default excludes and the user's patterns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from internvit_cli.sources.patterns import Pattern, Patterns, parse_pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_EXCLUDES = (
    # Parts of files and system folders on disks that a Mac has written to.
    *("._*", "__MACOSX/", ".AppleDouble/", ".AppleDB/", ".Spotlight-V100/", ".fseventsd/", ".TemporaryItems/"),
    ".DocumentRevisions-V100/",
    # Thumbnails.
    *("@eaDir/", ".@__thumb/", ".thumbnails/", ".thumbs/", ".picasaoriginals/"),
    # Deleted files.
    *(".Trash/", ".Trash-*/", ".Trashes/", "$RECYCLE.BIN/", "RECYCLER/", "#recycle/", "@Recycle/", ".dtrash/"),
    *(".trashed-*", ".stversions/"),
    # Snapshots, which hold every picture a second time.
    *(".snapshot/", ".snapshots/", "#snapshot/", "@Recently-Snapshot/", ".zfs/"),
    # Folders of programs and file systems.
    *(".ipynb_checkpoints/", "__pycache__/", ".git/", ".hg/", ".svn/", "System Volume Information/", "lost+found/"),
    *("@tmp/", ".sync/", ".dropbox.cache/", ".pending-*"),
)
"""Patterns that every walk excludes, in upper and lower case, unless `--no-default-excludes` is given."""

NOT_INCLUDED = "no --include"
"""Stands for the pattern of files that are left out because no `--include` matches them."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The patterns of a walk, which decide on paths relative to the walked folder."""

    excludes: Patterns
    includes: Patterns
    literal_includes: Patterns
    """Includes without a wildcard; they override the default excludes."""
    defaults: frozenset[Pattern]
    asks_of_every_file: bool
    """Whether only files with a leading dot can be excluded, so that others need not be matched."""

    def folder(self, path: bytes, *, wanted: bool) -> tuple[str, bool]:
        """Decide whether a folder is walked.

        Args:
            path: Its path relative to the walked folder.
            wanted: Whether an `--include` matches a folder above it.

        Returns:
            The pattern that excludes it, empty for none, and whether the files in it are wanted.
        """
        excluding = self._excluding(self.excludes.folder(path), self.literal_includes.folder(path))
        return excluding, self._is_wanted(self.includes.folder(path), wanted=wanted)

    def file(self, path: bytes, *, wanted: bool) -> str:
        """Return the pattern that excludes a file, empty for none; the arguments are those of `folder`."""
        excluding = self._excluding(self.excludes.file(path), self.literal_includes.file(path))
        if excluding or not self.includes:
            return excluding
        return "" if self._is_wanted(self.includes.file(path), wanted=wanted) else NOT_INCLUDED

    def _excluding(self, pattern: Pattern | None, named: Pattern | None) -> str:
        if pattern is None or pattern.takes_back:
            return ""
        is_lifted = pattern in self.defaults and named is not None and not named.takes_back
        return "" if is_lifted else pattern.text

    @staticmethod
    def _is_wanted(pattern: Pattern | None, *, wanted: bool) -> bool:
        return wanted if pattern is None else not pattern.takes_back


class WholePaths:
    """Rules for files that are not found by a walk: lines of lists, and rows of earlier runs."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._folder = lru_cache(maxsize=4096)(self._judge)

    def file(self, path: bytes) -> str:
        """Return the pattern that excludes a file or a folder above it; empty for none."""
        folder = path.rpartition(b"/")[0]
        excluding, wanted = self._folder(folder) if folder else ("", False)
        return excluding or self._rules.file(path, wanted=wanted)

    def _judge(self, folder: bytes) -> tuple[str, bool]:
        wanted, end = False, folder.find(b"/")
        while True:
            excluding, wanted = self._rules.folder(folder if end < 0 else folder[:end], wanted=wanted)
            if excluding or end < 0:
                return excluding, wanted
            end = folder.find(b"/", end + 1)


def make_rules(excludes: Sequence[str] = (), includes: Sequence[str] = (), *, defaults: bool = True) -> Rules:
    """Translate the patterns of a command line.

    Args:
        excludes: The values of `--exclude`, in order.
        includes: The values of `--include`, in order; if there are any, only files that match one of them are taken.
        defaults: Whether `DEFAULT_EXCLUDES` come before the others.

    Raises:
        UsageError: A pattern cannot match anything.
    """
    ours = [parse_pattern(text, "default", ignore_case=True) for text in (DEFAULT_EXCLUDES if defaults else ())]
    theirs = [parse_pattern(text, "--exclude") for text in excludes]
    wanted = [parse_pattern(text, "--include") for text in includes]
    return Rules(
        excludes=Patterns([*ours, *theirs]),
        includes=Patterns(wanted),
        literal_includes=Patterns([pattern for pattern in wanted if pattern.is_literal]),
        defaults=frozenset(ours),
        asks_of_every_file=bool(theirs or wanted),
    )
