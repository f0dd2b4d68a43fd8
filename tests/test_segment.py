"""`internvit probe --masks`: what tokens are worth for segmentation, held against scikit-learn and plain resizing."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from run_helpers import extract, internvit

from internvit_cli import open_features
from internvit_cli.probe import training
from internvit_cli.probe.data import patch_map
from internvit_cli.probe.masks import MaskFolder, numbers_in, read_mask, sample_pixels
from internvit_cli.probe.metrics import PixelCounts
from internvit_cli.probe.results_folder import OF_SEGMENTATION
from internvit_cli.probe.segmenters import (
    ConvSegmenter,
    LinearSegmenter,
    Segmenter,
    predicted_rows,
    scores_at,
    train_segmenter,
)

if TYPE_CHECKING:
    from pathlib import Path

SIZES = ((112, 56), (56, 112), (100, 100), (56, 56))
COLORS = np.array([(40, 60, 210), (210, 50, 40), (60, 190, 50)])


def draw(pictures: Path, masks: Path, count: int = 12, seed: int = 0) -> None:
    """Pictures of several sizes, with a box of one of two colors on a third; masks with a margin of no class."""
    random = np.random.default_rng(seed)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        labels = np.zeros((height, width), np.uint8)
        top, left = (int(random.integers(0, side // 2)) for side in (height, width))
        labels[top : top + height // 2, left : left + width // 2] = 1 + number % 2
        noise = random.normal(0, 15, (height, width, 3))
        key = f"{'ab'[number % 2]}/{seed}-{number:02d}"
        for folder in (pictures, masks):
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(COLORS[labels] + noise, 0, 255).astype(np.uint8)).save(pictures / f"{key}.png")
        labels[:3] = 255
        Image.fromarray(labels).save(masks / f"{key}.png")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LEAST_STEPS", 60)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    draw(folder / "pictures", folder / "masks")
    Image.new("RGB", (56, 56)).save(folder / "pictures" / "alone.png")
    (folder / "pictures" / "text.png").write_text("no picture")
    (folder / "masks" / "classes.txt").write_text("ground\nred\ngreen\n")
    extracted(folder / "pictures", folder / "feats.h5")
    return folder


def extracted(pictures: Path, output: Path, *options: object) -> Path:
    result = extract(pictures, "-o", output, "--tile-size", "56", "--max-tiles", "3", *options)
    assert result.returncode in (0, 3), result.stderr
    return output


def probed(*arguments: object) -> dict[str, Any]:
    result = internvit("probe", *arguments, "--json", "-q", "--ignore-duplicates")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refusal(*arguments: object) -> str:
    result = internvit("probe", *arguments, "-q", "--ignore-duplicates")
    assert result.returncode in (1, 2), result.stdout
    error, hint = result.stderr.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")
    return error


# ------------------------------------------------------------------------------------------------------- the command


def test_both_heads_learn_and_their_results_are_files(scene: Path, tmp_path: Path) -> None:
    found = probed(scene / "feats.h5", "--masks", scene / "masks", "-o", tmp_path / "probe")
    assert found["images"] == {"train": 10, "test": 2, "unlabelled": 1, "blank": 0, "skipped": 1}
    assert list(found["probes"]) == ["linear", "head"]
    for score in found["probes"].values():
        assert list(score["iou_by_class"]) == ["ground", "red", "green"]
        assert score["pixel_accuracy"] > 0.7 and score["mean_iou"] > 0.45
        assert score["interval"][0] <= score["mean_iou"] + 1e-9
    assert found["gap"] == found["probes"]["head"]["mean_iou"] - found["probes"]["linear"]["mean_iou"]
    assert {path.name for path in (tmp_path / "probe").iterdir()} == set(OF_SEGMENTATION)
    with (tmp_path / "probe" / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["value"]) for row in rows] == [("ground", "0"), ("red", "1"), ("green", "2")]
    assert abs(float(rows[0]["head_iou"]) - found["probes"]["head"]["iou_by_class"]["ground"]) < 1e-4
    again = probed(scene / "feats.h5", "--masks", scene / "masks", "-o", tmp_path / "probe", "--overwrite")
    assert again["probes"] == found["probes"], "the same seed gives the same result"


def test_another_output_is_the_test_part(scene: Path, tmp_path: Path) -> None:
    draw(tmp_path / "pictures", tmp_path / "masks", count=4, seed=1)
    other = extracted(tmp_path / "pictures", tmp_path / "feats.h5")
    for path in (tmp_path / "masks").rglob("*.png"):
        path.rename(scene / "masks" / path.relative_to(tmp_path / "masks"))
    found = probed(scene / "feats.h5", "--test", other, "--masks", scene / "masks", "--probe", "linear")
    assert (found["images"]["train"], found["images"]["test"]) == (12, 4) and list(found["probes"]) == ["linear"]


def test_what_cannot_be_used_is_one_line_that_names_the_problem(scene: Path, tmp_path: Path) -> None:
    feats, masks = scene / "feats.h5", tmp_path / "masks"
    assert "there is no such folder" in refusal(feats, "--masks", masks)
    masks.mkdir()
    assert "the mask of a/0-00.png would be a/0-00.png" in refusal(feats, "--masks", masks)
    for options in (("--labels", "folder"), ("--apply", "x.safetensors"), ("--shots", "1"), ("--depth", "2")):
        assert f"--masks and {options[0]} do not go together" in refusal(feats, "--masks", masks, *options)
    assert "--probe knn does not exist with --masks" in refusal(feats, "--masks", masks, "--probe", "knn")
    assert "--probe head does not exist without --masks" in refusal(feats, "--probe", "head")
    keys = [key for key in open_features(feats).done if "/" in key]
    for key in keys:
        (masks / key).parent.mkdir(exist_ok=True)
        Image.new("L", Image.open(scene / "pictures" / key).size, 1).save(masks / key)
    assert "at least two classes: all pixels of the masks are 1" in refusal(feats, "--masks", masks)
    Image.new("L", (31, 57), 1).save(masks / keys[0])
    (masks / keys[1]).write_bytes(b"text")
    said = refusal(feats, "--masks", masks)
    assert f"{keys[0]}: it has 31 x 57 pixels" in said and "1 other mask cannot be used" in said
    for path in (masks / keys[0], masks / keys[1]):
        Image.new("L", Image.open(scene / "pictures" / path.relative_to(masks)).size, 3).save(path)
    (masks / "classes.txt").write_text("one\ntwo\nthree\n")
    assert "holds class 3, but classes.txt names 3 classes" in refusal(feats, "--masks", masks)
    pooled = extracted(scene / "pictures", tmp_path / "pooled.h5", "--tokens", "none")
    assert "holds no tokens, which segmentation needs" in refusal(pooled, "--masks", masks)


# ---------------------------------------------------------------------------------------------------------- the masks


def test_pixel_values_are_class_numbers_whatever_the_kind_of_png(scene: Path, tmp_path: Path) -> None:
    image = open_features(scene / "feats.h5")["a/0-00.png"]
    wanted = np.random.default_rng(0).integers(0, 4, (image.height, image.width)).astype(np.uint8)
    palette = Image.fromarray(wanted)
    palette.putpalette([255, 0, 0] * 4)
    for number, mask in enumerate((Image.fromarray(wanted), palette, Image.fromarray(wanted.astype(np.uint16)))):
        mask.save(tmp_path / f"{number}.png")
        assert (read_mask(str(tmp_path / f"{number}.png"), image) == wanted).all()
    Image.fromarray(wanted > 0).save(tmp_path / "bits.png")
    assert (read_mask(str(tmp_path / "bits.png"), image) == (wanted > 0)).all()
    Image.fromarray(np.dstack([wanted] * 3)).save(tmp_path / "rgb.png")
    assert "RGB colors instead of class numbers" in read_mask(str(tmp_path / "rgb.png"), image)
    small = Image.fromarray(wanted).resize((image.width // 2, image.height // 2), Image.Resampling.NEAREST)
    small.save(tmp_path / "small.png")
    assert read_mask(str(tmp_path / "small.png"), image).shape == small.size[::-1]
    data = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    assert isinstance(read_mask(str(tmp_path / "cut.png"), image), str)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_values_of_few_bits_are_not_stretched(scene: Path, tmp_path: Path, bits: int) -> None:
    import struct
    import zlib

    image = open_features(scene / "feats.h5")["a/0-00.png"]
    row = b"\0" + b"\x1b" * (image.width * bits // 8)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    head = struct.pack(">LLBBBBB", image.width, image.height, bits, 0, 0, 0, 0)
    pixels = zlib.compress(row * image.height)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "gray.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    found = read_mask(str(tmp_path / "gray.png"), image)
    assert set(np.unique(found).tolist()) == ({0, 1, 2, 3} if bits == 2 else {1, 11})


def test_a_mask_is_turned_as_its_picture_if_it_fits_only_then(tmp_path: Path) -> None:
    pixels = np.zeros((40, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.jpg", exif=exif)
    image = open_features(extracted(tmp_path / "pictures", tmp_path / "feats.h5"))["a.jpg"]
    assert (image.width, image.height) == (40, 90)
    stored = np.zeros((40, 90), np.uint8)
    stored[:, :30] = 1
    Image.fromarray(stored).save(tmp_path / "a.png")
    assert (read_mask(str(tmp_path / "a.png"), image) == np.rot90(stored, -1)).all()
    upright = np.rot90(stored, 1).copy()
    Image.fromarray(upright).save(tmp_path / "a.png")
    assert (read_mask(str(tmp_path / "a.png"), image) == upright).all()


def test_only_the_part_that_tokens_cover_is_compared(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (100, 50)).save(tmp_path / "pictures" / "a.png")
    output = extracted(tmp_path / "pictures", tmp_path / "feats.h5", "--preprocess", "clip")
    mask = np.tile(np.arange(100, dtype=np.uint8), (50, 1))
    Image.fromarray(mask).save(tmp_path / "a.png")
    found = read_mask(str(tmp_path / "a.png"), open_features(output)["a.png"])
    assert found.shape == (50, 50) and (found == mask[:, 25:75]).all()


def test_no_key_leads_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    folder = MaskFolder(str(tmp_path / "masks"), None)
    assert folder.find("../a.jpg") is None and folder.find(f"{tmp_path}/a.jpg") is None
    for name in ("a.png", "a.jpg.png"):
        Image.new("L", (4, 4)).save(tmp_path / "masks" / name)
        assert folder.find("a.jpg") == str(tmp_path / "masks" / name)


def test_pixels_of_no_class_are_neither_counted_nor_drawn() -> None:
    values = np.array([[0, 255, 7], [255, 255, 7]], np.uint8)
    assert numbers_in(values).tolist() == [0, 7]
    assert sorted(sample_pixels(values, 100, np.random.default_rng(0)).numbers.tolist()) == [0, 7, 7]
    wide = np.array([[255, 65535, 300]], np.uint16)
    assert numbers_in(wide).tolist() == [300]


# ------------------------------------------------------------------------------------------- against other programs


def test_intersections_over_unions_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels, found = random.integers(-1, 5, (8, 20, 30)), random.integers(0, 5, (8, 20, 30))
    counts = PixelCounts.zeros(8, 6)
    for number in range(8):
        counts.add(number, labels[number, :7], found[number, :7])
        counts.add(number, labels[number, 7:], found[number, 7:])
    kept = labels >= 0
    expected = metrics.jaccard_score(labels[kept], found[kept], average=None, labels=range(5))
    np.testing.assert_allclose(counts.ious()[:5], expected, rtol=1e-12)
    assert np.isnan(counts.ious()[5]), "a class that never occurs has none"
    interval = counts.mean_iou(seed=0)
    assert interval.value == pytest.approx(expected.mean()) and interval.low < interval.value < interval.high
    assert counts.pixel_accuracy() == metrics.accuracy_score(labels[kept], found[kept])


@pytest.mark.parametrize("size", [(9, 50), (3, 4), (64, 17)])
def test_scores_are_resized_as_a_whole_map_would_be(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvit_cli.probe.segmenters.BAND_VALUES", 300)
    torch.manual_seed(0)
    scores = torch.randn(5, 6, 8)
    whole = F.interpolate(scores[None], size=size, mode="bilinear", align_corners=False)[0]
    bands = list(predicted_rows(scores, *size))
    assert len(bands) > 1 or size == (3, 4)
    assert (np.concatenate([found for _, found in bands]) == whole.argmax(0).numpy()).mean() > 0.99
    rows, columns = np.divmod(np.arange(size[0] * size[1]), size[1])
    places = np.stack([(columns + 0.5) / size[1], (rows + 0.5) / size[0]], 1).astype(np.float32)
    torch.testing.assert_close(scores_at(scores, places), whole.flatten(1).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [LinearSegmenter, ConvSegmenter])
def test_maps_of_several_sizes_are_normalized_together(kind: type[Segmenter]) -> None:
    """Maps of one size, in a batch, are what they are to PyTorch's own BatchNorm and convolutions."""
    torch.manual_seed(0)
    head = kind(12, 3)
    one = head([torch.randn(4, 6, 12) * 3 + 1, torch.randn(2, 2, 12)])
    assert [tuple(scores.shape) for scores in one] == [(3, 4, 6), (3, 2, 2)]
    maps = torch.randn(2, 4, 6, 12) * 3 + 1
    if kind is LinearSegmenter:
        normed = F.batch_norm(maps.permute(0, 3, 1, 2), None, None, training=True)
        expected = F.conv2d(normed, head.classify.weight, head.classify.bias)
        torch.testing.assert_close(torch.stack(head(list(maps))), expected, rtol=1e-4, atol=1e-4)


def test_convolutions_see_what_single_tokens_do_not() -> None:
    """The class of a place is that of its neighbor on the left."""
    random = np.random.default_rng(0)
    classes = random.integers(0, 2, (24, 8, 8))
    maps = np.eye(2, dtype=np.float32)[classes]
    shifted = np.roll(classes, 1, axis=2)
    samples = [sample_pixels(one.astype(np.uint8), 64, random) for one in shifted]
    reached = {}
    for kind in (LinearSegmenter, ConvSegmenter):
        torch.manual_seed(0)
        head = kind(2, 2)
        train_segmenter(head, lambda number: torch.from_numpy(maps[number]), samples, np.full(24, 128), seed=0)
        found = torch.stack(head([torch.from_numpy(one) for one in maps])).argmax(1).numpy()
        reached[kind] = (found == shifted)[:, :, 1:].mean()
    assert reached[LinearSegmenter] < 0.65
    assert reached[ConvSegmenter] > 0.95


def test_visual_and_patch_tokens_are_the_same_map(scene: Path, tmp_path: Path) -> None:
    patches = open_features(
        extracted(scene / "pictures", tmp_path / "p.h5", "--tokens", "patch", "--store-dtype", "float32")
    )
    visual = open_features(
        extracted(scene / "pictures", tmp_path / "v.h5", "--tokens", "visual", "--store-dtype", "float32")
    )
    for key in patches.done:
        assert (patch_map(patches[key]) == patch_map(visual[key])).all()
