"""Define the options and results of discovery; names are bytes throughout."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from internvit_cli.sources.archives import member_address
from internvit_cli.sources.left_out import LeftOut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.config import Skipped
    from internvit_cli.sources.missing import MissingList
    from internvit_cli.sources.selection import FileSelection


@dataclass(frozen=True, slots=True)
class Source:
    """A folder or an archive to which keys are relative."""

    root: bytes
    """Absolute path of the folder or the archive."""
    name: bytes = b""
    """NAME of `NAME=DIR`, or the key of an archive: the first part of all its keys; empty if there is none."""
    is_archive: bool = False

    @property
    def prefix(self) -> bytes:
        """The start of all its keys, including the slash."""
        return self.name + b"/" if self.name else b""

    def path(self, key: bytes) -> bytes:
        """Return the path of the file with a key, or the address of the archive's member."""
        name = key[len(self.prefix) :]
        return member_address(self.root, name) if self.is_archive else child_path(self.root, name)


@dataclass(frozen=True, slots=True)
class FolderProblem:
    """A folder that could not be listed; it is reported, and has no row."""

    path: bytes
    skipped: Skipped


@dataclass(frozen=True, slots=True)
class DiscoverOptions:
    """The options that decide which files are found, and their keys."""

    files_from: str | None = None
    """A file with one path per line; `-` is standard input."""
    null_separated: bool = False
    """Paths in lists end in NUL instead of a newline."""
    root: str | None = None
    """The folder to which the keys of files, globs and lists are relative."""
    follow_links: bool = False
    """Follow links that leave their source, and links to folders."""
    exclude: tuple[str, ...] = ()
    """Patterns of what is left out, as in a .gitignore."""
    include: tuple[str, ...] = ()
    """If there are any, only files that match one of these patterns are taken."""
    default_excludes: bool = True
    """Leave out what matches `rules.DEFAULT_EXCLUDES`."""
    sniff: bool = False
    """Look at the first bytes of files without a picture's extension."""


@dataclass(frozen=True, slots=True)
class Listing:
    """All files found, in the order of their keys' bytes.

    It takes about 80 bytes of memory per file beyond the key itself.
    """

    sources: tuple[Source, ...]
    keys: list[bytes]
    """The unique keys, sorted by their bytes."""
    source_index: array[int]
    """For each key, the index of its source."""
    skipped: dict[int, Skipped]
    """Entries that must not be opened, by index: links that leave their source, and files that are not regular."""
    unreadable_folders: tuple[FolderProblem, ...]
    unfollowed_links: int
    """Number of links to folders that were not followed because `follow_links` is off."""
    named: bytes = b""
    """For each key, 1 if a user named its file, 0 if it was found; empty if all were found."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Files in the sources that were not taken."""
    missing_lists: tuple[MissingList, ...] = ()
    """Lists of which no file exists."""
    empty_lists: tuple[str, ...] = ()
    """Paths of lists that name no files; that of standard input is empty."""
    is_missing: bool = False
    """Whether all files come from such lists."""
    selection: FileSelection | None = None
    tops: tuple[bytes, ...] = ()
    """The folders to which the patterns of the selection are relative."""
    notes: tuple[str, ...] = ()
    """What a user should know about the sources."""

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, index: int) -> bytes:
        """Return the path of one entry's file."""
        return self.sources[self.source_index[index]].path(self.keys[index])

    def is_named(self, index: int) -> bool:
        """Return whether a user named the file of an entry, on the command line or in a list."""
        return bool(self.named and self.named[index])

    def excludes(self, path: bytes) -> bool:
        """Return whether a pattern leaves out a file that an earlier listing may have contained.

        Args:
            path: The absolute path of the file.
        """
        selection = self.selection
        below_tops = (inside for top in self.tops if (inside := path_below(path, top)) is not None)
        return selection is not None and any(selection.excludes(inside) for inside in below_tops)

    def without_drawn(self, entries: Sequence[int]) -> Listing:
        """Return the listing without entries that internvit drew itself, which then count as left out."""
        if not entries:
            return self
        dropped = set(entries)
        kept = [index for index in range(len(self.keys)) if index not in dropped]
        places = {index: place for place, index in enumerate(kept)}
        return replace(
            self,
            keys=[self.keys[index] for index in kept],
            source_index=array("I", (self.source_index[index] for index in kept)),
            skipped={places[index]: skipped for index, skipped in self.skipped.items() if index in places},
            named=bytes(self.named[index] for index in kept) if self.named else b"",
            left_out=replace(self.left_out, drawn=self.left_out.drawn + len(dropped)),
        )


def child_path(folder: bytes, name: bytes) -> bytes:
    """Return the path of a name in a folder, which may be `/`."""
    return folder + name if folder.endswith(b"/") else folder + b"/" + name


def path_below(path: bytes, folder: bytes) -> bytes | None:
    """Return the part of a normalized absolute path below a folder; None if it does not lie below it."""
    top = child_path(folder, b"")
    return path[len(top) :] if path.startswith(top) and len(path) > len(top) else None
