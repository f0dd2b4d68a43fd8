"""Why a picture is skipped: damage is damage, a failing disk is a failing disk, and what is no picture is named."""

from __future__ import annotations

import csv
import errno
import io
import os
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from internvit_cli.config import PixelRule, Skipped, Status, TilingRule, Truncated
from internvit_cli.decode.direct import TiledPicture, tile_bytes, tile_file, tile_picture
from internvit_cli.plan.headers import read_header
from internvit_cli.sources import files
from internvit_cli.sources.members import OpenFile, status_of

if TYPE_CHECKING:
    from pathlib import Path

RULE = PixelRule(TilingRule(tile_size=28))
ACCEPTING = PixelRule(TilingRule(tile_size=28), truncated=Truncated.ACCEPT)
FORMATS: dict[str, dict[str, object]] = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "TIFF jpeg": {"compression": "jpeg"},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "PPM": {},
    "JPEG2000": {},
    "AVIF": {},
    "ICO": {},
    "ICNS": {},
    "DDS": {},
    "SGI": {},
    "TGA": {},
    "PCX": {},
}
NEEDED = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif", "TIFF": "libtiff"}


def drawn() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(np.kron(rng.integers(0, 256, (6, 9, 3), np.uint8), np.ones((5, 5, 1), np.uint8)))


def encoded(name: str) -> bytes:
    image_format = name.split(maxsplit=1)[0]
    if image_format in NEEDED and not features.check(NEEDED[image_format]):
        pytest.skip(f"this Pillow has no {image_format}")
    stream = io.BytesIO()
    drawn().save(stream, image_format, **FORMATS[name])
    return stream.getvalue()


def outcome(data: bytes, rule: PixelRule = RULE) -> TiledPicture | Skipped:
    found = tile_bytes(data, rule)
    assert isinstance(found, TiledPicture) or (found.message.isprintable() and "DOS" not in found.message)
    return found


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_that_is_cut_anywhere_behind_its_signature_is_truncated(name: str) -> None:
    whole = encoded(name)
    rng = np.random.default_rng(len(name))
    beginning = 32 if name != "PCX" else 128
    for length in rng.integers(beginning, len(whole), 60).tolist():
        found = outcome(whole[:length])
        if isinstance(found, Skipped):
            # TGA has no signature: what is left of one may be nothing that is known.
            assert found.status is Status.TRUNCATED or name == "TGA", (length, found)
    assert isinstance(outcome(whole[: len(whole) // 2]), (Skipped, TiledPicture))


@pytest.mark.parametrize("changes", [30, pytest.param(120, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", FORMATS)
def test_bytes_that_are_changed_anywhere_never_look_like_a_failing_disk(name: str, changes: int) -> None:
    whole, rng = encoded(name), np.random.default_rng(len(name))
    reasons = set()
    for number in range(changes):
        data = bytearray(whole)
        most = len(data) if number % 2 else min(len(data), 200)
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(0, most))] = int(rng.integers(0, 256))
        found = outcome(bytes(data))
        if isinstance(found, Skipped):
            reasons.add(found.status)
    assert reasons <= {
        Status.TRUNCATED,
        Status.UNSUPPORTED,
        Status.TOO_LARGE,
        Status.NOT_AN_IMAGE,
        Status.SIZE_MISMATCH,
    }
    if name == "PNG":  # every kind of PNG that there is is read
        assert Status.UNSUPPORTED not in reasons


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_pixels_of_a_png_that_cannot_be_decompressed_are_damage_and_nothing_unsupported() -> None:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">LLBBBBB", 9, 9, 8, 2, 0, 0, 0))
    good = zlib.compress(bytes(9 * 28))
    pixels = {
        "no zlib": b"\xff" * 40,
        "a window that is too large": b"\xf8" + good[1:],
        "an unknown filter": zlib.compress(b"\x09" * 9 * 28),
        "a byte changed": good[:6] + b"\xff\xff" + good[8:],
        "cut": good[:-9],
    }
    for name, data in pixels.items():
        found = outcome(head + chunk(b"IDAT", data) + chunk(b"IEND", b""))
        assert isinstance(found, Skipped), name
        assert found.status is Status.TRUNCATED, (name, found)


@pytest.mark.parametrize("offset", [0, 7, 1 << 20, (1 << 31) + 1, (1 << 32) - 1])
@pytest.mark.parametrize("field", ["the directory", "the pixels"])
def test_a_tiff_that_points_out_of_itself_is_damaged_and_not_unreadable(
    field: str, offset: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytearray(encoded("TIFF"))
    if field == "the directory":
        data[4:8] = struct.pack("<L", offset)
    else:
        entry = data.index(struct.pack("<HHL", 273, 4, 1))
        data[entry + 8 : entry + 12] = struct.pack("<L", offset)
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    for in_memory in (0, 64 << 20):
        monkeypatch.setattr("internvit_cli.decode.pictures._IN_MEMORY", in_memory)
        found = tile_file(os.fsencode(path), RULE)
        assert isinstance(found, (Skipped, TiledPicture))
        if isinstance(found, Skipped):
            assert found.status is Status.TRUNCATED, found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(path)
        except Exception:  # noqa: BLE001 - what cannot be opened cannot be given
            return
        given = tile_picture(opened, RULE)
    assert isinstance(given, TiledPicture) or given.status is Status.TRUNCATED


def test_a_bigtiff_whose_directory_lies_beyond_all_files_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"II+\0\x08\0\0\0" + struct.pack("<Q", (1 << 64) - 1) + bytes(100))
    found = read_header(os.fsencode(path), RULE)
    assert isinstance(found, Skipped)
    assert found.status is Status.TRUNCATED


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "gif"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINVAL])
def test_a_disk_that_fails_while_a_header_is_read_is_told_from_damage(
    extension: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{extension}"
    drawn().save(path)

    def fail(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", fail)
    found = read_header(os.fsencode(path), RULE)
    assert isinstance(found, Skipped)
    wanted = Status.VANISHED if number == errno.ESTALE else Status.UNREADABLE
    assert (found.status, found.message) == (wanted, os.strerror(number))


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose bytes cannot be read")
@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "gif"])
def test_a_disk_that_fails_while_pixels_are_read_is_told_from_damage(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{extension}"
    drawn().save(path)
    opened = OpenFile(os.open("/proc/self/mem", os.O_RDONLY), status_of(os.fsencode(path)))
    picture = files.OpenPicture(opened)
    with picture, pytest.raises(OSError) as failure:
        picture.stream().read()
    assert picture.failure(failure.value, 1).status is Status.UNREADABLE
    assert picture.failure(ValueError("what Pillow made of it"), 1).status is Status.UNREADABLE


def test_the_damaged_files_of_public_test_suites_are_damaged_or_of_a_kind_that_is_not_read(hostile: Path) -> None:
    """None of them is called unreadable, and no PNG is called unsupported."""
    with open(hostile / "OUTCOMES.tsv", encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if row["outcome"] == "error"]
    assert len(rows) > 60
    fitting = {Status.TRUNCATED, Status.UNSUPPORTED, Status.TOO_LARGE, Status.NOT_AN_IMAGE}
    for row in rows:
        found = tile_file(os.fsencode(hostile / row["file"]), RULE)
        if isinstance(found, TiledPicture):
            continue
        assert found.status in fitting, (row["file"], found)
        if row["file"].endswith(".png"):
            # Those of PNGs in whose signature bytes were changed begin as nothing that is known.
            is_png = (hostile / row["file"]).read_bytes().startswith(b"\x89PNG\r\n")
            assert found.status is (Status.TRUNCATED if is_png else Status.NOT_AN_IMAGE), (row["file"], found)


def test_a_png_with_a_wrong_checksum_is_damaged(cases: Path) -> None:
    found = tile_file(os.fsencode(cases / "badcrc_text.png"), RULE)
    assert isinstance(found, Skipped)
    assert found.status is Status.TRUNCATED
    assert "checksum" in found.message


def test_a_jpeg_of_twelve_bits_is_unsupported() -> None:
    data = bytearray(encoded("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    found = outcome(bytes(data))
    assert isinstance(found, Skipped)
    assert found.status is Status.UNSUPPORTED
    assert "12-bit" in found.message


# --------------------------------------------------------------------------------------------------- what it is instead


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", ("a HEIC picture", "JPEG or PNG")),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1", ("a HEIF picture", "JPEG or PNG")),
        (b"\xff\x0a\xfa\x1f" + bytes(9), ("a JPEG XL picture", "djxl")),
        (b"\0\0\0\x0cJXL \r\n\x87\n", ("a JPEG XL picture", "djxl")),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", ("an MP4 video", "ffmpeg")),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", ("a QuickTime video", "ffmpeg")),
        (b"\0\0\0\x08moov", ("a QuickTime video", "ffmpeg")),
        (b"\x1aE\xdf\xa3", ("a Matroska or WebM video", "ffmpeg")),
        (b"\n<!DOCTYPE HTML><html><body>404", ("a web page", "download the picture again")),
        (b"<html lang=de>", ("a web page", "download the picture again")),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", ("an XML file",)),
        (b'<svg xmlns="http://www.w3.org/2000/svg">', ("an SVG drawing", "render it")),
        (b'{"error": "not found"}', ("a JSON text",)),
        (b"\x1f\x8b\x08\0", ("a gzip archive", "unpack it")),
        (b"PK\x03\x04", ("a zip archive", "unpack it")),
        (b"%PDF-1.7", ("a PDF document", "render its pages")),
        (b"II*\0\x10\0\0\0CR\x02\0", ("a raw photograph", "develop it")),
        (b"FUJIFILMCCD-RAW 0201", ("a raw photograph", "develop it")),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ("a Git LFS pointer", "git lfs pull")),
        (b"/annex/objects/SHA256E-s12--0.jpg\n", ("a git-annex pointer", "git annex get")),
        (b"Not found\n", ("a text that begins with 'Not found",)),
        ("Nicht gefunden: übermäßig\n".encode() * 60, ("a text that begins with 'Nicht gefunden",)),
        (bytes(4096), ("only zeros", "again")),
        (b"\x89PNG\n\x1a\n\0\0\0", ("transfer in text mode", "again")),
        (bytes(range(1, 200)), ("begins with the bytes 01 02 03",)),
        (b"", ("empty",)),
    ],
)
def test_what_is_no_picture_is_called_by_its_name_with_what_would_help(data: bytes, words: tuple[str, ...]) -> None:
    found = outcome(data)
    assert isinstance(found, Skipped)
    assert found.status is Status.NOT_AN_IMAGE
    assert [word for word in words if word not in found.message] == []


def test_a_format_that_this_pillow_cannot_read_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "readable_formats", lambda: ("JPEG",))
    monkeypatch.setattr("internvit_cli.plan.headers.readable_formats", lambda: ("JPEG",))
    found = outcome(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(60))
    assert isinstance(found, Skipped)
    assert found.status is Status.UNSUPPORTED
    assert "newer Pillow" in found.message


# ------------------------------------------------------------------------------------------------------------ too large


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "GIF", "BMP", "ICO", "WEBP"])
def test_a_picture_of_too_many_pixels_is_told_by_its_own_size_and_the_option(name: str) -> None:
    data = encoded(name)
    pixels = 24 * 16 if name == "ICO" else 45 * 30
    found = outcome(data, PixelRule(TilingRule(tile_size=28), max_pixels=pixels - 1))
    assert isinstance(found, Skipped)
    assert (found.status, found.pixels) == (Status.TOO_LARGE, pixels)
    assert f"{pixels:,} pixels, more than --max-pixels {pixels - 1}" in found.message
    assert isinstance(outcome(data, PixelRule(TilingRule(tile_size=28), max_pixels=pixels)), TiledPicture)


# ---------------------------------------------------------------------------------------------- pictures without an end


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_pictures_that_lack_their_end_are_accepted_when_asked_for(name: str) -> None:
    whole = encoded(name)
    cut = whole[: len(whole) * 4 // 5]
    if not isinstance(outcome(cut), Skipped):
        pytest.skip(f"Pillow takes a {name} without its end anyhow")
    found = outcome(cut, ACCEPTING)
    try:
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        wanted = Image.open(io.BytesIO(cut))
        wanted.load()
    except Exception:  # noqa: BLE001 - not every format can do without its end
        assert isinstance(found, Skipped)
    else:
        picture = tile_picture(wanted.convert("RGB"), RULE)
        assert isinstance(found, TiledPicture)
        assert isinstance(picture, TiledPicture)
        assert (found.tiles == picture.tiles).all()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def test_two_bytes_less_cost_a_jpeg_unless_they_are_accepted(cases: Path) -> None:
    path = os.fsencode(cases / "trunc_2bytes.jpg")
    found = tile_file(path, RULE)
    assert isinstance(found, Skipped)
    assert found.status is Status.TRUNCATED
    assert "--truncated accept" in found.message
    assert isinstance(tile_file(path, ACCEPTING), TiledPicture)


@pytest.mark.parametrize("users", [False, True])
def test_whether_an_end_may_lack_is_the_rules_alone_and_leaves_no_trace(
    users: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", users)
    cut = encoded("JPEG")[:-40]
    assert isinstance(outcome(cut), Skipped)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is users
    assert isinstance(outcome(cut, ACCEPTING), TiledPicture)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is users
