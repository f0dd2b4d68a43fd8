"""What discovery takes and gives: frozen records, names as bytes throughout."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from internvit_cli.sources.left_out import LeftOut

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.config import Skipped
    from internvit_cli.sources.missing import MissingList
    from internvit_cli.sources.selection import FileSelection


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
    exclude: tuple[str, ...] = ()
    """Patterns as in .gitignore of what is left out."""
    include: tuple[str, ...] = ()
    """With any, only files that one of them fits are taken."""
    default_excludes: bool = True
    """Leave out what `rules.DEFAULT_EXCLUDES` names."""
    sniff: bool = False
    """Look at the first bytes of files that are no pictures by their names."""


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
    named: bytes = b""
    """For each key, 1 when a user named its file outright, 0 when it was found; empty when all were found."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What lies in the sources beside the files found."""
    missing_lists: tuple[MissingList, ...] = ()
    """Lists of which not one file is there."""
    empty_lists: tuple[str, ...] = ()
    """Paths of lists that name nothing; standard input's is empty."""
    is_missing: bool = False
    """Whether all files come from such lists."""
    selection: FileSelection | None = None
    tops: tuple[bytes, ...] = ()
    """The folders that the selection's patterns are relative to."""

    def __len__(self) -> int:
        return len(self.keys)

    def path(self, index: int) -> bytes:
        """The file behind one entry."""
        return self.sources[self.source_index[index]].path(self.keys[index])

    def is_named(self, index: int) -> bool:
        """Whether a user named the file of an entry outright, on the command line or in a list."""
        return bool(self.named and self.named[index])

    def excludes(self, path: bytes) -> bool:
        """Whether a pattern leaves out a file that an earlier listing may have had.

        Args:
            path: absolute.
        """
        selection = self.selection
        below_tops = (inside for top in self.tops if (inside := below(path, top)) is not None)
        return selection is not None and any(selection.excludes(inside) for inside in below_tops)

    def without_drawn(self, entries: Sequence[int]) -> Listing:
        """Return the listing without some entries, pictures that this program drew, which count as left out."""
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


def child(folder: bytes, name: bytes) -> bytes:
    """A path below a folder, which may be `/`."""
    return folder + name if folder.endswith(b"/") else folder + b"/" + name


def below(path: bytes, folder: bytes) -> bytes | None:
    """The part of a normalized absolute path below a folder; None when it lies elsewhere or is the folder itself."""
    top = child(folder, b"")
    return path[len(top) :] if path.startswith(top) and len(path) > len(top) else None
