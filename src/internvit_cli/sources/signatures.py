"""What a file is by its first bytes, for files whose names do not tell: pictures, and what people take for them."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from internvit_cli.sources import kinds
from internvit_cli.sources.kinds import kind_of

if TYPE_CHECKING:
    from internvit_cli.sources.kinds import Kind

FIRST_BYTES = 512
_TAR_MAGIC = slice(257, 262)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIF_BRANDS = {*(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")}
_RAW_BRAND = b"crx "

_PICTURES = re.compile(
    rb"""
      \xff\xd8\xff                                          # JPEG
    | \x89PNG\r\n
    | GIF8[79]a
    | RIFF....WEBP
    | BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0   # BMP, with a length of its second header that occurs
    | P(?:[1-6]\s+(?:\#[^\n]*\n\s*)*\d+\s+\d+ | 7\s+[A-Z\#] | [Ff]\s+\d+\s+\d+)
    | \0\0\0\x0cjP\x20\x20\r\n | \xff\x4f\xff\x51     # JPEG 2000
    | \0\0[\x01\x02]\0[^\0]\0...\0                        # icons and cursors
    | 8BPS\0\x01 | qoif\0 | DDS\x20\x7c | icns\0 | BLP[12][\0-\x03]\0\0\0
    | SIMPLE\x20\x20= | \x01\xda[\0\x01][\x01\x02] | \x59\xa6\x6a\x95 | /\*\x20XPM\x20\*/
    """,
    re.VERBOSE | re.DOTALL,
)
_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
_OTHERS = (
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL \r\n"), kinds.JPEG_XL),
    (re.compile(rb"II\*\0....CR\x02|FUJIFILMCCD-RAW|IIR[OS]\x08\0|IIU\0", re.DOTALL), kinds.RAW),
    (
        re.compile(rb"....(?:ftyp|moov|mdat)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|\0\0\x01\xba|OggS\0", re.DOTALL),
        kinds.VIDEO,
    ),
    (re.compile(rb"%PDF-|AT&TFORM|\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), kinds.DOCUMENT),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6|\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg", re.DOTALL), kinds.DRAWING),
    (
        re.compile(rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|BZh[1-9]1AY|\xfd7zXZ\0|7z\xbc\xaf|Rar!\x1a|\x28\xb5\x2f\xfd"),
        kinds.ARCHIVE,
    ),
    (re.compile(rb"PAR1\x15|ARROW1\0\0|ORC[\0-\x1f]|Obj\x01"), kinds.PACKED),
    (re.compile(rb"\x89HDF\r\n|\x93NUMPY"), kinds.ARRAYS),
    (re.compile(rb"SQLite format 3\0"), kinds.TABLE),
    (re.compile(rb"\x76\x2f\x31\x01|#\?RADIANCE"), kinds.RANGE),
)


def is_picture(first: bytes, name: bytes = b"") -> bool:
    """Return whether a file is of a format that is read.

    Raw photographs and scans of microscopes lie in TIFF files of which Pillow would read a small preview: a TIFF file
    whose name says that it is one of them is none for us.

    Args:
        first: its first `FIRST_BYTES` bytes, or all of a shorter one.
        name: its name; empty where it does not matter.
    """
    if _TIFF.match(first):
        extension = name.rpartition(b".")[2].lower()
        return kind_of(extension) not in (kinds.RAW, kinds.SCIENCE) and kind_by_bytes(first) is None
    return _PICTURES.match(first) is not None or bool(_AVIF_BRANDS & _brands(first))


def kind_by_bytes(first: bytes) -> Kind | None:
    """Return the kind of a file that begins so; None where that does not tell, or it may be a picture that is read."""
    if brands := _brands(first):
        if brands & _AVIF_BRANDS:
            return None
        if brands & _HEIF_BRANDS:
            return kinds.HEIF
        return kinds.RAW if _RAW_BRAND in brands else kinds.VIDEO
    if first[_TAR_MAGIC] == b"ustar":
        return kinds.ARCHIVE
    return next((kind for signature, kind in _OTHERS if signature.match(first)), None)


def _brands(first: bytes) -> set[bytes]:
    """What a file of ISO's media format calls itself; nothing for another."""
    if first[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(first[:4], "big"), len(first))
    return {first[8:12], *(first[start : start + 4] for start in range(16, end, 4))}


def first_bytes(path: bytes) -> bytes:
    """Return the first bytes of a regular file; none of what cannot be opened or is no regular file."""
    from internvit_cli.config import Skipped
    from internvit_cli.decode.files import open_regular  # it loads Pillow

    opened = open_regular(path)
    if isinstance(opened, Skipped):
        return b""
    try:
        return os.pread(opened.descriptor, FIRST_BYTES, 0)
    except OSError:
        return b""
    finally:
        os.close(opened.descriptor)
