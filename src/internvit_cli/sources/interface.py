"""What discovery takes and gives: frozen records, names as bytes throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array

    from internvit_cli.config import Skipped


@dataclass(frozen=True, slots=True)
class Source:
    """A folder that keys are relative to."""

    root: bytes
    """Absolute path of the folder."""
    name: bytes = b""
    """NAME of `NAME=DIR`: the first part of all its keys; empty for none."""

    @property
    def prefix(self) -> bytes:
        """What its keys start with."""
        return self.name + b"/" if self.name else b""

    def path(self, key: bytes) -> bytes:
        """The file of one of its keys."""
        return child(self.root, key[len(self.prefix) :])


@dataclass(frozen=True, slots=True)
class FolderProblem:
    """A folder that could not be listed: one entry of the report, without a row."""

    path: bytes
    skipped: Skipped


@dataclass(frozen=True, slots=True)
class DiscoverOptions:
    """The options that decide which files are found and what they are called."""

    files_from: str | None = None
    """A file with one path a line; `-` is standard input."""
    null_separated: bool = False
    """Paths of lists end in NUL instead of a line end."""
    root: str | None = None
    """What the keys of files, globs and lists are relative to."""
    follow_links: bool = False
    """Follow links that leave their source, and links to folders."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All files found, in the order of their keys' bytes.

    About 80 bytes of memory a file beyond the key itself.
    """

    sources: tuple[Source, ...]
    keys: list[bytes]
    """Unique, sorted by bytes."""
    source_index: array[int]
    """For each key, the index of its source."""
    skipped: dict[int, Skipped]
    """Entries that must not be opened, by index: links that leave their source, and what is no regular file."""
    unreadable_folders: tuple[FolderProblem, ...]
    unfollowed_links: int
    """Links to folders that were left alone, for want of `follow_links`."""

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, index: int) -> bytes:
        """The file behind one entry."""
        return self.sources[self.source_index[index]].path(self.keys[index])


def child(folder: bytes, name: bytes) -> bytes:
    """A path below a folder, which may be `/`."""
    return folder + name if folder.endswith(b"/") else folder + b"/" + name


def below(path: bytes, folder: bytes) -> bytes | None:
    """The part of a normalised absolute path below a folder; None when it lies elsewhere or is the folder itself."""
    top = child(folder, b"")
    return path[len(top) :] if path.startswith(top) and len(path) > len(top) else None
