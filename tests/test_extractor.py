"""Encoding in memory: the values of the command line, for pictures that are files, Pillow images or arrays."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import mmap
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from comparing import same_bytes
from PIL import Image
from run_helpers import extract, internvit

from internvit_cli import Extractor, Features, InternvitError, SkippedImageError, open_features
from internvit_cli.config import Status
from internvit_cli.decode import direct
from internvit_cli.errors import ClosedError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from internvit_cli.storage.read.image import ImageFeatures

FLOAT32 = ("--dtype", "float32", "--device", "cpu")
CPU: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
FEW, FEW_TILES = {"max_tiles": 3}, ("--max-tiles", 3)
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
    photo.save(folder / "turned6.jpg", xmp=b'<rdf:Description tiff:Orientation="6"/>')
    Image.fromarray(random.integers(0, 4096, (90, 120), np.uint16)).save(folder / "grey12.png")
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
        assert found.dtype == expected.dtype and same_bytes(found, expected), (theirs.key, name)


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Features:
    output = tmp_path_factory.mktemp("out") / "feats.h5"
    assert extract(folder, "-o", output, "--tile-pooled", *FEW_TILES, *FLOAT32).returncode == 0
    return open_features(output)


@pytest.mark.parametrize("source", ["paths", "pillow", "streamed"])
def test_pictures_of_every_kind_give_the_bits_of_the_command_line(folder, stored, source):
    """EXIF, alpha, palettes, 16 bits, floats, CMYK, TIFF: as files and as Pillow images, batched across images."""
    with (
        Extractor("tiny-random", tile_pooled=True, batch_tiles=5, **FEW, **CPU) as extractor,
        contextlib.ExitStack() as stack,
    ):
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


ENCODED = {
    "bytes": lambda data, path: data,
    "numpy's bytes": lambda data, path: np.bytes_(data),
    "bytearray": lambda data, path: bytearray(data),
    "memoryview": lambda data, path: memoryview(data),
    "memoryview with gaps": lambda data, path: memoryview(np.repeat(np.frombuffer(data, np.uint8), 2))[::2],
    "BytesIO": lambda data, path: io.BytesIO(data),
    "BytesIO at its end": lambda data, path: written(data, io.BytesIO()),
    "file": lambda data, path: path.open("rb"),
    "file that was read": lambda data, path: read_on(path.open("rb")),
    "file without buffer": lambda data, path: path.open("rb", buffering=0),
    "file by its descriptor": lambda data, path: os.fdopen(os.open(path, os.O_RDONLY), "rb"),
    "temporary file": lambda data, path: written(data, tempfile.TemporaryFile()),  # noqa: SIM115
    "named temporary file": lambda data, path: written(data, tempfile.NamedTemporaryFile()),  # noqa: SIM115
    "member of an archive": lambda data, path: zipped(data).open("inside/picture"),
    "mapped file": lambda data, path: mapped(path),
    "stream that cannot be sought": lambda data, path: Pipe(data),
    "dict with bytes": lambda data, path: {"bytes": data, "path": "name in a table.jpg"},
    "dict with bytes alone": lambda data, path: {"bytes": data},
    "dict with bytes and no path": lambda data, path: {"bytes": bytearray(data), "path": None},
    "dict with a path": lambda data, path: {"bytes": None, "path": str(path)},
    "dict with a path alone": lambda data, path: {"path": path},
    "str": lambda data, path: str(path),
    "numpy's str": lambda data, path: np.str_(path),
    "os.PathLike": lambda data, path: path,
    "os.DirEntry": lambda data, path: next(entry for entry in os.scandir(path.parent) if entry.name == path.name),
}
"""The same file in every form in which a program may hold it."""


def written(data, file):
    file.write(data)
    return file


def mapped(path):
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_on(file):
    file.read(7)
    return file


def zipped(data):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside/picture", data)
    return zipfile.ZipFile(packed)


class Pipe:
    """As what a network gives: it can be read once."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self) -> bytes:
        data, self._data = self._data, b""
        return data


@pytest.fixture(scope="module")
def small() -> Iterator[Extractor]:
    """What tells pictures apart, at little cost."""
    with Extractor("tiny-random", tokens="none", max_tiles=1, **CPU) as extractor:
        yield extractor


@pytest.mark.parametrize("form", ENCODED)
def test_a_file_in_any_form_gives_what_its_path_gives(folder, small, form):
    """Turned by EXIF, so that orientation counts; alone, and among others."""
    path = folder / "turned6.png"
    expected, data = small(path), path.read_bytes()
    one, (first, again) = small(ENCODED[form](data, path)), small([ENCODED[form](data, path) for _ in range(2)])
    for image in (one, first, again):
        assert_same(image, expected)
        assert image.digest == expected.digest
        assert image.path in {None, str(path)} or form == "named temporary file"


def test_pictures_are_called_by_the_name_they_come_with_and_have_a_path_while_it_is_theirs(folder, small, tmp_path):
    path = folder / "grey.png"
    data = path.read_bytes()
    moved = tmp_path / "moved.png"
    shutil.copy(path, moved)
    with path.open("rb") as file, moved.open("rb") as gone, zipped(data).open("inside/picture") as member:
        moved.unlink()
        moved.write_bytes(b"another file by now")
        images = small([file, gone, member, {"bytes": data, "path": "a.png"}, {"bytes": None, "path": str(path)}, data])
        assert not file.closed and not gone.closed, "whoever opened a file closes it"
    assert [(image.key, image.path) for image in images] == [
        (str(path), str(path)),
        (str(moved), None),
        ("inside/picture", None),
        ("a.png", None),
        (str(path), str(path)),
        ("5", None),
    ]
    assert all(image.is_done for image in images)


def test_where_there_are_no_files_in_memory_bytes_are_decoded_all_the_same(folder, small, monkeypatch):
    data = (folder / "turned6.png").read_bytes()
    expected = small(data)
    monkeypatch.delattr(os, "memfd_create")
    assert_same(small(data), expected)


def test_no_room_for_bytes_in_memory_skips_the_picture(folder, small, monkeypatch):
    def refuse(name: str) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(direct.os, "memfd_create", refuse)
    assert small(b"any").status is Status.TOO_LARGE


def test_pictures_may_come_in_any_iterable(folder, small):
    paths = [str(folder / name) for name in ("grey.png", "alpha.png")]
    expected = [image.pooled.tobytes() for image in small(paths)]
    data = [Path(path).read_bytes() for path in paths]
    stack = np.stack([np.asarray(Image.open(paths[0]))[:, :, None]] * 2)
    for many in (tuple(paths), iter(paths), dict.fromkeys(paths).keys(), np.array(paths), np.array(data, object), data):
        assert [image.pooled.tobytes() for image in small(many)] == expected
    assert [image.pooled.tobytes() for image in small(stack)] == [expected[0]] * 2
    assert small([]) == small(()) == small(np.empty((0, 8, 8, 3), np.uint8)) == []


class Unreadable:
    def __init__(self, what: Any) -> None:
        self._what = what

    def read(self) -> Any:
        if isinstance(self._what, BaseException):
            raise self._what
        return self._what


def test_a_file_that_fails_while_it_is_read_is_a_picture_that_cannot_be_used(small):
    for error, word in ((OSError(errno.EIO, "Input/output error"), "unreadable"), (EOFError("cut"), "truncated")):
        assert small(Unreadable(error)).status.word == word
    assert [image.status.word for image in small([b"", io.BytesIO(b"GIF89a"), b"imgs/lund.jpg"])] == [
        *("not_an_image", "truncated", "not_an_image")
    ]


NO_PICTURES = {
    "a number": (lambda: 3, "an object of type int"),
    "None": (lambda: None, "None"),
    "an object": (object, "an object of type object"),
    "a row of a table": (lambda: {"image": b"", "label": 1}, "its keys: image, label"),
    "a dict of nothing": (lambda: {"bytes": None, "path": None}, 'neither "bytes" nor "path"'),
    "a dict whose bytes are text": (lambda: {"bytes": "abc"}, '"bytes" is an object of type str'),
    "a dict whose path is a number": (lambda: {"bytes": b"", "path": 3}, '"path" is an object of type int'),
    "a URL": (lambda: "https://example.org/a.jpg", "a URL"),
    "a data URL": (lambda: "data:image/png;base64,AAAA", "a URL"),
    "bytes that were made a str": (lambda: "\x89PNG\0\0", "a path with a NUL"),
    "half of a character": (lambda: "a\ud800.jpg", "a path with a character that file names cannot have"),
    "text": (lambda: io.StringIO("abc"), "opened as text"),
    "a file opened as text": (lambda: Path(__file__).open(), "opened as text"),  # noqa: SIM115
    "a file for writing": (lambda: Path(os.devnull).open("wb"), "cannot be read"),  # noqa: SIM115
    "a closed file": (lambda: closed(io.BytesIO(b"abc")), "a file that was closed"),
    "a file that gives text": (lambda: Unreadable("abc"), r"read\(\) returns an object of type str"),
    "a closed Pillow image": (lambda: closed(Image.new("RGB", (9, 9))), "a Pillow image that was closed"),
    "floats": (lambda: np.zeros((9, 9, 3), np.float32), r"a float32 array \[9, 9, 3\]"),
    "channels first": (lambda: np.zeros((3, 9, 9), np.uint8), r"a uint8 array \[3, 9, 9\]"),
    "a row of pixels": (lambda: np.zeros(9, np.uint8), r"a uint8 array \[9\]"),
    "a tensor": (lambda: torch.zeros(9, 9, 3, dtype=torch.uint8), r"torch.Tensor \[9, 9, 3\]"),
}
"""What somebody may give by mistake, and how it is called."""


def closed(thing):
    thing.close()
    return thing


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_an_error_that_says_what_it_is_and_what_is_accepted(small, name):
    make, words = NO_PICTURES[name]
    with pytest.raises(UsageError, match=words) as caught:
        small(make())
    assert caught.value.message.startswith("image 0 is ")
    assert caught.value.hint
    with pytest.raises(UsageError, match=words):
        small([make()])


def test_many_of_what_are_no_pictures_are_an_error_about_the_first_of_them(folder, small):
    good = folder / "grey.png"
    for wrong in ([good, ["a.png"]], [good, {7}], [good, 7], iter([good, torch.zeros(9, 9, 3, dtype=torch.uint8)])):
        with pytest.raises(UsageError, match="image 1 is an object of type") as caught:
            small(wrong)
        assert "Pillow image" in caught.value.hint
    with pytest.raises(UsageError, match=r"image 0 is an object of type torch.Tensor \[9, 9, 3\]"):
        small(torch.zeros(2, 9, 9, 3, dtype=torch.uint8))
    with pytest.raises(UsageError, match=r"image 0 is a uint8 array \[1, 9, 9, 3\]"):
        small(np.zeros((1, 1, 9, 9, 3), np.uint8))


def test_features_are_no_picture_and_are_not_read_to_say_so(small, stored):
    for wrong, words in ((stored, "Features that has neither"), (stored[0], "ImageFeatures")):
        with pytest.raises(UsageError, match=words) as caught:
            small(wrong)
        assert len(caught.value.message) < 300


def test_one_picture_is_no_stream(folder, small):
    for one in (str(folder / "grey.png"), b"abc", {"path": "a.png"}, 3):
        with pytest.raises(UsageError, match="not an iterable"):
            small.stream(one)


def test_a_closed_extractor_says_so(folder, stored):
    extractor = Extractor("tiny-random", tokens="none", max_tiles=1, **CPU)
    begun = extractor.stream([folder / "grey.png"] * 50)
    first = next(begun)
    extractor.close()
    extractor.close()
    assert first.pooled.shape == (64,), "what it gave is the caller's"
    for use in (
        lambda: extractor(folder / "grey.png"),
        lambda: extractor([]),
        lambda: extractor.stream([]),
        lambda: list(begun),
        extractor.__enter__,
    ):
        with pytest.raises(ClosedError, match="was closed") as caught:
            use()
        assert isinstance(caught.value, InternvitError) and caught.value.hint
    assert "closed" in repr(extractor)
    with Extractor.like(stored, device="cpu") as again:
        pass
    with pytest.raises(ClosedError):
        again(folder / "grey.png")


def test_results_are_described_in_a_line_without_their_values(tmp_path):
    with Extractor("tiny-random", tile_pooled=True, store_dtype="bfloat16", max_tiles=2, **CPU) as extractor:
        image, missing = extractor([Image.new("RGB", (200, 100)), tmp_path / "missing.jpg"])
        assert "bfloat16" not in repr(extractor) and "float32 on" in repr(extractor)
    assert repr(image) == (
        "<ImageFeatures '0': done, 200 x 100 pixels, 2 x 1 tiles and a thumbnail, "
        "pooled [64] float32, visual_tokens [3, 256, 256] bfloat16, tile_pooled [3, 64] float32>"
    )
    assert repr(missing) == f"<ImageFeatures '{tmp_path / 'missing.jpg'}': vanished (No such file or directory)>"
    tiles = [repr(tile) for tile in image.iter_tiles()]
    assert tiles[1].startswith("<Tile 1 of ") and tiles[1].endswith(
        ": column 1, row 0, tokens [256, 256] float32, pooled [64] float32>"
    )
    assert "the thumbnail" in tiles[2]
    assert image != missing and len({image, image, missing}) == 2, "images can be compared, whatever arrays they hold"


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


def test_one_picture_gives_one_image_and_a_list_gives_a_list(folder, stored):
    with Extractor.like(stored, device="cpu") as extractor:
        for picture in (str(folder / "grey.png"), folder / "grey.png", Image.open(folder / "grey.png")):
            assert_same(extractor(picture), stored["grey.png"])
        assert extractor([]) == []


OPTIONS: dict[str, tuple[dict[str, Any], tuple[object, ...]]] = {
    "patch tokens, cls": (FEW | {"tokens": "patch", "pool": "cls"}, (*FEW_TILES, "--tokens", "patch", "--pool", "cls")),
    "no tokens": ({"tokens": "none", "pool": "cls+mean"}, ("--tokens", "none", "--pool", "cls+mean")),
    "no thumbnail": (FEW | {"thumbnail": False, "tile_pooled": True}, (*FEW_TILES, "--no-thumbnail", "--tile-pooled")),
    "few small tiles": ({"max_tiles": 4, "tile_size": 224}, ("--max-tiles", 4, "--tile-size", 224)),
    "squash, bfloat16": (
        {"preprocess": "squash", "store_dtype": "bfloat16"},
        ("--preprocess", "squash", "--store-dtype", "bfloat16"),
    ),
    "clip, float32": (
        {"preprocess": "clip", "store_dtype": "float32"},
        ("--preprocess", "clip", "--store-dtype", "float32"),
    ),
    "background, no exif": (
        FEW | {"background": "red", "exif": False},
        (*FEW_TILES, "--background", "red", "--no-exif"),
    ),
    "an earlier layer": (FEW | {"layer": -2}, (*FEW_TILES, "--layer", -2)),
    "several layers": (FEW | {"layer": [0, -1]}, (*FEW_TILES, "--layer", "0,-1")),
    "no end, twelve bits": (
        FEW | {"truncated": "accept", "grey_range": "auto"},
        (*FEW_TILES, "--truncated", "accept", "--grey-range", "auto"),
    ),
    "twelve bits": (FEW | {"grey_range": 4095}, (*FEW_TILES, "--grey-range", 4095)),
    "a low limit": (FEW | {"max_pixels": 300_000}, (*FEW_TILES, "--max-pixels", 300_000)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_mean_what_they_mean_on_the_command_line(folder, tmp_path, name):
    keywords, words = OPTIONS[name]
    small = tmp_path / "small"
    small.mkdir()
    turned, gray = ("turned6.png", "turned6.jpg"), ("grey.png", "grey12.png", "grey16.png")
    for key in ("alpha.png", *turned, *gray, PHOTOS[0]):
        shutil.copy(folder / key, small)
    (small / "cut.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:-500])
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
        ({"background": "no color"}, UsageError),
        ({"min_tiles": 13}, UsageError),
        ({"device": "toaster"}, UsageError),
        ({"token": "patch"}, TypeError),
        ({"max_tiles": "6"}, UsageError),
        ({"max_tiles": 2.5}, UsageError),
        ({"max_tiles": True}, UsageError),
        ({"tile_size": 0}, UsageError),
        ({"max_pixels": -1}, UsageError),
        ({"truncated": "maybe"}, UsageError),
        ({"truncated": True}, UsageError),
        ({"grey_range": "most"}, UsageError),
        ({"grey_range": 0}, UsageError),
        ({"grey_range": 65_536}, UsageError),
        ({"grey_range": 1.5}, UsageError),
        ({"threads": 0}, UsageError),
        ({"batch_tiles": "many"}, UsageError),
        ({"layer": "last"}, UsageError),
        ({"thumbnail": "no"}, UsageError),
        ({"exif": None}, UsageError),
        ({"background": (1, 2)}, UsageError),
        ({"background": (0, 0, 256)}, UsageError),
        ({"background": 3}, UsageError),
        ({"device": 0}, UsageError),
        ({"revision": 3}, UsageError),
    ):
        with pytest.raises(error, match=next(iter(wrong)).replace("_", ".")) as caught:
            Extractor("tiny-random", **wrong)
        assert error is TypeError or caught.value.hint


def test_options_may_be_numpys_numbers_lists_and_paths(reference):
    model = reference / "300m-standalone"
    options = {"max_tiles": np.int64(6), "background": [255, 0, 0], "layer": np.int8(-2)}
    with Extractor(model, **options, **CPU) as one, Extractor(str(model), **options, **CPU) as other:
        assert one.recipe == other.recipe
        assert json.loads(one.recipe.to_json())["max_tiles"] == 6 and one.recipe.background == (255, 0, 0)
    for make in (lambda: Extractor(3, **CPU), lambda: Extractor.like(3), lambda: open_features(b"feats.h5")):
        with pytest.raises(UsageError, match="an object of type"):
            make()


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
