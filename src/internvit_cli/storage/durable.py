"""Write files so that they survive a crash: positioned writes, reserved space, syncs and atomic renames."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from internvit_cli.errors import ENOTSUPP, RESTORE, NoSpaceError, OutputError, system_words
from internvit_cli.runtime.untrusted import file_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""EFBIG: the file is larger than the filesystem or a shell limit allows."""
WITHOUT_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM, ENOTSUPP)
"""EPERM: sandboxes return it for system calls that they do not know."""
WITHOUT_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, ENOTSUPP)
"""Errors of filesystems that cannot sync folders; a failing disk returns others, such as EIO."""


READ_AHEAD_BYTES = 512 << 10


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn disk errors into errors that end the run and say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise NoSpaceError(
                f"no room for {path}: {system_words(error)}", "free some space and run the same command again"
            ) from error
        raise OutputError(
            f"cannot write {path}: {system_words(error)}",
            "check the disk, then run the same command again: what was committed is kept",
        ) from error


def write_all(descriptor: int, data: Any, offset: int) -> None:
    """Write a whole buffer at a byte offset, in as many writes as the kernel needs."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def read_exactly(descriptor: int, size: int, offset: int, path: str) -> bytearray:
    """Read `size` bytes at a byte offset.

    Raises:
        OutputError: The file ends before that.
    """
    data = bytearray(size)
    read_into(descriptor, data, offset, path)
    return data


def read_into(descriptor: int, target: Any, offset: int, path: str) -> None:
    """Fill a writable buffer of bytes from a byte offset.

    Raises:
        OutputError: The file ends before that.
    """
    view = memoryview(target)
    if offset + len(view) > os.fstat(descriptor).st_size:
        raise too_short(path)
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise too_short(path)
        view, offset = view[got:], offset + got


def read_ahead(descriptor: int, size: int, offset: int) -> None:
    """Ask the system to read a part of a file into its cache, and return at once; other systems than Linux do nothing.

    Linux reads no more per call than a device takes at a time, so there is a call for each piece. If the last byte is
    in the cache already, so is the rest, as a rule, and asking would cost more than it gives.
    """
    if not hasattr(os, "posix_fadvise") or not size or is_cached(descriptor, offset + size - 1):
        return
    for start in range(offset, offset + size, READ_AHEAD_BYTES):
        piece = min(READ_AHEAD_BYTES, offset + size - start)
        os.posix_fadvise(descriptor, start, piece, os.POSIX_FADV_WILLNEED)


def is_cached(descriptor: int, offset: int) -> bool:
    """Return whether a byte of a file is in the system's cache; False if the filesystem cannot tell."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to be read, or the filesystem does not support the question
        return False


def too_short(path: str) -> OutputError:
    """Return the error for a file that ends before its rows do."""
    return OutputError(f"{path} is shorter than its index says", f"it was truncated after it was written; {RESTORE}")


def sync_data(descriptor: int) -> None:
    """Wait until a file's data is on the disk.

    An error is fatal: after a failed sync the data may be gone, so it is never retried.
    """
    if sys.platform == "darwin":  # fsync there leaves the data in the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(descriptor)


def sync_together(descriptors: Mapping[str, int]) -> None:
    """Sync the data of several files at the same time, which lets a filesystem's journal commit them together.

    Args:
        descriptors: Descriptors by path.

    Raises:
        OutputError: A sync failed. All of them were requested, and none is ever retried.
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


def sync_path(path: str) -> str:
    """Sync a file or a folder by name.

    Returns:
        The system's message if the filesystem cannot sync folders; otherwise an empty string. Such a filesystem must
        not make every run fail; `unsynced_folder` describes what is lost there.

    Raises:
        OutputError: The disk failed, which is fatal, as in `sync_data`.
    """
    with disk_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:  # the folder may be written but not read
            if os.path.isdir(path):
                return system_words(error)
            raise
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno in WITHOUT_FOLDER_SYNC and stat.S_ISDIR(os.fstat(descriptor).st_mode):
                return system_words(error)
            raise
        finally:
            os.close(descriptor)
    return ""


def unsynced_folder(folder: str) -> str:
    """Sync a folder and return a sentence on which guarantees are missing there, or an empty string.

    Raises:
        OutputError: The disk failed.
    """
    words = sync_path(folder)
    if not words:
        return ""
    return (
        f"{folder} cannot be synced ({words}): after a power cut (not after a kill) a finished output may be missing "
        "or still have the name of an unfinished one; in that case, run the same command again"
    )


def rename_durably(source: str, target: str) -> None:
    """Rename a synced file or folder, replacing an existing file, so that the new name survives a power cut."""
    with disk_errors(target):
        os.replace(source, target)
    sync_path(os.path.dirname(os.path.abspath(target)))


def write_file(path: str, data: bytes) -> None:
    """Write a small file atomically and durably.

    A link with that name is replaced; its target is left alone.

    Raises:
        OutputError: A folder, a pipe or the like has that name, or the disk failed; no temporary file is left behind.
    """
    temporary = f"{path}.tmp"
    if not os.path.islink(path):
        refuse_special(path)
    with disk_errors(path):
        make_way(temporary)
        try:
            with create(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            rename_durably(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def create(path: str, buffering: int = -1) -> BinaryIO:
    """Create a file that does not exist yet, for writing in binary.

    All of our files are created here or in `append`, so that nothing is ever written through a symbolic or hard link.

    Raises:
        FileExistsError: Something has that name; a dangling link counts.
    """
    return open(path, "xb", buffering=buffering)


def append(path: str) -> BinaryIO:
    """Open one of our files for reading and for appending; it is created if it does not exist.

    Raises:
        OutputError: A link, a pipe or the like has its name.
    """
    descriptor = open_ours(path, os.O_CREAT | os.O_APPEND)
    if os.fstat(descriptor).st_nlink > 1:  # other hard links, such as a snapshot's, keep the old content
        with os.fdopen(descriptor, "rb") as shared:
            write_file(path, shared.read())
        descriptor = open_ours(path, os.O_APPEND)
    return os.fdopen(descriptor, "ab")


def open_ours(path: str, flags: int = 0) -> int:
    """Open one of our files for reading and writing, but nothing else with its name; return the descriptor.

    Raises:
        OutputError: A link, a pipe or the like has its name.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    except OSError:
        refuse_special(path)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        refuse_special(path)
    return descriptor


def refuse_special(path: str) -> None:
    """Refuse anything but a regular file under the name of one of our files.

    Raises:
        OutputError: It is a folder, a link, a pipe, a socket or a device.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(
            f"{path} is {file_kind(mode)}, but internvit keeps a file there", "move it away, or choose another name"
        )


def make_way(temporary: str) -> None:
    """Remove a temporary file that an interrupted run left behind; the target of a link is never removed.

    Raises:
        OutputError: Something else has that name.
    """
    if os.path.lexists(temporary):
        if not os.path.islink(temporary):
            refuse_special(temporary)
        os.unlink(temporary)


@contextmanager
def folder_for(path: str) -> Iterator[None]:
    """Create the folder of a file to be written, and remove a new folder again if the file cannot be written.

    Raises:
        OutputError: It cannot be created.
    """
    folder = os.path.dirname(os.path.abspath(path))
    is_new = not os.path.isdir(folder)
    with disk_errors(folder):
        os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it is not empty
                os.rmdir(folder)
        raise


def remove(path: str) -> None:
    """Remove a file, or a folder with its contents, if it exists."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def reserve(path: str) -> bool:
    """Reserve the blocks of a file, so that the disk cannot fill up in the middle of a run.

    This calls fallocate(2) itself, because the C library's fallback would write every block on filesystems that lack
    it. There, the file stays sparse.

    Returns:
        Whether the blocks are reserved.

    Raises:
        OSError: The blocks are not available.
    """
    if not sys.platform.startswith("linux"):
        return False
    fallocate: Callable[..., int] = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]  # type: ignore[attr-defined]
    descriptor = open_ours(path)
    try:
        size = os.fstat(descriptor).st_size
        while size and fallocate(descriptor, 0, 0, size) != 0:
            number = ctypes.get_errno()
            if number in WITHOUT_FALLOCATE:
                return False
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number), path)
    finally:
        os.close(descriptor)
    return True


def memory_file() -> BinaryIO:
    """Return an empty file in memory that disappears when it is closed; its holes take no space."""
    if not hasattr(os, "memfd_create"):
        return tempfile.TemporaryFile(buffering=0)
    return os.fdopen(os.memfd_create("internvit-plan"), "w+b", buffering=0)


def written_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a file that are not holes, as (start, stop) bytes; the whole file if holes are unknown."""
    size = os.fstat(descriptor).st_size
    if not hasattr(os, "SEEK_DATA"):
        yield 0, size
        return
    stop = 0
    while stop < size:
        try:
            start = os.lseek(descriptor, stop, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        stop = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, stop


def free_bytes(path: str) -> int:
    """Return the bytes that an ordinary user may still write beside `path`, which need not exist yet."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def allocated_bytes(path: str) -> int:
    """Return the bytes of disk that a file or the files of a folder occupy."""
    if os.path.isdir(path):
        return sum(allocated_bytes(entry.path) for entry in os.scandir(path))
    return os.stat(path).st_blocks * 512 if os.path.exists(path) else 0


def check_space(path: str, needed: int, less: str = "--tokens none, --max-tiles") -> None:
    """Refuse a plan that does not fit on the disk.

    Args:
        path: The output.
        needed: The number of bytes that will be written.
        less: Options that reduce it.

    Raises:
        NoSpaceError: Fewer than `needed` bytes are free.
    """
    free = free_bytes(path)
    if needed > free:
        raise NoSpaceError(
            f"{path} needs {needed:,} bytes more, and {free:,} are free there",
            f"free some space, choose another disk, or store less ({less})",
        )
