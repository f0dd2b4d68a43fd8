"""Whether two pictures show the same: crops and copies do, other frames and other pictures do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from internvit_cli.similarity import alignment
from internvit_cli.similarity.alignment import SAME, SIDE, agreement
from internvit_cli.similarity.gray_squares import to_gray_square

if TYPE_CHECKING:
    from pathlib import Path


def scenery(seed: int, size: int = 512) -> Image.Image:
    """A made-up picture with outlines and details at every scale."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size), np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        total += np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC)) / cells**0.5
    scaled = 128 + 50 * total / total.std()
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")


def one_agreement(one: Image.Image, other: Image.Image) -> float:
    both = [agreement(to_gray_square(a)[None], to_gray_square(b)[None])[0] for a, b in ((one, other), (other, one))]
    assert (both[0] > SAME) == (both[1] > SAME), "it does not matter which of them comes first"
    return float(min(both))


@given(st.tuples(*[st.floats(0, 0.12)] * 4), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_crop_agrees_with_what_it_was_cropped_from(borders, seed):
    picture = scenery(seed)
    left, top, right, bottom = (round(512 * share) for share in borders)
    assert one_agreement(picture, picture.crop((left, top, 512 - right, 512 - bottom))) > SAME


@pytest.mark.parametrize("side", [700, 170, 90, 64])
def test_a_picture_agrees_with_itself_at_another_size(side):
    picture = scenery(3)
    assert one_agreement(picture, picture.resize((side, side // 2))) > SAME


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_different_pictures_do_not_agree(seed):
    assert one_agreement(scenery(seed), scenery(seed + 20_000)) < 0.6


def test_what_moved_in_front_parts_two_frames():
    """Half of the scene shifts against the other half, as near things do when a camera moves."""
    back, front = scenery(1), scenery(2)
    frames = []
    for shift in (0, 40):
        frame = back.crop((20, 0, 492, 512))
        frame.paste(front.crop((shift, 0, 472 + shift, 280)), (0, 232))
        frames.append(frame)
    assert one_agreement(*frames) < SAME


def test_a_mirrored_or_turned_picture_is_another_one():
    picture = scenery(5)
    assert one_agreement(picture, ImageOps.mirror(picture)) < 0.5
    assert one_agreement(picture, picture.rotate(90)) < 0.5


def test_brightness_and_contrast_do_not_matter():
    picture = scenery(6)
    for change in (lambda value: 0.6 * value + 90, lambda value: 0.8 * value):
        assert one_agreement(picture, picture.point(change)) > 0.95


@pytest.mark.parametrize(("one", "other", "is_same"), [(250, 250, True), (250, 247, True), (250, 10, False)])
def test_blank_pictures_agree_when_they_are_equally_bright(one, other, is_same):
    pages = [Image.new("L", (300, 200), value) for value in (one, other)]
    assert (one_agreement(*pages) >= SAME) is is_same
    assert one_agreement(pages[0], scenery(1)) < 0.5


def test_many_pairs_at_once_agree_as_each_does_alone(monkeypatch):
    looks = np.stack([to_gray_square(scenery(seed)) for seed in range(12)])
    crops = np.stack([to_gray_square(scenery(seed).crop((30, 10, 500, 480))) for seed in range(12)])
    partners = np.concatenate([crops[:6], crops[7:], crops[6:7]])
    monkeypatch.setattr(alignment, "PAIRS_AT_ONCE", 5)
    many = agreement(looks, partners)
    single = np.concatenate([agreement(looks[row : row + 1], partners[row : row + 1]) for row in range(12)])
    assert np.allclose(many, single, atol=1e-4)
    assert (many[:6] > SAME).all() and (many[6:] < SAME).all()
    assert agreement(looks[:0], looks[:0]).shape == (0,)


def test_a_soft_picture_agrees_with_a_sharp_one():
    picture = scenery(8)
    assert one_agreement(picture, picture.filter(ImageFilter.GaussianBlur(6))) > SAME


@pytest.mark.sweep
def test_of_all_photographs_copies_agree_and_no_other_pair_does(photos: Path):
    looks, crops, names = [], [], []
    for path in sorted(photos.glob("*_*.*")):
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened).convert("RGB")
        width, height = upright.size
        looks.append(to_gray_square(upright))
        middle = upright.crop((width // 10, height // 10, width - width // 10, height - height // 10))
        crops.append(to_gray_square(middle.resize((max(1, width // 3), max(1, height // 3)))))
        names.append(path.name)
    whole, middles = np.stack(looks), np.stack(crops)
    assert agreement(whole, middles).min() > 0.92 and agreement(middles, whole).min() > 0.92
    first, second = np.triu_indices(len(whole), 1)
    found = agreement(whole[first], whole[second])
    same = {
        (names[one][:3], names[other][:3]) for one, other in zip(first[found > 0.8], second[found > 0.8], strict=True)
    }
    assert same == {("021", "055"), ("057", "074")}
    assert whole.shape[1:] == (SIDE, SIDE)
