"""Pictures become the pixels of the official code, and what cannot becomes a reason."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from internvit_cli.config import GreyRange, PixelRule, Preprocess, Skipped, Status, TilingRule
from internvit_cli.decode import pictures
from internvit_cli.decode.pictures import decode_tiles
from internvit_cli.plan.headers import Header, read_header
from internvit_cli.plan.tiling import choose_grid, decoded_tile_count
from internvit_cli.sources import DiscoverOptions, discover

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

as_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) != 13, reason="the outcomes are those of Pillow 13"
)

ONE_VIEW = PixelRule(TilingRule(tile_size=28, preprocess=Preprocess.SQUASH))
CLIP = PixelRule(TilingRule(preprocess=Preprocess.CLIP))


def decode(path: Path | bytes, rule: PixelRule, header: Header | None = None) -> NDArray[np.uint8] | Skipped:
    """Plan and decode: uint8 [tiles, side, side, 3], or why not."""
    name = os.fsencode(path)
    planned = header or read_header(name, rule)
    if isinstance(planned, Skipped):
        return planned
    grid = choose_grid(planned.width, planned.height, rule.tiling)
    side = rule.tiling.tile_size
    out = np.full((decoded_tile_count(grid, rule) + 1, side, side, 3), 77, np.uint8)
    outcome = decode_tiles(name, planned, grid, rule, out)
    if isinstance(outcome, Skipped):
        return outcome
    assert (out[outcome.tiles :] == 77).all(), "nothing beyond the tiles is written"
    assert outcome.tiles == decoded_tile_count(grid, rule)
    assert outcome.digest == hashlib.sha256(open(name, "rb").read()).digest()  # noqa: SIM115
    return out[: outcome.tiles]


def tiles(path: Path | bytes, rule: PixelRule) -> NDArray[np.uint8]:
    outcome = decode(path, rule)
    assert not isinstance(outcome, Skipped), outcome
    return outcome


def reason(path: Path | bytes, rule: PixelRule, header: Header | None = None) -> Status:
    outcome = decode(path, rule, header)
    assert isinstance(outcome, Skipped)
    return outcome.status


def two_pass(image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
    return np.asarray(
        image.resize((width, image.height), Image.Resampling.BICUBIC).resize((width, height), Image.Resampling.BICUBIC)
    )


@pytest.fixture
def planned(tmp_path: Path) -> tuple[Path, Header]:
    path = tmp_path / "a.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    header = read_header(os.fsencode(path), ONE_VIEW)
    assert isinstance(header, Header)
    return path, header


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.sweep)], ids=["every fifth", "all"])
def test_the_tiles_of_the_photographs_have_their_reference_digests(photos: Path, reference: Path, step: int) -> None:
    stored = json.loads((reference / "tile_digests.json").read_text())
    assert len(stored) >= 100
    for entry in stored[::step]:
        rule = PixelRule(TilingRule(max_tiles=entry["max_tiles"]), exif=False)
        found = [hashlib.sha256(tile.tobytes()).hexdigest()[:16] for tile in tiles(photos / entry["file"], rule)]
        assert found == entry["tiles"], (entry["file"], entry["max_tiles"])


def test_the_global_view_alone_is_the_thumbnail(photos: Path) -> None:
    path = photos / "055_exif-orientation_1200x1800.jpg"
    assert (tiles(path, PixelRule(global_view_only=True)) == tiles(path, PixelRule())[-1:]).all()


def test_tiles_can_do_without_a_thumbnail(photos: Path) -> None:
    path = photos / "028_exif-samples_640x480.jpg"
    with_thumbnail = tiles(path, PixelRule())
    assert (tiles(path, PixelRule(TilingRule(thumbnail=False))) == with_thumbnail[:-1]).all()


def test_squash_is_the_whole_picture_in_one_tile(photos: Path) -> None:
    path = photos / "040_imageio_768x512.png"
    with Image.open(path) as image:
        expected = two_pass(image.convert("RGB"), 448, 448)
    assert (tiles(path, PixelRule(TilingRule(preprocess=Preprocess.SQUASH))) == expected).all()


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (448, 448), (1000, 449), (100, 40), (33, 700), (449, 447)])
def test_clip_is_the_view_of_the_clip_image_processor(size: tuple[int, int], tmp_path: Path, photos: Path) -> None:
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    with Image.open(photos / "040_imageio_768x512.png") as photo:
        image = photo.convert("RGB").resize(size)
    image.save(tmp_path / "a.png")

    class TwoPass(processors.CLIPImageProcessorPil):  # type: ignore[misc,name-defined]
        """The same arithmetic; Pillow 13 chooses the order of its passes, so they are made one by one."""

        def resize(self, image: NDArray[np.uint8], size: Any, *args: Any, **options: Any) -> NDArray[np.uint8]:
            first = image.ndim == 3 and image.shape[0] == 3
            source = Image.fromarray(image.transpose(1, 2, 0) if first else image)
            sized = super().resize(image, size, *args, **options)
            height, width = sized.shape[1:] if first else sized.shape[:2]
            result = two_pass(source, width, height)
            assert np.abs(result.astype(int) - (sized.transpose(1, 2, 0) if first else sized)).max() <= 8
            return result.transpose(2, 0, 1) if first else result

    processor = TwoPass(
        size={"shortest_edge": 448}, crop_size={"height": 448, "width": 448}, do_rescale=False, do_normalize=False
    )
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)
    found = tiles(tmp_path / "a.png", CLIP)
    assert found.shape == (1, 448, 448, 3)
    assert (found[0] == expected).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_every_orientation_is_set_upright(extension: str, orientation: int, tmp_path: Path, photos: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{extension}"
    with Image.open(photos / "040_imageio_768x512.png") as photo:
        photo.convert("RGB").resize((96, 64)).save(path, exif=exif)
    rule = PixelRule(TilingRule(tile_size=56, max_tiles=6))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    upright.save(tmp_path / "upright.png")
    assert (tiles(path, rule) == tiles(tmp_path / "upright.png", rule)).all()


def test_without_exif_only_tiff_is_turned_as_pillow_turns_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.effect_noise((96, 64), 80).convert("RGB")
    rule = PixelRule(TilingRule(tile_size=56), exif=False)
    for name in ("a.png", "a.tif"):
        image.save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as stored:
            stored.convert("RGB").save(tmp_path / "plain.png")
        assert (tiles(tmp_path / name, rule) == tiles(tmp_path / "plain.png", rule)).all()


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "LAB"])
def test_other_modes_are_converted_as_pillow_does(mode: str, tmp_path: Path) -> None:
    image = Image.effect_noise((28, 28), 80).convert("RGB")
    image = image.convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.frombytes("LAB", (28, 28), image.tobytes())
    path = saved(image, tmp_path / ("a.tif" if mode in ("CMYK", "LAB") else "a.png"))
    with Image.open(path) as stored:
        assert stored.mode == mode
        expected = np.asarray(stored.convert("RGB"))
    assert (tiles(path, ONE_VIEW)[0] == expected).all()


def grey(path: Path, grey_range: GreyRange | int = GreyRange.FULL) -> NDArray[np.uint8]:
    found = tiles(path, PixelRule(ONE_VIEW.tiling, grey_range=grey_range))[0]
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()
    return found[..., 0]


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_sixteen_bit_greys_are_scaled(extension: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    path = saved(Image.fromarray(values), tmp_path / f"a.{extension}")
    assert (grey(path) == (values.astype(int) * 255 + 32767) // 65535).all()


def test_big_endian_sixteen_bit_greys_are_scaled(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 28 * 28).astype(">u2").reshape(28, 28)
    path = saved(Image.frombytes("I;16B", (28, 28), values.tobytes()), tmp_path / "a.tif")
    assert (grey(path) == (values.astype(int) * 255 + 32767) // 65535).all()


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
@pytest.mark.parametrize(
    ("most", "white"),
    [(200, 255), (255, 255), (256, 1023), (3000, 4095), (4095, 4095), (4096, 16383), (16384, 65535), (65535, 65535)],
)
def test_the_range_of_grays_is_that_of_the_bits_that_a_picture_uses_when_asked_for(
    extension: str, most: int, white: int, tmp_path: Path
) -> None:
    values = np.linspace(0, most, 28 * 28).astype(np.uint16).reshape(28, 28)
    path = saved(Image.fromarray(values), tmp_path / f"a.{extension}")
    expected = (values.astype(int) * 255 + white // 2) // white
    assert (grey(path, GreyRange.AUTO) == expected).all()
    assert (grey(path, white) == expected).all()


def test_grays_beyond_the_value_that_is_white_are_white(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 28 * 28).astype(np.uint16).reshape(28, 28)
    found = grey(saved(Image.fromarray(values), tmp_path / "a.png"), 4095)
    assert (found[values >= 4095] == 255).all()
    assert (np.diff(found.ravel().astype(int)) >= 0).all()
    signed = np.linspace(-9, 9000, 28 * 28).astype(np.int32).reshape(28, 28)
    found = grey(saved(Image.fromarray(signed), tmp_path / "a.tif"), 4095)
    assert not found[signed <= 0].any()
    assert (found[signed >= 4095] == 255).all()


@pytest.mark.parametrize("grey_range", [*GreyRange, 4095])
def test_a_range_of_grays_changes_no_other_picture(grey_range: GreyRange | int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rule = PixelRule(ONE_VIEW.tiling, grey_range=grey_range)
    pixels = rng.integers(0, 256, (28, 28, 3), np.uint8)
    floats = Image.fromarray(rng.random((28, 28), np.float32) * 9)
    for name, image in {
        "a.png": Image.fromarray(pixels),
        "b.png": Image.fromarray(pixels[..., 0]),
        "c.tif": floats,
    }.items():
        path = saved(image, tmp_path / name)
        assert (tiles(path, rule) == tiles(path, ONE_VIEW)).all()


def test_a_picture_of_twelve_bits_is_not_black_when_its_range_is_asked_for(cases: Path) -> None:
    path = cases / "i12in16.png"
    dark, bright = grey(path, GreyRange.FULL), grey(path, GreyRange.AUTO)
    assert dark.max() <= 16
    assert bright.max() > 200


@pytest.mark.parametrize(("low", "high"), [(0, 40_000), (-70_000, 130_000), (-(2**31), 2**31 - 1), (70_000, 70_000)])
def test_whole_numbers_are_scaled_from_sixteen_bits_or_their_own_range(low: int, high: int, tmp_path: Path) -> None:
    values = np.linspace(low, high, 28 * 28).astype(np.int32).reshape(28, 28)
    wide = values.astype(np.int64)
    span = max(int(wide.max() - wide.min()), 1)
    expected = (
        (wide * 255 + 32767) // 65535 if low >= 0 and high < 65536 else ((wide - wide.min()) * 255 + span // 2) // span
    )
    assert (grey(saved(Image.fromarray(values), tmp_path / "a.tif")) == expected).all()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.7), (-3.0, 9.5), (0.0, 1e30), (5.0, 5.0)])
def test_floats_are_scaled_from_one_or_their_own_range(low: float, high: float, tmp_path: Path) -> None:
    values = np.linspace(low, high, 28 * 28).astype(np.float32).reshape(28, 28)
    bottom, top = (0.0, 1.0) if low >= 0 and high <= 1 else (float(values.min()), float(values.max()))
    exact = (values.astype(np.float64) - bottom) / max(top - bottom, 1e-9) * 255
    assert np.abs(grey(saved(Image.fromarray(values), tmp_path / "a.tif")) - exact).max() <= 0.5 + 1e-6


def test_nan_is_black_and_infinities_are_the_ends(tmp_path: Path) -> None:
    values = np.full((28, 28), 0.5, np.float32)
    values[0], values[1], values[2] = np.nan, np.inf, -np.inf
    found = grey(saved(Image.fromarray(values), tmp_path / "a.tif"))
    assert [set(row.tolist()) for row in found[:4]] == [{0}, {255}, {0}, {128}]
    values[:] = np.nan
    assert not grey(saved(Image.fromarray(values), tmp_path / "b.tif")).any()


def test_alpha_is_dropped_or_composed_over_a_background(tmp_path: Path) -> None:
    path = saved(Image.new("RGBA", (28, 28), (200, 100, 0, 0)), tmp_path / "a.png")
    over = PixelRule(ONE_VIEW.tiling, background=(1, 2, 3))
    assert tiles(path, ONE_VIEW)[0, 0, 0].tolist() == [200, 100, 0]
    assert tiles(path, over)[0, 0, 0].tolist() == [1, 2, 3]
    half = saved(Image.new("RGBA", (28, 28), (200, 100, 0, 128)), tmp_path / "b.png")
    assert np.abs(tiles(half, over)[0, 0, 0].astype(int) - [101, 51, 1]).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "LA"])
def test_every_kind_of_transparency_is_composed(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (28, 28), (0, 0) if mode == "LA" else 0)
    options = {} if mode == "LA" else {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    path = saved(image, tmp_path / "a.png", **options)
    assert tiles(path, PixelRule(ONE_VIEW.tiling, background=(9, 8, 7)))[0, 0, 0].tolist() == [9, 8, 7]


@pytest.mark.parametrize("extension", ["gif", "webp", "png", "tif"])
def test_the_first_frame_stands_for_an_animation(extension: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (28, 28), color) for color in ("red", "green", "blue")]
    path = saved(frames[0], tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:])
    assert np.abs(tiles(path, ONE_VIEW)[0, 0, 0].astype(int) - [255, 0, 0]).max() <= 3


def test_a_file_that_changed_since_the_plan_is_changed(planned: tuple[Path, Header]) -> None:
    path, header = planned
    assert not isinstance(decode(path, ONE_VIEW, header), Skipped)
    os.utime(path, ns=(0, header.file_mtime_ns + 1))
    assert reason(path, ONE_VIEW, header) is Status.CHANGED
    assert reason(path, ONE_VIEW, header._replace(file_size=header.file_size + 1)) is Status.CHANGED


def test_a_file_that_changes_under_our_eyes_is_changed(
    planned: tuple[Path, Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, header = planned

    def disturb(*_: object) -> None:
        os.utime(path, ns=(0, 1))
        raise OSError("image file is truncated")

    monkeypatch.setattr(pictures, "cut_tiles", disturb)
    assert reason(path, ONE_VIEW, header) is Status.CHANGED


def test_a_file_that_went_since_the_plan_has_vanished(planned: tuple[Path, Header]) -> None:
    path, header = planned
    path.unlink()
    assert reason(path, ONE_VIEW, header) is Status.VANISHED


def test_a_size_other_than_planned_is_a_mismatch(planned: tuple[Path, Header]) -> None:
    path, header = planned
    assert reason(path, ONE_VIEW, header._replace(width=61)) is Status.SIZE_MISMATCH
    assert reason(path, ONE_VIEW, header._replace(orientation=6)) is Status.SIZE_MISMATCH


def test_large_files_are_hashed_in_blocks_and_decoded_from_the_file(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("028_exif-samples_640x480.jpg", "029_libwebp-gallery_1280x720.webp", "040_imageio_768x512.png"):
        at_once = tiles(photos / name, PixelRule())
        with monkeypatch.context() as patch:
            patch.setattr(pictures, "_IN_MEMORY", 1000)
            assert (tiles(photos / name, PixelRule()) == at_once).all()


@as_pillow_13
def test_the_files_of_public_test_suites_come_out_as_pillow_says(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures that Pillow decodes are decoded, and those it refuses for a text; RGB pixels are Pillow's."""
    pixels: list[str] = []
    fill = pictures.cut_tiles

    def spy(picture: Image.Image, *rest: Any) -> int:
        pixels.append(hashlib.md5(picture.tobytes()).hexdigest())
        return fill(picture, *rest)

    monkeypatch.setattr(pictures, "cut_tiles", spy)
    rule = PixelRule(TilingRule(tile_size=28), exif=False)
    with open(hostile / "OUTCOMES.tsv", encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    assert len(rows) == 198
    for row in rows:
        outcome = decode(hostile / row["file"], rule)
        if row["file"] == "pillow__png_decompression_dos.png":
            assert not isinstance(outcome, Skipped), (row["file"], outcome)
        elif row["outcome"] == "ok":
            assert not isinstance(outcome, Skipped), (row["file"], outcome)
            assert row["mode"].startswith("I") or pixels[-1] == row["rgb_md5"], row["file"]
        else:
            assert isinstance(outcome, Skipped), row["file"]
            assert outcome.status in _expected_reasons(row["exception"]), (row["file"], outcome)


def _expected_reasons(exception: str) -> set[Status]:
    if exception == "PIL.UnidentifiedImageError":
        return {Status.NOT_AN_IMAGE, Status.TRUNCATED, Status.UNSUPPORTED}
    if exception == "PIL.Image.DecompressionBombError":
        return {Status.TOO_LARGE}
    return {Status.TRUNCATED, Status.UNSUPPORTED, Status.TOO_LARGE}


@as_pillow_13
@pytest.mark.sweep
def test_the_hostile_tree_has_the_outcomes_that_its_maker_expects(made: Path) -> None:
    listing = discover([str(made)], DiscoverOptions())
    outcomes: dict[str, bool] = {}
    for i, key in enumerate(listing.keys):
        name = key.decode("utf-8", "backslashreplace")
        if i not in listing.skipped and name != "bomb/many_scans.jpg":  # Slow by design: for the time limit's test.
            outcomes[name] = not isinstance(decode(listing.path(i), ONE_VIEW), Skipped)
    # Pillow takes a stream of pixels that ends early as long as it ends properly: black rows, no error.
    assert outcomes.pop("bomb/claims_9000sq_short.png")
    # Its text is larger than Pillow reads; its pixels are good.
    assert outcomes.pop("bomb/ztxt60M.png")
    wrong = []
    for line in (made / "MADE.tsv").read_text().splitlines()[1:]:
        name, expect, _ = line.split("\t")
        wanted = {"ok": True, "ok-beware": True, "warn": True, "error": False}.get(expect)
        if wanted is not None and outcomes.get(name, wanted) != wanted:
            wrong.append((name, expect))
    assert wrong == []
    assert sum(outcomes.values()) > 120
