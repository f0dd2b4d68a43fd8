"""Resizing on a device gives the pixels that Pillow gives in a decode worker, bit for bit."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_helpers import open_all, tiny_card
from PIL import Image
from run_helpers import extract, make_pictures

from internvit_cli import open_features
from internvit_cli.config import PixelRule, Preprocess, Resize, Skipped, TilingRule
from internvit_cli.decode.decoder import DecodedImage, DecodeJob, DecodeOptions, Decoder, FailedImage, UncutImage
from internvit_cli.decode.pictures import cut_tiles, decode_picture
from internvit_cli.encode.encoder import Encoder
from internvit_cli.encode.interface import Placed, placed_within
from internvit_cli.encode.options import EncoderOptions
from internvit_cli.encode.resizing import passes
from internvit_cli.encode.resizing.coefficients import coefficients
from internvit_cli.encode.resizing.cutter import Cutter
from internvit_cli.extract.engine import PICTURE_MEMORY, EngineOptions, Workload, decode_options
from internvit_cli.plan.headers import Header, read_header
from internvit_cli.plan.tiling import choose_grid, decoded_tile_count, views_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
SIDE = 28
SIZES = st.integers(1, 700)
RULES = {
    "tiles": PixelRule(TilingRule(tile_size=SIDE)),
    "many tiles": PixelRule(TilingRule(tile_size=SIDE, min_tiles=7, max_tiles=40)),
    "no thumbnail": PixelRule(TilingRule(tile_size=SIDE, thumbnail=False)),
    "global view": PixelRule(TilingRule(tile_size=SIDE), global_view_only=True),
    "squash": PixelRule(TilingRule(tile_size=SIDE, preprocess=Preprocess.SQUASH)),
    "clip": PixelRule(TilingRule(tile_size=SIDE, preprocess=Preprocess.CLIP)),
}


def noise(width: int, height: int, *, extreme: bool = False) -> np.ndarray:
    """A picture of random values, or of 0 and 255 alone, whose sums leave the range before they are clipped."""
    random = np.random.default_rng(width * 1009 + height)
    return (
        random.integers(0, 2, (height, width, 3), np.uint8) * 255
        if extreme
        else random.integers(0, 256, (height, width, 3), np.uint8)
    )


def by_pillow(picture: np.ndarray, rule: PixelRule) -> np.ndarray:
    height, width, _ = picture.shape
    grid = choose_grid(width, height, rule.tiling)
    tiles = np.empty((decoded_tile_count(grid, rule), SIDE, SIDE, 3), np.uint8)
    assert cut_tiles(Image.fromarray(picture), grid, rule, tiles) == len(tiles)
    return tiles


def on_device(picture: np.ndarray, rule: PixelRule) -> np.ndarray:
    height, width, _ = picture.shape
    views = views_of(width, height, choose_grid(width, height, rule.tiling), rule)
    return Cutter(CPU, SIDE).cut(torch.from_numpy(picture), views).numpy()


@given(SIZES, SIZES, st.sampled_from(sorted(RULES)), st.booleans())
def test_every_tile_is_that_of_pillow(width: int, height: int, name: str, extreme: bool) -> None:
    picture = noise(width, height, extreme=extreme)
    np.testing.assert_array_equal(on_device(picture, RULES[name]), by_pillow(picture, RULES[name]))


@given(st.integers(1, 3000), st.integers(1, 1500), st.booleans())
def test_one_pass_is_that_of_pillow_at_every_size(size: int, target: int, extreme: bool) -> None:
    line = noise(size, 1, extreme=extreme)
    expected = np.asarray(Image.fromarray(line).resize((target, 1), Image.Resampling.BICUBIC))
    actual = passes.plain_pass(torch.from_numpy(line), passes.table_on(CPU, size, target))
    # Pillow leaves out a pass that changes no size, and so does the cutter.
    if size != target:
        np.testing.assert_array_equal(actual.numpy(), expected)


@given(st.integers(1, 5000), st.integers(1, 2000))
def test_the_weights_of_a_pixel_add_up_to_one(size: int, target: int) -> None:
    table = coefficients(size, target)
    weights = table[:, 1:]
    assert (abs(weights.sum(axis=1) - (1 << 22)) <= weights.shape[1]).all()
    assert table[:, 0].min() >= 0 and table[:, 0].max() < size
    last = table[:, 0] + (weights != 0).cumsum(axis=1).argmax(axis=1)
    assert last.max() < size, "no pixel beyond the picture has a weight"


@pytest.mark.parametrize("rule", [PixelRule(), PixelRule(TilingRule(max_tiles=1))], ids=["tiles", "one tile"])
def test_photographs_have_the_same_tiles(photos: Path, rule: PixelRule) -> None:
    for path in sorted(photos.iterdir())[:: 12 if rule.tiling.max_tiles > 1 else 6]:
        header = read_header(os.fsencode(path), rule)
        if isinstance(header, Skipped):
            continue
        picture = np.empty((header.height, header.width, 3), np.uint8)
        assert not isinstance(decode_picture(os.fsencode(path), header, rule, picture), Skipped), path
        grid = choose_grid(header.width, header.height, rule.tiling)
        views = views_of(header.width, header.height, grid, rule)
        tiles = np.empty((decoded_tile_count(grid, rule), 448, 448, 3), np.uint8)
        cut_tiles(Image.fromarray(picture), grid, rule, tiles)
        cut = Cutter(CPU, 448).cut(torch.from_numpy(picture), views)
        assert torch.equal(cut, torch.from_numpy(tiles)), path


def test_a_pass_that_is_off_by_one_once_is_not_used() -> None:
    def wrong(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        out = passes.plain_pass(pixels, table)
        out.view(-1)[-1] ^= 1
        return out

    assert passes.difference(wrong, CPU) and not passes.difference(passes.plain_pass, CPU)


@given(st.lists(st.integers(1, 13), min_size=1, max_size=8), st.integers(1, 9))
def test_tiles_on_a_device_find_their_places_in_halved_batches(counts: list[int], size: int) -> None:
    starts = np.cumsum([0, *counts])
    placed = [
        Placed(int(start), torch.arange(start, start + count))
        for start, count in zip(starts, counts, strict=False)
        if count % 2
    ]
    whole = torch.full((int(starts[-1]),), -1)
    for one in placed:
        whole[one.position : one.position + len(one.tiles)] = one.tiles
    for begin in range(0, len(whole), size):
        part = whole[begin : begin + size]
        found = torch.full_like(part, -1)
        for one in placed_within(placed, begin, len(part)):
            assert len(one.tiles)
            found[one.position : one.position + len(one.tiles)] = one.tiles
        assert torch.equal(found, part)


# ---------------------------------------------------------------------------------------------------- decode workers


@pytest.fixture
def jobs(tmp_path: Path) -> list[DecodeJob]:
    """A small picture that lies on its side, a large one, one in another mode, and one that is no picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(60, 40)).save(tmp_path / "0.png", exif=exif)
    Image.fromarray(noise(300, 200)).save(tmp_path / "1.png")
    Image.fromarray(noise(50, 30)).convert("P").save(tmp_path / "2.png")
    Image.fromarray(noise(50, 30)).save(tmp_path / "3.png")
    found = []
    for row in range(4):
        path = os.fsencode(tmp_path / f"{row}.png")
        header = read_header(path, RULES["tiles"])
        assert isinstance(header, Header)
        found.append(DecodeJob(row, path, header, choose_grid(header.width, header.height, RULES["tiles"].tiling)))
    (tmp_path / "3.png").write_bytes(b"no picture" + bytes(found[3].header.file_size - 10))
    os.utime(tmp_path / "3.png", ns=(0, found[3].header.file_mtime_ns))
    return found


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(DecodeOptions(RULES["tiles"], 13, 1, 30.0, 4 << 30, picture_bytes=60 * 40 * 3))
    yield decoder
    decoder.close()


def test_pictures_that_fit_come_whole_and_upright_and_the_others_as_tiles(
    decoder: Decoder, jobs: list[DecodeJob]
) -> None:
    cut = Cutter(CPU, SIDE)
    found = {}
    for image in decoder.run_uncut(jobs):
        if isinstance(image, UncutImage):
            found[image.row] = cut.cut(torch.from_numpy(image.picture), image.views).numpy(), image.digest
            image.release()
    as_tiles = {}
    for image in decoder.run(jobs):
        if isinstance(image, DecodedImage):
            as_tiles[image.row] = image.tiles.copy(), image.digest
            image.release()
    assert sorted(found) == [0, 2] and sorted(as_tiles) == [0, 1, 2]
    for row, (tiles, digest) in found.items():
        np.testing.assert_array_equal(tiles, as_tiles[row][0])
        assert digest == as_tiles[row][1]


def test_a_picture_that_cannot_be_decoded_has_the_same_reason_and_count(
    decoder: Decoder, jobs: list[DecodeJob]
) -> None:
    reasons = []
    for run in (decoder.run, decoder.run_uncut):
        (failed,) = run([jobs[3]])
        assert isinstance(failed, FailedImage)
        reasons.append((failed.skipped, failed.tiles))
    assert reasons[0] == reasons[1]


def test_without_room_for_pictures_all_come_as_tiles(jobs: list[DecodeJob]) -> None:
    decoder = Decoder(DecodeOptions(RULES["tiles"], 13, 1, 30.0, 4 << 30))
    try:
        assert not any(isinstance(image, UncutImage) for image in decoder.run_uncut(jobs))
    finally:
        decoder.close()


@pytest.mark.parametrize(
    ("resize", "device", "pixels", "expected"),
    [
        (Resize.CPU, "cuda:0", 1000, 0),
        (Resize.AUTO, "cpu", 1000, 0),
        (Resize.AUTO, "cuda:0", 1000, 3000),
        (Resize.DEVICE, "cpu", 1000, 3000),
        (Resize.AUTO, "cuda:0", 10**9, PICTURE_MEMORY // 36),
    ],
)
def test_slots_have_room_for_the_pictures_of_a_run_within_a_bound(
    resize: Resize, device: str, pixels: int, expected: int
) -> None:
    encoder = EncoderOptions(device=device, resize=resize)
    options = EngineOptions(PixelRule(), encoder, (device,), 16, 60.0, 4 << 30)
    assert decode_options(options, Workload(100, 13, pixels)).picture_bytes == expected


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("devices", ["cpu", pytest.param("cpu,cpu", marks=pytest.mark.sweep)])
def test_a_run_stores_the_same_wherever_pictures_are_resized(tmp_path: Path, devices: str) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, 6, size=300)
    Image.fromarray(noise(90, 700)).convert("RGBA").save(folder / "tall.png")
    (folder / "text.jpg").write_text("no picture")
    outputs = [tmp_path / f"{resize}.h5" for resize in ("cpu", "device")]
    for output in outputs:
        options = ("--devices", devices, "--max-tiles", "4", "--resize", output.stem)
        result = extract(folder, "-o", output, *options)
        assert result.returncode == 3, result.stderr
        assert ("pictures resized there" in result.stderr) == (output.stem == "device")
    by_cpu, by_device = map(open_features, outputs)
    assert list(by_cpu) == list(by_device) and len(by_cpu.done) == 7
    for key in by_cpu.done:
        np.testing.assert_array_equal(by_cpu[key].visual_tokens, by_device[key].visual_tokens)
        assert by_cpu[key].digest == by_device[key].digest
    assert by_cpu["text.jpg"].status is by_device["text.jpg"].status


# ----------------------------------------------------------------------------------------------------------- on a card


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.cuda
@pytest.mark.parametrize("tile_size", [56, 448])
def test_on_cuda_pictures_are_cut_as_pillow_does_and_their_tiles_encoded_as_others(tile_size: int) -> None:
    """Many pictures one after the other in one piece of registered memory, as between decode workers and the card."""
    checkpoint = open_all(tiny_card())
    rule = PixelRule(TilingRule(tile_size=tile_size, max_tiles=6))
    options = EncoderOptions(device="cuda", tile_size=tile_size, batch_tiles=8, resize=Resize.DEVICE)
    memory = np.frombuffer(mmap.mmap(-1, 1 << 24), np.uint8)
    with Encoder.load(checkpoint, options) as encoder:
        assert encoder.info.resizing == "pictures resized there"
        encoder.register(memory)
        random = np.random.default_rng(0)
        for _ in range(60):
            width, height = (int(side) for side in random.integers(1, 1500, 2))
            picture = memory[: width * height * 3].reshape(height, width, 3)
            picture[:] = random.integers(0, 256, picture.shape, np.uint8)
            grid = choose_grid(width, height, rule.tiling)
            expected = np.empty((decoded_tile_count(grid, rule), tile_size, tile_size, 3), np.uint8)
            cut_tiles(Image.fromarray(picture), grid, rule, expected)
            cut = encoder.cut(picture, views_of(width, height, grid, rule))
            picture[:] = 0  # its memory is free
            buffer = encoder.buffer()
            pending = encoder.submit(buffer[: len(expected)], [Placed(0, cut)])
            plain = encoder.submit(expected)
            assert np.array_equal(cut.cpu().numpy(), expected), (width, height)
            assert np.array_equal(pending.result().layers[0].tokens, plain.result().layers[0].tokens)
