"""Expand patterns that the shell did not: `*`, `?`, `[...]` within a name, `**` for any number of folders."""

from __future__ import annotations

import fnmatch
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from internvit_cli.sources.interface import FolderProblem, child_path
from internvit_cli.sources.walk import folder_problem

if TYPE_CHECKING:
    from internvit_cli.sources.selection import FileSelection

_MAGIC = re.compile(rb"[*?[]")
_ANY_DEPTH = b"**"


@dataclass(slots=True)
class Matches:
    """Paths that match a pattern, in no particular order; relative if the pattern is."""

    base: bytes
    """The folder before the first wildcard, to which rules are relative; empty for the working directory."""

    files: list[bytes] = field(default_factory=list)
    """Matching files that the selection takes; links are not resolved."""
    folders: list[bytes] = field(default_factory=list)
    """Matching folders, as in the shell; none for a pattern with `**`, which matches the files below them."""
    unreadable_folders: list[FolderProblem] = field(default_factory=list)


def has_wildcard(text: bytes) -> bool:
    """Return whether a name contains a wildcard."""
    return _MAGIC.search(text) is not None


def expand(pattern: bytes, selection: FileSelection) -> Matches:
    """Find the files and folders that match a pattern, listing each folder once.

    As in the shell, a wildcard does not match a leading dot, and `**` follows no links to folders.

    Args:
        pattern: A path with at least one wildcard.
        selection: Decides which matching files are taken, and which folders are not listed.

    Returns:
        The matches, with the folders that could not be listed.
    """
    parts = [part for part in pattern.split(b"/") if part]
    literal = next(i for i, part in enumerate(parts) if has_wildcard(part))
    base = b"/" if pattern.startswith(b"/") else b""
    base = os.path.join(base, *parts[:literal]) if literal else base
    return _Expansion(parts[literal:], base, selection).run()


_Below = tuple[bytes, frozenset[int], bool]
"""A folder relative to the base, the pattern parts its entries may match, and whether an `--include` matches it."""


class _Expansion:
    """Walks with the set of pattern parts that may match next, so that several `**` need no second walk."""

    def __init__(self, parts: list[bytes], base: bytes, selection: FileSelection) -> None:
        if parts[-1] == _ANY_DEPTH:
            parts = [*parts, b"*"]
        self.parts = parts
        self.tests = [re.compile(fnmatch.translate(os.fsdecode(part))) for part in parts]
        self.with_folders = _ANY_DEPTH not in parts
        self.selection = selection
        self.matches = Matches(base)

    def run(self) -> Matches:
        stack: list[_Below] = [(b"", self._closure({0}), False)]
        while stack:
            relative, positions, wanted = stack.pop()
            folder = self._path(relative)
            try:
                with os.scandir(folder or b".") as entries:
                    for entry in entries:
                        path = child_path(relative, entry.name) if relative else entry.name
                        following = self._entry(entry, path, positions, wanted=wanted)
                        if following:
                            inner = self.selection.enters(path, wanted=wanted)
                            if inner is not None:
                                stack.append((path, following, inner))
            except (FileNotFoundError, NotADirectoryError):
                continue  # the pattern names a folder that does not exist, so nothing matches
            except OSError as error:
                self.matches.unreadable_folders.append(folder_problem(folder or b".", error))
        return self.matches

    def _path(self, relative: bytes) -> bytes:
        """Return a path below the base as a path from the working directory."""
        if not relative:
            return self.matches.base
        return child_path(self.matches.base, relative) if self.matches.base else relative

    def _closure(self, positions: set[int]) -> frozenset[int]:
        """Add the parts after each `**`, which may also match no folder at all."""
        reached = set(positions)
        for position in range(len(self.parts)):
            if position in reached and self.parts[position] == _ANY_DEPTH:
                reached.add(position + 1)
        return frozenset(reached)

    def _entry(
        self, entry: os.DirEntry[bytes], path: bytes, positions: frozenset[int], *, wanted: bool
    ) -> frozenset[int]:
        """Record a matching entry; return the parts that entries below it may match."""
        text, following = os.fsdecode(entry.name), set()
        for position in positions:
            part = self.parts[position]
            if text.startswith(".") and not part.startswith(b"."):
                continue
            if part == _ANY_DEPTH:
                if entry.is_dir(follow_symlinks=False):
                    following.add(position)
            elif self.tests[position].match(text):
                if position < len(self.parts) - 1:
                    if _leads_to_folder(entry):
                        following.add(position + 1)
                else:
                    self._record(entry, path, wanted=wanted)
        return self._closure(following)

    def _record(self, entry: os.DirEntry[bytes], path: bytes, *, wanted: bool) -> None:
        if _leads_to_folder(entry):
            if self.with_folders and self.selection.enters(path, wanted=wanted) is not None:
                self.matches.folders.append(self._path(path))
        elif self.selection.takes(path, entry, wanted=wanted):
            self.matches.files.append(self._path(path))


def _leads_to_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links is not a folder
        return False
