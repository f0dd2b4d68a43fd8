"""Coarse types: tokens in int8 and fp8 with scales, arithmetic in fp8, and what they are measured to cost."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import storage_helpers
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from internvit_cli import Extractor, open_features
from internvit_cli.cli.app import run
from internvit_cli.config import ComputeDtype, StoreDtype, Tokens
from internvit_cli.model import accuracy
from internvit_cli.model.accuracy import ATTRIBUTE_CHARACTERS, Accuracy, AccuracyError, ComputeError, StoreError
from internvit_cli.model.kernels.plain import dequantize_tokens, quantize_tokens
from internvit_cli.storage.format.layout import decode_values

if TYPE_CHECKING:
    from pathlib import Path

SCALED = ("int8", "fp8")
TORCH_TYPE = {"int8": torch.int8, "fp8": torch.uint8}


def make_pictures(folder: Path, count: int, seed: int = 1) -> list[Path]:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed}-{number}.png" for number in range(count)]
    for path in paths:
        size = int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(path)
    return paths


def extract(*arguments: Any, expect: int = 0) -> None:
    words = ["extract", *map(str, arguments), "--model", "tiny-random", "--device", "cpu", "--dtype", "float32"]
    assert run([*words, "--tile-size", "56", "-q"]) == expect


def verify(output: Path) -> int:
    return run(["verify", str(output), "--re-extract", "2", "--reference", "-q"])


# -------------------------------------------------------------------------------------------------------- the numbers


LARGEST = 65504.0 * 127
"""The largest number of int8 times the largest scale in float16."""


@given(
    arrays.arrays(np.float32, (3, 10), elements=st.floats(-LARGEST, LARGEST, width=32)),
    st.integers(1, 10),
)
def test_no_value_is_further_off_than_half_of_its_own_scale(tokens: np.ndarray, count: int) -> None:
    stored, scales = quantize_tokens(torch.from_numpy(tokens), torch.int8, count)
    assert scales.shape == (3, count) and scales.dtype is torch.float16 and (scales > 0).all()
    read_back = decode_values(stored.numpy(), StoreDtype.INT8, scales.numpy())
    np.testing.assert_array_equal(dequantize_tokens(stored, scales).numpy(), read_back)
    steps = scales.numpy().astype(np.float64)[:, np.arange(10) % count]
    assert (np.abs(read_back.astype(np.float64) - tokens) <= steps / 2 * (1 + 1e-4)).all()
    for scale in range(count):  # no scale is larger than its values need
        largest = np.abs(tokens[:, scale::count]).max(axis=1) / 127
        assert (scales[:, scale].numpy() <= largest * (1 + 2.0**-9) + 2.0**-24).all()


@given(
    arrays.arrays(np.float32, (3, 8), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.sampled_from(SCALED),
)
def test_no_value_is_further_from_what_is_stored_than_half_a_step(tokens: np.ndarray, dtype: str) -> None:
    stored, scales = quantize_tokens(torch.from_numpy(tokens), TORCH_TYPE[dtype])
    read_back = decode_values(stored.numpy(), StoreDtype(dtype), scales.numpy()).astype(np.float64)
    error, largest = np.abs(read_back - tokens), np.abs(tokens).max(axis=-1, keepdims=True).astype(np.float64)
    slack = 1e-6 * largest + 1e-37
    if dtype == "int8":
        assert (error <= largest / 127 / 2 + slack).all()
    else:  # three bits of mantissa, and below 2**-6 even steps
        assert (error <= np.maximum(np.abs(tokens) * 2.0**-4, largest / 448 * 2.0**-10) + slack).all()


@pytest.mark.parametrize("dtype", SCALED)
def test_a_token_of_zeros_is_read_back_as_zeros(dtype: str) -> None:
    for count in (0, 2):
        stored, scales = quantize_tokens(torch.zeros(2, 4), TORCH_TYPE[dtype], count)
        assert (decode_values(stored.numpy(), StoreDtype(dtype), scales.numpy()) == 0).all()


def test_an_outlier_channel_makes_few_values_of_a_visual_token_coarse() -> None:
    """A visual token joins four patches, whose outlier channels share a scale."""
    patches = np.random.default_rng(0).standard_normal((50, 4, 384)).astype(np.float32)
    patches[:, :, 77] *= 40
    tokens = patches.reshape(50, 1536)
    for count, share in ((12, 1 / 12), (24, 1 / 24)):
        stored, scales = quantize_tokens(torch.from_numpy(tokens), torch.int8, count)
        coarse = scales.numpy().astype(np.float32) > 4 * np.median(scales)
        assert coarse[:, 77 % count].all() and coarse.mean() == pytest.approx(share)
        read_back = decode_values(stored.numpy(), StoreDtype.INT8, scales.numpy())
        fine = np.arange(1536) % count != 77 % count
        assert np.linalg.norm((read_back - tokens)[:, fine]) < 0.009 * np.linalg.norm(tokens[:, fine])


def test_the_numbers_behind_the_codes_of_fp8_are_those_of_torch() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(
        decode_values(codes[:, None], StoreDtype.FP8, np.ones(256, np.float32))[:, 0], expected
    )


# --------------------------------------------------------------------------------------------------------- the outputs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 6)
    return folder


@pytest.fixture(scope="module")
def exact(pictures: Path) -> Path:
    path = pictures.parent / f"{pictures.name}-exact.h5"
    extract(pictures, "-o", path, "--store-dtype", "float32")
    return path


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("kind", ["h5", "npy"])
def test_coarse_tokens_are_close_to_exact_ones_and_verify(
    tmp_path: Path, pictures: Path, exact: Path, dtype: str, kind: str
) -> None:
    output = tmp_path / ("feats.h5" if kind == "h5" else "feats")
    extract(pictures, "-o", output, "--store-dtype", dtype, "--tile-pooled")
    features, wanted = open_features(output), open_features(exact)
    worst = 1.0
    for key, image in features.items():
        read, given = image.visual_tokens, wanted[key].visual_tokens
        assert read.dtype == np.float32
        cosine = (read * given).sum(-1) / np.linalg.norm(read, axis=-1) / np.linalg.norm(given, axis=-1)
        worst = min(worst, float(cosine.min()))
        np.testing.assert_array_equal(image.pooled, wanted[key].pooled)
        np.testing.assert_array_equal(image.to_torch().numpy(), read)
        np.testing.assert_array_equal(image.tile_tokens(0), read[0])
    assert 0.995 < worst < 1
    measured = json.loads(features.attributes["store_error"])
    assert measured["tiles"] > 0
    assert measured["lowest_cosine"] == pytest.approx(worst, abs=2e-3)
    assert 0 < measured["relative_error"] < 0.05
    assert verify(output) == 0


def test_int8_takes_half_the_bytes_of_float16(tmp_path: Path, pictures: Path) -> None:
    for dtype in ("int8", "float16"):
        extract(pictures, "-o", tmp_path / f"{dtype}.h5", "--store-dtype", dtype)
    with h5py.File(tmp_path / "int8.h5") as coarse, h5py.File(tmp_path / "float16.h5") as fine:
        assert coarse["visual_tokens"].attrs["dtype"] == "int8"
        assert coarse["visual_tokens"].nbytes * 2 == fine["visual_tokens"].nbytes
        scales = coarse["visual_scales"][0]  # [T, 2] for 256 values per token
        assert scales.shape == (4, 2) and scales.dtype == np.float16
        assert coarse["visual_scales"].nbytes < 0.016 * coarse["visual_tokens"].nbytes
        read = coarse["visual_tokens"][0] * np.tile(scales.astype(np.float32), 128)
        np.testing.assert_allclose(read, fine["visual_tokens"][0], atol=float(np.abs(read).max()) / 127)


@pytest.mark.parametrize(("kind", "values", "scales"), [("visual", 128, 2), ("patch", 64, 1)])
def test_the_recipe_and_info_say_how_many_values_share_a_scale(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], kind: str, values: int, scales: int
) -> None:
    extract(pictures, "-o", tmp_path / "feats.h5", "--store-dtype", "int8", "--tokens", kind)
    assert open_features(tmp_path / "feats.h5").recipe.values_per_scale == values
    assert run(["info", str(tmp_path / "feats.h5"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["recipe"]["values_per_scale"] == values
    of_scales, of_tokens = (facts["datasets"][f"{kind}_{what}"] for what in ("scales", "tokens"))
    assert of_scales == {"shape": [*of_tokens["shape"][:2], scales], "dtype": "float16"}


@pytest.mark.parametrize("options", [("--store-dtype", "fp8"), ("--store-dtype", "float16"), ("--tokens", "none")])
def test_recipes_without_several_scales_stay_as_they_were(tmp_path: Path, pictures: Path, options: tuple[str]) -> None:
    extract(pictures, "-o", tmp_path / "feats.h5", "--store-dtype", "int8", *options)
    assert "values_per_scale" not in open_features(tmp_path / "feats.h5").attributes["recipe"]


@pytest.mark.parametrize("kind", ["feats.h5", "feats"])
def test_the_plan_of_a_coarse_output_has_its_exact_size(
    tmp_path: Path, pictures: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(pictures), "-o", str(tmp_path / kind), "--store-dtype", "int8", "--model", "tiny-random"]
    assert run(["plan", *words, "--tile-size", "56", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["bytes"]
    extract(*words[:5])
    assert run(["info", str(tmp_path / kind), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == planned


# ---------------------------------------------------------------------------------- one scale per token, as earlier


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Two outputs as earlier versions wrote them, with one scale per token, and their pictures."""
    for name in ("a", "b"):
        make_pictures(tmp_path / name, 2, seed=ord(name))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoreDtype, "values_per_scale", lambda *_: 0)
            extract(tmp_path / name, "-o", tmp_path / f"{name}.h5", "--store-dtype", "int8")
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["visual_scales"].dtype == np.float32 and file["visual_scales"].ndim == 2
    return tmp_path


def test_an_output_with_one_scale_per_token_goes_on_so_until_it_is_overwritten(earlier: Path) -> None:
    output = earlier / "a.h5"
    before = open_features(output)
    tokens = {key: image.visual_tokens for key, image in before.items()}
    make_pictures(earlier / "a", 1, seed=5)
    extract(earlier / "a", "-o", output, "--store-dtype", "int8")
    after = open_features(output)
    assert len(after) == 3 and after.recipe == before.recipe and after.recipe.values_per_scale == 0
    for key, rows in tokens.items():
        np.testing.assert_array_equal(after[key].visual_tokens, rows)
    assert verify(output) == 0
    extract(earlier / "a", "-o", output, "--store-dtype", "int8", "--overwrite")
    assert open_features(output).recipe.values_per_scale == 128
    assert verify(output) == 0


def test_outputs_with_one_scale_per_token_are_merged_with_their_like_only(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other, new = earlier / "a.h5", earlier / "b.h5", earlier / "new.h5"
    extract(earlier / "b", "-o", new, "--store-dtype", "int8")
    assert run(["merge", str(one), str(other), "-o", str(earlier / "both.h5"), "-q"]) == 0
    assert len(open_features(earlier / "both.h5")) == 4
    assert verify(earlier / "both.h5") == 0
    assert run(["merge", str(one), str(new), "-o", str(earlier / "mixed.h5"), "-q"]) == 5
    assert "values_per_scale" in capsys.readouterr().err
    for path in (other, new):  # without tokens, nothing of it is left
        assert run(["export", str(path), str(path.with_suffix(".vectors.h5")), "--no-tokens", "-q"]) == 0
    recipes = {open_features(earlier / name).recipe for name in ("b.vectors.h5", "new.vectors.h5")}
    assert len(recipes) == 1


def test_both_layouts_are_exported_as_they_are_and_compared_as_numbers(
    earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(earlier / "b", "-o", earlier / "new.h5", "--store-dtype", "int8")
    for name in ("b", "new"):
        path, back = earlier / f"{name}.h5", earlier / f"{name}-back.h5"
        assert run(["export", str(path), str(earlier / f"{name}-npy"), "-q"]) == 0
        assert run(["export", str(earlier / f"{name}-npy"), str(back), "-q"]) == 0
        assert run(["diff", str(path), str(back), "-q"]) == 0
        assert verify(back) == 0
    capsys.readouterr()
    assert run(["diff", str(earlier / "b.h5"), str(earlier / "new.h5"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == {"values_per_scale": ["0", "128"]}
    assert 0.999 < found["tokens"]["lowest"] < 1 and found["equal_tokens"] == 0


@pytest.mark.parametrize("kind", ["h5", "npy"])
def test_an_output_of_coarse_tokens_grows_and_keeps_its_figures(tmp_path: Path, kind: str) -> None:
    folder, output = tmp_path / "pictures", tmp_path / ("feats.h5" if kind == "h5" else "feats")
    make_pictures(folder, 3)
    extract(folder, "-o", output, "--store-dtype", "int8")
    before = open_features(output)
    tokens = {key: image.visual_tokens for key, image in before.items()}
    make_pictures(folder, 2, seed=2)
    extract(folder, "-o", output, "--store-dtype", "int8")
    after = open_features(output)
    assert len(after) == 5
    assert after.attributes["store_error"] == before.attributes["store_error"]
    for key, rows in tokens.items():
        np.testing.assert_array_equal(after[key].visual_tokens, rows)
    assert verify(output) == 0


@pytest.mark.sweep
def test_several_devices_store_the_same_coarse_tokens(tmp_path: Path, pictures: Path) -> None:
    extract(pictures, "-o", tmp_path / "one.h5", "--store-dtype", "int8")
    words = ["--devices", "cpu,cpu", "--model", "tiny-random", "--dtype", "float32", "--tile-size", "56", "-q"]
    both = tmp_path / "two.h5"
    assert run(["extract", str(pictures), "-o", str(both), "--store-dtype", "int8", *words]) == 0
    one, two = open_features(tmp_path / "one.h5"), open_features(both)
    assert one.attributes["store_error"] == two.attributes["store_error"]
    for key, image in one.items():
        np.testing.assert_array_equal(image.visual_tokens, two[key].visual_tokens)


@pytest.mark.parametrize("dtype", SCALED)
def test_an_extractor_gives_the_same_coarse_tokens(tmp_path: Path, pictures: Path, dtype: str) -> None:
    extract(pictures, "-o", tmp_path / "feats.h5", "--store-dtype", dtype)
    features = open_features(tmp_path / "feats.h5")
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "tile_size": 56}
    with Extractor("tiny-random", store_dtype=dtype, **options) as extractor:
        images = extractor([pictures / key for key in features])
    assert len(images) == len(list(pictures.rglob("*.*"))) > 0
    for image, stored in zip(images, features.values(), strict=True):
        np.testing.assert_array_equal(image.visual_tokens, stored.visual_tokens)


def test_a_damaged_scale_is_found(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "feats.h5"
    extract(pictures, "-o", output, "--store-dtype", "int8")
    with h5py.File(output) as file:
        offset = file["visual_scales"].id.get_offset()
    data = bytearray(output.read_bytes())
    data[offset + 2] ^= 1
    output.write_bytes(data)
    assert run(["verify", str(output)]) == 1
    assert next(iter(open_features(output))) in capsys.readouterr().out


def test_pictures_that_cannot_be_decoded_leave_the_figures_unknown(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    whole = make_pictures(tmp_path / "other", 1)[0].read_bytes()
    (tmp_path / "pictures" / "cut.png").write_bytes(whole[: len(whole) // 2])
    extract(tmp_path / "pictures", "-o", tmp_path / "feats.h5", "--store-dtype", "int8", expect=1)
    assert json.loads(open_features(tmp_path / "feats.h5").attributes["store_error"]) == {"tiles": 0}


def test_info_tells_the_figures(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(pictures, "-o", tmp_path / "feats.h5", "--store-dtype", "fp8")
    capsys.readouterr()
    assert run(["info", str(tmp_path / "feats.h5"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert 0.99 < facts["accuracy"]["store_error"]["lowest_cosine"] < 1
    assert facts["datasets"]["visual_tokens"]["dtype"] == "fp8"
    assert run(["info", str(tmp_path / "feats.h5")]) == 0
    assert "lowest_cosine" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- arithmetic in fp8


@pytest.fixture
def emulated_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 on a CPU, where it is emulated and never offered."""
    for module in ("encode.devices", "extract.requests"):
        monkeypatch.setattr(f"internvit_cli.{module}.check_kind", lambda *_, **__: None)


def extract_in_fp8(pictures: Path, output: Path, *more: str) -> int:
    words = ["--model", "tiny-random", "--device", "cpu", "--dtype", "fp8", "--tile-size", "56", "-q"]
    return run(["extract", str(pictures), "-o", str(output), *words, *more])


def test_a_run_in_fp8_stores_how_far_it_is_from_wider_types(tmp_path: Path, pictures: Path, emulated_fp8: None) -> None:
    # Random weights lose more than trained ones.
    assert extract_in_fp8(pictures, tmp_path / "feats.h5", "--max-error", "0.9") == 0
    measured = json.loads(open_features(tmp_path / "feats.h5").attributes["compute_error"])
    assert 6 <= measured["tiles"] <= 12
    assert 0.9 < measured["lowest_cosine_bfloat16"] < measured["mean_cosine_bfloat16"] < 1
    assert 0 < measured["relative_error_float32"] < 0.2


def test_a_run_in_fp8_that_is_too_coarse_stops_before_it_makes_anything(
    tmp_path: Path, pictures: Path, emulated_fp8: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract_in_fp8(pictures, tmp_path / "feats.h5", "--max-error", "0.99999") == 1
    said = capsys.readouterr().err
    assert "below 0.99999" in said
    accepted = re.search(r"use --dtype bfloat16, or accept it with --max-error (0\.9\d*)$", said.strip())
    assert accepted is not None
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("feats.h5") and path.suffix != ".lock"]
    assert extract_in_fp8(pictures, tmp_path / "feats.h5", "--max-error", accepted[1]) == 0, "the hint is right"


# ------------------------------------------------------------------------------------------------------- the attributes


def test_figures_that_are_not_numbers_are_refused_and_still_are_json() -> None:
    nan = float("nan")
    found = Accuracy(ComputeError(2, nan, nan, nan, nan, nan), StoreError(2, nan, nan, nan))
    with pytest.raises(AccuracyError):
        found.check(0.0)

    recipe = replace(storage_helpers.RECIPE, compute_dtype=ComputeDtype.FP8, store_dtype=StoreDtype.INT8)
    texts = accuracy.to_attributes(recipe, found)
    assert json.loads(texts["store_error"])["lowest_cosine"] is None
    assert {len(text) for text in texts.values()} == {ATTRIBUTE_CHARACTERS}


@given(st.integers(1, 16), st.lists(st.floats(-1, 1), min_size=5, max_size=5))
def test_figures_always_fit_their_attribute(tiles: int, figures: list[float]) -> None:
    recipe = replace(storage_helpers.RECIPE, compute_dtype=ComputeDtype.FP8, tokens=Tokens.NONE)
    (text,) = accuracy.to_attributes(recipe, Accuracy(ComputeError(tiles, *figures))).values()
    assert len(text) == ATTRIBUTE_CHARACTERS


# --------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("dtype", SCALED)
def test_coarse_tokens_survive_an_export_and_back(tmp_path: Path, pictures: Path, dtype: str) -> None:
    output = tmp_path / "feats.h5"
    extract(pictures, "-o", output, "--store-dtype", dtype)
    assert run(["export", str(output), str(tmp_path / "npy"), "-q"]) == 0
    assert run(["export", str(tmp_path / "npy"), str(tmp_path / "back.h5"), "-q"]) == 0
    assert run(["diff", str(output), str(tmp_path / "back.h5"), "-q"]) == 0
    assert verify(tmp_path / "back.h5") == 0
    assert (
        open_features(tmp_path / "back.h5").attributes["store_error"] == open_features(output).attributes["store_error"]
    )


@pytest.mark.parametrize("dtype", SCALED)
def test_safetensors_holds_coarse_tokens_in_their_own_type(tmp_path: Path, pictures: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    output = tmp_path / "feats.h5"
    extract(pictures, "-o", output, "--store-dtype", dtype)
    assert run(["export", str(output), str(tmp_path / "feats.safetensors"), "-q"]) == 0
    tensors = load_file(tmp_path / "feats.safetensors")
    assert tensors["visual_tokens"].dtype is {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[dtype]
    scales = tensors["visual_scales"].float()
    read = tensors["visual_tokens"].float() * (scales[..., None] if dtype == "fp8" else scales.repeat(1, 1, 128))
    expected = np.concatenate([image.visual_tokens for image in open_features(output).values()])
    np.testing.assert_array_equal(read.numpy(), expected)


def test_coarse_and_fine_outputs_are_compared_as_numbers(
    tmp_path: Path, pictures: Path, exact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(pictures, "-o", tmp_path / "feats.h5", "--store-dtype", "int8")
    capsys.readouterr()
    assert run(["diff", str(exact), str(tmp_path / "feats.h5"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["equal_vectors"], told["equal_tokens"]) == (6, 0)
    assert 0.995 < told["tokens"]["lowest"] < 1


@pytest.mark.parametrize(
    ("found", "lowest", "shown", "accept"),
    [
        (0.989999, 0.99, "0.98999", "--max-error 0.98999"),
        (0.5, 0.999, "0.5", "--max-error 0.5"),
        (-0.1, 0.0, "-0.1", None),
        (float("nan"), 0.0, "nan", None),
    ],
)
def test_the_refusal_of_a_cosine_names_a_value_that_would_accept_it(
    found: float, lowest: float, shown: str, accept: str | None
) -> None:
    with pytest.raises(AccuracyError) as refused:
        accuracy.check_cosine(found, lowest)
    assert f"a cosine of {shown} " in refused.value.message
    assert refused.value.hint == "use --dtype bfloat16" + (f", or accept it with {accept}" if accept else "")
    if accept:
        accuracy.check_cosine(found, float(accept.split()[-1]))


def test_what_an_output_records_is_held_to_what_is_accepted_now() -> None:
    recorded = {"compute_error": json.dumps({"tiles": 2, "lowest_cosine_bfloat16": 0.99})}
    accuracy.check_recorded(recorded, 0.99)
    accuracy.check_recorded({"compute_error": json.dumps({"tiles": 0})}, 0.99)
    accuracy.check_recorded({}, 0.99)
    with pytest.raises(AccuracyError):
        accuracy.check_recorded(recorded, 0.999)
