"""`internvit show`: what the maps say is true of the tokens, and what is written can be read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from comparing import same_bytes
from PIL import Image
from run_helpers import extract, internvit

from internvit_cli import open_features
from internvit_cli.config import Preprocess, TokenMapKind
from internvit_cli.errors import UsageError
from internvit_cli.plan.tiling import clip_size, covered_box
from internvit_cli.runtime.workers import WorkerSpec
from internvit_cli.viz import maps, photograph
from internvit_cli.viz.maps import TokenMap, components, fit_maps, similarity_map, similarity_scale, tile_pattern
from internvit_cli.viz.panels import GONE, Canvas, mark_outliers
from internvit_cli.viz.photograph import PictureFile, load_photograph
from internvit_cli.viz.show import ShowOptions, file_name, show, token_at

FLOAT32 = ("--dtype", "float32", "--device", "cpu")
PHOTO, PORTRAIT = "040_imageio_768x512.png", "021_exif-orientation_1200x1800.jpg"


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    shutil.copy(photos / PHOTO, folder)
    photo = Image.open(photos / PORTRAIT)
    photo.resize((300, 450)).save(folder / "turned.jpg", exif=photo.getexif(), quality=95)
    (folder / "bad.jpg").write_text("no picture")
    (folder / "sub").mkdir()
    Image.open(photos / PHOTO).resize((96, 64)).save(folder / "sub" / "small.png")
    return folder


@pytest.fixture(scope="module")
def stored(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "feats.h5"
    assert extract(folder, "-o", output, "--max-tiles", 6, *FLOAT32).returncode == 3
    return output


def random_map(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# ------------------------------------------------------------------------------------------------ the maps


@pytest.mark.parametrize(
    "shape", [(500, 40), (40, 500), (2, 30), (1, 5), pytest.param((3000, 1500), marks=pytest.mark.sweep)]
)
def test_components_are_those_of_a_singular_value_decomposition(shape):
    """Exact where the smaller side is small, by iteration otherwise."""
    rng = np.random.default_rng(1)
    strong = rng.standard_normal((shape[0], 3)) * [9, 5, 3] @ rng.standard_normal((3, shape[1]))
    data = (strong + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    data -= data.mean(axis=0)
    axes, explained = components(data)
    values, vectors = np.linalg.svd(data.astype(np.float64), full_matrices=False)[1:]
    count = min(3, int((values > 1e-4 * values[0]).sum()))
    for axis, vector in zip(axes[:count], vectors, strict=False):
        assert abs(float(axis @ vector)) > 1 - 1e-4
        assert axis[np.abs(axis).argmax()] > 0
    shares = values**2 / max((values**2).sum(), 1e-30)
    assert np.allclose(explained[:count], shares[:count], atol=1e-3)
    assert np.array_equal(components(data)[0], axes), "the same every time"


def test_signs_do_not_depend_on_the_order_of_the_tokens():
    data = random_map(400, 20) * np.arange(1, 21)
    data -= data.mean(axis=0)
    assert np.allclose(components(data)[0], components(data[::-1])[0], atol=1e-5)


def test_equal_tokens_have_equal_colors_in_all_images():
    one, other = random_map(6, 8, 30), random_map(4, 4, 30, seed=1)
    other[0, 0] = one[2, 3]
    images = [TokenMap.of(one), TokenMap.of(other)]
    fitted = fit_maps(images, 2)
    assert np.array_equal(fitted.colors(images[0])[2, 3], fitted.colors(images[1])[0, 0])
    assert np.array_equal(fitted.colors(TokenMap.of(7 * one)), fitted.colors(images[0])), "length is another map"


def test_the_sample_that_components_are_fitted_to_is_bounded(monkeypatch):
    monkeypatch.setattr(maps, "FITTED_BYTES", 4 * 30 * 200)
    sizes = []
    real = maps.components
    monkeypatch.setattr(maps, "components", lambda data, *rest: sizes.append(len(data)) or real(data, *rest))
    fit_maps((TokenMap.of(random_map(20, 20, 30, seed=seed)) for seed in range(4)), 4)
    assert sizes == [200]


def test_the_foreground_is_what_does_not_fill_the_border():
    """A patch of one kind on a ground of another is found, whichever sign the component has."""
    for sign in (1, -1):
        tokens = np.zeros((16, 24, 10), np.float32)
        tokens[...], tokens[5:12, 8:15] = [sign, *[0] * 9], [-sign, *[0] * 9]
        tokens += 0.2 * random_map(16, 24, 10)
        fitted = fit_maps([TokenMap.of(tokens)], 1, foreground=True)
        mask = fitted.mask(TokenMap.of(tokens))
        expected = np.zeros((16, 24), bool)
        expected[5:12, 8:15] = True
        assert (mask == expected).mean() > 0.98


def test_lengths_far_from_the_others_are_outliers_and_do_not_stretch_the_colors():
    tokens = random_map(20, 20, 50)
    tokens[3, 4] *= 40
    fitted = fit_maps([TokenMap.of(tokens)], 1)
    lengths = TokenMap.of(tokens).lengths
    assert np.argwhere(lengths > fitted.outlier).tolist() == [[3, 4]]
    assert fitted.lengths.high < 12


def test_similarity_is_the_cosine_with_and_without_the_mean():
    tokens = random_map(5, 6, 8) + 3
    image, one = TokenMap.of(tokens), tokens[2, 3]
    plain = similarity_map(image, image.directions[2, 3], None)
    expected = tokens @ one / np.linalg.norm(tokens, axis=-1) / np.linalg.norm(one)
    assert np.allclose(plain, expected, atol=1e-6) and plain[2, 3] == pytest.approx(1)
    centered = similarity_map(image, image.directions[2, 3], image.directions.mean(axis=(0, 1)))
    assert centered[2, 3] == pytest.approx(1) and centered.min() < 0 < plain.min()
    scale = similarity_scale([centered], centered=True)
    assert scale.low == -scale.high
    assert similarity_scale([plain], centered=False).high == 1.0


def test_what_tokens_owe_to_their_place_is_taken_off():
    """Tokens that are a pattern of the tile and something of the picture: only the latter is left."""
    rng = np.random.default_rng(0)
    pattern = rng.standard_normal((16, 12)).astype(np.float32)
    tiles = [pattern + 0.3 * rng.standard_normal(12) + 4 for _ in range(60)]
    found = tile_pattern(tiles)
    assert found.shape == (4, 4, 12)
    image = np.concatenate([np.concatenate([tile.reshape(4, 4, 12) for tile in tiles[:3]], axis=1)] * 2)
    spread = TokenMap.of(image).directions.std(axis=(0, 1)).mean()
    assert TokenMap.of(image, found).directions.std(axis=(0, 1)).mean() < 0.3 * spread


# ------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (448, 448), (3000, 500), (7, 900)])
def test_the_covered_box_is_the_part_that_the_crop_shows(size: tuple[int, int]) -> None:
    """CLIP's crop takes the middle: as many pixels of the resized picture as a tile has, on both axes."""
    left, top, right, bottom = covered_box(*size, Preprocess.CLIP, 448)
    resized = clip_size(*size, 448)
    assert (right - left) * resized[0] / size[0] == pytest.approx(448)
    assert (bottom - top) * resized[1] / size[1] == pytest.approx(448)
    assert left == pytest.approx(size[0] - right, abs=2 * size[0] / resized[0])
    assert covered_box(*size, Preprocess.TILES, 448) == (0, 0, *size)


def test_a_point_falls_on_the_token_under_it(stored, folder):
    image = open_features(stored)[PHOTO]
    shape = image.token_map().shape[:2]
    assert token_at(image, (0, 0), shape) == (0, 0)
    assert token_at(image, (767.9, 511.9), shape) == (shape[0] - 1, shape[1] - 1)
    assert token_at(image, (384, 100), shape) == (100 * shape[0] // 512, shape[1] // 2)
    for outside in ((768, 10), (10, 512)):
        with pytest.raises(UsageError, match="outside") as caught:
            token_at(image, outside, shape)
        assert "x from 0 to 768" in caught.value.hint


def test_a_map_lies_exactly_over_its_picture(stored):
    image = open_features(stored)[PHOTO]
    canvas = Canvas.of(image, None, 640, 1.0)
    colors = np.zeros((32, 48, 3), np.uint8)
    colors[5, 40] = 255
    picture = np.asarray(canvas.overlay(colors))
    rows, columns = np.nonzero(picture[..., 0])
    x, y = canvas.center((32, 48), 5, 40)
    assert abs(rows.mean() + 0.5 - y) <= 1 and abs(columns.mean() + 0.5 - x) <= 1
    assert len(rows) == pytest.approx(canvas.photograph.width * canvas.photograph.height / 32 / 48, rel=0.2)
    marked = canvas.photograph.copy()
    mark_outliers(canvas, marked, colors[..., 0] > 0)
    rows, columns = np.nonzero(np.asarray(marked)[..., 1] == 0)
    assert abs(rows.mean() - y) <= 1 and abs(columns.mean() - x) <= 1


def test_opacity_and_mask_let_the_photograph_through(stored, folder):
    image = open_features(stored)[PHOTO]
    photo = load_photograph(PictureFile.of(image), 1280).picture
    red = np.zeros((32, 48, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    faint = np.asarray(Canvas.of(image, photo, 640, 0.0).overlay(red), int)
    assert (faint[..., 0] == faint[..., 1]).all(), "nothing but the photograph in grey"
    full = np.asarray(Canvas.of(image, photo, 640, 1.0).overlay(red, np.arange(48)[None] >= np.full((32, 1), 24)), int)
    assert (full[:, 330:] == [255, 0, 0]).all() and (full[:, :310, 0] == full[:, :310, 1]).all()


# --------------------------------------------------------------------------------------------------------- photographs


def test_the_photograph_is_turned_as_stored(stored, folder):
    image = open_features(stored)["turned.jpg"]
    assert image.orientation == 3
    loaded = load_photograph(PictureFile.of(image), 2000)
    expected = Image.open(folder / "turned.jpg").convert("RGB").transpose(Image.Transpose.ROTATE_180)
    assert not loaded.problem and loaded.picture.size == expected.size
    difference = np.abs(np.asarray(loaded.picture, int) - np.asarray(expected, int))
    assert difference.max() <= 3


@pytest.fixture(scope="module")
def one_picture(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with a picture, and its features."""
    place = tmp_path_factory.mktemp("one")
    (place / "pictures").mkdir()
    shutil.copyfile(photos / PHOTO, place / "pictures" / PHOTO)
    assert extract(place / "pictures", "-o", place / "feats.h5", "--max-tiles", 1, *FLOAT32).returncode == 0
    return place / "pictures", place / "feats.h5"


def replaced_by_another(picture: Path) -> None:
    Image.open(picture).rotate(180).save(picture)


def same_length_other_bytes(picture: Path) -> None:
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)


def pipe(picture: Path) -> None:
    picture.unlink()
    os.mkfifo(picture)


def six_gigabytes(picture: Path) -> None:
    os.truncate(picture, 6 << 30)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (Path.unlink, "No such file"),
        (replaced_by_another, "changed since"),
        (same_length_other_bytes, "changed since"),
        (pipe, "not a regular file"),
        (six_gigabytes, "changed since"),
    ],
)
def test_a_picture_that_is_not_the_one_that_was_encoded_is_not_shown(one_picture, tmp_path, change, words):
    pictures, output = one_picture
    shutil.copytree(pictures, tmp_path / "now")
    change(tmp_path / "now" / PHOTO)
    (shown,) = show(ShowOptions(str(output), [PHOTO], size=200, pictures=str(tmp_path / "now")))
    (note,) = shown.notes
    assert words in note and str(tmp_path / "now" / PHOTO) in note and PHOTO in shown.facts["photograph"]
    assert any("not shown" in caption and words in caption for caption in shown.panels[0].captions)
    colors = {color for _, color in shown.panels[0].image.getcolors(100_000)}
    assert GONE in colors and all(len(set(color)) == 1 for color in colors), "only the tile's edges and number"


def test_a_picture_of_another_size_is_not_read(one_picture, monkeypatch):
    image = open_features(one_picture[1])[PHOTO]
    monkeypatch.setattr(photograph, "digested", lambda *_: pytest.fail("it is read"))
    file = PictureFile.of(image)
    assert "changed since" in load_photograph(replace(file, size=file.size - 1), 100).problem


@pytest.mark.parametrize("wrong", [{"sha256": bytes(32)}, {"sha256": b"\1" * 32}, {"width": 767}])
def test_a_row_that_does_not_describe_its_picture_shows_none(one_picture, wrong):
    """The rows are whatever the maker of the file wrote: above all, zeros for a digest agree with nothing."""
    file = PictureFile.of(open_features(one_picture[1])[PHOTO])
    assert load_photograph(file, 100).picture is not None
    found = load_photograph(replace(file, **wrong), 100)
    assert found.picture is None and found.problem and found.path.endswith(PHOTO)


def test_a_path_that_no_file_can_have_costs_its_own_photograph(one_picture):
    file = replace(PictureFile.of(open_features(one_picture[1])[PHOTO]), path=b"/a\0b")
    found = load_photograph(file, 100)
    assert found.picture is None and "NUL" in found.problem and found.path == "/a\\x00b"


def test_pictures_that_moved_are_found_in_the_folder_that_is_named(one_picture, tmp_path):
    pictures, output = one_picture
    shutil.copytree(pictures, tmp_path / "moved" / "here")
    (away,) = show(ShowOptions(str(output), [PHOTO], size=100, pictures=str(tmp_path / "moved")))
    assert "No such file" in away.notes[0]
    (back,) = show(ShowOptions(str(output), [PHOTO], size=100, pictures=str(tmp_path / "moved" / "here")))
    (home,) = show(ShowOptions(str(output), [PHOTO], size=100))
    assert not back.notes and same_bytes(back.figure.tobytes(), home.figure.tobytes())
    refused = internvit("show", output, PHOTO, "--pictures", tmp_path / "nowhere")
    assert refused.returncode == 2 and "not a folder" in refused.stderr and "hint:" in refused.stderr


def test_a_picture_that_takes_its_reader_along_costs_itself_alone(stored, monkeypatch):
    spec = WorkerSpec("test_show:deadly")
    monkeypatch.setattr(photograph, "WorkerSpec", lambda *_, **__: spec)
    dead, alive = show(ShowOptions(str(stored), [PHOTO, "turned.jpg"], size=100))
    assert "worker_died" in dead.notes[0] and f"{PHOTO}: " in dead.notes[0] and not alive.notes


def deadly():
    """A worker's function that one kind of picture kills."""

    def read(task):
        if task[0].path.endswith(PHOTO.encode()):
            os.kill(os.getpid(), signal.SIGKILL)
        return load_photograph(*task)

    return read


def test_figures_of_random_weights_say_so(stored, tmp_path):
    result = internvit("show", stored, PHOTO, "-o", tmp_path, "--size", 100, "--json")
    assert "random weights" in result.stderr and "random weights" in json.loads(result.stdout)["notes"][0]


def test_the_earlier_word_for_similarity_is_still_taken(stored, tmp_path):
    result = internvit("show", stored, PHOTO, "-o", tmp_path, "--size", 100, "--map", "likeness", "--point", "3,3")
    assert result.returncode == 0, result.stderr
    assert "likeness" not in internvit("show", "--help").stdout


# ------------------------------------------------------------------------------------------------ the command


def test_figures_are_written_and_named(stored, tmp_path):
    result = internvit("show", stored, PHOTO, "sub/small.png", "-o", tmp_path / "new", "--size", 200)
    assert result.returncode == 0, result.stderr
    paths = result.stdout.splitlines()
    assert paths == [str(tmp_path / "new" / name) for name in (f"{PHOTO}.show.png", "sub__small.png.show.png")]
    for path in paths:
        with Image.open(path) as image:
            assert image.mode == "RGB" and min(image.size) > 300
    assert len(os.listdir(tmp_path / "new")) == 2, "no temporary file is left"
    again = internvit("show", stored, PHOTO, "sub/small.png", "-o", tmp_path / "again", "--size", 200)
    for path, second in zip(paths, again.stdout.splitlines(), strict=True):
        assert same_bytes(Path(path), Path(second))


def test_without_a_folder_figures_go_where_one_is(stored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = internvit("show", stored, PHOTO, "--size", 100, "--map", "pca", "--map", "length", "--separate")
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(tmp_path)) == [f"{PHOTO}.length.png", f"{PHOTO}.pca.png"]


def test_json_is_one_object_with_the_figures_facts(stored, tmp_path):
    arguments = (PHOTO, "bad.jpg", "turned.jpg", "--point", "300,200", "--foreground", "-o", tmp_path, "--size", 100)
    result = internvit("show", stored, *arguments, "--json")
    assert result.returncode == 3, result.stderr
    told = json.loads(result.stdout)
    assert told["exit_code"] == 3 and told["error"] is None and told["skipped"] == ["bad.jpg"]
    assert [image["key"] for image in told["images"]] == [PHOTO, "turned.jpg"]
    first = told["images"][0]
    assert first["similarity"]["highest"] == pytest.approx(1) and first["photograph"] == "as it was encoded"
    assert 0 < first["foreground"] < 1 and first["lengths"]["median"] > 0
    assert all(os.path.exists(file) for image in told["images"] for file in image["files"])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("040_imagio_768x512.png",), 2, f"did you mean '{PHOTO}'"),
        ((), 2, "such as"),
        (("bad.jpg",), 1, "not_an_image"),
        ((PHOTO, "--point", "9000,3"), 2, "outside"),
        ((PHOTO, "--point", "a,b"), 2, "not X,Y"),
        ((PHOTO, "--map", "similarity"), 2, "--point"),
        ((PHOTO, "--map", "sideways"), 2, "sideways"),
        ((PHOTO, "--terminal"), 2, "not a terminal"),
        ((PHOTO, "--terminal", "--json"), 2, "choose one"),
        ((PHOTO, "-o", "/proc/nowhere"), 2, "is in /proc"),
        ((PHOTO, "-o", "x" * 300), 1, "cannot write"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_way_out(stored, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    result = internvit("show", stored, *arguments)
    assert result.returncode == code
    assert words in result.stderr and "hint:" in result.stderr and "\x1b" not in result.stdout
    assert not os.listdir(tmp_path)


def test_a_file_without_tokens_shows_its_tiles_and_says_what_is_missing(folder, tmp_path):
    output = tmp_path / "pooled.h5"
    assert extract(folder, "-o", output, "--tokens", "none", *FLOAT32).returncode == 3
    result = internvit("show", output, PHOTO, "-o", tmp_path)
    assert result.returncode == 0 and "holds no tokens" in result.stderr
    for asked in (("--map", "pca"), ("--point", "3,3"), ("--foreground",)):
        refused = internvit("show", output, PHOTO, "-o", tmp_path, *asked)
        assert refused.returncode == 2 and "holds no tokens" in refused.stderr and "--tokens visual" in refused.stderr


@pytest.mark.parametrize("graphics", ["kitty", "iterm2", "sixel", "blocks"])
def test_pictures_are_drawn_where_no_terminal_reads_only_when_asked_outright(stored, tmp_path, monkeypatch, graphics):
    monkeypatch.setenv("COLUMNS", "60")
    result = internvit("show", stored, PHOTO, "-o", tmp_path, "--size", 100, "--terminal", "--graphics", graphics)
    assert result.returncode == 0 and "\x1b" in result.stdout
    plain = internvit("show", stored, PHOTO, "-o", tmp_path, "--size", 100, "--graphics", graphics)
    assert "\x1b" not in plain.stdout


@pytest.mark.parametrize("preprocess", ["clip", "squash"])
@pytest.mark.parametrize("tokens", ["patch", "visual"])
def test_every_kind_of_tokens_and_of_view_is_drawn(folder, tmp_path, preprocess, tokens):
    options = ("--preprocess", preprocess, "--tokens", tokens, "--store-dtype", "bfloat16", *FLOAT32)
    assert extract(folder, "-o", tmp_path / "feats", *options).returncode == 3
    asked = ShowOptions(str(tmp_path / "feats"), [PHOTO, "turned.jpg"], point=(300, 200), position=False, size=150)
    for shown in show(asked):
        assert [panel.name for panel in shown.panels] == ["tiles", "pca", "length", "similarity"]
        assert not shown.notes


def test_a_real_checkpoint_s_projected_tokens_are_drawn(folder, reference, tmp_path):
    arguments = ("--model", reference / "6b-chat", "--tokens", "projected", *FLOAT32)
    assert internvit("extract", folder, "-o", tmp_path / "feats.h5", *arguments).returncode == 3
    (shown,) = show(ShowOptions(str(tmp_path / "feats.h5"), [PHOTO], point=(1, 1), size=150))
    assert {panel.name for panel in shown.panels} == {one.value for one in TokenMapKind}


def test_names_of_files_are_plain_short_and_never_shared():
    keys = [
        "a/b.jpg",
        "a__b.jpg",
        "a_b.jpg",
        "x" * 300 + "1",
        "x" * 300 + "2",
        "new\nline",
        "new_line",
        ".a",
        "..",
        "é/ü",
    ]
    keys += ["not-utf8-\udcff", "not-utf8-\udcfe"]
    names = [file_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    for name in names:
        assert len(os.fsencode(name)) <= 255 and "/" not in name and name.isprintable() and not name.startswith(".")
    assert names[0] == "a__b.jpg.show.png"


def test_showing_needs_no_torch(stored, tmp_path):
    code = (
        "import sys; from internvit_cli.cli.app import run; assert run(sys.argv[1:]) == 0;"
        "assert 'torch' not in sys.modules"
    )
    arguments = ["show", str(stored), PHOTO, "-o", str(tmp_path), "--point", "3,3", "--no-position"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
