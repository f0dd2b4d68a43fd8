"""Manage an output, which is one file or a folder of shards with a manifest, and give shards their final names."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from internvit_cli.config import Format, Status
from internvit_cli.errors import RESTORE_OR_OVERWRITE, OutputError, UsageError, one_line, system_words
from internvit_cli.options import named_path
from internvit_cli.runtime.untrusted import TooLargeError, parse_json, read_bounded
from internvit_cli.storage.durable import make_way, refuse_special, remove, rename_durably, write_file
from internvit_cli.storage.format.interface import ShardFormat, backend_of
from internvit_cli.storage.format.layout import (
    FORMAT,
    FORMAT_VERSION,
    NEWER,
    SHARD_FILE,
    SHARD_NAME,
    ForeignFileError,
    StoredShard,
    UnrecognizedFileError,
    unknown_value,
)
from internvit_cli.storage.format.soundness import check_shard
from internvit_cli.storage.output_names import PARTIAL, SINGLE_FILE_SUFFIXES, is_single_file, suffix_of
from internvit_cli.storage.same_file import file_identity

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

MANIFEST = "manifest.json"
NEXT_MANIFEST = "manifest.next.json"
SKIPPED = "skipped.jsonl"
MANIFEST_BYTES = 16 << 20
"""More than the manifest of a folder without superseded rows takes; it lists the key of each superseded row."""


@dataclass(frozen=True, slots=True)
class ManifestEntry:
    """One shard as listed in the manifest."""

    name: str
    format: Format
    images: int
    tiles: int
    superseded: tuple[str, ...] = ()
    """Keys whose rows in this shard do not count: later shards have newer ones, or their pictures were pruned."""


@dataclass(frozen=True, slots=True)
class FinishedShard:
    """A complete shard on disk, with its index."""

    name: str
    path: str
    format: Format
    stored: StoredShard
    superseded: tuple[str, ...] = ()
    files: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The `file_identity` of each of its files at the time the index was read."""

    @property
    def backend(self) -> ShardFormat:
        """The module that reads it."""
        return backend_of(self.format)

    @property
    def is_partial(self) -> bool:
        """Whether it is unfinished."""
        return self.path.endswith(PARTIAL)

    @property
    def superseded_keys(self) -> frozenset[bytes]:
        """Keys whose rows here no longer count: a later shard has newer ones, or their pictures were pruned."""
        return frozenset(map(os.fsencode, self.superseded))

    @property
    def live_rows(self) -> NDArray[np.int64]:
        """Numbers of the rows that count, ascending, [k] int64."""
        rows: NDArray[np.int64] = self.stored.table.rows_without(self.superseded_keys)
        return rows


class _Length(NamedTuple):
    """The size and the identity of a file."""

    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class _Before:
    """The state of an output when a run began."""

    has_folder: bool
    number: int
    """Number of the current shard."""
    has_partial: bool
    has_replacement: bool
    skipped: _Length | None
    """None if there is no list of skipped images."""


class Output:
    """An output path and its shards. A single file is one shard; a folder has any number, listed in its manifest."""

    def __init__(self, path: str, wanted: Format | None = None) -> None:
        """Interpret `-o PATH --format WANTED` without reading or writing anything.

        Raises:
            UsageError: The name and the format contradict each other.
        """
        name = named_path(path)
        # Files beside the output, above all its lock, must be found through every alias of the output.
        is_alias = os.path.islink(name) or os.path.basename(name) in (".", "..")
        self.path = os.path.realpath(name) if is_alias else name
        self.is_file = is_single_file(path)
        if self.is_file and wanted is Format.NPY:
            raise UsageError(
                f"{path} names an HDF5 file, but --format npy was given", "name a folder, such as -o feats/"
            )
        self.format = Format.H5 if self.is_file else wanted or self._present_format()
        self._has_slash = path.endswith("/")
        self._staged = False
        self._published = False
        self._before: _Before | None = None

    @property
    def backend(self) -> ShardFormat:
        """The format in which new shards are written."""
        return backend_of(self.format)

    @property
    def skipped_path(self) -> str:
        """Path of the JSON lines that list skipped images."""
        return f"{self.path}.skipped.jsonl" if self.is_file else os.path.join(self.path, SKIPPED)

    def final_path(self, number: int) -> str:
        """Return the path of a finished shard; for .npy shards, the prefix of its files."""
        return self.path if self.is_file else os.path.join(self.path, _shard_name(number)) + self.backend.SUFFIX

    def partial_path(self, number: int) -> str:
        """Return the path of a shard while it is filled."""
        return self.final_path(number) + PARTIAL

    @property
    def folder(self) -> str:
        """The folder in which the names of shards appear."""
        return os.path.dirname(os.path.abspath(self.path)) if self.is_file else self.path

    def prepare(self) -> None:
        """Check the place, create the folder, and remove half-written files that a crash left behind.

        Raises:
            OutputError: The path is something else, or cannot be written.
        """
        self.check_place()
        has_folder = os.path.isdir(self.path)
        if self.is_file:
            refuse_special(self.partial_path(0))
            make_way(f"{self.partial_path(0)}.tmp")
        else:
            self._prepare_folder()
        number = 0 if self._has_damaged_manifest() else self.next_number()
        self._before = _Before(
            has_folder=has_folder,
            number=number,
            has_partial=os.path.lexists(self.partial_path(number)),
            has_replacement=os.path.lexists(os.path.join(self.path, NEXT_MANIFEST)),
            skipped=_length(self.skipped_path),
        )

    def withdraw(self) -> None:
        """Remove what a failed start created since `prepare`; nothing is removed once an image is stored."""
        before = self._before
        if before is None or self._published or before.has_partial or self._has_damaged_manifest():
            return
        partial = self.partial_path(before.number)
        if os.path.exists(partial) and (self.backend.read(partial).table.status == Status.DONE).any():
            return
        remove(partial)
        if not before.has_replacement and not self.is_file:
            remove(os.path.join(self.path, NEXT_MANIFEST))
        now = _length(self.skipped_path)
        if before.skipped is None:
            remove(self.skipped_path)
        elif now is not None and now.inode == before.skipped.inode and now.size > before.skipped.size:
            os.truncate(self.skipped_path, before.skipped.size)
        if not before.has_folder and not self.is_file:
            os.rmdir(self.path)

    def check_place(self) -> None:
        """Check that an output can be here, without reading or writing one.

        Raises:
            OutputError: Something else is here, or its folder does not exist.
        """
        parent = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(parent):
            raise OutputError(f"the folder {parent} does not exist", f"create it: mkdir -p {parent}")
        if os.path.islink(self.path):
            raise OutputError(f"{self.path} is a link that leads back to itself", "remove it, or choose another name")
        is_folder = os.path.isdir(self.path)
        if os.path.exists(self.path) and not is_folder and not os.path.isfile(self.path):
            raise ForeignFileError(f"{self.path} is not a regular file", "choose another output, or move it away")
        if not self.is_file and os.path.exists(self.path) and not is_folder:
            raise OutputError(
                f"{self.path} is a file, but the output would be a folder", "name it with .h5, or choose another name"
            )
        refuse_special(self.skipped_path)
        if is_folder:
            self._check_folder(names_in(self.path))

    def _check_folder(self, names: list[str]) -> None:
        """Refuse a folder that holds something else."""
        is_ours = any(name in (MANIFEST, NEXT_MANIFEST, SKIPPED) or SHARD_FILE.fullmatch(name) for name in names)
        if not is_ours and not self._has_slash and suffix_of(self.path) in SINGLE_FILE_SUFFIXES:
            raise OutputError(
                f"{self.path} is a folder", f"name a file; with a slash, {self.path}/, features go into the folder"
            )
        if names and not is_ours:
            raise OutputError(f"{self.path} holds other files and is not a feature store", "name a new or empty folder")

    def _prepare_folder(self) -> None:
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot make the folder {self.path}: {system_words(error)}", "choose an output that can be written"
            ) from error
        names = names_in(self.path)
        for name in names:
            if name.endswith(PARTIAL) and os.path.islink(os.path.join(self.path, name)):
                refuse_special(os.path.join(self.path, name))
        if MANIFEST not in names and NEXT_MANIFEST not in names:
            self._refuse_unclaimed(names)
        if not self._has_damaged_manifest():  # loading it reports the damage
            self._recover()

    def finished(self) -> list[FinishedShard]:
        """Load the complete shards, oldest first, each checked against its digest."""
        if self.is_file:
            return [load_shard("", self.path, self.backend)] if os.path.exists(self.path) else []
        return [self._load_entry(entry) for entry in self._entries()]

    def _load_entry(self, entry: ManifestEntry) -> FinishedShard:
        backend = backend_of(entry.format)
        path = os.path.join(self.path, entry.name) + backend.SUFFIX
        return load_own_shard(entry.name, path, backend, entry.superseded)

    def partial(self) -> FinishedShard | None:
        """Load the shard that an earlier run left unfinished, with its current statuses."""
        number = self.next_number()
        path = self.partial_path(number)
        if not os.path.exists(path):
            return None
        return load_own_shard(_shard_name(number), path, self.backend)

    @property
    def partial_exists(self) -> bool:
        """Whether an earlier run left a shard unfinished, readable or not."""
        return os.path.exists(self.partial_path(self.next_number()))

    def next_number(self) -> int:
        """Return the number after those of all shards that a manifest names."""
        return max((int(name.removeprefix("shard-")) + 1 for name in self._named()), default=0)

    def publish(self, number: int, images: int, tiles: int, superseded: Mapping[str, Sequence[str]]) -> None:
        """Make a filled shard part of the output: rename its files, then write the manifest, which commits it."""
        partial = self.partial_path(number)
        self._published = True
        self.backend.publish(partial, self.final_path(number))
        if self.is_file:
            return
        added = ManifestEntry(_shard_name(number), self.format, images, tiles)
        self._write_manifest([*self._without(superseded), added])
        self._sweep({*self._named(), added.name})
        self._remove_partials(added.name)

    def drop_rows(self, dropped: Mapping[str, Sequence[str]]) -> None:
        """Mark rows of a folder's shards as superseded; `dropped` has keys by shard name."""
        self._write_manifest(self._without(dropped))
        self._sweep(self._named())

    def _without(self, dropped: Mapping[str, Sequence[str]]) -> list[ManifestEntry]:
        """Return the manifest's entries with more keys superseded, without shards that have no live row left."""
        entries = [
            replace(entry, superseded=tuple(sorted({*entry.superseded, *dropped.get(entry.name, ())})))
            for entry in self._entries()
        ]
        return [entry for entry in entries if len(entry.superseded) < entry.images]

    def replace_all(self) -> None:
        """Begin an output that replaces the present one when it is complete, or continue one.

        If a manifest is damaged, the complete shards are unknown, and all shards are removed at once.
        """
        if self.is_file:
            return
        if self._has_damaged_manifest():
            self._clear()
        self._staged = True
        if not os.path.exists(os.path.join(self.path, NEXT_MANIFEST)):
            self._write_manifest([])

    def discard_partial(self) -> None:
        """Discard the unfinished shard and an unfinished replacement."""
        if self._staged:
            self._write_manifest([])
        if self.is_file:
            remove(self.partial_path(0))
        else:
            self._sweep(self._named())
        if self._before is not None:
            self._before = replace(self._before, has_partial=False)

    def complete(self) -> None:
        """Finish the output after all planned shards: a replacement takes the place of the old output."""
        if self._staged:
            rename_durably(os.path.join(self.path, NEXT_MANIFEST), os.path.join(self.path, MANIFEST))
            self._staged = False
            self._sweep(self._named())

    def _present_format(self) -> Format:
        """Return the format of the existing shards, so that a repeated command need not name it."""
        names = names_in(self.path) if os.path.isdir(self.path) else []
        return Format.H5 if any(SHARD_FILE.fullmatch(name) and ".h5" in name for name in names) else Format.NPY

    def _entries(self, manifest: str = "") -> list[ManifestEntry]:
        if self.is_file:
            return []
        return read_manifest(os.path.join(self.path, manifest or self._manifest))

    @property
    def _manifest(self) -> str:
        return NEXT_MANIFEST if self._staged else MANIFEST

    def _write_manifest(self, entries: list[ManifestEntry]) -> None:
        shards = [asdict(entry) | {"format": entry.format.value} for entry in entries]
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "shards": shards, "digest": _digest(shards)}
        text = json.dumps(manifest, indent=1)
        write_file(os.path.join(self.path, self._manifest), text.encode() + b"\n")

    def _named(self) -> set[str]:
        """Return the names of the shards in the manifests."""
        return {entry.name for manifest in (MANIFEST, NEXT_MANIFEST) for entry in self._entries(manifest)}

    def _remove_partials(self, name: str) -> None:
        """Remove the partial files of a finished shard, including those of the other format."""
        for shard_format in Format:
            partial = os.path.join(self.path, name) + backend_of(shard_format).SUFFIX + PARTIAL
            if os.path.exists(partial):
                os.rename(partial, f"{partial}.tmp")
                remove(f"{partial}.tmp")

    def _has_damaged_manifest(self) -> bool:
        try:
            self._named()
        except ForeignFileError:
            raise
        except OutputError:
            return True
        return False

    def _sweep(self, kept: Collection[str]) -> None:
        """Remove half-written files, and all shard files except the named ones."""
        for name in os.listdir(self.path):
            match = SHARD_FILE.fullmatch(name)
            is_ours = match is not None or name.removesuffix(".tmp") in (MANIFEST, NEXT_MANIFEST, SKIPPED)
            if (is_ours and name.endswith(".tmp")) or (match is not None and match[1] not in kept):
                remove(os.path.join(self.path, name))

    def _refuse_foreign(self, final: str) -> None:
        """Refuse to touch a foreign file with the name of a shard; loading reports a damaged shard of ours."""
        try:
            load_shard("", final, self.backend)
        except ForeignFileError:
            raise
        except OutputError:
            return

    def _clear(self) -> None:
        """Remove every shard and then the manifests, so that a crash in between leaves the manifests."""
        self._sweep(())
        for name in (NEXT_MANIFEST, MANIFEST):
            remove(os.path.join(self.path, name))

    def _refuse_unclaimed(self, names: Collection[str]) -> None:
        """Refuse to touch shards without a manifest: they are somebody else's, or their manifest was lost.

        An interrupted first run leaves only parts of the first shard, possibly with final .npy files beside them.
        """
        first = _shard_name(0)
        shards = [match for name in names if (match := SHARD_FILE.fullmatch(name)) and not name.endswith(".tmp")]
        apart = [match for match in shards if ".h5" not in match[0] and match[0] != first + PARTIAL]
        if any(match[1] != first for match in shards) or (apart and first + PARTIAL not in names):
            raise ForeignFileError(
                f"{self.path} holds shards but no {MANIFEST} that names them",
                f"restore {MANIFEST} if they are features, or name a new or empty folder",
            )

    def _recover(self) -> None:
        """Remove what no manifest names, except the current shard: a crash may have happened before its entry."""
        current, named = self.next_number(), self._named()
        self._sweep({*named, _shard_name(current)})
        for name in named:  # a crash happened between the entry and the removal of the partial files
            self._remove_partials(name)
        final, partial = self.final_path(current), self.partial_path(current)
        if os.path.isfile(final) and not os.path.exists(partial):
            self._refuse_foreign(final)
            os.rename(final, partial)


def read_manifest(path: str) -> list[ManifestEntry]:
    """Return the shards that a manifest names, or an empty list if there is no manifest yet.

    Raises:
        OutputError: It is damaged, of a newer version, or names anything but a shard of its own folder.
    """
    try:
        manifest = parse_json(_manifest_text(path))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ForeignFileError(f"{path} is not a manifest of internvit features", "choose another output")
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise OutputError(
                f"{path} has format version {one_line(str(version), 40)}; this program reads version {FORMAT_VERSION}",
                NEWER,
            )
        return _entries_of(manifest, path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}", "check what it is, and its permissions") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged: {one_line(str(error))}", RESTORE_OR_OVERWRITE) from error


def _manifest_text(path: str) -> bytes:
    """Read a manifest, whose size is bounded by the keys of the shards beside it."""
    try:
        return read_bounded(path, MANIFEST_BYTES, follow_links=False)
    except TooLargeError:
        with os.scandir(os.path.dirname(path)) as entries:
            shards = [entry for entry in entries if SHARD_FILE.fullmatch(entry.name) and entry.is_file()]
        most = MANIFEST_BYTES + sum(entry.stat().st_size for entry in shards)
        return read_bounded(path, most, follow_links=False)


def _entries_of(manifest: dict[str, Any], path: str) -> list[ManifestEntry]:
    if manifest["digest"] != _digest(manifest["shards"]):
        raise ValueError("its digest does not match")
    entries = [_entry(shard, path) for shard in manifest["shards"]]
    if len({entry.name for entry in entries}) < len(entries):
        raise ValueError("it names a shard twice")
    return entries


def _digest(shards: Any) -> str:
    """Return the SHA-256 of a manifest's shards, 64 hex digits; the manifest decides which files are removed."""
    return hashlib.sha256(json.dumps(shards, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _entry(shard: dict[str, Any], path: str) -> ManifestEntry:
    name = shard["name"]
    if not SHARD_NAME.fullmatch(name):
        raise ValueError(f"{one_line(repr(name), 80)} is not a shard's name")
    if shard["format"] not in [known.value for known in Format]:
        raise unknown_value({}, f"the format of {name} in {path} is {one_line(repr(shard['format']), 80)}")
    for count in (shard["images"], shard["tiles"]):
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 1 << 48:
            raise ValueError(f"{one_line(repr(count), 80)} is not a number of images or tiles")
    for key in shard["superseded"]:
        os.fsencode(key)  # raises for a text that cannot be a key
    return ManifestEntry(name, Format(shard["format"]), shard["images"], shard["tiles"], tuple(shard["superseded"]))


def _length(path: str) -> _Length | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return _Length(status.st_ino, status.st_size)


def names_in(folder: str) -> list[str]:
    """List what a folder holds.

    Raises:
        OutputError: It cannot be read.
    """
    try:
        return os.listdir(folder)
    except OSError as error:
        raise OutputError(f"cannot read {folder}: {error.strerror}", "check its permissions") from error


def load_shard(name: str, path: str, backend: ShardFormat, superseded: tuple[str, ...] = ()) -> FinishedShard:
    """Read a shard's index and check it against its digest.

    Raises:
        OutputError: The shard does not exist, or is damaged.
    """
    # Recorded first: a file that is replaced after this has another identity, and is never read with this index.
    files = {file: file_identity(file, os.stat(file)) for file in backend.final_paths(path) if os.path.exists(file)}
    stored = backend.read(path)
    check_shard(stored, path)
    return FinishedShard(name, path, backend.KIND, stored, superseded, files)


def load_own_shard(name: str, path: str, backend: ShardFormat, superseded: tuple[str, ...] = ()) -> FinishedShard:
    """Read the index of a shard that must be ours: a manifest names it, or it is being filled.

    Raises:
        OutputError: It is damaged, maybe beyond recognition, and can be replaced.
        ForeignFileError: Another program's file has taken its place.
    """
    try:
        return load_shard(name, path, backend, superseded)
    except UnrecognizedFileError as error:
        raise OutputError(
            f"{path} is damaged: its first bytes are not those of a shard", RESTORE_OR_OVERWRITE
        ) from error


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}"
