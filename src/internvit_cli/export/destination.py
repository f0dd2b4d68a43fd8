"""Create a result in a folder beside its place and rename it when it is complete, so that no partial result appears."""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from internvit_cli.errors import OutputError, UsageError
from internvit_cli.export.targets import EXPORT_FACTS, INDEX
from internvit_cli.storage.durable import create, disk_errors, remove, rename_durably, sync_path
from internvit_cli.storage.format.hdf5 import read as read_hdf5
from internvit_cli.storage.format.layout import SHARD_FILE, ForeignFileError
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import MANIFEST, NEXT_MANIFEST, SKIPPED
from internvit_cli.storage.output_names import PARTIAL, SINGLE_FILE_SUFFIXES, suffix_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from internvit_cli.export.targets import ResultPlace

STAGING = ".exporting"
"""Suffix of the folder that holds an unfinished result."""
MARKER = "internvit" + STAGING
"""The empty file that marks that folder as internvit's; no result may have this name."""
REPLACED = "replaced"
RENAME_EXCHANGE = 2
AT_FDCWD = -100


class Destination:
    """The place of a result. Within `open` it belongs to this process, and has a working folder."""

    def __init__(
        self, place: ResultPlace, sources: Sequence[str], *, overwrite: bool = False, lock: bool = True
    ) -> None:
        """Refuse places that cannot or must not be written, without touching anything.

        Args:
            place: The result to create.
            sources: The outputs that are read.
            overwrite: Whether to replace an existing result of the same kind.
            lock: Whether to hold a lock against other runs.

        Raises:
            UsageError: Something exists already, or the place overlaps a source.
            OutputError: The parent folder does not exist, or an existing file is not from internvit.
        """
        is_alias = os.path.islink(place.path) or os.path.basename(place.path) in (".", "..")
        self.path = os.path.realpath(place.path) if is_alias else os.path.abspath(place.path)
        self.is_folder = place.is_folder
        self._target = place.target
        self.folder = self.path + STAGING
        self._skip_list = [f"{self.path}.{SKIPPED}"] if place.target.is_feature_file and not place.is_folder else []
        self._lock = lock
        self._overwrite = overwrite
        self._check_parent()
        for source in sources:
            refuse_overlap(source, self.path)
        self._check_present()

    @property
    def name(self) -> str:
        """The name of the result without its folder."""
        return os.path.basename(self.path)

    def staged(self, name: str) -> str:
        """Return the path at which a file of the result is created."""
        return os.path.join(self.folder, name)

    def final(self, name: str) -> str:
        """Return the final path of a file of the result."""
        return os.path.join(os.path.dirname(self.path), name)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the place, with an empty working folder that is removed at the end in any case.

        Raises:
            LockedError: Another run holds the place.
            UsageError: Something else has the name of the working folder.
        """
        with exclusive(self.path, enabled=self._lock):
            self._check_present()
            self._remove_folder()  # left by a run that was killed
            with disk_errors(self.folder):
                os.mkdir(self.folder)
                create(self.staged(MARKER)).close()
            sync_path(self.folder)  # before it holds anything else
            try:
                yield
            finally:
                self._remove_folder()

    def publish(self, names: Sequence[str], obsolete: Sequence[str] = (), withdrawn: Sequence[str] = ()) -> None:
        """Rename the finished and synced files to their final names, one after the other.

        Args:
            names: Names of the files.
            obsolete: Paths of the replaced result that are removed afterwards.
            withdrawn: Paths that describe the replaced result, and are removed first because they must describe no
                other.
        """
        for path in withdrawn:
            self._remove_durably(path)
        for name in names:
            if os.path.isdir(self.final(name)) and os.listdir(self.final(name)):
                self._exchange(name)
            else:
                rename_durably(self.staged(name), self.final(name))
        for path in obsolete:
            self._remove_durably(path)

    def refuse_present(self, path: str) -> None:
        """Refuse an existing file unless it may be replaced.

        Raises:
            UsageError: The file exists.
        """
        if os.path.lexists(path) and not self._overwrite:
            raise UsageError(f"{path} exists already", "choose another name, or replace it with --overwrite")

    def refuse_beside(self, path: str) -> None:
        """Refuse an existing file with the name of another file of the result, unless it may be replaced.

        Raises:
            UsageError: The file exists, or is a folder.
        """
        self.refuse_present(path)
        if os.path.isdir(path) and not os.path.islink(path):
            raise UsageError(f"{path} is a folder, and would be replaced by a file", "choose another name")

    # ------------------------------------------------------------------------------------------------------- refusals

    def _check_parent(self) -> None:
        parent = os.path.dirname(self.path)
        if not os.path.isdir(parent):
            raise OutputError(f"the folder {parent} does not exist", f"create it: mkdir -p {parent}")

    def _check_present(self) -> None:
        self._refuse_foreign_folder()
        if os.path.lexists(self.path):
            self._check_result()
        for path in (self.path + PARTIAL, *self._skip_list):
            self.refuse_beside(path)

    def _check_result(self) -> None:
        if os.path.islink(self.path):  # results are written to the target of a link
            raise UsageError(f"{self.path} is a link that leads back to itself", "choose another name")
        mode = os.stat(self.path).st_mode
        if self.is_folder:
            self._check_folder(mode)
        elif not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UsageError(f"{self.path} is {what}", "choose another name")
        else:
            self.refuse_present(self.path)
            self._refuse_foreign()

    def _check_folder(self, mode: int) -> None:
        if not stat.S_ISDIR(mode):
            what = "a file" if stat.S_ISREG(mode) else "not a regular file"
            raise UsageError(f"{self.path} is {what}, but the result would be a folder", "choose another name")
        names = os.listdir(self.path)
        if strange := self._foreign_names(names):
            raise UsageError(f"{self.path} holds other files, such as {min(strange)}", "name a new or empty folder")
        if names:
            self.refuse_present(self.path)

    def _foreign_names(self, names: Sequence[str]) -> list[str]:
        """Return the names in a folder that a result of this kind would not have."""
        if self._target.is_sample_folder:
            own = (INDEX, EXPORT_FACTS)
            is_ours = EXPORT_FACTS in names  # it is written last, and no other program has both
            suffix = self._target.sample_suffix
            return [name for name in names if not (is_ours and (name in own or name.endswith(suffix)))]
        known = (MANIFEST, NEXT_MANIFEST, SKIPPED)
        return [name for name in names if name not in known and not SHARD_FILE.fullmatch(name)]

    def _refuse_foreign(self) -> None:
        """Refuse to replace the HDF5 file of another program; a damaged feature file may be replaced."""
        if suffix_of(self.path) not in SINGLE_FILE_SUFFIXES:
            return
        try:
            read_hdf5(self.path)
        except ForeignFileError:
            raise
        except OutputError:
            return

    def _refuse_foreign_folder(self) -> None:
        """Refuse a working folder of another program; an empty one may be left from a crash."""
        if not os.path.lexists(self.folder):
            return
        if os.path.isdir(self.folder) and not os.path.islink(self.folder):
            names = os.listdir(self.folder)
            if MARKER in names or not names:
                return
        raise UsageError(
            f"{self.folder} is in the way, and was not made by an export", "move it away, or choose another name"
        )

    def _remove_folder(self) -> None:
        """Remove the working folder with the marker last, so that it is recognized after a crash."""
        if not os.path.isdir(self.folder):
            return
        for name in os.listdir(self.folder):
            if name != MARKER:
                remove(self.staged(name))
        remove(self.staged(MARKER))
        os.rmdir(self.folder)

    def _remove_durably(self, path: str) -> None:
        if os.path.lexists(path):
            with disk_errors(path):
                remove(path)
            sync_path(os.path.dirname(path))

    def _exchange(self, name: str) -> None:
        """Replace a folder by another one, in one step if the system supports that."""
        staged, final = self.staged(name), self.final(name)
        if not _exchange_names(staged, final):
            with disk_errors(final):
                os.rename(final, self.staged(REPLACED))
                os.rename(staged, final)
        sync_path(os.path.dirname(final))


def refuse_overlap(source: str, result: str) -> None:
    """Refuse to write a result over the output that is read, or inside it.

    Raises:
        UsageError: They are the same, or one lies inside the other.
    """
    read, written = (os.path.realpath(path.rstrip("/") or "/") for path in (source, result))
    if read == written or _is_same(read, written):
        raise UsageError(f"{result} is the output that is read", "choose another name")
    for inner, outer in ((written, read), (read, written)):
        if inner.startswith(outer + os.sep):
            raise UsageError(f"{inner} lies inside {outer}", "choose a name outside")


def _is_same(one: str, other: str) -> bool:
    """Return whether two paths lead to the same file."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _exchange_names(one: str, other: str) -> bool:
    """Swap two names in one step; return False if the system or the filesystem does not support that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0)
