"""`internvit bench` and `plan --bench`: figures of every stage, a prediction that follows from them, nothing left."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import internvit, make_pictures, state_of

from internvit_cli.cli.bench import batch_list, dtype_list
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.commands.bench import ADVICE, DecodeRate, EncoderRate, predict
from internvit_cli.config import ComputeDtype
from internvit_cli.runtime.workers import usable_cpus

if TYPE_CHECKING:
    from pathlib import Path

QUICK = ("--model", "tiny-random", "--seconds", "0.2", "--dtype", "float32")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 6)
    (tmp_path / "pictures" / "bad.jpg").write_text("no picture")
    return tmp_path / "pictures"


def test_every_stage_has_a_figure_and_nothing_is_left_behind(pictures: Path, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    result = internvit("bench", pictures, "-o", tmp_path / "feats.h5", *QUICK, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    (encoder,) = figures["encoder"]
    assert encoder["tiles_per_second"] > 0 and encoder["dtype"] == "float32" and encoder["device"] == "cpu"
    decode = figures["decode"]
    assert decode["images"] >= 1 and decode["images_per_second"] > 0 and decode["megapixels_per_second"] > 0
    assert figures["write_bytes_per_second"] > 0
    prediction = figures["prediction"]
    assert prediction["images"] == 6 and prediction["limit"] in ADVICE
    assert prediction["seconds"] == pytest.approx(6 / prediction["images_per_second"])
    assert state_of(tmp_path) == before


def test_the_table_names_the_bottleneck(pictures: Path) -> None:
    result = internvit("bench", pictures, *QUICK)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines() if line[0] != " "] == [
        *("model", "cores", "encoder", "decode", "write", "images", "time"),
    ]
    assert "is the limit" in result.stdout


def test_without_pictures_encoder_and_disk_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = internvit("bench", *QUICK, "--dtypes", "float32,bfloat16", "--batch-sizes", "2,4", "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["decode"] is None and figures["prediction"] is None
    measured = [(rate["dtype"], rate["batch_tiles"]) for rate in figures["encoder"]]
    assert measured == [("float32", 2), ("float32", 4), ("bfloat16", 2), ("bfloat16", 4)]


@pytest.mark.sweep
def test_a_model_on_the_hub_is_measured_with_weights_that_are_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from internvit_cli.commands import bench

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(bench, "_encoder_rate", lambda encoder, options, seconds: EncoderRate("cpu", "x", 1, 2.0))
    result = internvit("bench", "--model", "300m", "--seconds", "0.1", "--layer", "0")
    assert result.returncode == 0, result.stderr
    assert "the weights are random" in result.stderr


def test_plan_says_how_long_it_will_take(pictures: Path, tmp_path: Path) -> None:
    result = internvit("plan", pictures, "-o", tmp_path / "f.h5", "--model", "tiny-random", "--bench", "--json")
    assert result.returncode == 0, result.stderr
    planned = json.loads(result.stdout)
    assert planned["images"] == 7 and planned["expected"]["seconds"] > 0
    plain = json.loads(internvit("plan", pictures, "--model", "tiny-random", "--json").stdout)
    assert plain["expected"] is None


@pytest.mark.sweep
def test_the_page_of_a_plan_says_how_long_it_will_take(pictures: Path) -> None:
    assert "time     about" in internvit("plan", pictures, "--model", "tiny-random", "--bench").stdout


def survey(images: int, tiles: int, nbytes: int) -> Any:
    return SimpleNamespace(
        table=SimpleNamespace(status=np.zeros(images, np.uint8)), decoded_tiles=tiles, feature_bytes=nbytes
    )


RATES = st.floats(0.1, 1e6)


@given(st.integers(1, 10**6), st.integers(1, 13), RATES, RATES, RATES, st.integers(1, 8))
def test_on_cards_the_slowest_stage_decides(
    images: int, tiles: int, encoder: float, decode: float, write: float, devices: int
) -> None:
    found = survey(images, images * tiles, images * 1000)
    decoding = DecodeRate(10, 4, 4 / decode, 1.0, decode)
    predicted = predict(found, EncoderRate("cuda:0", "bfloat16", 64, encoder), decoding, write, devices)
    times = {"encoder": tiles / encoder / devices, "decode": decode / 4, "write": 1000 / write}
    assert 1 / predicted.images_per_second == pytest.approx(max(times.values()))
    assert times[predicted.limit] == pytest.approx(max(times.values()))
    assert predicted.seconds == pytest.approx(images * max(times.values()))


@given(st.integers(1, 10**6), st.integers(1, 13), RATES, RATES)
def test_on_a_cpu_encoder_and_workers_share_the_cores(images: int, tiles: int, encoder: float, decode: float) -> None:
    found = survey(images, images * tiles, 0)
    decoding = DecodeRate(10, 1, 1 / decode, 1.0, decode)
    predicted = predict(found, EncoderRate("cpu", "bfloat16", 8, encoder), decoding, 1e9, 1)
    assert 1 / predicted.images_per_second == pytest.approx(tiles / encoder + decode / usable_cpus())


@pytest.mark.parametrize("text", ["", "0", "a", "1,", "1,-2", "99999999"])
def test_what_is_no_list_of_batches_is_refused(text: str) -> None:
    with pytest.raises(UnusableWordError):
        batch_list(text)


def test_lists_of_batches_and_types() -> None:
    assert batch_list("1,64") == (1, 64)
    assert dtype_list("float32,bf16") == (ComputeDtype.FLOAT32, ComputeDtype.BFLOAT16)
    with pytest.raises(UnusableWordError):
        dtype_list("float8")
