"""Opening what may be anything, and turning every failure into a value.

What a failure becomes:

- `vanished`: no such file any more.
- `unreadable`: the operating system did not give its bytes (permission, I/O error, link loop, name too long).
- `not_regular`: a pipe, socket, device or folder.
- `not_an_image`: empty, or in no format that is read.
- `too_large`: over the pixel limit, or over the memory that a worker has.
- `unsupported`: a picture of a kind that Pillow knows and does not read.
- `truncated`: all other damage: the bytes are there, and are not a whole picture.
"""

from __future__ import annotations

import errno
import warnings
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from internvit_cli import untrusted
from internvit_cli.config import Skipped, Status
from internvit_cli.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator

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

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})
_TOO_LARGE_WORDS = ("too large", "too much memory")
_UNSUPPORTED_WORDS = ("unsupported", "not supported", "unknown", "unrecognized", "not available", "cannot handle")


@lru_cache(maxsize=1)
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has; older ones know no AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_regular(path: bytes) -> untrusted.Opened | Skipped:
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


def classify(error: Exception) -> Skipped:
    """The reason behind an exception that one file raised; its message on one bounded line."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return Skipped(_status(error), name, one_line(_message(error)))


@contextmanager
def pillow_limits(max_pixels: int) -> Iterator[None]:
    """Within, Pillow refuses larger pictures by itself, nested ones too, and gives no warnings.

    Both are settings of the whole process, so this serves one thread at a time.
    """
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow warns over its limit and refuses over twice of it.
        Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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
    if any(word in text for word in _TOO_LARGE_WORDS):
        return Status.TOO_LARGE
    if any(word in text for word in _UNSUPPORTED_WORDS):
        return Status.UNSUPPORTED
    return Status.TRUNCATED


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
    return str(error) or "no message"
