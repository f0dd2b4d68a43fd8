"""Writing that survives a crash: positioned writes, reserved space, syncs, names that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

from internvit_cli.errors import NoSpaceError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The last: a file over what the filesystem, or a limit of the shell, allows."""
WITHOUT_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn an error of the disk into one that ends the run and says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise NoSpaceError(
                f"no room for {path}: {error.strerror}", "free some space and run the same command again"
            ) from error
        raise OutputError(
            f"cannot write {path}: {error.strerror}",
            "check the disk, then run the same command again: what was committed is kept",
        ) from error


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write a whole buffer at a byte offset, whatever the kernel takes at a time."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_exactly(descriptor: int, size: int, offset: int, path: str) -> bytearray:
    """Read `size` bytes at a byte offset.

    Raises:
        OutputError: the file ends before that.
    """
    if offset + size > os.fstat(descriptor).st_size:
        raise _too_short(path)
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise _too_short(path)
        view, offset = view[got:], offset + got
    return data


def _too_short(path: str) -> OutputError:
    return OutputError(
        f"{path} is shorter than its index says", "it was truncated after it was written; restore it from a copy"
    )


def sync_data(descriptor: int) -> None:
    """Wait until a file's data is on the disk.

    An error is fatal: after a failed sync the data may be gone, so it is never retried.
    """
    if sys.platform == "darwin":  # fsync there leaves the data in the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def sync_together(descriptors: Mapping[str, int]) -> None:
    """Sync the data of several files at the same time: a filesystem's journal takes in one go what waits for it.

    Args:
        descriptors: by path.

    Raises:
        OutputError: a sync failed; all of them have been asked for, and none is ever asked for again.
    """
    if len(descriptors) == 1:
        for path, descriptor in descriptors.items():
            with disk_errors(path):
                sync_data(descriptor)
        return
    with ThreadPoolExecutor(len(descriptors), thread_name_prefix="sync") as pool:
        syncs = {path: pool.submit(sync_data, descriptor) for path, descriptor in descriptors.items()}
    for path, sync in syncs.items():
        with disk_errors(path):
            sync.result()


def sync_path(path: str) -> None:
    """Sync a file or a folder by name."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_durably(source: str, target: str) -> None:
    """Move a synced file or folder to its name, replacing a file, so that the name itself survives a power cut."""
    with disk_errors(target):
        os.replace(source, target)
    sync_path(os.path.dirname(os.path.abspath(target)))


def write_file(path: str, data: bytes) -> None:
    """Write a small file that is either there and whole, or not there."""
    temporary = f"{path}.tmp"
    with disk_errors(path), open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename_durably(temporary, path)


def remove(path: str) -> None:
    """Remove a file or a folder with all it holds; nothing when it is not there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def reserve(path: str) -> None:
    """Have the filesystem set the blocks of a file aside, so that the disk cannot fill up in the middle of a run.

    This is fallocate(2) itself: the C library's stand-in for filesystems without it would write every block. There the
    file stays sparse.

    Raises:
        OSError: the blocks are not to be had.
    """
    if not sys.platform.startswith("linux"):
        return
    fallocate: Callable[..., int] = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]  # type: ignore[attr-defined]
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        if size and fallocate(descriptor, 0, 0, size) != 0:
            number = ctypes.get_errno()
            if number not in WITHOUT_FALLOCATE:
                raise OSError(number, os.strerror(number), path)
    finally:
        os.close(descriptor)


def memory_file() -> BinaryIO:
    """An empty file that lies in memory and goes when it is closed; its holes take no room."""
    if not hasattr(os, "memfd_create"):
        return tempfile.TemporaryFile(buffering=0)
    return os.fdopen(os.memfd_create("internvit-plan"), "w+b", buffering=0)


def written_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that are not holes, as (start, stop) bytes; all of it where holes cannot be told."""
    size = os.fstat(descriptor).st_size
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    stop = 0
    while stop < size:
        try:
            start = os.lseek(descriptor, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole is left
                return
            raise
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, stop


def free_bytes(path: str) -> int:
    """Bytes that an ordinary user may still write beside `path`, which need not exist yet."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def allocated_bytes(path: str) -> int:
    """Bytes of disk that a file, or the files of a folder, take up already."""
    if os.path.isdir(path):
        return sum(allocated_bytes(entry.path) for entry in os.scandir(path))
    return os.stat(path).st_blocks * 512 if os.path.exists(path) else 0


def check_space(path: str, needed: int, less: str = "--tokens none, --max-tiles") -> None:
    """Refuse a plan that cannot fit.

    Args:
        path: what is to be written.
        needed: bytes.
        less: options with which it would be less.

    Raises:
        NoSpaceError: fewer than `needed` bytes are free.
    """
    free = free_bytes(path)
    if needed > free:
        raise NoSpaceError(
            f"{path} needs {needed:,} bytes more, and {free:,} are free there",
            f"free some space, choose another disk, or store less ({less})",
        )
