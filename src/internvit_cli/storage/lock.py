"""One writer an output: a lock that the kernel drops with its holder, so that a dead run never needs a human."""

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
    """Hold `output` for this process. The data itself is never locked, so readers always get in.

    Raises:
        LockedError: another run holds it; the message names host, process and start.
        OutputError: the folder cannot be written, something else has the name of the lock, or its filesystem has no
            locks.
    """
    if not enabled:
        yield
        return
    path = f"{output}.lock"
    descriptor = _acquire(path)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # such as a full disk: the lock holds without its text
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        yield
    finally:
        # Unlinking while the lock is held is safe: whoever waits for this inode looks whether the path still has it.
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
        if is_ours:  # its other name, such as that of a snapshot, must not get our text
            os.unlink(path)
        os.close(descriptor)


def _open(path: str) -> tuple[int, bool]:
    """Open the lock file, or make it; returns the descriptor, and whether it is new."""
    # No link is followed: what it leads to would be overwritten.
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
            "it may be another user's: remove it when no run writes this output, or choose another output",
        ) from error


def _refusal(error: OSError, path: str, descriptor: int) -> InternvitError:
    """What to say when the kernel does not give the lock. Only one answer means that somebody has it."""
    if error.errno == errno.EWOULDBLOCK:
        output = path.removesuffix(".lock")
        return LockedError(f"{output} is held by another run{_holder(descriptor)}", "try again later")
    return OutputError(
        f"the filesystem of {path} has no locks that work: {system_words(error)}",
        "run with --no-lock, and see to it that only one run writes this output",
    )


@contextlib.contextmanager
def _errors_of_folder(path: str) -> Iterator[None]:
    """Turn an error of making a file into one that says what to do, unless the file is there already."""
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
    """Whether a path still names the opened file, which another run may just have finished with and unlinked."""
    ours = os.fstat(descriptor)
    try:
        theirs = os.lstat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


def _holder(descriptor: int) -> str:
    """Who holds the lock, as far as the file tells."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f": process {int(record['pid'])} on {record['host']!s:.255}, since {record['started']!s:.40}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
