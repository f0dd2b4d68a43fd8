"""Allow one writer per output, with a lock that the kernel releases when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from typing import TYPE_CHECKING

from internvit_cli.errors import InternvitError, LockedError, NoSpaceError, OutputError, system_words
from internvit_cli.storage.durable import NO_SPACE_ERRNOS, open_ours

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def exclusive(output: str, *, enabled: bool = True) -> Iterator[None]:
    """Lock `output` for this process. The data itself is never locked, so readers are never blocked.

    Raises:
        LockedError: Another run holds the lock; the message names its host, process and start.
        OutputError: The folder cannot be written, something else has the name of the lock, or its filesystem has no
            locks.
    """
    if not enabled:
        yield
        return
    path = f"{output}.lock"
    descriptor = _acquire(path)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # such as a full disk: the lock works without its text
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        # Unlinking while the lock is held is safe: a process that waits for this inode checks whether the path has it.
        if _is_at(descriptor, path):
            os.unlink(path)
        os.close(descriptor)


def _acquire(path: str) -> int:
    while True:
        descriptor, is_new = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            refusal = _refusal(error, path, descriptor)
            os.close(descriptor)
            if is_new and not isinstance(refusal, LockedError):
                with contextlib.suppress(OSError):
                    os.unlink(path)
            raise refusal from error
        is_ours = _is_at(descriptor, path)
        if is_ours and os.fstat(descriptor).st_nlink == 1:
            return descriptor
        if is_ours:  # another hard link, such as a snapshot's, must not get our text
            os.unlink(path)
        os.close(descriptor)


def _open(path: str) -> tuple[int, bool]:
    """Open or create the lock file; return the descriptor, and whether the file is new."""
    # No link is followed: its target would be overwritten.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        with contextlib.suppress(FileExistsError), _errors_of_folder(path):
            return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # its holder has just finished
            return _open_present(path), False


def _open_present(path: str) -> int:
    try:
        return open_ours(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot open the lock {path}: {system_words(error)}",
            "it may belong to another user: remove it if no run is writing this output, or choose another output",
        ) from error


def _refusal(error: OSError, path: str, descriptor: int) -> InternvitError:
    """Return the error for a lock that was not granted. Only one errno means that another process holds it."""
    if error.errno == errno.EWOULDBLOCK:
        output = path.removesuffix(".lock")
        return LockedError(f"{output} is held by another run{_holder(descriptor)}", "try again later")
    return OutputError(
        f"the filesystem of {path} has no locks that work: {system_words(error)}",
        "run with --no-lock, and make sure that only one run writes this output",
    )


@contextlib.contextmanager
def _errors_of_folder(path: str) -> Iterator[None]:
    """Turn errors of creating a file into errors that say what to do, unless the file exists already."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in NO_SPACE_ERRNOS:
            raise NoSpaceError(f"no room for {path}: {system_words(error)}", "free some space") from error
        if error.errno == errno.ENAMETOOLONG:
            raise OutputError(f"cannot create {path}: {system_words(error)}", "choose a shorter name") from error
        folder = os.path.dirname(os.path.abspath(path))
        raise OutputError(
            f"cannot write in {folder}: {system_words(error)}",
            "create the folder, or choose an output in one that can be written",
        ) from error


def _is_at(descriptor: int, path: str) -> bool:
    """Return whether a path still names the opened file, which another run may have unlinked when it finished."""
    ours = os.fstat(descriptor)
    try:
        theirs = os.lstat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


def _holder(descriptor: int) -> str:
    """Describe the holder of the lock from the file's text."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f": process {int(record['pid'])} on {record['host']!s:.255}, since {record['started']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
