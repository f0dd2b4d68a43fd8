"""Read sizes and orientations of ordinary JPEG, PNG and WebP files from a few of their bytes.

Most pictures are such files, and Pillow parses all of a file's EXIF when it opens it. These functions return None for
any unusual file, which is then left to Pillow.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.plan.orientation import MOST_METADATA, UPRIGHT, exif_orientation, valid_orientation, xmp_orientation
from internvit_cli.plan.png_chunks import SIGNATURE, QuickHeader, quick_png

if TYPE_CHECKING:
    from internvit_cli.sources.files import OpenPicture

EXIF_SIGNATURE = b"Exif\0\0"
XMP_SIGNATURE = b"http://ns.adobe.com/xap/1.0/\0"

_SCAN, _EXIF_SEGMENT, _MPF_SEGMENT, _TABLES = 0xDA, 0xE1, 0xE2, 0xDB
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Markers of baseline, extended and progressive frames."""
_SKIPPED_SEGMENTS = {0xC4, _TABLES, 0xDD, *range(0xE0, 0xF0), 0xFE}
"""Markers of tables, application data and comments."""
_LOOKED_AT = (_TABLES, _MPF_SEGMENT)

_ANIMATED, _HAS_XMP, _HAS_EXIF = 0x02, 0x04, 0x08
"""Flags of an extended WebP file."""


def quick_header(file: OpenPicture) -> QuickHeader | None:
    """Return the header of an ordinary JPEG, PNG or WebP file; None for everything else."""
    start = file.at(0, 12)
    try:
        if start.startswith(b"\xff\xd8\xff"):
            return _jpeg(file)
        if start.startswith(SIGNATURE):
            return quick_png(file)
        if start.startswith(b"RIFF") and start[8:] == b"WEBP":
            return _webp(file)
    except struct.error:  # the file is cut off
        pass
    return None


class _MetadataBlock(NamedTuple):
    """The place of a block of metadata in the file."""

    position: int
    length: int


def _orientation(file: OpenPicture, exif: _MetadataBlock | None, xmp: _MetadataBlock | None) -> int:
    """Return the orientation from EXIF, or else from XMP, which is read only then."""
    value = exif_orientation(_block(file, exif)) if exif else None
    if value is None and xmp:
        value = xmp_orientation(None, _block(file, xmp))
    return valid_orientation(value)


def _block(file: OpenPicture, place: _MetadataBlock) -> bytes:
    return file.at(place.position, min(place.length, MOST_METADATA))


def _jpeg(file: OpenPicture) -> QuickHeader | None:
    """Read the segments of a JPEG up to the first scan."""
    size, exif, xmp = None, None, None
    position = 2
    while True:
        mark, kind, length = struct.unpack(">BBH", file.at(position, 4))
        body, position = position + 4, position + 2 + length
        if mark != 0xFF or length < 2 or position > file.size:
            return None
        if kind == _SCAN:
            return QuickHeader(*size, _orientation(file, exif, xmp)) if size else None
        if kind in _FRAMES and size is None:
            size = _frame_size(file.at(body, length - 2))
            if size is None:
                return None
        elif kind not in _SKIPPED_SEGMENTS or (kind in _LOOKED_AT and _is_odd(file, kind, body, length - 2)):
            return None
        elif kind == _EXIF_SEGMENT:
            start = file.at(body, min(length - 2, len(XMP_SIGNATURE)))
            if start == XMP_SIGNATURE:
                xmp = _MetadataBlock(body + len(XMP_SIGNATURE), length - 2 - len(XMP_SIGNATURE))
            elif start.startswith(EXIF_SIGNATURE):
                if exif:
                    return None
                exif = _MetadataBlock(body, length - 2)


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Return the width and height of a frame with 8 bits and one, three or four components; None for others."""
    bits, height, width, components = struct.unpack_from(">BHHB", frame)
    is_plain = bits == 8 and components in (1, 3, 4) and len(frame) == 6 + 3 * components
    return (width, height) if is_plain and width and height else None


def _is_odd(file: OpenPicture, kind: int, body: int, length: int) -> bool:
    """Return whether a segment needs Pillow: several pictures in one file, or tables of an unusual length."""
    if kind == _MPF_SEGMENT:
        return file.at(body, 4) == b"MPF\0"
    if kind == _TABLES:
        tables = file.at(body, length)
        while tables:
            tables = tables[1 + 64 * (2 if tables[0] >> 4 else 1) :] if len(tables) > 64 else b"odd"
            if tables == b"odd":
                return True
    return False


def _webp(file: OpenPicture) -> QuickHeader | None:
    """Read the frame of a simple WebP file, or the canvas of an extended one without animation."""
    (riff_size,) = struct.unpack("<L", file.at(4, 4))
    if riff_size + 8 > file.size:
        return None
    kind, length = struct.unpack("<4sL", file.at(12, 8))
    if 20 + length > file.size:
        return None
    match kind:
        case b"VP8 ":
            tag, start, width, height = struct.unpack("<B2x3sHH", file.at(20, 10))
            is_key_frame = not tag & 1 and start == b"\x9d\x01\x2a"
            return _sized(width & 0x3FFF, height & 0x3FFF) if is_key_frame else None
        case b"VP8L":
            signature, bits = struct.unpack("<BL", file.at(20, 5))
            is_version_0 = signature == 0x2F and not bits >> 29
            return _sized((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1) if is_version_0 else None
        case b"VP8X" if length == 10:
            return _extended_webp(file, riff_size + 8)
    return None


def _sized(width: int, height: int, orientation: int = UPRIGHT) -> QuickHeader | None:
    return QuickHeader(width, height, orientation) if width and height else None


def _extended_webp(file: OpenPicture, end: int) -> QuickHeader | None:
    header = file.at(20, 10)
    flags = header[0]
    if flags & _ANIMATED:
        return None
    width, height = (1 + int.from_bytes(header[start : start + 3], "little") for start in (4, 7))
    wanted = {kind for kind, flag in ((b"EXIF", _HAS_EXIF), (b"XMP ", _HAS_XMP)) if flags & flag}
    if not wanted:
        return _sized(width, height)
    position, found = 30, {}
    while position + 8 <= end:
        kind, length = struct.unpack("<4sL", file.at(position, 8))
        if position + 8 + length > end or kind in found:
            return None
        if kind in wanted:
            found[kind] = _MetadataBlock(position + 8, length)
        position += 8 + length + length % 2
    return _sized(width, height, _orientation(file, found.get(b"EXIF"), found.get(b"XMP ")))
