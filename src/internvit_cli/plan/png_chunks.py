"""Read the chunks of a PNG without Pillow: its size, its orientation, and the file without its texts.

A PNG may have metadata after its pixels, which Pillow sees only after decoding, and compressed texts of any size, for
which Pillow refuses the picture. This module skips the pixels, and limits how much text it reads.
"""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

from PIL import UnidentifiedImageError

from internvit_cli.plan.orientation import (
    EXIF,
    MOST_METADATA,
    RAW_PROFILE,
    UPRIGHT,
    XMP,
    XMP_TEXT,
    metadata_orientation,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from internvit_cli.sources.files import OpenPicture

    Result = TypeVar("Result")

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOST_CHUNKS = 1 << 16
"""Largest number of chunks that are read, not counting those of pixels."""
MOST_CHECKED = 1 << 20
"""Longest chunk before the pixels of an ordinary file, in bytes."""

_MODES = frozenset(
    {
        *((depth, 0) for depth in (1, 2, 4, 8, 16)),
        *((depth, color) for color in (2, 4, 6) for depth in (8, 16)),
        *((depth, 3) for depth in (1, 2, 4, 8)),
    }
)
"""Valid combinations of bit depth and color type."""
_IS_KIND = re.compile(rb"\w{4}").fullmatch
_UNUSUAL = frozenset({b"IHDR", b"IEND", b"acTL", b"fcTL", b"fdAT"})
"""Chunks that are unusual before the pixels: a second header, the end of the file, an animation."""
_LEAST_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}
_LEAST_TRANSPARENCY = {0: 2, 2: 6}
"""Length of a tRNS chunk in bytes, by color type."""
_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_DROPPED = frozenset({*_TEXTS, b"iCCP"})
_LONGEST_KEY = 80


class QuickHeader(NamedTuple):
    """The size and the orientation of an ordinary file."""

    width: int
    """The width in pixels, before orientation."""
    height: int
    orientation: int
    """The orientation from EXIF, or else from XMP, 1 to 8."""


class Chunk(NamedTuple):
    """The place of a chunk's data in a file."""

    kind: bytes
    position: int
    length: int


def quick_png(file: OpenPicture) -> QuickHeader | None:
    """Return the header of an ordinary PNG; None for an unusual file, which is left to Pillow."""
    head = file.at(8, 25)
    if not _is_sound(file, Chunk(b"IHDR", 16, 13)) or head[:8] != b"\0\0\0\x0dIHDR":
        return None
    width, height, depth, color, _, filters, _ = struct.unpack_from(">LLBBBBB", head, 8)
    if not width or not height or (depth, color) not in _MODES or filters:
        return None
    texts = []
    for chunk in _chunks(file, 33):
        if chunk.kind == b"IDAT":
            texts += _texts_from(file, chunk.position - 8, is_animated=False)
            return QuickHeader(width, height, _orientation(file, texts))
        if not _is_ordinary(file, chunk, color):
            return None
        if chunk.kind in _TEXTS or chunk.kind == b"eXIf":
            texts.append(chunk)
    return None


def png_orientation(file: OpenPicture) -> int:
    """Return the orientation of any PNG, 1 to 8, from metadata before or after its pixels; 1 if there is none."""
    return _orientation(file, _texts_from(file, len(SIGNATURE), is_animated=_is_animated(file)))


def without_texts(stream: BinaryIO) -> BinaryIO | None:
    """Return a PNG without its texts and its color profile, which change no pixel but may be too large for Pillow.

    Chunks before the pixels with a wrong checksum are kept, so that a damaged file is still recognized.

    Args:
        stream: A complete file; its position changes.

    Returns:
        The smaller file; None if it is not a PNG, or nothing could be left out.
    """
    stream.seek(0)
    if stream.read(len(SIGNATURE)) != SIGNATURE:
        return None
    data = SIGNATURE + stream.read()
    kept, position, is_behind = [SIGNATURE], len(SIGNATURE), False
    while len(header := data[position : position + 8]) == 8:
        length, kind = struct.unpack(">L4s", header)
        end = position + 12 + length
        body = data[position + 8 : end - 4]
        is_behind = is_behind or kind == b"IDAT"
        is_sound = is_behind or zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end], "big")
        if kind not in _DROPPED or not is_sound:
            kept.append(data[position:end])
        position = end
    lighter = b"".join(kept)
    return BytesIO(lighter) if len(lighter) < len(data) else None


def despite_texts(read: Callable[[BinaryIO], Result], stream: BinaryIO) -> Result:
    """Call `read` on a file, and again without the texts of a PNG if Pillow refuses it.

    Raises:
        Exception: The error that `read` raises, for the smaller file if there is one.
    """
    try:
        return read(stream)
    except (
        ValueError,
        SyntaxError,
        UnidentifiedImageError,
    ):  # texts that are too large, or compressed in an unknown way
        lighter = without_texts(stream)
        if lighter is None:
            raise
    return read(lighter)


def _chunks(file: OpenPicture, position: int) -> Iterator[Chunk]:
    """Yield chunks from a position on, but only the last of adjacent pixel chunks of the same length."""
    for _ in range(MOST_CHUNKS):
        header = file.at(position, 8)
        if len(header) < 8 or not _IS_KIND(header, 4):
            return
        length, kind = struct.unpack(">L4s", header)
        yield Chunk(kind, position + 8, length)
        if kind == b"IDAT":
            position = _last_alike(file, position, header, 12 + length)
        position += 12 + length


def _last_alike(file: OpenPicture, position: int, header: bytes, stride: int) -> int:
    """Return the position of the last of adjacent chunks with the same header; encoders write thousands of them."""
    step, grows = 1, True
    while step:
        if file.at(position + step * stride, 8) == header:
            position += step * stride
            step = step * 2 if grows else step
        else:
            step, grows = step // 2, False
    return position


def _is_sound(file: OpenPicture, chunk: Chunk) -> bool:
    """Return whether the checksum of a chunk is right."""
    data = file.at(chunk.position, chunk.length + 4)
    return len(data) == chunk.length + 4 and zlib.crc32(data[:-4], zlib.crc32(chunk.kind)) == int.from_bytes(
        data[-4:], "big"
    )


def _is_ordinary(file: OpenPicture, chunk: Chunk, color: int) -> bool:
    """Return whether Pillow certainly continues after a chunk before the pixels."""
    kind, position, length = chunk
    if kind in _UNUSUAL or length > MOST_CHECKED or not _is_sound(file, chunk):
        return False
    if kind in (b"zTXt", b"iCCP"):
        name, end, rest = file.at(position, length).partition(b"\0")
        return bool(name and end) and rest[:1] == b"\0"
    least = _LEAST_TRANSPARENCY.get(color, 0) if kind == b"tRNS" else _LEAST_BYTES.get(kind, 0)
    return length >= least


def _is_animated(file: OpenPicture) -> bool:
    """Return whether Pillow counts more than one frame, including a default picture before the first."""
    frames, announced, has_frame = 0, 0, False
    for kind, position, _ in _chunks(file, len(SIGNATURE)):
        if kind == b"acTL":
            announced += 1
            frames = int.from_bytes(file.at(position, 4), "big")
        if kind in (b"IDAT", b"fdAT"):
            break
        has_frame = has_frame or kind == b"fcTL"
    return announced == 1 and 0 < frames <= 1 << 31 and frames + (not has_frame) > 1


def _texts_from(file: OpenPicture, position: int, *, is_animated: bool) -> list[Chunk]:
    """Return chunks that may hold the orientation, as far as Pillow reads: up to an animation's second frame."""
    found, is_behind = [], False
    for chunk in _chunks(file, position):
        if chunk.kind == b"IEND" or (chunk.kind == b"fcTL" and is_animated and is_behind):
            break
        is_behind = is_behind or chunk.kind in (b"IDAT", b"fdAT")
        if chunk.kind in _TEXTS or chunk.kind == b"eXIf":
            found.append(chunk)
    return found


def _orientation(file: OpenPicture, chunks: list[Chunk]) -> int:
    """Return the orientation in the given chunks; the last of several chunks of one kind counts."""
    info: dict[str, str | bytes] = {}
    room = MOST_METADATA
    for chunk in reversed(chunks):
        for key, value in _entries(file, chunk, room).items():
            info.setdefault(key, value)
            room -= len(value)
    return metadata_orientation(info) if info else UPRIGHT


def _entries(file: OpenPicture, chunk: Chunk, room: int) -> dict[str, str | bytes]:
    """Return the entries of Pillow's `Image.info` from one chunk, as far as they concern the orientation."""
    if chunk.length > room:
        return {}
    if chunk.kind == b"eXIf":
        return {EXIF: b"Exif\0\0" + file.at(chunk.position, chunk.length)}
    key = file.at(chunk.position, min(chunk.length, _LONGEST_KEY)).partition(b"\0")[0].decode("latin-1")
    if key not in (EXIF, RAW_PROFILE, XMP_TEXT):
        return {}
    _, _, value = file.at(chunk.position, chunk.length).partition(b"\0")
    if chunk.kind == b"iTXt":
        return _international(key, value, room)
    if chunk.kind == b"zTXt":
        value = _inflated(value[1:], room) or b""
    return {key: value if key == EXIF and chunk.kind == b"tEXt" else value.decode("latin-1")}


def _international(key: str, value: bytes, room: int) -> dict[str, str | bytes]:
    head, *rest = value[:2], *value[2:].split(b"\0", 2)
    if len(head) < 2 or len(rest) < 3:
        return {}
    language, translated, text = rest
    if head[0]:
        inflated = _inflated(text, room) if not head[1] else None
        if inflated is None:
            return {}
        text = inflated
    found: dict[str, str | bytes] = {XMP: text} if key == XMP_TEXT else {}
    try:
        language.decode(), translated.decode()
        return found | {key: text.decode()}
    except UnicodeDecodeError:
        return found


def _inflated(data: bytes, room: int) -> bytes | None:
    """Decompress at most `room` bytes; return None if the data is damaged."""
    try:
        return zlib.decompressobj().decompress(data, max(room, 1))
    except zlib.error:
        return None
