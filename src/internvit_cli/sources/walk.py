"""Walk through a folder to find its pictures, and the entries that must not be opened."""

from __future__ import annotations

import heapq
import os
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from internvit_cli.config import Skipped, Status
from internvit_cli.errors import one_line
from internvit_cli.sources.interface import FolderProblem, child_path, path_below

if TYPE_CHECKING:
    from internvit_cli.sources.selection import FileSelection

_KERNEL_FOLDERS = (b"/proc", b"/sys", b"/dev")
_SHARED_MEMORY = b"/dev/shm"
"""The only folder below them that holds ordinary files."""
_MOST_LINKS = 40
"""Linux gives up after the same number of links."""


@dataclass(slots=True)
class WalkResult:
    """The results of a walk, in no particular order."""

    keys: list[bytes] = field(default_factory=list)
    """Paths relative to the root of the walk."""
    skipped: dict[int, Skipped] = field(default_factory=dict)
    unreadable_folders: list[FolderProblem] = field(default_factory=list)
    unfollowed_links: int = 0


def walk(root: bytes, selection: FileSelection, *, follow_links: bool) -> WalkResult:
    """Find all pictures below a folder, with one `os.scandir` per folder.

    Links to files are followed if they stay below the root. `follow_links` removes that restriction, and also follows
    links to folders: each real folder once, after all real folders, in the order of their keys, so that the result does
    not depend on the order in which the file system lists them.

    Args:
        root: The absolute path of a folder, which may itself be a link.
        selection: Decides which files are taken, and which folders are listed.
        follow_links: Whether to follow links to folders, and links that leave the root.

    Returns:
        The pictures, and the folders that could not be listed, which never raise an exception.
    """
    walker = _Walker(root, selection, follow_links=follow_links)
    walker.tree((b"", False))
    while walker.linked_folders:
        walker.tree(heapq.heappop(walker.linked_folders))
    return walker.found


_Folder = tuple[bytes, bool]
"""The key of a folder, empty for the root, and whether an `--include` matches it."""


class _Walker:
    def __init__(self, root: bytes, selection: FileSelection, *, follow_links: bool) -> None:
        self.root = root
        self.follow_links = follow_links
        self.found = WalkResult()
        self.linked_folders: list[_Folder] = []
        self._selection = selection
        self._seen: set[tuple[int, int]] = set()
        self._real_folder = lru_cache(maxsize=4096)(os.path.realpath)
        self._real_root = os.path.realpath(root)

    def tree(self, top: _Folder) -> None:
        """Walk a folder and the real folders below it; the stack is explicit because trees can be very deep."""
        stack = [top]
        while stack:
            folder, wanted = stack.pop()
            path = child_path(self.root, folder) if folder else self.root
            try:
                if not self.follow_links or self._first_visit(path):
                    stack += self._folder(path, folder + b"/" if folder else b"", wanted=wanted)
            except OSError as error:
                self.found.unreadable_folders.append(folder_problem(path, error))

    def _first_visit(self, path: bytes) -> bool:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in self._seen:
            return False
        self._seen.add(identity)
        return True

    def _folder(self, path: bytes, prefix: bytes, *, wanted: bool) -> list[_Folder]:
        """Add the pictures of one folder, and return its real subfolders."""
        keys, selection, subfolders = self.found.keys, self._selection, []
        with os.scandir(path) as entries:
            for entry in entries:
                key = prefix + entry.name
                if entry.is_symlink():
                    self._link(key, entry, wanted=wanted)
                elif entry.is_dir(follow_symlinks=False):
                    inner = selection.enters(key, wanted=wanted)
                    if inner is not None:
                        subfolders.append((key, inner))
                elif selection.takes(key, entry, wanted=wanted):
                    if not entry.is_file(follow_symlinks=False):
                        self.found.skipped[len(keys)] = _not_regular("a pipe, socket or device")
                    keys.append(key)
        return subfolders

    def _link(self, key: bytes, entry: os.DirEntry[bytes], *, wanted: bool) -> None:
        path = child_path(self.root, key)
        end = self._end_of_link(path)
        try:
            mode: int | None = None if _of_kernel(end) else os.stat(path).st_mode
        except OSError:
            mode = None  # dangling, or a loop; opening it reports which
        if mode is not None and stat.S_ISDIR(mode):
            self._link_to_folder(key, wanted=wanted)
            return
        refusal = self._refusal(end, mode)
        if self._selection.takes(key, entry, wanted=wanted, may_open=refusal is None and mode is not None):
            if refusal:
                self.found.skipped[len(self.found.keys)] = refusal
            self.found.keys.append(key)

    def _link_to_folder(self, key: bytes, *, wanted: bool) -> None:
        inner = self._selection.enters(key, wanted=wanted)
        if inner is None:
            return
        if self.follow_links:
            heapq.heappush(self.linked_folders, (key, inner))
        else:
            self.found.unfollowed_links += 1

    def _refusal(self, end: bytes, mode: int | None) -> Skipped | None:
        if _of_kernel(end):
            return _not_regular(f"links to {one_line(end)}")
        if mode is not None and not stat.S_ISREG(mode):
            return _not_regular("links to a pipe, socket or device")
        if not self.follow_links and path_below(end, self._real_root) is None:
            return Skipped(
                Status.LINK_OUTSIDE, "", f"links to {one_line(end)}, outside its source; --follow-links reads it"
            )
        return None

    def _end_of_link(self, path: bytes) -> bytes:
        """Return the target of a link with its folder resolved; stop at /proc, /sys and /dev, whose links mislead."""
        for _ in range(_MOST_LINKS):
            folder, name = os.path.split(path)
            if name in (b"", b".", b".."):
                return os.path.realpath(path)
            path = child_path(self._real_folder(folder), name)
            if _of_kernel(path):
                return path
            try:
                target = os.readlink(path)
            except OSError:
                return path
            path = os.path.join(os.path.dirname(path), target)
        return path


def folder_problem(path: bytes, error: OSError) -> FolderProblem:
    """Return the problem to report for a folder that could not be listed."""
    status = Status.VANISHED if isinstance(error, FileNotFoundError) else Status.UNREADABLE
    return FolderProblem(path, Skipped(status, type(error).__name__, one_line(error.strerror or str(error))))


def _not_regular(message: str) -> Skipped:
    return Skipped(Status.NOT_REGULAR, "", message)


def _of_kernel(path: bytes) -> bool:
    if path_below(path, _SHARED_MEMORY) is not None:
        return False
    return any(path == folder or path_below(path, folder) is not None for folder in _KERNEL_FOLDERS)
