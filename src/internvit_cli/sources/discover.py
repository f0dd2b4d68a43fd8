"""Turn the sources of the command line into one sorted listing of unique keys."""

from __future__ import annotations

import os
from array import array
from glob import glob
from typing import TYPE_CHECKING

from internvit_cli.config import LONGEST_KEY, Skipped, Status
from internvit_cli.errors import NoImagesError, UsageError, one_line, system_words
from internvit_cli.runtime.words import counted
from internvit_cli.sources import globs
from internvit_cli.sources.archives import index_of, is_archive, is_archive_name
from internvit_cli.sources.interface import DiscoverOptions, FolderProblem, Listing, Source, child_path, path_below
from internvit_cli.sources.lists import read_list, unquoted
from internvit_cli.sources.members import shown
from internvit_cli.sources.missing import LOOKED_AT, MissingList, explain_missing, how_to_cut
from internvit_cli.sources.refusals import refuse_container, refuse_output, refuse_url
from internvit_cli.sources.selection import FileSelection
from internvit_cli.sources.walk import walk

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

STANDARD_INPUT = "-"


def discover(arguments: Sequence[str], options: DiscoverOptions, stdin: BinaryIO | None = None) -> Listing:
    """Find all pictures of the sources; no picture is opened.

    A source is a folder, a file, `NAME=DIR`, a pattern, or `-` for a list on standard input. An existing file or folder
    takes precedence over any other meaning of its name. Files that a user names, also in a list, are taken whatever
    their extension, and need not exist: opening them reports that. Only the user's own patterns leave them out.

    Args:
        arguments: The sources as typed on the command line.
        options: Options that decide which files are taken, and their keys.
        stdin: The binary stream that `-` stands for.

    Returns:
        The listing, sorted by the bytes of its keys; empty if the folders hold no pictures.

    Raises:
        UsageError: A source does not exist or holds no files, a key lies outside its root, or two files have one key.
        NoImagesError: No file matches a pattern.
    """
    collection = _Collection(options, stdin)
    for argument in arguments:
        collection.add_argument(argument, is_alone=len(arguments) == 1)
    if options.files_from is not None:
        collection.add_list(options.files_from)
    return collection.listing()


class _Collection:
    def __init__(self, options: DiscoverOptions, stdin: BinaryIO | None) -> None:
        self._options = options
        self._stdin = stdin
        self._root = None if options.root is None else _root_folder(options.root)
        self._selection = FileSelection(options)
        self._sources: dict[Source, int] = {}
        self._walked: set[Source] = set()
        self._tops: dict[bytes, None] = {}
        self._keys: list[bytes] = []
        self._owners = array("I")
        self._named = bytearray()
        self._skipped: dict[int, Skipped] = {}
        self._missing: list[MissingList] = []
        self._empty_lists: list[str] = []
        self._found = 0
        """The number of keys that do not come from a list of which no file exists."""
        self._unreadable_folders: list[FolderProblem] = []
        self._notes: list[str] = []
        self._unfollowed_links = 0

    def add_argument(self, argument: str, *, is_alone: bool) -> None:
        """Add one source of the command line."""
        path = os.fsencode(argument)
        if argument == STANDARD_INPUT:
            self.add_list(argument)
        elif os.path.isdir(path):
            self._add_folder(Source(absolute_folder(path)))
        elif is_archive(path):
            self._add_archive(path)
        elif os.path.lexists(path):
            refuse_container(path, is_alone=is_alone)
            self._add_file(path, is_named=True)
        else:
            refuse_url(path)
            if (named := _named_folder(path)) is not None:
                self._add_members(named) if named.is_archive else self._add_folder(named)
            elif globs.has_wildcard(path):
                self._add_archives(path) if is_archive_name(path) else self._add_pattern(path)
            else:
                raise _missing(path)

    def add_list(self, name: str) -> None:
        """Add the paths of a list, which are relative to `--root`, by default the working directory."""
        root = self._root or os.getcwdb()
        owner = self._source(Source(root))
        if name == STANDARD_INPUT:
            if self._stdin is None:
                raise UsageError("standard input can be read only once", "name - as a source or for --files-from")
            stream, self._stdin = self._stdin, None
            self._add_lines(stream, "", root, owner)
            return
        refuse_url(os.fsencode(name))
        try:
            with open(name, "rb") as file:
                self._add_lines(file, name, root, owner)
        except OSError as error:
            raise UsageError(f"cannot read the list {one_line(name)}: {error.strerror}", "check the path") from error

    def listing(self) -> Listing:
        """Sort the keys, drop duplicates, and refuse keys that stand for two files."""
        keys: list[bytes] = []
        owners = array("I")
        named = bytearray(len(self._keys))
        skipped: dict[int, Skipped] = {}
        for i in sorted(range(len(self._keys)), key=self._keys.__getitem__):
            if len(self._keys[i]) > LONGEST_KEY:
                continue
            if keys and keys[-1] == self._keys[i]:
                self._check_same_file(keys[-1], owners[-1], self._owners[i])
                named[len(keys) - 1] |= self._named[i]
                if i not in self._skipped:  # one of the two is a file that the user named, which may be a link
                    skipped.pop(len(keys) - 1, None)
                continue
            if i in self._skipped:
                skipped[len(keys)] = self._skipped[i]
            named[len(keys)] = self._named[i]
            keys.append(self._keys[i])
            owners.append(self._owners[i])
        return Listing(
            sources=tuple(self._sources),
            keys=keys,
            source_index=owners,
            skipped=skipped,
            unreadable_folders=tuple(sorted(self._unreadable_folders, key=lambda problem: problem.path)),
            unfollowed_links=self._unfollowed_links,
            named=bytes(named[: len(keys)]),
            left_out=self._selection.left_out,
            missing_lists=tuple(self._missing),
            empty_lists=tuple(self._empty_lists),
            is_missing=bool(self._missing) and not self._found,
            selection=self._selection,
            tops=tuple(self._tops),
            notes=(*self._notes, *self._note_on_long_keys()),
        )

    def _note_on_long_keys(self) -> list[str]:
        long = [key for key in self._keys if len(key) > LONGEST_KEY]
        if not long:
            return []
        return [
            f"{counted(len(long), 'picture')} left out, because the key is longer than {LONGEST_KEY:,} bytes; "
            f"the first begins with {one_line(min(long)[:60])}"
        ]

    def _source(self, source: Source) -> int:
        return self._sources.setdefault(source, len(self._sources))

    def _add_folder(self, source: Source) -> None:
        if source in self._walked:
            return
        self._walked.add(source)
        self._tops[source.root] = None
        if source.root != b"/":
            self._check_patterns(source.root)
        owner, offset = self._source(source), len(self._keys)
        found = walk(source.root, self._selection, follow_links=self._options.follow_links)
        if not found.keys:
            refuse_output(source.root)
        self._keys += [source.prefix + key for key in found.keys] if source.prefix else found.keys
        self._owners.extend(array("I", [owner]) * len(found.keys))
        self._named.extend(bytes(len(found.keys)))
        self._found += len(found.keys)
        self._skipped.update({offset + i: skipped for i, skipped in found.skipped.items()})
        self._unreadable_folders += found.unreadable_folders
        self._unfollowed_links += found.unfollowed_links

    def _add_archive(self, path: bytes) -> None:
        """Add the members of an archive, whose key begins theirs."""
        folder, name = os.path.split(path)
        whole = child_path(absolute_folder(folder or b"."), name)
        root = self._root or os.path.dirname(whole)
        key = path_below(whole, root)
        if key is None:
            raise _outside(path, root)
        self._add_members(Source(whole, key, is_archive=True))

    def _add_archives(self, pattern: bytes) -> None:
        found = sorted(path for path in glob(pattern, recursive=True) if is_archive(path))
        if not found:
            raise NoImagesError(f"no archive matches {one_line(pattern)}", "check the pattern")
        for path in found:
            self._add_archive(path)

    def _add_members(self, source: Source) -> None:
        if source in self._walked:
            return
        self._walked.add(source)
        try:
            index = index_of(source.root)
        except OSError as error:
            raise UsageError(f"cannot read {one_line(source.root)}: {system_words(error)}", "check the path") from error
        names = sorted({*index.members, *index.refused})
        if index.problem and not names:
            raise UsageError(
                f"{one_line(source.root)} cannot be read as an archive: {index.problem}",
                "check that it is a complete .tar or .zip archive",
            )
        if index.problem:
            problem = Skipped(Status.TRUNCATED, "", f"damaged archive: {index.problem}")
            self._unreadable_folders.append(FolderProblem(source.root, problem))
        self._notes += [f"{one_line(source.root)}: {note}" for note in index.notes]
        owner = self._source(source)
        for name in names:
            if self._selection.takes_member(name):
                if name in index.refused:
                    self._skipped[len(self._keys)] = index.refused[name]
                self._add_key(source.prefix + name, owner, is_named=False)
                self._found += 1

    def _check_patterns(self, root: bytes) -> None:
        """Refuse a pattern that is a path to a place below the source, because patterns are relative to the source."""
        for text in (*self._options.exclude, *self._options.include):
            path = os.fsencode(text.removeprefix("!"))
            inside = path_below(path, root)
            if inside is not None and not os.path.lexists(child_path(root, path.split(b"/")[1])):
                raise UsageError(
                    f"the pattern {one_line(text)} is a path, and patterns are relative to {one_line(root)}",
                    f"write /{one_line(inside)}",
                )

    def _add_file(self, path: bytes, *, is_named: bool) -> None:
        folder, name = os.path.split(path)
        folder = absolute_folder(folder or b".")
        root = self._root or folder
        key = path_below(child_path(folder, name), root)
        if key is None:
            raise _outside(path, root)
        self._tops[root] = None
        if not is_named or self._selection.takes_named(key):
            self._add_key(key, self._source(Source(root)), is_named=is_named)
            self._found += 1

    def _add_pattern(self, pattern: bytes) -> None:
        matches = globs.expand(pattern, self._selection)
        self._tops[absolute_folder(matches.base or b".")] = None
        self._unreadable_folders += matches.unreadable_folders
        if not matches.files and not matches.folders:
            raise self._selection.left_out.no_images(f"no picture matches the pattern {one_line(pattern)}")
        for folder in matches.folders:
            self._add_folder(Source(absolute_folder(folder)))
        for path in matches.files:
            self._add_file(path, is_named=False)

    def _add_lines(self, stream: BinaryIO, name: str, root: bytes, owner: int) -> None:
        self._tops[root] = None
        looked_at: list[bytes] = []
        first = len(self._keys)
        for line in read_list(stream, self._options.null_separated):
            if len(looked_at) < LOOKED_AT:
                looked_at.append(line)
            try:
                key = _key_of_line(line if self._options.null_separated else unquoted(line, root), root)
            except UsageError as error:
                if hint := how_to_cut(looked_at, name, root, root):
                    raise UsageError(f"{error.message}; the list is a table", hint) from error
                raise
            if self._selection.takes_named(key):
                self._add_key(key, owner, is_named=True)
        if not looked_at:
            self._empty_lists.append(name)
        added = self._keys[first:]
        if added and not any(os.path.lexists(child_path(root, key)) for key in added):
            self._missing.append(explain_missing(looked_at, name, root))
        else:
            self._found += len(added)

    def _add_key(self, key: bytes, owner: int, *, is_named: bool) -> None:
        self._keys.append(key)
        self._owners.append(owner)
        self._named.append(is_named)

    def _check_same_file(self, key: bytes, first: int, second: int) -> None:
        if first == second:
            return
        sources = list(self._sources)
        paths = sources[first].path(key), sources[second].path(key)
        if not _same_file(*paths):
            one, other = map(shown, paths)
            owner = sources[second]
            kind, place = ("archive", owner.root) if owner.is_archive else ("folder", os.path.dirname(other))
            raise UsageError(
                f"two files have the key {one_line(key)}: {one_line(one)} and {one_line(other)}",
                f"name the {kind}, as in NAME={one_line(place)}, or give files a common --root",
            )


def absolute_folder(folder: bytes) -> bytes:
    """Return the absolute path of a folder; links are kept, unless the path contains `..`."""
    return os.path.realpath(folder) if b".." in folder.split(b"/") else os.path.abspath(folder)


def _root_folder(name: str) -> bytes:
    if not os.path.isdir(name):
        raise UsageError(f"--root {one_line(name)} is not a folder", "name a folder that holds all files")
    return absolute_folder(os.fsencode(name))


def _named_folder(argument: bytes) -> Source | None:
    """Return the source of `NAME=DIR`; None if the argument has another form."""
    name, equals, folder = argument.partition(b"=")
    if not equals or not name or b"/" in name:
        return None
    if name not in (b".", b"..") and is_archive(folder):
        return Source(os.path.abspath(folder), name, is_archive=True)
    if not os.path.isdir(folder):
        if globs.has_wildcard(argument):
            return None
        raise UsageError(f"{one_line(argument)}: {_shown(folder)} is not a folder", "NAME=DIR names a folder")
    if name in (b".", b".."):
        raise UsageError(f"{one_line(argument)}: keys cannot start with {one_line(name)}/", "choose another NAME")
    return Source(absolute_folder(folder), name)


def _key_of_line(line: bytes, root: bytes) -> bytes:
    """Return the key for a line of a list: its path below the root, without `//` and `.`."""
    if b".." in line.split(b"/"):
        raise _outside(line, root)
    key = path_below(
        os.path.normpath(child_path(root, line) if not line.startswith(b"/") else b"/" + line.lstrip(b"/")), root
    )
    if key is None:
        raise _outside(line, root)
    return key


def _shown(path: bytes) -> str:
    return one_line(path) or "an empty name"


def _missing(path: bytes) -> UsageError:
    if not os.path.isabs(path):
        return UsageError(
            f"no such file or folder: {_shown(path)}", f"the working directory is {one_line(os.getcwdb())}"
        )
    return UsageError(f"no such file or folder: {one_line(path)}", "check the path, and that its parents can be read")


def _outside(path: bytes, root: bytes) -> UsageError:
    return UsageError(
        f"{one_line(path)} is not below {one_line(root)}, so it has no key",
        "name a folder that contains all files with --root, and write paths without ..",
    )


def _same_file(first: bytes, second: bytes) -> bool:
    try:
        return first == second or os.path.samefile(first, second)
    except (OSError, ValueError):  # members of archives have addresses instead of paths
        return False
