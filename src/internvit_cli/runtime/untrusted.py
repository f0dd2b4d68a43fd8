"""Open, read and parse files from others safely: without waiting, and with limits on size.

A path may lead to a pipe without a writer, to an endless device, to a sparse file of terabytes, or out of its folder;
JSON may be nested a million levels deep. All code that reads a file that the run did not just write uses this module.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

LINE_BYTES = 1 << 16
"""Largest line of JSON, which is enough for any image; a key has at most 4096 bytes before it is escaped."""

BLOCK_BYTES = 1 << 20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class NotRegularError(OSError):
    """A path leads to something other than a regular file; `strerror` says what it is."""

    def __init__(self, path: str | bytes, mode: int) -> None:
        self.kind = file_kind(mode)
        """What the path leads to, such as `a pipe`."""
        super().__init__(errno.EINVAL, f"it is {self.kind}, not a file", path)


class TooLargeError(OSError):
    """A file is larger than its purpose allows."""

    def __init__(self, path: str | bytes, most: int) -> None:
        super().__init__(errno.EFBIG, f"it is larger than {most:,} bytes", path)


class OpenFile(NamedTuple):
    """A regular file, open for reading; the receiver closes the descriptor."""

    descriptor: int
    status: os.stat_result


def file_kind(mode: int) -> str:
    """Return the kind of file for a file mode, such as `a pipe`."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a file")


def open_regular(path: str | bytes, *, follow_links: bool = True) -> OpenFile:
    """Open a regular file for reading, without ever waiting and without opening anything else.

    Args:
        path: The file.
        follow_links: Whether the path itself may be a link.

    Returns:
        The descriptor, not inherited by child processes, and its fstat.

    Raises:
        NotRegularError: The path leads to a pipe, socket, device or folder, or is a link that must not be followed.
        OSError: The file cannot be opened.
    """
    if b"\0" in os.fsencode(path):  # such a file cannot exist, but Python does not raise an OSError
        raise OSError(errno.EINVAL, "its name holds a NUL byte", path)
    # Checked first, because opening some devices acts on them, and again, because the name may be reused.
    mode = os.stat(path, follow_symlinks=follow_links).st_mode
    if not stat.S_ISREG(mode):
        raise NotRegularError(path, mode)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise NotRegularError(path, status.st_mode)
    return OpenFile(descriptor, status)


@contextmanager
def opened(path: str | bytes, *, follow_links: bool = True) -> Iterator[BinaryIO]:
    """Open a regular file as an unbuffered binary stream for the duration of a `with` block.

    Raises:
        NotRegularError: See `open_regular`.
        OSError: The file cannot be opened.
    """
    found = open_regular(path, follow_links=follow_links)
    with os.fdopen(found.descriptor, "rb", buffering=0) as file:
        yield file


def read_bounded(path: str | bytes, most: int, *, follow_links: bool = True) -> bytes:
    """Read a whole regular file that has at most `most` bytes.

    Raises:
        NotRegularError: See `open_regular`.
        TooLargeError: The file has more bytes.
        OSError: The file cannot be read.
    """
    with opened(path, follow_links=follow_links) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise TooLargeError(path, most)
        parts, room = [], most + 1
        while room and (part := file.read(room)):
            room -= len(part)
            parts.append(part)
        if not room:  # the file grew, or is one of the kernel's files, which report no size
            raise TooLargeError(path, most)
        return b"".join(parts)


def lines_of(file: BinaryIO, longest: int = LINE_BYTES) -> Iterator[bytes]:
    """Yield the lines of an open file, line ends included, in memory that does not grow with the file.

    Raises:
        ValueError: A line has more than `longest` bytes; the lines before it were yielded.
    """
    number, rest = 0, b""
    while block := file.read(max(longest, BLOCK_BYTES)):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            number += 1
            if len(line) >= longest:
                raise ValueError(f"line {number:,} is longer than {longest:,} bytes")
            yield line + b"\n"
        if len(rest) >= longest:
            raise ValueError(f"line {number + 1:,} is longer than {longest:,} bytes")
    if rest:
        yield rest


def parse_json(text: str | bytes) -> Any:
    """Parse standard JSON, which has no NaN and no infinity.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or has a number that is too large.
    """
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
