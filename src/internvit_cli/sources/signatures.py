"""Recognize pictures and other kinds of files by their first bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from internvit_cli.runtime.untrusted import opened
from internvit_cli.sources import kinds
from internvit_cli.sources.kinds import kind_by_extension

if TYPE_CHECKING:
    from internvit_cli.sources.kinds import Kind

FIRST_BYTES = 512
_TAR_MAGIC = slice(257, 262)
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {*(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")}
_HEIF_BRANDS = {*_HEIC_BRANDS, b"mif1", b"msf1"}
_RAW_BRAND = b"crx "
_SHOWN_BYTES = 16


def _pattern(text: bytes) -> re.Pattern[bytes]:
    return re.compile(text, re.DOTALL)


_PICTURES = (
    (_pattern(rb"\xff\xd8\xff"), "JPEG"),
    (_pattern(rb"\x89PNG\r\n"), "PNG"),
    (_pattern(rb"GIF8[79]a"), "GIF"),
    (_pattern(rb"RIFF....WEBP"), "WEBP"),
    # with a length of its second header that occurs
    (_pattern(rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"), "BMP"),
    (_pattern(rb"P(?:[1-6]\s+(?:#[^\n]*\n\s*)*\d+\s+\d+|7\s+[A-Z#]|[Ff]\s+\d+\s+\d+)"), "PPM"),
    (_pattern(rb"\0\0\0\x0cjP\x20\x20\r\n|\xff\x4f\xff\x51"), "JPEG2000"),
    (_pattern(rb"\0\0\x01\0[^\0]\0...\0"), "ICO"),
    (_pattern(rb"\0\0\x02\0[^\0]\0...\0"), "CUR"),
    (_pattern(rb"8BPS\0\x01"), "PSD"),
    (_pattern(rb"qoif\0"), "QOI"),
    (_pattern(rb"DDS\x20\x7c"), "DDS"),
    (_pattern(rb"icns\0"), "ICNS"),
    (_pattern(rb"BLP[12][\0-\x03]\0\0\0"), "BLP"),
    (_pattern(rb"SIMPLE\x20\x20="), "FITS"),
    (_pattern(rb"\x01\xda[\0\x01][\x01\x02]"), "SGI"),
    (_pattern(rb"\x59\xa6\x6a\x95"), "SUN"),
    (_pattern(rb"/\*\x20XPM\x20\*/"), "XPM"),
)
"""Pillow's names of the supported formats, and patterns of their first bytes."""
_TIFF = _pattern(rb"II[*+]\0|MM\0[*+]")
_OTHERS = (
    (_pattern(rb"\xff\x0a|\0\0\0\x0cJXL \r\n"), "a JPEG XL picture", kinds.JPEG_XL),
    (_pattern(rb"II\*\0....CR\x02|FUJIFILMCCD-RAW|IIR[OS]\x08\0|IIU\0"), "a raw photograph", kinds.RAW),
    (_pattern(rb"\0MRM\0|FOVb"), "a raw photograph", kinds.RAW),
    (_pattern(rb"....(?:moov|mdat)"), "a QuickTime video", kinds.VIDEO),
    (_pattern(rb"\x1aE\xdf\xa3"), "a Matroska or WebM video", kinds.VIDEO),
    (_pattern(rb"RIFF....AVI "), "an AVI video", kinds.VIDEO),
    (_pattern(rb"FLV\x01"), "a Flash video", kinds.VIDEO),
    (_pattern(rb"\0\0\x01\xba"), "an MPEG video", kinds.VIDEO),
    (_pattern(rb"OggS\0"), "an Ogg video", kinds.VIDEO),
    (_pattern(rb"%PDF-"), "a PDF document", kinds.DOCUMENT),
    (_pattern(rb"AT&TFORM"), "a DjVu document", kinds.DOCUMENT),
    (_pattern(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), "an Office document", kinds.DOCUMENT),
    (_pattern(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing", kinds.DRAWING),
    (_pattern(rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?<svg"), "an SVG drawing", kinds.DRAWING),
    (_pattern(rb"PK\x03\x04|PK\x05\x06"), "a zip archive", kinds.ARCHIVE),
    (_pattern(rb"\x1f\x8b"), "a gzip archive", kinds.ARCHIVE),
    (_pattern(rb"BZh[1-9]1AY"), "a bzip2 archive", kinds.ARCHIVE),
    (_pattern(rb"\xfd7zXZ\0"), "an xz archive", kinds.ARCHIVE),
    (_pattern(rb"7z\xbc\xaf"), "a 7z archive", kinds.ARCHIVE),
    (_pattern(rb"Rar!\x1a"), "a RAR archive", kinds.ARCHIVE),
    (_pattern(rb"\x28\xb5\x2f\xfd"), "a zstd archive", kinds.ARCHIVE),
    (_pattern(rb"PAR1\x15|ARROW1\0\0|ORC[\0-\x1f]|Obj\x01"), "a packed dataset", kinds.PACKED),
    (_pattern(rb"\x89HDF\r\n"), "an HDF5 file", kinds.ARRAYS),
    (_pattern(rb"\x93NUMPY"), "a NumPy array", kinds.ARRAYS),
    (_pattern(rb"SQLite format 3\0"), "a SQLite database", kinds.TABLE),
    (_pattern(rb"\x76\x2f\x31\x01"), "an OpenEXR picture", kinds.RANGE),
    (_pattern(rb"#\?RADIANCE"), "a Radiance picture", kinds.RANGE),
)
"""Patterns of the first bytes of other files, with a more precise name than that of their kind."""
_AGAIN = "download or copy it again"
_TEXTS = (
    (_pattern(rb"version https://git-lfs\.github\.com/"), "a Git LFS pointer", "run `git lfs pull`"),
    (_pattern(rb"(?:\.\./)*(?:\.git)?/annex/objects/"), "a git-annex pointer", "run `git annex get`"),
    (
        _pattern(rb"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body|title)\b"),
        "a web page, which a failed download may leave",
        "download the picture again",
    ),
    (_pattern(rb"(?i)\s*<[?!a-z]"), "an XML file", ""),
    (_pattern(rb"\s*(?:\{\s*[\"}]|\[\s*[\[\]{\"\d-])"), "a JSON text, such as the error message of a server", _AGAIN),
    (
        _pattern(rb".?PNG[\r\n]|.{10,12}IHDR"),
        "a PNG with changed first bytes, such as after a transfer in text mode",
        _AGAIN,
    ),
)
"""Files that are never pictures: patterns of their first bytes, what they are, and what to do."""


def picture_format(first: bytes) -> str | None:
    """Return Pillow's name of the format that the first bytes of a file indicate; None if it is not a picture."""
    if _AVIF_BRANDS & _brands(first):
        return "AVIF"
    if _TIFF.match(first):
        return "TIFF" if kind_by_bytes(first) is None else None
    return next((name for signature, name in _PICTURES if signature.match(first)), None)


def is_picture(first: bytes, name: bytes = b"") -> bool:
    """Return whether a file has a supported picture format.

    Raw photographs and microscope scans are often TIFF files, of which Pillow would read a small preview. A TIFF file
    with an extension of these kinds does not count as a picture.

    Args:
        first: Its first `FIRST_BYTES` bytes, or all of a shorter file.
        name: Its name; empty if it does not matter.
    """
    found = picture_format(first)
    if found == "TIFF":
        return kind_by_extension(name.rpartition(b".")[2].lower()) not in (kinds.RAW, kinds.SCIENCE)
    return found is not None


def kind_by_bytes(first: bytes) -> Kind | None:
    """Return the kind of a file by its first bytes; None if it is unknown, or may be a supported picture."""
    return _other(first)[1]


def describe(first: bytes, size: int) -> str:
    """Describe a file that is not a picture by its first bytes, and say what to do.

    Args:
        first: Its first `FIRST_BYTES` bytes, or all of a shorter file.
        size: The size of the whole file, in bytes.
    """
    if not first.strip(b"\0"):
        what = "the file is empty" if not size else "it begins with only zeros, like an unfinished copy"
        return f"{what}; {_AGAIN}"
    name, kind = _other(first)
    if kind is not None:
        return _sentence(name, kind.remedy_for_one)
    text = first.removeprefix(b"\xef\xbb\xbf")
    for signature, name, remedy in _TEXTS:
        if signature.match(text):
            return _sentence(name, remedy)
    if _is_text(text):
        return f"it is a text that begins with {text[:_SHOWN_BYTES].decode(errors='ignore')!r}"
    return f"it begins with the bytes {first[:_SHOWN_BYTES].hex(' ')}"


def _sentence(name: str, remedy: str) -> str:
    return f"it is {name}; {remedy}" if remedy else f"it is {name}"


def _is_text(first: bytes) -> bool:
    try:
        # The last character may be cut off.
        text = first.decode() if len(first) < FIRST_BYTES else first[:-4].decode(errors="ignore")
    except UnicodeDecodeError:
        return False
    return "\0" not in text and sum(map(_is_printed, text)) >= 0.95 * len(text) > 0


def _is_printed(character: str) -> bool:
    return character.isprintable() or character.isspace()


def _other(first: bytes) -> tuple[str, Kind | None]:
    """Return the name and the kind of a file by its first bytes; the kind is None if it is unknown."""
    if brands := _brands(first):
        return _of_brands(brands)
    if first[_TAR_MAGIC] == b"ustar":
        return "a tar archive", kinds.ARCHIVE
    return next(((name, kind) for signature, name, kind in _OTHERS if signature.match(first)), ("", None))


def _of_brands(brands: set[bytes]) -> tuple[str, Kind | None]:
    if brands & _AVIF_BRANDS:
        return "an AVIF picture", None
    if brands & _HEIF_BRANDS:
        return "a HEIC picture" if brands & _HEIC_BRANDS else "a HEIF picture", kinds.HEIF
    if _RAW_BRAND in brands:
        return "a raw photograph", kinds.RAW
    return "a QuickTime video" if b"qt  " in brands else "an MP4 video", kinds.VIDEO


def _brands(first: bytes) -> set[bytes]:
    """Return the brands of a file in the ISO base media format; empty for other files."""
    if first[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(first[:4], "big"), len(first))
    return {first[8:12], *(first[start : start + 4] for start in range(16, end, 4))}


def first_bytes(path: bytes) -> bytes:
    """Return the first bytes of a regular file; empty if it cannot be opened or is not regular."""
    try:
        with opened(path) as file:
            return file.read(FIRST_BYTES)
    except OSError:
        return b""
