"""Find the orientation of a picture in its metadata, exactly as Pillow's `ImageOps.exif_transpose` does.

Pillow looks in one EXIF block first and, if that has no orientation at all, in XMP. Its own reader is not used here,
because it decodes a PNG first, copies every field of a hostile block, and is tens of times slower.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

UPRIGHT = 1
EXIF = "exif"
RAW_PROFILE = "Raw profile type exif"
XMP_TEXT = "XML:com.adobe.xmp"
XMP = "xmp"
METADATA_KEYS = (EXIF, RAW_PROFILE, XMP_TEXT, XMP)
"""Keys of `PIL.Image.Image.info` that decide the orientation."""

MOST_METADATA = 16 << 20
"""Largest amount of metadata that is read for the orientation of a picture, in bytes, stored or decompressed."""

_EXIF_PREFIX = re.compile(rb"(?:Exif\0\0){1,2}")
_BYTE_ORDERS = {b"MM\0*": ">", b"II*\0": "<", b"MM*\0": ">", b"II\0*": "<"}
_ORIENTATION_TAG = 0x0112
_FIELD_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
"""Bytes per value, by TIFF field type. Pillow ignores fields of other types."""
_NUMBERS = {3: "H", 4: "L", 5: "LL", 6: "b", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L", 16: "Q"}
"""Struct codes by TIFF field type. Pillow does not read bytes and texts as numbers, not even single bytes."""
_XMP_PATTERN = 'tiff:Orientation(="|>)([0-9])'
_XMP_IN_TEXT, _XMP_IN_BYTES = re.compile(_XMP_PATTERN), re.compile(_XMP_PATTERN.encode())


def metadata_orientation(info: Mapping[Any, Any]) -> int:
    """Return the orientation of a picture, 1 to 8; 1 if its metadata has none or is damaged.

    Args:
        info: The metadata as in `PIL.Image.Image.info`, of which `METADATA_KEYS` are used.
    """
    value = exif_orientation(_exif_block(info))
    if value is None:
        value = xmp_orientation(info.get(XMP_TEXT), info.get(XMP))
    return valid_orientation(value)


def valid_orientation(value: float | None) -> int:
    """Return the orientation, 1 to 8, for a number in a file; 1 for numbers without a meaning."""
    return int(value) if value is not None and value in range(1, 9) else UPRIGHT


def exif_orientation(data: bytes) -> float | None:
    """Return the number in the orientation field of an EXIF block, whatever it is.

    Only the first directory is read, as Pillow does: a field before the orientation that points outside the block ends
    the directory, and the first of several fields with the same tag counts.

    Returns:
        The number, or 0 if the field does not hold a number; None if there is no such field.
    """
    if prefix := _EXIF_PREFIX.match(data):
        data = data[prefix.end() :]
    order = _BYTE_ORDERS.get(data[:4])
    if order is None or len(data) < 8:
        return None
    (start,) = struct.unpack_from(order + "L", data, 4)
    if start + 2 > len(data):
        return None
    (count,) = struct.unpack_from(order + "H", data, start)
    directory = data[start + 2 : start + 2 + 12 * count]
    seen: set[int] = set()
    read = 0
    for tag, kind, values, field in struct.iter_unpack(order + "HHL4s", directory[: len(directory) // 12 * 12]):
        size = values * _FIELD_BYTES.get(kind, 0)
        if not size or tag in seen:
            continue
        place, offset = field, 0
        if size > 4:
            read += size
            if read > len(data):
                continue
            (offset,) = struct.unpack(order + "L", field)
            place = data
            if offset + size > len(data):
                return None
        if tag == _ORIENTATION_TAG:
            return _first_number(place, offset, order, kind)
        seen.add(tag)
    return None


def _first_number(place: bytes, offset: int, order: str, kind: int) -> float:
    if kind not in _NUMBERS:
        return 0
    number, *divisor = struct.unpack_from(order + _NUMBERS[kind], place, offset)
    if divisor:
        return float(number / divisor[0]) if divisor[0] else 0
    return float(number)


def xmp_orientation(text: object, data: object = None) -> int | None:
    """Return the digit after `tiff:Orientation` in an attribute or an element; None if there is none.

    Args:
        text: XMP of a PNG as str, which takes precedence.
        data: XMP as bytes.
    """
    if text and isinstance(text, str):
        found: Any = _XMP_IN_TEXT.search(text)
    else:
        found = _XMP_IN_BYTES.search(data) if isinstance(data, bytes) else None
    return int(found[2]) if found else None


def _exif_block(info: Mapping[Any, Any]) -> bytes:
    exif = info.get(EXIF)
    if exif is None and isinstance(profile := info.get(RAW_PROFILE), str):
        return _raw_profile(profile)
    return exif if isinstance(exif, bytes) else b""


def _raw_profile(text: str) -> bytes:
    """Decode a profile as ImageMagick writes it: a line break, a name, a length, and lines of hex digits."""
    digits = "".join(text.split("\n", 3)[3:]).replace("\n", "")
    try:
        return bytes.fromhex(digits)
    except ValueError:
        return b""
