"""Which files and folders the names alone rule out: what no source means to hold, and what the user excludes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from internvit_cli.sources.patterns import Pattern, Patterns, parse_pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_EXCLUDES = (
    # Beside pictures on disks that a Mac has written to: halves of files, and its own folders.
    *("._*", "__MACOSX/", ".AppleDouble/", ".AppleDB/", ".Spotlight-V100/", ".fseventsd/", ".TemporaryItems/"),
    ".DocumentRevisions-V100/",
    # Thumbnails.
    *("@eaDir/", ".@__thumb/", ".thumbnails/", ".thumbs/", ".picasaoriginals/"),
    # What was deleted.
    *(".Trash/", ".Trash-*/", ".Trashes/", "$RECYCLE.BIN/", "RECYCLER/", "#recycle/", "@Recycle/", ".dtrash/"),
    *(".trashed-*", ".stversions/"),
    # Snapshots, in which every picture lies once more.
    *(".snapshot/", ".snapshots/", "#snapshot/", "@Recently-Snapshot/", ".zfs/"),
    # What programs and file systems keep for themselves.
    *(".ipynb_checkpoints/", "__pycache__/", ".git/", ".hg/", ".svn/", "System Volume Information/", "lost+found/"),
    *("@tmp/", ".sync/", ".dropbox.cache/", ".pending-*"),
)
"""Patterns that every walk excludes, whatever the case of letters, unless `--no-default-excludes` is given."""

NOT_INCLUDED = "no --include"
"""Stands for the pattern of what is left out because no `--include` fits."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Patterns to be asked about paths relative to the walked folder."""

    excludes: Patterns
    includes: Patterns
    literal_includes: Patterns
    """Those without a wildcard: what they name is walked though a default excludes it."""
    defaults: frozenset[Pattern]
    asks_of_every_file: bool
    """Without patterns of the user only files with a dot in front can be excluded: no others need be asked about."""

    def folder(self, path: bytes, *, wanted: bool) -> tuple[str, bool]:
        """Judge a folder.

        Args:
            path: relative to the walked folder.
            wanted: whether an `--include` fits a folder that it lies in.

        Returns:
            The pattern that keeps it from being walked, empty for none, and whether what lies in it is wanted.
        """
        excluding = self._excluding(self.excludes.folder(path), self.literal_includes.folder(path))
        return excluding, self._is_wanted(self.includes.folder(path), wanted=wanted)

    def file(self, path: bytes, *, wanted: bool) -> str:
        """Return the pattern that leaves a file out, empty for none; the arguments are those of `folder`."""
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
    """Rules for files that no walk leads to: lines of lists, and rows of earlier runs."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._folder = lru_cache(maxsize=4096)(self._judge)

    def file(self, path: bytes) -> str:
        """Return the pattern that leaves a file out, or a folder that it lies in; empty for none."""
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
        excludes: of `--exclude`, in order.
        includes: of `--include`, in order; with any, only files that one of them fits are taken.
        defaults: whether `DEFAULT_EXCLUDES` stand before the others.

    Raises:
        UsageError: a pattern that can fit nothing.
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
