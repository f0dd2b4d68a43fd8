"""Open files of any content, and turn every failure into a `Skipped` value.

The reasons are:

- `vanished`: the file does not exist any more.
- `unreadable`: the operating system could not read its bytes (permission, I/O error, link loop, name too long).
- `not_regular`: it is a pipe, socket, device or folder.
- `not_an_image`: it is empty, or in no supported format.
- `too_large`: it exceeds the pixel limit, or the memory of a worker.
- `unsupported`: it is a picture of a format or a kind that this Pillow does not read.
- `truncated`: it is damaged in another way: it begins like a picture, but the bytes that follow are not a complete one.

An error number means `unreadable` only if the system itself failed to read the bytes. Pillow also raises errors with
numbers when an offset in a damaged file points nowhere; that counts as damage.
"""

from __future__ import annotations

import errno
import io
import os
import re
import warnings
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile, UnidentifiedImageError

from internvit_cli.config import Skipped, Status, Truncated
from internvit_cli.errors import one_line
from internvit_cli.runtime import untrusted
from internvit_cli.sources.members import MemberError, OpenFile, Window, open_place
from internvit_cli.sources.signatures import FIRST_BYTES, describe, picture_format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from typing_extensions import Self

    from internvit_cli.config import PixelRule
    from internvit_cli.sources.members import FileStatus

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "AVIF",
    "JPEG2000",
    "ICO",
    "CUR",
    "DIB",
    "ICNS",
    "PSD",
    "QOI",
    "SGI",
    "DDS",
    "FITS",
    "PCX",
    "DCX",
    "BLP",
    "FTEX",
    "GBR",
    "MSP",
    "PIXAR",
    "SUN",
    "FLI",
    "XBM",
    "XPM",
    "PCD",
    "TGA",
)
"""Pillow's formats that may be opened, common ones first and those without a signature last.

Left out are EPS and WMF, which run other programs, the stubs, which need plugins, and those that accept almost any
bytes.
"""

READ_AT_ONCE = 4096
"""Bytes that are read first; they hold the whole header of most files."""

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})
_BAD_OFFSET = frozenset({errno.EINVAL, errno.EOVERFLOW})
"""Error numbers for positions that no file has."""
_UNSUPPORTED_WORDS = (
    *("unsupported", "not supported", "not available", "not installed", "cannot handle 12-bit", "cannot handle 16-bit"),
    *("not yet supported", "unknown pixel mode", "unknown pcx", "unknown tga"),
)
"""Pillow's words for undamaged pictures that it cannot read; other words for unknown contents mean damage."""
_EMPTY_WORDS = ("None", "not identified by this driver")
_CUT_SHORT = "image file is truncated"
"""Pillow's words if only the end of the pixels is missing."""


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Return the formats of `FORMATS` that this Pillow supports; older versions lack AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_or_skip(path: bytes) -> OpenFile | Skipped:
    """Open a regular file, following links, or an archive's member, without waiting and without opening anything else.

    Returns:
        The descriptor (not inherited by child processes) with size and time, or the reason why it cannot be opened.
    """
    try:
        return open_place(path)
    except MemberError as error:
        return Skipped(Status.TRUNCATED, "", error.strerror or "")
    except untrusted.NotRegularError:
        return Skipped(Status.NOT_REGULAR, "", "not a regular file")
    except OSError as error:
        return system_failure(error)


class OpenPicture:
    """An open file that is read as a picture, and explains why if it cannot be."""

    __slots__ = ("_error", "_first", "_opened", "size", "status")

    def __init__(self, opened: OpenFile) -> None:
        """Take over the descriptor, which is closed at the end of a `with` block."""
        self._opened = opened
        self._error: OSError | None = None
        self.status = opened.status
        """Size and time when the file was opened."""
        self.size = opened.status.st_size
        self._first = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._opened.descriptor)

    def status_now(self) -> FileStatus:
        """Return the current size and time."""
        return self._opened.status_now()

    def stream(self) -> BinaryIO:
        """Return the file as a stream from its start; only one stream is usable at a time."""
        return io.BufferedReader(_Bytes(self._opened, self._failed))

    def at(self, position: int, count: int) -> bytes:
        """Return `count` bytes from a position, or fewer at the end; the beginning is read only once."""
        end = position + count
        try:
            if end > READ_AT_ONCE:
                return self._read(position, count)
            self._first = self._first or self._read(0, READ_AT_ONCE)
        except OSError as error:
            self._error = error
            raise
        return self._first[position:end]

    def _read(self, position: int, count: int) -> bytes:
        count = min(count, self.size - position)
        return os.pread(self._opened.descriptor, count, self._opened.start + position) if count > 0 else b""

    def _failed(self, error: OSError) -> None:
        self._error = error

    def failure(self, error: Exception, max_pixels: int) -> Skipped:
        """Return the reason behind an exception that Pillow raised while it read this file within `pillow_settings`.

        Args:
            error: The exception.
            max_pixels: The pixel limit that was in force.
        """
        if self._error is not None:
            return system_failure(self._error)
        if isinstance(error, UnidentifiedImageError):
            return self._unidentified()
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOMEM):
            return _damaged(error)
        return pillow_failure(error, max_pixels)

    def _unidentified(self) -> Skipped:
        """Return why Pillow does not recognize the file: what else it is, or what is wrong with its header."""
        first = self.at(0, FIRST_BYTES)
        named = picture_format(first)
        if named is None:
            return Skipped(
                Status.NOT_AN_IMAGE,
                "PIL.UnidentifiedImageError",
                f"in no supported picture format: {one_line(describe(first, self.status.st_size))}",
            )
        if named not in readable_formats():
            return Skipped(Status.UNSUPPORTED, "", f"{named}, which this Pillow does not read: install a newer Pillow")
        try:
            Image.OPEN[named][0](self.stream(), "")
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            text = _words_of(error)
            damaged = Skipped(_status_of_text(text.lower()), _name(error), "")
        else:
            text, damaged = "", Skipped(Status.TRUNCATED, "PIL.UnidentifiedImageError", "")
        state = "of a kind that is not supported" if damaged.status is Status.UNSUPPORTED else "with a damaged header"
        return Skipped(damaged.status, damaged.exception, one_line(f"{named} {state}{text and ': '}{text}"))


def _words_of(error: Exception) -> str:
    """Return Pillow's own message; empty if it only repeats Python's message on a missing byte, or has none."""
    text = str(error)
    return "" if (error.__cause__ is not None and text == str(error.__cause__)) or text in _EMPTY_WORDS else text


class _Bytes(Window):
    """A stream over a descriptor that stays open; it records failures of the system to read it."""

    def __init__(self, opened: OpenFile, failed: Callable[[OSError], None]) -> None:
        super().__init__(opened.descriptor, opened.start, opened.status.st_size)
        self._failed = failed

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self._failed(error)
            raise


def open_picture(path: bytes) -> OpenPicture | Skipped:
    """Open a file that may be a picture; see `open_or_skip`."""
    opened = open_or_skip(path)
    return opened if isinstance(opened, Skipped) else OpenPicture(opened)


def system_failure(error: Exception) -> Skipped:
    """Return the reason behind an exception with an error number of the system; the message is one short line."""
    return Skipped(_status(error), _name(error), one_line(_message(error)))


def pillow_failure(error: Exception, max_pixels: int) -> Skipped:
    """Return the reason behind an exception that Pillow raised for a picture without a file."""
    if isinstance(error, Image.DecompressionBombError):
        return _bomb(error, max_pixels)
    if isinstance(error, OSError) and error.errno in _BAD_OFFSET:
        return _damaged(error)
    return system_failure(error)


def too_many_pixels(pixels: int, words: str, max_pixels: int) -> Skipped:
    """Return the reason to skip a picture with more pixels than the limit; the message begins with `words`."""
    message = f"{words} {pixels:,} pixels, more than --max-pixels {max_pixels}"
    return Skipped(Status.TOO_LARGE, "", message, pixels)


@contextmanager
def pillow_settings(rule: PixelRule) -> Iterator[None]:
    """Set Pillow's limits for a block: it refuses pictures above the pixel limit, nested ones too, without warnings.

    It also accepts or refuses pictures that lack their end, as the rule says. These are settings of the whole process,
    so only one thread at a time may use this.
    """
    limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow warns above its limit, and refuses above twice the limit.
        Image.MAX_IMAGE_PIXELS = (rule.max_pixels + 1) // 2
        ImageFile.LOAD_TRUNCATED_IMAGES = rule.truncated is Truncated.ACCEPT
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, truncated


def _damaged(error: OSError) -> Skipped:
    return Skipped(Status.TRUNCATED, _name(error), f"damaged: it points outside its own bytes ({_message(error)})")


@contextmanager
def without_pixel_limit() -> Iterator[None]:
    """Turn off Pillow's pixel limit for a block, because a low limit must not apply to the tiles of a picture."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _bomb(error: Image.DecompressionBombError, max_pixels: int) -> Skipped:
    """Return the reason for a size that only Pillow saw, such as that of a picture in an icon."""
    found = re.search(r"[0-9]+", str(error))
    return too_many_pixels(int(found[0]) if found else max_pixels + 1, "it has", max_pixels)


def _name(error: Exception) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _status(error: Exception) -> Status:
    if isinstance(error, UnidentifiedImageError):
        return Status.NOT_AN_IMAGE
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return Status.TOO_LARGE
    if isinstance(error, NotImplementedError):
        return Status.UNSUPPORTED
    if isinstance(error, OSError) and error.errno is not None:
        return _status_of_errno(error.errno)
    return _status_of_text(str(error).lower())


def _status_of_text(text: str) -> Status:
    """Return the status for errors of a shared class, which differ only in their message."""
    if "out of memory" in text:
        return Status.TOO_LARGE
    return Status.UNSUPPORTED if any(word in text for word in _UNSUPPORTED_WORDS) else Status.TRUNCATED


def _status_of_errno(number: int) -> Status:
    if number in _GONE:
        return Status.VANISHED
    if number in (errno.ENXIO, errno.EISDIR):
        return Status.NOT_REGULAR
    return Status.TOO_LARGE if number == errno.ENOMEM else Status.UNREADABLE


def _message(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "in no supported picture format"  # Pillow's own message names an object in memory.
    if isinstance(error, MemoryError):
        return "it needs more memory than a worker may use (--worker-memory)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path, which is the entry's key
    text = str(error) or "no message"
    return f"{text}; --truncated accept takes what is there" if _CUT_SHORT in text else text
