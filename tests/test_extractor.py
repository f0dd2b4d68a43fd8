"""Encoding in memory: the values of the command line, for pictures that are files, Pillow images or arrays."""

from __future__ import annotations

import contextlib
import io
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from run_helpers import extract, internvit

from internvit_cli import Extractor, Features, InternvitError, SkippedImageError, open_features
from internvit_cli.config import Status
from internvit_cli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli.storage.image import ImageFeatures

FLOAT32 = ("--dtype", "float32", "--device", "cpu")
CPU = {"dtype": "float32", "device": "cpu"}
PHOTOS = ("028_exif-samples_640x480.jpg", "021_exif-orientation_1200x1800.jpg", "066_libwebp-gallery_800x600.webp")
"""The second is turned by its EXIF."""


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, and pictures of every kind that is not plain RGB."""
    folder = tmp_path_factory.mktemp("pictures")
    for name in PHOTOS:
        shutil.copy(photos / name, folder)
    random = np.random.default_rng(0)
    photo = Image.open(photos / PHOTOS[0]).resize((320, 240))
    transparent = photo.convert("RGBA")
    transparent.putalpha(Image.fromarray(random.integers(0, 256, (240, 320), np.uint8)))
    transparent.save(folder / "alpha.png")
    photo.quantize(32).save(folder / "palette.png", transparency=3)
    photo.convert("L").save(folder / "grey.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(random.integers(0, 60000, (90, 120), np.uint16)).save(folder / "grey16.png")
    Image.fromarray(random.random((90, 120), np.float32)).save(folder / "float.tiff")
    exif = Image.Exif()
    for orientation in range(2, 9):
        exif[0x0112] = orientation
        photo.save(folder / f"turned{orientation}.png", exif=exif)
    photo.save(folder / "turned6.tiff", exif=exif)
    return folder


def assert_same(ours: ImageFeatures, theirs: ImageFeatures) -> None:
    """Every bit of every array, and every fact."""
    facts = ("status", "width", "height", "orientation", "grid", "has_thumbnail", "tiles")
    assert [getattr(ours, name) for name in facts] == [getattr(theirs, name) for name in facts], theirs.key
    for name in ("pooled", "tokens", "tile_pooled"):
        try:
            expected = getattr(theirs, name)
        except InternvitError as error:
            with pytest.raises(type(error)):
                getattr(ours, name)
            continue
        found = getattr(ours, name)
        assert found.dtype == expected.dtype and found.tobytes() == expected.tobytes(), (theirs.key, name)


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Features:
    output = tmp_path_factory.mktemp("out") / "feats.h5"
    assert extract(folder, "-o", output, "--tile-pooled", *FLOAT32).returncode == 0
    return open_features(output)


@pytest.mark.parametrize("source", ["paths", "pillow", "streamed"])
def test_pictures_of_every_kind_give_the_bits_of_the_command_line(folder, stored, source):
    """EXIF, alpha, palettes, 16 bits, floats, CMYK, TIFF: as files and as Pillow images, batched across images."""
    with Extractor("tiny-random", tile_pooled=True, batch_tiles=5, **CPU) as extractor, contextlib.ExitStack() as stack:
        paths = [folder / key for key in stored]
        if source == "paths":
            images = extractor(paths)
        elif source == "pillow":
            images = extractor([stack.enter_context(Image.open(path)) for path in paths])
        else:
            images = list(extractor.stream(iter(paths)))
        assert extractor.recipe == stored.recipe
    assert len(images) == len(stored)
    for ours, theirs in zip(images, stored.values(), strict=True):
        assert_same(ours, theirs)
        assert ours.path == theirs.path
        assert ours.digest == (theirs.digest if source != "pillow" else bytes(32))


def test_arrays_are_pictures_too(folder, stored):
    with Extractor.like(stored, device="cpu") as extractor:
        rgb = np.asarray(Image.open(folder / PHOTOS[2]))
        grey = np.asarray(Image.open(folder / "grey.png"))
        alpha = np.asarray(Image.open(folder / "alpha.png"))
        images = extractor([rgb, grey, grey[:, :, None], alpha, rgb[:, ::-1][:, ::-1]])
        assert [image.key for image in images] == ["0", "1", "2", "3", "4"]
        for image, key in zip(images, (PHOTOS[2], "grey.png", "grey.png", "alpha.png", PHOTOS[2]), strict=True):
            assert_same(image, stored[key])
        stack = np.stack([rgb, rgb])
        assert [image.tiles for image in extractor(stack)] == [images[0].tiles] * 2
        for wrong in (rgb.astype(np.float32), rgb[0, 0], np.zeros((4, 4, 7), np.uint8), 3, None):
            with pytest.raises(UsageError, match="image 0") as caught:
                extractor([wrong])
            assert caught.value.hint


def test_one_picture_gives_one_image_and_a_list_gives_a_list(folder, stored):
    with Extractor.like(stored, device="cpu") as extractor:
        for picture in (str(folder / "grey.png"), folder / "grey.png", Image.open(folder / "grey.png")):
            assert_same(extractor(picture), stored["grey.png"])
        assert extractor([]) == []


OPTIONS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "patch tokens, cls": ({"tokens": "patch", "pool": "cls"}, ("--tokens", "patch", "--pool", "cls")),
    "no tokens": ({"tokens": "none", "pool": "cls+mean"}, ("--tokens", "none", "--pool", "cls+mean")),
    "no thumbnail": ({"thumbnail": False, "tile_pooled": True}, ("--no-thumbnail", "--tile-pooled")),
    "few small tiles": ({"max_tiles": 4, "tile_size": 224}, ("--max-tiles", 4, "--tile-size", 224)),
    "squash, bfloat16": (
        {"preprocess": "squash", "store_dtype": "bfloat16"},
        ("--preprocess", "squash", "--store-dtype", "bfloat16"),
    ),
    "clip, float32": (
        {"preprocess": "clip", "store_dtype": "float32"},
        ("--preprocess", "clip", "--store-dtype", "float32"),
    ),
    "background, no exif": ({"background": "red", "exif": False}, ("--background", "red", "--no-exif")),
    "an earlier layer": ({"layer": -2}, ("--layer", -2)),
    "a low limit": ({"max_pixels": 300_000}, ("--max-pixels", 300_000)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_mean_on_the_command_line(folder, tmp_path, name):
    keywords, words = OPTIONS[name]
    small = tmp_path / "small"
    small.mkdir()
    for key in ("alpha.png", "grey16.png", "turned6.png", "grey.png", PHOTOS[0]):
        shutil.copy(folder / key, small)
    assert extract(small, "-o", tmp_path / "feats.h5", *words, *FLOAT32).returncode in {0, 3}
    stored = open_features(tmp_path / "feats.h5")
    with Extractor("tiny-random", **keywords, **CPU) as extractor:
        assert extractor.recipe == stored.recipe
        for ours, theirs in zip(extractor([small / key for key in stored]), stored.values(), strict=True):
            if theirs.status is Status.DONE:
                assert_same(ours, theirs)
            else:
                assert ours.status is theirs.status


@pytest.mark.parametrize("checkpoint", ["6b-chat", "300m-hf"])
def test_a_real_checkpoint_gives_the_same_projected_tokens(folder, reference, tmp_path, checkpoint):
    words = ("--model", reference / checkpoint, "--tokens", "projected", *FLOAT32)
    small = tmp_path / "small"
    small.mkdir()
    shutil.copy(folder / PHOTOS[0], small)
    assert internvit("extract", small, "-o", tmp_path / "feats.h5", *words).returncode == 0
    stored = open_features(tmp_path / "feats.h5")
    with Extractor(str(reference / checkpoint), tokens="projected", **CPU) as extractor:
        assert_same(extractor(small / PHOTOS[0]), stored[PHOTOS[0]])
    with Extractor.like(tmp_path / "feats.h5", device="cpu") as extractor:
        assert_same(extractor(small / PHOTOS[0]), stored[PHOTOS[0]])


# ------------------------------------------------------------------------------------------------ what cannot be used


def test_a_picture_that_cannot_be_used_says_why_and_leaves_the_others_alone(folder, tmp_path, stored):
    (tmp_path / "text.jpg").write_text("no picture")
    data = (folder / PHOTOS[0]).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    cut = Image.open(io.BytesIO(data[: len(data) // 2]))
    missing = tmp_path / "missing.jpg"
    given = [tmp_path / "text.jpg", folder / "grey.png", tmp_path / "cut.jpg", missing, cut, folder / PHOTOS[0]]
    with Extractor.like(stored, device="cpu") as extractor:
        images = extractor(given)
    words = [image.status.word for image in images]
    assert words == ["not_an_image", "done", "truncated", "vanished", "truncated", "done"]
    for image in images:
        if not image.is_done:
            with pytest.raises(SkippedImageError, match=image.status.word):
                _ = image.pooled
            assert image.reason
    assert_same(images[1], stored["grey.png"])
    assert_same(images[5], stored[PHOTOS[0]])


def test_values_that_the_type_cannot_hold_skip_the_picture(folder, monkeypatch):
    from internvit_cli.model import features

    monkeypatch.setitem(features._ROUNDS_TO_INFINITY, features.StoreDtype.FLOAT16, 1e-6)
    with Extractor("tiny-random", max_tiles=1, **CPU) as extractor:
        assert extractor(folder / "grey.png").status is Status.OVERFLOW


def test_weights_that_are_not_the_file_s_are_refused(stored, reference):
    with pytest.raises(ModelError, match="not those") as caught:
        Extractor.like(stored, model=str(reference / "300m-standalone"))
    assert "--model" in caught.value.hint or "model" in caught.value.hint


def test_options_that_mean_nothing_are_refused():
    for wrong, error in (
        ({"tokens": "words"}, UsageError),
        ({"pool": "max"}, UsageError),
        ({"background": "no colour"}, UsageError),
        ({"min_tiles": 13}, UsageError),
        ({"device": "toaster"}, UsageError),
        ({"token": "patch"}, TypeError),
    ):
        with pytest.raises(error):
            Extractor("tiny-random", **wrong)


def test_the_number_of_threads_of_the_program_stays_what_it_was():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Extractor("tiny-random", max_tiles=1, **CPU) as extractor:
            extractor(Image.new("RGB", (50, 50)))
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_stream_holds_a_few_pictures_at_a_time(folder, stored):
    """Pictures are taken as features are; a stream that is left alone takes no more."""
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield folder / "grey.png"

    with Extractor("tiny-random", max_tiles=1, batch_tiles=2, **CPU) as extractor:
        stream = extractor.stream(endless())
        for _ in range(20):
            assert next(stream).is_done
        assert len(taken) <= 20 + 8
        stream.close()
