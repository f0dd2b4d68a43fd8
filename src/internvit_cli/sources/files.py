"""Opening what may be anything, and turning every failure into a value.

What a failure becomes:

- `vanished`: no such file any more.
- `unreadable`: the operating system did not give its bytes (permission, I/O error, link loop, name too long).
- `not_regular`: a pipe, socket, device or folder.
- `not_an_image`: empty, or in no format that is read.
- `too_large`: over the pixel limit, or over the memory that a worker has.
- `unsupported`: a picture of a format or a kind that this Pillow does not read.
- `truncated`: all other damage: it begins as a picture, and the bytes that follow are not a whole one.

An error number says `unreadable` only where the system itself failed to give the file's bytes. Pillow meets error
numbers too when it follows an offset of a damaged file to nowhere; that is damage.
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
from internvit_cli.sources.signatures import FIRST_BYTES, describe, picture_format

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from typing_extensions import Self

    from internvit_cli.config import PixelRule

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
"""What may be opened, the common first, those without a signature last.

Not EPS and WMF, which run other programs; not the stubs, which need plugins; not the ones that take almost any bytes.
"""

READ_AT_ONCE = 4096
"""Bytes: the whole header of most files."""

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})
_BAD_OFFSET = frozenset({errno.EINVAL, errno.EOVERFLOW})
"""What the system says of positions that no file has."""
_UNSUPPORTED_WORDS = (
    *("unsupported", "not supported", "not available", "not installed", "cannot handle 12-bit", "cannot handle 16-bit"),
    *("not yet supported", "unknown pixel mode", "unknown pcx", "unknown tga"),
)
"""What Pillow says of pictures that are whole. What it calls unknown or unrecognized otherwise is damage."""
_EMPTY_WORDS = ("None", "not identified by this driver")
_CUT_SHORT = "image file is truncated"
"""What Pillow says when it lacks the end of pixels that it would otherwise accept."""


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has; older ones know no AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_regular(path: bytes) -> untrusted.OpenFile | Skipped:
    """Open a file that must be a regular one, following links; never wait, and never open anything else.

    Returns:
        The descriptor (not inherited by child processes) and its fstat, or why it could not be had.
    """
    try:
        return untrusted.open_regular(path)
    except untrusted.NotRegularError:
        return Skipped(Status.NOT_REGULAR, "", "not a regular file")
    except OSError as error:
        return classify(error)


class OpenPicture:
    """An open file that is to be read as a picture, and that knows the reason when it cannot be."""

    __slots__ = ("_descriptor", "_error", "_first", "size", "status")

    def __init__(self, opened: untrusted.OpenFile) -> None:
        """Take over the descriptor, which is closed at the end of a `with` block."""
        self._descriptor = opened.descriptor
        self._error: OSError | None = None
        self.status = opened.status
        """What fstat said when it was opened."""
        self.size = opened.status.st_size
        self._first = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def status_now(self) -> os.stat_result:
        """Return what fstat says now."""
        return os.fstat(self._descriptor)

    def stream(self) -> BinaryIO:
        """Return the file as a stream from its start, of which there is one at a time."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return io.BufferedReader(_Bytes(self._descriptor, self._failed))

    def at(self, position: int, count: int) -> bytes:
        """Return bytes from a position on, fewer at the end; those at the beginning are read once."""
        end = position + count
        try:
            if end > READ_AT_ONCE:
                return os.pread(self._descriptor, count, position) if position < self.size else b""
            self._first = self._first or os.pread(self._descriptor, READ_AT_ONCE, 0)
        except OSError as error:
            self._error = error
            raise
        return self._first[position:end]

    def _failed(self, error: OSError) -> None:
        self._error = error

    def failure(self, error: Exception, max_pixels: int) -> Skipped:
        """Return the reason behind an exception that this file raised while Pillow read it, within `pillow_settings`.

        Args:
            error: what was raised.
            max_pixels: the limit that was in force.
        """
        if self._error is not None:
            return classify(self._error)
        if isinstance(error, UnidentifiedImageError):
            return self._unidentified()
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOMEM):
            return _damaged(error)
        return pillow_failure(error, max_pixels)

    def _unidentified(self) -> Skipped:
        """Why Pillow knows no picture in it: what else it is, or what is wrong with its header."""
        first = self.at(0, FIRST_BYTES)
        named = picture_format(first)
        if named is None:
            return Skipped(
                Status.NOT_AN_IMAGE,
                "PIL.UnidentifiedImageError",
                f"in no picture format that is read: {one_line(describe(first, self.status.st_size))}",
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
        state = "of a kind that is not read" if damaged.status is Status.UNSUPPORTED else "with a damaged header"
        return Skipped(damaged.status, damaged.exception, one_line(f"{named} {state}{text and ': '}{text}"))


def _words_of(error: Exception) -> str:
    """Return what Pillow says itself; empty where it repeats Python's word on a missing byte, or says nothing."""
    text = str(error)
    return "" if (error.__cause__ is not None and text == str(error.__cause__)) or text in _EMPTY_WORDS else text


class _Bytes(io.FileIO):
    """The bytes of a descriptor that stays open; tells when the system fails to give them."""

    def __init__(self, descriptor: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(descriptor, closefd=False)
        self._failed = failed

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self._failed(error)
            raise

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            self._failed(error)
            raise


def open_picture(path: bytes) -> OpenPicture | Skipped:
    """Open what may be a picture; see `open_regular`."""
    opened = open_regular(path)
    return opened if isinstance(opened, Skipped) else OpenPicture(opened)


def classify(error: Exception) -> Skipped:
    """Return the reason behind an exception whose error number is the system's; the message is one bounded line."""
    return Skipped(_status(error), _name(error), one_line(_message(error)))


def pillow_failure(error: Exception, max_pixels: int) -> Skipped:
    """Return the reason behind an exception that Pillow raised over a picture whose file is not at hand."""
    if isinstance(error, Image.DecompressionBombError):
        return _bomb(error, max_pixels)
    if isinstance(error, OSError) and error.errno in _BAD_OFFSET:
        return _damaged(error)
    return classify(error)


def too_many_pixels(pixels: int, words: str, max_pixels: int) -> Skipped:
    """Return the reason to skip a picture of `pixels` pixels, more than the limit; `words` stand in front of them."""
    message = f"{words} {pixels:,} pixels, more than --max-pixels {max_pixels}"
    return Skipped(Status.TOO_LARGE, "", message, pixels)


@contextmanager
def pillow_settings(rule: PixelRule) -> Iterator[None]:
    """Within, Pillow refuses larger pictures by itself, nested ones too, and gives no warnings.

    It also takes or refuses pictures that lack their end, as the rule says. All are settings of the whole process, so
    this serves one thread at a time.
    """
    limit, truncated = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow warns over its limit and refuses over twice of it.
        Image.MAX_IMAGE_PIXELS = (rule.max_pixels + 1) // 2
        ImageFile.LOAD_TRUNCATED_IMAGES = rule.truncated is Truncated.ACCEPT
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = limit, truncated


def _damaged(error: OSError) -> Skipped:
    return Skipped(Status.TRUNCATED, _name(error), f"damaged: it points out of its own bytes ({_message(error)})")


@contextmanager
def any_size() -> Iterator[None]:
    """Within, Pillow does not count pixels: a low limit is about pictures, not about the tiles that are cut of them."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _bomb(error: Image.DecompressionBombError, max_pixels: int) -> Skipped:
    """The same as `too_many_pixels`, for sizes that only Pillow saw, such as those of pictures in icons."""
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
    """Of the errors that share one class with others, and differ in their words alone."""
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
        return "in no picture format that is read"  # Pillow's own text names an object in memory.
    if isinstance(error, MemoryError):
        return "it takes more memory than a worker may have (--worker-memory)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # Without the path, which is the entry's key.
    text = str(error) or "no message"
    return f"{text}; --truncated accept takes what is there" if _CUT_SHORT in text else text
