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

from internvit_cli.errors import LockedError, NoSpaceError, OutputError
from internvit_cli.storage.durable import NO_SPACE_ERRNOS

if TYPE_CHECKING:
    from collections.abc import Iterator

WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def exclusive(output: str, *, enabled: bool = True) -> Iterator[None]:
    """Hold `output` for this process. The data itself is never locked, so readers always get in.

    Raises:
        LockedError: another run holds it; the message names host, process and start.
        OutputError: the folder cannot be written, or its filesystem has no locks.
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
        try:
            # No link is followed: what it leads to would be overwritten.
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in NO_SPACE_ERRNOS:
                raise NoSpaceError(f"no room for {path}: {error.strerror}", "free some space") from error
            folder = os.path.dirname(os.path.abspath(path))
            raise OutputError(
                f"cannot write in {folder}: {error.strerror}",
                "create the folder, or choose an output in one that can be written",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno in WITHOUT_FLOCK:
                raise OutputError(
                    f"the filesystem of {path} has no locks",
                    "run with --no-lock, and see to it that only one run writes this output",
                ) from error
            raise LockedError(
                f"{path.removesuffix('.lock')} is held by another run{_describe(holder)}", "try again later"
            ) from error
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: str) -> bool:
    """Whether a path still names the opened file, which another run may just have finished with and unlinked."""
    ours = os.fstat(descriptor)
    try:
        theirs = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


def _describe(holder: bytes) -> str:
    try:
        record = json.loads(holder)
        return f": process {int(record['pid'])} on {record['host']!s:.255}, since {record['started']!s:.40}"
    except (ValueError, KeyError, TypeError):
        return ""
