"""Headers say what planning needs, without decoding, and every failure is a value."""

from __future__ import annotations

import errno
import io
import os
import struct
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from internvit_cli.config import PixelRule, Preprocess, Skipped, Status, TilingRule
from internvit_cli.plan.headers import Header, OwnDrawing, read_header, read_headers
from internvit_cli.plan.orientation import valid_orientation
from internvit_cli.plan.quick_headers import QuickHeader, quick_header
from internvit_cli.sources.files import open_or_skip, open_picture, system_failure
from internvit_cli.viz.draw.png import encode_png

if TYPE_CHECKING:
    from pathlib import Path

RULE = PixelRule()


def save(path: Path, size: tuple[int, int] = (40, 20), orientation: int | None = None, **options: Any) -> bytes:
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.new("RGB", size, (90, 120, 30)).save(path, **options)
    return os.fsencode(path)


def header(path: bytes, rule: PixelRule = RULE) -> Header:
    found = read_header(path, rule)
    assert isinstance(found, Header), found
    return found


def skipped(path: bytes, rule: PixelRule = RULE) -> Skipped:
    found = read_header(path, rule)
    assert isinstance(found, Skipped), found
    return found


def test_a_drawing_of_ours_is_told_apart_whatever_its_size_and_is_a_picture_like_any_other(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(encode_png(Image.new("RGB", (300, 200))))
    assert read_headers([path], RULE) == [OwnDrawing(header(path))]
    assert header(path)[:3] == (300, 200, 1)
    (small,) = read_headers([path], PixelRule(max_pixels=10))
    assert isinstance(small, OwnDrawing) and isinstance(small.outcome, Skipped)
    assert small.outcome.status is Status.TOO_LARGE


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm", "jp2", "tga"])
def test_a_header_has_size_and_file_facts(extension: str, tmp_path: Path) -> None:
    path = save(tmp_path / f"a.{extension}")
    status = os.stat(path)
    assert header(path) == (40, 20, 1, status.st_size, status.st_mtime_ns)


@pytest.mark.parametrize("orientation", [*range(10), 65535])
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_sizes_are_those_of_the_upright_picture(extension: str, orientation: int, tmp_path: Path) -> None:
    path = save(tmp_path / f"a.{extension}", orientation=orientation)
    found = header(path)
    with Image.open(os.fsdecode(path)) as image:
        assert found[:2] == ImageOps.exif_transpose(image).size
    expected = orientation if 1 <= orientation <= 8 and extension != "tif" else 1
    assert found.orientation == expected


def test_exif_can_be_ignored(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", orientation=6)
    assert header(path, PixelRule(exif=False))[:3] == (40, 20, 1)


def test_what_cannot_be_read_is_a_value_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_bytes(b"<html>404</html>" * 10)
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "fifo.jpg")
    expected = {
        "empty.jpg": Status.NOT_AN_IMAGE,
        "page.jpg": Status.NOT_AN_IMAGE,
        "eps.jpg": Status.NOT_AN_IMAGE,
        "gone.jpg": Status.VANISHED,
        "page.jpg/a.jpg": Status.VANISHED,
        "loop.jpg": Status.UNREADABLE,
        "n" * 300 + ".jpg": Status.UNREADABLE,
        "folder.jpg": Status.NOT_REGULAR,
        "fifo.jpg": Status.NOT_REGULAR,
    }
    found = read_headers([os.fsencode(tmp_path / name) for name in expected], RULE)
    assert {
        name: item.status for name, item in zip(expected, found, strict=True) if isinstance(item, Skipped)
    } == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_file_without_permission_is_unreadable(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg")
    os.chmod(path, 0)
    assert skipped(path).status is Status.UNREADABLE


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_devices_are_not_opened(device: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(device)
    assert skipped(os.fsencode(tmp_path / "a.jpg")).status is Status.NOT_REGULAR


def test_an_opened_file_is_not_inherited(tmp_path: Path) -> None:
    opened = open_or_skip(save(tmp_path / "a.jpg"))
    assert not isinstance(opened, Skipped)
    assert not os.get_inheritable(opened.descriptor)
    os.close(opened.descriptor)


def test_too_many_pixels_are_refused_below_and_above_pillows_own_limit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", (101, 100))
    assert skipped(path, PixelRule(max_pixels=10_099)).status is Status.TOO_LARGE
    assert header(path, PixelRule(max_pixels=10_100)).width == 101
    signature = b"\x89PNG\r\n\x1a\n"
    ihdr = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    (tmp_path / "b.png").write_bytes(signature + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    large = os.fsencode(tmp_path / "b.png")
    assert skipped(large).status is Status.TOO_LARGE
    assert header(large, PixelRule(max_pixels=400_000_000)).width == 20_000


def test_a_thread_of_pixels_that_resizing_would_blow_up_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", (1, 200_000))
    assert header(path).height == 200_000
    assert skipped(path, PixelRule(TilingRule(preprocess=Preprocess.CLIP))).status is Status.TOO_LARGE
    assert skipped(save(tmp_path / "b.png", (1, 500_000))).status is Status.TOO_LARGE


def test_reading_headers_leaves_pillows_settings_alone(tmp_path: Path) -> None:
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    read_header(save(tmp_path / "a.jpg"), PixelRule(max_pixels=10))
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (limit, filters)


def test_pillow_warnings_stay_silent(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", (10_000, 9_000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert header(path).width == 10_000


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file"), Status.VANISHED),
        (OSError(errno.ESTALE, "Stale file handle"), Status.VANISHED),
        (PermissionError(errno.EACCES, "Permission denied"), Status.UNREADABLE),
        (OSError(errno.EIO, "Input/output error"), Status.UNREADABLE),
        (OSError(errno.ENXIO, "No such device"), Status.NOT_REGULAR),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Status.TOO_LARGE),
        (UnidentifiedImageError("cannot identify"), Status.NOT_AN_IMAGE),
        (Image.DecompressionBombError("bomb"), Status.TOO_LARGE),
        (MemoryError(), Status.TOO_LARGE),
        (OSError("out of memory when reading image file"), Status.TOO_LARGE),
        (ValueError("Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK"), Status.TRUNCATED),
        (ValueError("Box length too large"), Status.TRUNCATED),
        (OSError("unrecognized data stream contents when reading image file"), Status.TRUNCATED),
        (SyntaxError("Unknown compression method 78 in zTXt chunk"), Status.TRUNCATED),
        (OSError("decoder jpeg2k not available"), Status.UNSUPPORTED),
        (OSError("image file is truncated (0 bytes not processed)"), Status.TRUNCATED),
        (SyntaxError("broken PNG file"), Status.TRUNCATED),
        (struct.error("unpack"), Status.TRUNCATED),
        (NotImplementedError("Unimplemented pixel format"), Status.UNSUPPORTED),
        (ValueError("conversion from La to L not supported"), Status.UNSUPPORTED),
    ],
)
def test_every_exception_has_a_reason(error: Exception, status: Status) -> None:
    assert system_failure(error).status is status
    assert system_failure(error).message


@given(st.text())
def test_messages_are_one_bounded_printable_line(text: str) -> None:
    message = system_failure(ValueError(text)).message
    assert message.isprintable()
    assert 1 <= len(message) <= 3100


def test_a_truncated_header_is_a_value_at_every_length(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    data = stream.getvalue()
    path = tmp_path / "a.jpg"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert isinstance(read_header(os.fsencode(path), RULE), (Header, Skipped))


# ----------------------------------------------------------------------------------------- headers without Pillow


def quick(data: bytes, folder: Path) -> QuickHeader | None:
    path = folder / "quick"
    path.write_bytes(data)
    picture = open_picture(os.fsencode(path))
    assert not isinstance(picture, Skipped)
    with picture:
        return quick_header(picture)


def as_pillow_opens(data: bytes) -> QuickHeader | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            return QuickHeader(*image.size, as_pillow_turns(image))
    except Exception:  # noqa: BLE001 - damaged pictures make Pillow raise nearly anything
        return None


def as_pillow_turns(image: Image.Image) -> int:
    """What its `exif_transpose` goes by; -1 where it raises, because pixels or EXIF are damaged."""
    try:
        if image.format == "PNG":
            image.load()
        return valid_orientation(image.getexif().get(0x0112, 1))
    except Exception:  # noqa: BLE001 - so do damaged pixels and damaged EXIF
        return -1


def ordinary_files() -> dict[str, bytes]:
    """JPEG, PNG and WebP as cameras and programs write them, with EXIF and without."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a title " * 20
    found = {}
    for mode in ("RGB", "L", "CMYK"):
        picture = Image.fromarray(rng.integers(0, 256, (37, 53, 3), np.uint8)).convert(mode)
        variants = {"jpeg": {}, "jpeg progressive": {"progressive": True}, "jpeg exif": {"exif": exif}}
        variants["jpeg comment"] = {"comment": b"c" * 70, "icc_profile": b"p" * 150_000}
        if mode != "CMYK":
            text = PngInfo()
            text.add_text("Comment", "so long " * 99, zip=True)
            variants |= {"png": {"icc_profile": b"p" * 9_000}, "png exif": {"exif": exif, "pnginfo": text}}
        if mode == "RGB":
            variants |= {"webp": {}, "webp lossless": {"lossless": True}, "webp exif": {"exif": exif}}
            variants["webp profile"] = {"exif": exif, "icc_profile": b"p" * 9_000, "xmp": b"x" * 5_001}
        for name, options in variants.items():
            data = io.BytesIO()
            picture.save(data, name.split()[0], **options)
            found[f"{name} {mode}"] = data.getvalue()
    return found


ORDINARY = ordinary_files()


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_need_no_pillow_and_say_the_same(name: str, tmp_path: Path) -> None:
    found = quick(ORDINARY[name], tmp_path)
    assert found is not None
    assert found == as_pillow_opens(ORDINARY[name])


@pytest.mark.parametrize("name", ORDINARY)
def test_a_damaged_header_never_says_anything_but_what_pillow_says(name: str, tmp_path: Path) -> None:
    """Bytes flipped and files cut anywhere in the header: where both give an answer, it is the same one."""
    whole, rng, answers = ORDINARY[name], np.random.default_rng(len(name)), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(0, min(len(data), 700)))] = int(rng.integers(0, 256))
        if rng.random() < 0.3:
            del data[int(rng.integers(4, len(data))) :]
        found, wanted = quick(bytes(data), tmp_path), as_pillow_opens(bytes(data))
        if found is not None and wanted is not None:
            answers += 1
            assert found == (wanted if wanted.orientation > 0 else (*wanted[:2], found.orientation))
    assert answers > 5


def test_what_is_unusual_is_left_to_pillow(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10))
    several = io.BytesIO()
    picture.save(several, "MPO", save_all=True, append_images=[picture])
    moving = io.BytesIO()
    picture.save(moving, "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 10), "red")])
    plain = ORDINARY["jpeg exif RGB"]
    segment = plain[plain.index(b"\xff\xe1") :][: 2 + int.from_bytes(plain[plain.index(b"\xff\xe1") + 2 :][:2], "big")]
    unusual = {
        "several pictures in one file": several.getvalue(),
        "a moving picture": moving.getvalue(),
        "EXIF in two segments": plain.replace(segment, segment * 2),
        "junk between segments": plain.replace(segment, b"\x00" + segment),
        "another format": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "nothing": b"",
    }
    for name, data in unusual.items():
        assert quick(data, tmp_path) is None, name
