"""Sizes and orientations from the first bytes of files: all that planning needs to know, without decoding."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from internvit_cli.config import DEFAULT_MAX_PIXELS, DRAWN_BY, PixelRule, Skipped, Status
from internvit_cli.decode.files import classify, open_regular, pillow_limits, readable_formats
from internvit_cli.quick_headers import EXIF_SIGNATURE, quick_header
from internvit_cli.table import modified_ns
from internvit_cli.tiling import largest_resized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import BinaryIO

UPRIGHT = 1
_MARK = b"tEXt" + "\0".join(DRAWN_BY).encode()
_MARK_AT = 8 + 25 + 4
"""Behind a PNG's signature, its first chunk and the length of the second: where `draw.png` puts it."""
_ORIENTATION_TAG = 0x0112
_INTEGER_TYPES = {1: ("B", 1), 3: ("H", 2), 4: ("L", 4)}
"""TIFF field type: struct code and bytes."""


class Header(NamedTuple):
    """What is known of a picture before it is decoded."""

    width: int
    """Pixels, after orientation."""
    height: int
    """Pixels, after orientation."""
    orientation: int
    """EXIF's number, 1 to 8, of the turn that decoding applies; 1 for none."""
    file_size: int
    """Bytes."""
    file_mtime_ns: int


class Drawn(NamedTuple):
    """A picture that this program drew of others, and that a source holds by chance."""

    outcome: Header | Skipped
    """What it is like any other picture."""


def read_header(path: bytes, rule: PixelRule) -> Header | Skipped:
    """Read the header of one file, whoever made it; see `read_headers`."""
    found = read_headers((path,), rule)[0]
    return found.outcome if isinstance(found, Drawn) else found


def read_headers(paths: Iterable[bytes], rule: PixelRule) -> list[Header | Drawn | Skipped]:
    """Read the headers of files; one thread of a process at a time.

    Args:
        paths: files; links are followed.
        rule: whether EXIF counts, and the pixels that are too many.

    Returns:
        For each path, in order, its header or why it cannot be used.
    """
    with pillow_limits(rule.max_pixels):
        return [_read(path, rule) for path in paths]


def header_reader(rule: PixelRule) -> Callable[[list[bytes]], list[Header | Drawn | Skipped]]:
    """What a planning worker runs: `read_headers` under one rule."""
    return lambda paths: read_headers(paths, rule)


def exif_orientation(data: bytes) -> int:
    """The orientation, 1 to 8, in a block of EXIF; 1 when there is none, or when the block is damaged.

    Only the first directory's one tag is looked at: Pillow's getexif() reads the pixels of a PNG first, and is tens of
    times slower everywhere.
    """
    while data.startswith(EXIF_SIGNATURE):
        data = data[len(EXIF_SIGNATURE) :]
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or data[2:4] not in (b"*\0", b"\0*"):
        return UPRIGHT
    try:
        (start,) = struct.unpack_from(order + "L", data, 4)
        (count,) = struct.unpack_from(order + "H", data, start)
    except struct.error:
        return UPRIGHT
    directory = data[start + 2 : start + 2 + 12 * count]
    directory = directory[: len(directory) // 12 * 12]
    orientation = UPRIGHT
    for tag, kind, values, field in struct.iter_unpack(order + "HHL4s", directory):
        if tag == _ORIENTATION_TAG and kind in _INTEGER_TYPES and values:
            orientation = _first_value(data, order, kind, values, field) or orientation
    return orientation if 1 <= orientation <= 8 else UPRIGHT


def _first_value(data: bytes, order: str, kind: int, values: int, field: bytes) -> int | None:
    """The first number of a field, which lies elsewhere when it has more than four bytes."""
    code, size = _INTEGER_TYPES[kind]
    place, offset = (field, 0) if values * size <= 4 else (data, struct.unpack(order + "L", field)[0])
    if offset + values * size > len(place):
        return None
    value: int = struct.unpack_from(order + code, place, offset)[0]
    return value


def _read(path: bytes, rule: PixelRule) -> Header | Drawn | Skipped:
    opened = open_regular(path)
    if isinstance(opened, Skipped):
        return opened
    with os.fdopen(opened.descriptor, "rb") as file:
        if not opened.status.st_size:
            return Skipped(Status.NOT_AN_IMAGE, "", "the file is empty")
        try:
            return _inspect(file, opened.status, rule)
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            return _marked(file, classify(error))


def _inspect(file: BinaryIO, status: os.stat_result, rule: PixelRule) -> Header | Drawn | Skipped:
    quick = quick_header(file.fileno(), status.st_size)
    if quick is not None:
        return _usable(_upright(quick.width, quick.height, quick.exif if rule.exif else b""), status, rule)
    image = Image.open(file, formats=readable_formats())
    return _marked(file, _usable(upright_size(image, rule), status, rule))


def _usable(upright: tuple[int, int, int], status: os.stat_result, rule: PixelRule) -> Header | Skipped:
    width, height, orientation = upright
    return unusable_size(width, height, rule) or Header(width, height, orientation, status.st_size, modified_ns(status))


def _marked(file: BinaryIO, outcome: Header | Skipped) -> Header | Drawn | Skipped:
    """What a file is, told apart from others when its mark says that this program drew it."""
    return Drawn(outcome) if os.pread(file.fileno(), len(_MARK), _MARK_AT) == _MARK else outcome


def upright_size(image: Image.Image, rule: PixelRule) -> tuple[int, int, int]:
    """Width and height, pixels, after the turn that sets a picture upright, and EXIF's number of that turn."""
    # TIFF: Pillow turns it by itself, and says so in the size.
    counts = rule.exif and image.format != "TIFF"
    return _upright(*image.size, image.info.get("exif") or b"" if counts else b"")


def _upright(width: int, height: int, exif: bytes) -> tuple[int, int, int]:
    orientation = exif_orientation(exif) if exif else UPRIGHT
    return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def unusable_size(width: int, height: int, rule: PixelRule) -> Skipped | None:
    """Why a picture of this size, pixels, is not decoded; None when it is."""
    if min(width, height) < 1:
        return Skipped(Status.TRUNCATED, "", f"a size of {width} x {height} pixels")
    if width * height > rule.max_pixels:
        return Skipped(Status.TOO_LARGE, "", f"{width} x {height} pixels are more than {rule.max_pixels}")
    # A low limit is about the pictures; it must not forbid the tiles that small ones are made into.
    limit = max(rule.max_pixels, DEFAULT_MAX_PIXELS)
    resized = largest_resized(width, height, rule)
    if resized > limit:
        return Skipped(Status.TOO_LARGE, "", f"{width} x {height} would be resized by way of {resized} pixels")
    return None
