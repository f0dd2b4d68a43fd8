"""Pictures are set upright exactly as Pillow's `exif_transpose` sets them, wherever their orientation stands.

Planning reads it without decoding; the tests compare both what is planned and the pixels that come out.
"""

from __future__ import annotations

import io
import os
import struct
import time
import warnings
import zlib
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin, features
from PIL import __version__ as pillow_version
from PIL.PngImagePlugin import PngInfo, iTXt

from internvit_cli.config import PixelRule, Preprocess, Skipped, TilingRule
from internvit_cli.decode.direct import TiledPicture, tile_bytes, tile_file, tile_picture
from internvit_cli.plan.headers import Header, read_header
from internvit_cli.plan.orientation import exif_orientation, metadata_orientation, valid_orientation

if TYPE_CHECKING:
    from pathlib import Path

RULE = PixelRule(TilingRule(tile_size=28))
TURN_TAG = 0x0112
SIZE = (45, 30)
NUMBERS = (*range(1, 9), 0, 9, 65535)
as_pillow_13 = pytest.mark.skipif(int(pillow_version.split(".")[0]) < 13, reason="older Pillow reads EXIF otherwise")


# ------------------------------------------------------------------------------------------------ pictures of all kinds


def drawn() -> Image.Image:
    """A picture that looks different after each of the eight turns."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 256, (6, 9, 3), np.uint8), np.ones((5, 5, 1), np.uint8))
    return Image.fromarray(pixels)


def exif_block(number: int, order: str = ">", kind: int = 3) -> bytes:
    """A TIFF block of a maker's name and an orientation."""
    value = {1: "B3x", 3: "H2x", 4: "L"}[kind]
    directory = struct.pack(order + "HHHL4s", 2, 0x010F, 2, 4, b"cam\0")
    directory += struct.pack(order + "HHL" + value, TURN_TAG, kind, 1, number)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8) + directory + bytes(4)


def xmp_packet(number: object, syntax: str = "attribute") -> str:
    body = {
        "attribute": f'<rdf:Description tiff:Orientation="{number}"/>',
        "element": f"<rdf:Description><tiff:Orientation>{number}</tiff:Orientation></rdf:Description>",
        "quoted": f"<rdf:Description tiff:Orientation='{number}'/>",
    }[syntax]
    return f'<?xpacket begin=""?><x:xmpmeta xmlns:x="adobe:ns:meta/">{body}</x:xmpmeta><?xpacket end="w"?>'


def raw_profile(data: bytes, name: str = "exif") -> str:
    digits = data.hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    return f"\n{name}\n{len(data):8}\n{lines}\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def encoded(image_format: str, image: Image.Image | None = None, **options: Any) -> bytes:
    stream = io.BytesIO()
    (image or drawn()).save(stream, image_format, **options)
    return stream.getvalue()


def chunks_of(data: bytes) -> list[bytes]:
    found, position = [], 8
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        found.append(data[position:end])
        position = end
    return found


def png(*extra: bytes, behind: bool = False, image: Image.Image | None = None, split: int = 0) -> bytes:
    """A PNG with more chunks, in front of its pixels or behind them; `split` is the bytes of its pixel chunks."""
    first, *pixels, last = chunks_of(encoded("PNG", image))
    if split:
        data = b"".join(part[8:-4] for part in pixels)
        pixels = [chunk(b"IDAT", data[start : start + split]) for start in range(0, len(data), split)]
    parts = [first, *pixels, *extra, last] if behind else [first, *extra, *pixels, last]
    return PngImagePlugin._MAGIC + b"".join(parts)


def text(key: str, value: str | bytes) -> bytes:
    return chunk(b"tEXt", key.encode() + b"\0" + (value.encode("latin-1") if isinstance(value, str) else value))


def compressed_text(key: str, value: str) -> bytes:
    return chunk(b"zTXt", key.encode() + b"\0\0" + zlib.compress(value.encode("latin-1")))


def international(key: str, value: str, *, is_compressed: bool = False) -> bytes:
    body = zlib.compress(value.encode()) if is_compressed else value.encode()
    return chunk(b"iTXt", key.encode() + (b"\0\1\0" if is_compressed else b"\0\0\0") + b"en\0\0" + body)


def jpeg(*segments: bytes) -> bytes:
    data = encoded("JPEG", quality=95)
    marked = [b"\xff\xe1" + struct.pack(">H", 2 + len(segment)) + segment for segment in segments]
    return data[:2] + b"".join(marked) + data[2:]


def webp(number: bytes, xmp: bytes, *, flags: int | None = None) -> bytes:
    """An extended WebP whose metadata lies behind its pixels."""
    simple = encoded("WEBP", lossless=True)[12:]
    flags = (8 if number else 0) | (4 if xmp else 0) if flags is None else flags
    body = b"VP8X" + struct.pack("<LL", 10, flags)
    body += (SIZE[0] - 1).to_bytes(3, "little") + (SIZE[1] - 1).to_bytes(3, "little") + simple
    for kind, data in ((b"EXIF", number), (b"XMP ", xmp)):
        if data:
            body += kind + struct.pack("<L", len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<L", 4 + len(body)) + b"WEBP" + body


JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def files(number: int, order: str) -> dict[str, bytes]:
    """One picture in every container, with an orientation in every place."""
    exif, kind = b"Exif\0\0" + exif_block(number, order), exif_block(number, order)
    none = b"Exif\0\0" + struct.pack(">4sLHHHL4sL", b"MM\0*", 8, 1, 0x010F, 2, 4, b"cam\0", 0)
    profile, long_profile = raw_profile(exif), exif_block(number, order, 4)
    found = {
        "jpeg exif": jpeg(exif),
        "jpeg exif, as long": jpeg(b"Exif\0\0" + long_profile),
        "jpeg exif, as byte": jpeg(b"Exif\0\0" + exif_block(number % 256, order, 1)),
        "jpeg exif after xmp": jpeg(JPEG_XMP + xmp_packet(3).encode(), exif),
        "jpeg exif without it, xmp": jpeg(none, JPEG_XMP + xmp_packet(number).encode()),
        "jpeg exif in two parts": jpeg(exif[:30], b"Exif\0\0" + exif[30:]),
        "mpo": encoded("MPO", exif=exif, save_all=True, append_images=[drawn()]),
        "png eXIf": png(chunk(b"eXIf", kind)),
        "png eXIf behind": png(chunk(b"eXIf", kind), behind=True),
        "png eXIf behind many chunks": png(chunk(b"eXIf", kind), behind=True, split=16),
        "png eXIf twice": png(chunk(b"eXIf", exif_block(3)), chunk(b"eXIf", kind)),
        "png tEXt exif": png(text("exif", exif)),
        "png profile tEXt": png(text("Raw profile type exif", profile)),
        "png profile zTXt": png(compressed_text("Raw profile type exif", profile)),
        "png profile iTXt": png(international("Raw profile type exif", profile)),
        "png profile zTXt behind": png(compressed_text("Raw profile type exif", profile), behind=True),
        "png profile of another name": png(compressed_text("Raw profile type APP1", raw_profile(exif, "APP1"))),
        "png profile cut": png(text("Raw profile type exif", profile[:40])),
        "png profile and eXIf": png(text("Raw profile type exif", raw_profile(exif_block(3))), chunk(b"eXIf", kind)),
        "tiff": encoded("TIFF", exif=Image.Exif()),
        "gif": encoded("GIF", comment=xmp_packet(number).encode()),
        "icon": encoded("ICO"),
    }
    tagged = Image.Exif()
    tagged[TURN_TAG] = number
    found["tiff tag"] = encoded("TIFF", exif=tagged)
    if 1 <= number <= 8:  # libtiff writes no other
        found["tiff tag, compressed"] = encoded("TIFF", exif=tagged, compression="tiff_lzw")
    for syntax in ("attribute", "element", "quoted"):
        packet = xmp_packet(number, syntax)
        found |= {
            f"jpeg xmp {syntax}": jpeg(JPEG_XMP + packet.encode()),
            f"png xmp {syntax}": png(international("XML:com.adobe.xmp", packet)),
            f"png xmp {syntax}, compressed": png(international("XML:com.adobe.xmp", packet, is_compressed=True)),
            f"png xmp {syntax} behind": png(international("XML:com.adobe.xmp", packet), behind=True),
            f"png xmp {syntax} tEXt": png(text("XML:com.adobe.xmp", packet)),
            f"tiff xmp {syntax}": encoded("TIFF", tiffinfo={700: packet.encode()}),
        }
        if features.check("webp"):
            found[f"webp xmp {syntax}"] = webp(b"", packet.encode())
    if features.check("webp"):
        found["webp exif"] = webp(kind, b"")
        found["webp exif, with its name"] = webp(exif, b"")
        found["webp exif and xmp"] = webp(kind, xmp_packet(3).encode())
        found["webp exif without a flag"] = webp(kind, b"", flags=0)
        moving: dict[str, Any] = {"save_all": True, "append_images": [Image.new("RGB", SIZE)], "lossless": True}
        found["webp moving"] = encoded("WEBP", exif=exif, **moving)
    if features.check("avif"):
        found["avif"] = encoded("AVIF", exif=exif)
    moving = {"save_all": True, "append_images": [Image.new("RGB", SIZE)]}
    for name, extra in {"front": False, "behind": True}.items():
        frames = chunks_of(encoded("PNG", **moving))
        place = len(frames) - 1 if extra else 1
        frames.insert(place, chunk(b"eXIf", kind))
        found[f"png moving, {name}"] = PngImagePlugin._MAGIC + b"".join(frames)
    return found


NAMES = tuple(files(1, ">"))


def pillows(data: bytes) -> Image.Image:
    """The picture as Pillow sets it upright; as it lies, where damaged EXIF makes it raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except ValueError:
            return image.convert("RGB")


# ------------------------------------------------------------------------------------------------------------- the same


@as_pillow_13
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("number", NUMBERS)
def test_every_container_and_place_is_planned_and_decoded_as_pillow_sets_it_upright(
    number: int, order: str, tmp_path: Path
) -> None:
    every = files(number, order)
    assert len(every) > 10
    for name, data in every.items():
        path = tmp_path / "picture"
        path.write_bytes(data)
        wanted = pillows(data)
        planned = read_header(os.fsencode(path), RULE)
        assert isinstance(planned, Header), (name, planned)
        assert planned[:2] == wanted.size, name
        found = tile_file(os.fsencode(path), RULE)
        assert isinstance(found, TiledPicture), (name, found)
        assert planned.orientation == found.orientation
        upright = tile_picture(wanted, PixelRule(RULE.tiling, exif=False))
        assert isinstance(upright, TiledPicture)
        assert (found.tiles == upright.tiles).all(), name
        given_open = tile_picture(Image.open(io.BytesIO(data)), RULE)
        assert isinstance(given_open, TiledPicture)
        assert (given_open.tiles == upright.tiles).all(), name


def test_the_files_of_the_test_say_something_in_most_places() -> None:
    turned = {name for name, data in files(6, "<").items() if pillows(data).size != SIZE}
    assert turned > {
        "jpeg exif",
        "png eXIf behind many chunks",
        "webp exif",
        "png xmp element behind",
        "tiff xmp element",
    }
    assert set(NAMES) - turned >= {"png profile of another name", "jpeg xmp quoted", "webp exif without a flag"}


@pytest.mark.parametrize("name", NAMES)
def test_without_exif_pictures_stay_as_they_lie(name: str) -> None:
    found = tile_bytes(files(6, ">")[name], PixelRule(RULE.tiling, exif=False))
    assert isinstance(found, TiledPicture)
    assert found.orientation == 1
    assert ((found.width, found.height) == SIZE) or name.startswith(("tiff", "icon"))


# ------------------------------------------------------------------------------------------------- EXIF, field by field


FIELD_TYPES = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 0, 99])
FIELDS = st.lists(
    st.tuples(
        st.sampled_from([TURN_TAG, TURN_TAG, 0x010E, 0x010F, 0x8769]),
        FIELD_TYPES,
        st.sampled_from([0, 1, 1, 1, 2, 3, 5, 60, 1 << 30]),
        st.one_of(
            st.integers(0, 9).map(lambda number: struct.pack(">HH", number, number)), st.binary(min_size=4, max_size=4)
        ),
        st.one_of(st.none(), st.integers(0, 200)),
    ),
    max_size=5,
)


def pillows_number(data: bytes) -> object:
    """What Pillow finds in an EXIF block; None where it raises."""
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif.load(data)
            return exif.get(TURN_TAG, 1)
        except Exception:  # noqa: BLE001 - damaged blocks make it raise nearly anything
            return None


@as_pillow_13
@settings(max_examples=400)
@given(st.sampled_from("<>"), FIELDS, st.binary(max_size=80), st.integers(0, 2), st.integers(0, 20), st.integers(0, 99))
def test_an_exif_block_is_read_as_pillow_reads_it(
    order: str, fields: list[tuple[int, int, int, bytes, int | None]], tail: bytes, prefixes: int, start: int, cut: int
) -> None:
    directory = struct.pack(order + "H", len(fields))
    for tag, kind, values, field, offset in fields:
        place = field if offset is None else struct.pack(order + "L", offset)
        directory += struct.pack(order + "HHL4s", tag, kind, values, place)
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8 + start)
    block = b"Exif\0\0" * prefixes + header + bytes(start) + directory + tail
    block = block[: len(block) - cut] if cut < 50 else block
    wanted = pillows_number(block)
    is_turn = isinstance(wanted, (int, float)) or hasattr(wanted, "numerator")
    expected = int(wanted) if is_turn and wanted in range(1, 9) else 1  # type: ignore[call-overload]
    assert valid_orientation(exif_orientation(block)) == expected


@given(
    st.binary(max_size=80), st.sampled_from([b"", b"II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08", b"MM\0*", b"II+\0"])
)
def test_damaged_exif_means_upright_or_some_orientation(data: bytes, start: bytes) -> None:
    assert 1 <= metadata_orientation({"exif": start + data}) <= 8


def test_no_type_of_metadata_is_an_error() -> None:
    for value in (None, "", b"", "text", 7, ("a", "b"), iTXt("x"), b"\xff" * 9):
        for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
            assert metadata_orientation({key: value}) == 1


# -------------------------------------------------------------------------------------------------------------- hostile


@cache
def bomb(megabytes: int) -> bytes:
    """Compressed text that is many times larger than the file."""
    packer, block = zlib.compressobj(1), bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(megabytes)), packer.flush()])


HOSTILE = {
    "a bomb in zTXt": lambda: [chunk(b"zTXt", b"Comment\0\0" + bomb(100))],
    "a bomb in the profile": lambda: [chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb(100))],
    "a bomb in XMP": lambda: [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb(100))],
    "many bombs": lambda: [chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb(20))] * 40,
    "a color profile that is a bomb": lambda: [chunk(b"iCCP", b"p\0\0" + bomb(100))],
    "a profile of line breaks": lambda: [compressed_text("Raw profile type exif", "\n" * 1_000_000)],
    "more text than Pillow takes": lambda: [text(f"Comment {number}", "x" * 1_000_000) for number in range(70)],
    "a directory that is its own field": lambda: [
        chunk(b"eXIf", b"MM\0*\0\0\0\x08" + b"\0\x01\x01\x12\0\x04\xff\xff\xff\xff\0\0\0\x08")
    ],
    "fields without end": lambda: [
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + struct.pack(">HHLL", 1, 7, 5 << 20, 8) * 65_535)
    ],
    "a hundred thousand empty chunks": lambda: [chunk(b"teXt", b"")] * 100_000,
}


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_of_a_png_costs_a_bound_and_never_the_picture(name: str, behind: bool) -> None:
    data = png(*HOSTILE[name](), behind=behind)
    plain = tile_bytes(png(), RULE)
    began = time.process_time()
    found = tile_bytes(data, RULE)
    assert isinstance(found, TiledPicture), found
    assert isinstance(plain, TiledPicture)
    assert (found.tiles == plain.tiles).all()
    assert time.process_time() - began < 20  # of this process alone; unbounded it takes minutes


def test_good_pictures_are_read_whatever_the_size_of_their_texts_and_profiles() -> None:
    info = PngInfo()
    info.add_text("Comment", "a long story. " * 200_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", xmp_packet(6) + " " * 3_000_000, zip=True)
    data = encoded("PNG", pnginfo=info, icc_profile=bytes(3_000_000))
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data))
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    found = tile_bytes(data, RULE)
    assert isinstance(found, TiledPicture)
    assert (found.width, found.height, found.orientation) == (*SIZE[::-1], 6)
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_good_pictures_are_read_when_their_texts_are_compressed_by_an_unknown_method(kind: bytes, behind: bool) -> None:
    found = tile_bytes(png(chunk(kind, b"Comment\0\5nobody knows"), behind=behind), RULE)
    assert isinstance(found, TiledPicture), found
    assert (found.width, found.height) == SIZE


def test_a_wrong_checksum_beside_a_text_that_is_too_large_is_still_damage() -> None:
    broken = bytearray(chunk(b"gAMA", bytes(4)))
    broken[-1] ^= 1
    assert isinstance(tile_bytes(png(HOSTILE["a bomb in zTXt"]()[0], bytes(broken)), RULE), Skipped)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=6),
    st.integers(0, 9),
)
def test_damage_anywhere_is_never_more_than_a_picture_or_a_reason(
    name: str, flips: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(files(6, "<")[name])
    for place, value in flips:
        data[place % len(data)] = value
    assert isinstance(tile_bytes(bytes(data[: len(data) - cut]), RULE), (TiledPicture, Skipped))


def test_the_cases_that_stayed_sideways_are_upright(cases: Path) -> None:
    for name in ("rawprofile6.png", "xmp6.jpg"):
        found = read_header(os.fsencode(cases / name), RULE)
        assert isinstance(found, Header)
        assert found[:3] == (120, 200, 6)


def test_the_clip_view_is_that_of_the_upright_picture(tmp_path: Path) -> None:
    rule = PixelRule(TilingRule(tile_size=28, preprocess=Preprocess.CLIP))
    found = tile_bytes(files(6, ">")["png profile zTXt"], rule)
    upright = tile_picture(pillows(files(6, ">")["png profile zTXt"]), rule)
    assert isinstance(found, TiledPicture)
    assert isinstance(upright, TiledPicture)
    assert (found.tiles == upright.tiles).all()
