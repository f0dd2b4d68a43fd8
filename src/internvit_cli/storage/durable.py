"""Writing that survives a crash: positioned writes, reserved space, syncs, names that appear whole or not at all."""

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
"""The last: a file over what the filesystem, or a limit of the shell, allows."""
WITHOUT_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EPERM, ENOTSUPP)
"""The last but one: what a sandbox answers to system calls that it does not know."""
WITHOUT_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, ENOTSUPP)
"""What filesystems that sync no folders answer; a failing disk answers something else, such as EIO."""


@contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Turn an error of the disk into one that ends the run and says what to do."""
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
        raise too_short(path)
    data = bytearray(size)
    view = memoryview(data)
    while view:
        got = os.preadv(descriptor, [view], offset)
        if got == 0:
            raise too_short(path)
        view, offset = view[got:], offset + got
    return data


def too_short(path: str) -> OutputError:
    """Return the error of a file that ends before its rows do."""
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


def sync_path(path: str) -> str:
    """Sync a file or a folder by name.

    Returns:
        Why a folder is not synced, in the system's words, where its filesystem syncs none; otherwise nothing. Such a
        filesystem must not make every run fail: what is lost there is told by `unsynced_folder`.

    Raises:
        OutputError: the disk failed. It is fatal, as in `sync_data`.
    """
    with disk_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:  # a folder that may be written and not read
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
    """Sync a folder; returns one sentence on what is not promised there, and nothing where all is.

    Raises:
        OutputError: the disk failed.
    """
    words = sync_path(folder)
    if not words:
        return ""
    return (
        f"{folder} cannot be synced ({words}): after a power cut, not after a kill, a finished output may be missing "
        "or still have the name of an unfinished one; run the same command again then"
    )


def rename_durably(source: str, target: str) -> None:
    """Move a synced file or folder to its name, replacing a file, so that the name itself survives a power cut."""
    with disk_errors(target):
        os.replace(source, target)
    sync_path(os.path.dirname(os.path.abspath(target)))


def write_file(path: str, data: bytes) -> None:
    """Write a small file that is either there and whole, or not there.

    A link that has its name is replaced, and what it leads to is left alone.

    Raises:
        OutputError: a folder, a pipe or the like has its name, or the disk failed; nothing is left beside it.
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
    """Make a file that is not there yet, for writing in binary.

    All files of ours begin here or in `append`, so that a link or another name of a file that somebody put in the way
    is never written through.

    Raises:
        FileExistsError: something has that name; a link that leads nowhere has it too.
    """
    return open(path, "xb", buffering=buffering)


def append(path: str) -> BinaryIO:
    """Open a file of ours for writing at its end, made if it is not there; what is in it can be read too.

    Raises:
        OutputError: a link, a pipe or the like has its name.
    """
    descriptor = open_ours(path, os.O_CREAT | os.O_APPEND)
    if os.fstat(descriptor).st_nlink > 1:  # another name of it, such as that of a snapshot, keeps what it had
        with os.fdopen(descriptor, "rb") as shared:
            write_file(path, shared.read())
        descriptor = open_ours(path, os.O_APPEND)
    return os.fdopen(descriptor, "ab")


def open_ours(path: str, flags: int = 0) -> int:
    """Open a file of ours for reading and writing, and nothing else that has its name; returns the descriptor.

    Raises:
        OutputError: a link, a pipe or the like has its name.
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
    """Refuse what has the name of a file of ours and is none.

    Raises:
        OutputError: it is a folder, a link, a pipe, a socket or a device.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(
            f"{path} is {file_kind(mode)}, where a file of internvit belongs", "move it away, or choose another name"
        )


def make_way(temporary: str) -> None:
    """Remove what a run that was cut short left under the name of a temporary file, and never what a link leads to.

    Raises:
        OutputError: something else has that name.
    """
    if os.path.lexists(temporary):
        if not os.path.islink(temporary):
            refuse_special(temporary)
        os.unlink(temporary)


@contextmanager
def folder_for(path: str) -> Iterator[None]:
    """Have the folder that a file is to be written in; a new one goes again when the file cannot be written.

    Raises:
        OutputError: it cannot be made.
    """
    folder = os.path.dirname(os.path.abspath(path))
    is_new = not os.path.isdir(folder)
    with disk_errors(folder):
        os.makedirs(folder, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # there is something in it
                os.rmdir(folder)
        raise


def remove(path: str) -> None:
    """Remove a file or a folder with all it holds; nothing when it is not there."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def reserve(path: str) -> bool:
    """Have the filesystem set the blocks of a file aside, so that the disk cannot fill up in the middle of a run.

    This is fallocate(2) itself: the C library's stand-in for filesystems without it would write every block. There the
    file stays sparse.

    Returns:
        Whether they are set aside.

    Raises:
        OSError: the blocks are not to be had.
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
