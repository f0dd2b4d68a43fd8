"""`internvit models` and `internvit doctor`: what is known by name, and whether this machine is fit for a run."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from folders import REFERENCE
from hub_helpers import answer, hf_download, use_cache
from huggingface_hub import constants
from run_helpers import internvit, make_pictures, state_of

from internvit_cli.commands import doctor
from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.model.catalog import KNOWN_MODELS

if TYPE_CHECKING:
    from pathlib import Path


def checks(*arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    if "--model" not in arguments:
        arguments = (*arguments, "--model", "tiny-random")
    result = internvit("doctor", *arguments, "--json")
    found = json.loads(result.stdout)
    assert found["exit_code"] == result.returncode
    return result.returncode, {check["name"]: check for check in found["checks"]}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty hub cache, offline: no test may reach the hub, or find what this machine has."""
    use_cache(monkeypatch, tmp_path / "hub")


def test_every_known_model_is_listed_with_its_sizes() -> None:
    models = {model["name"]: model for model in json.loads(internvit("models", "--json").stdout)["models"]}
    assert set(models) == {*(model.repo for model in KNOWN_MODELS), "tiny-random"}
    small = models["OpenGVLab/InternViT-300M-448px-V2_5"]
    assert small["parameters"] == 304_012_288 and small["license"] == "MIT"
    assert small["download_bytes"] == 608_024_576
    assert (small["tokens"], small["token_size"], small["bytes_per_tile"]) == (256, 4096, 2_097_152)
    large = models["OpenGVLab/InternViT-6B-448px-V1-0"]
    assert large["parameters"] == 5_905_251_200 and large["blocks"] == 45
    assert models["tiny-random"]["cached"] == "built in"
    table = internvit("models").stdout.splitlines()
    assert all(len(line) <= 80 for line in table) and len(table) == len(models) + 4


def test_a_machine_that_will_do_is_said_to_do_and_left_as_it_was(tmp_path: Path) -> None:
    before = state_of(tmp_path)
    code, found = checks("-o", tmp_path / "feats.h5")
    assert code == 0
    wanted = {"versions", "processor", "memory", "pictures", "open files", "shared memory", "workers", "hub cache"}
    assert wanted | {"output", "writing", "reserving", "locking", "devices"} <= set(found)
    assert not [name for name, check in found.items() if check["state"] == "bad"]
    assert "torch" in found["versions"]["found"] and "free" in found["output"]["found"]
    assert state_of(tmp_path) == before
    lines = internvit("doctor", "--model", "tiny-random", "-o", tmp_path / "feats.h5").stdout.splitlines()
    assert all(line.split()[0] in {"ok", "note", "hint:"} for line in lines)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s3cret" * 6)
    result = internvit("doctor")
    assert "a token is set" in result.stdout and "s3cret" not in result.stdout + result.stderr


def test_what_will_not_work_is_bad_and_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = checks("-o", tmp_path / "missing" / "feats.h5")
    assert code == 1 and found["output"]["state"] == "bad" and "mkdir" in found["output"]["hint"]

    def refuse(*_: Any) -> None:
        raise OSError(37, os.strerror(37))

    monkeypatch.setattr(fcntl, "flock", refuse)
    code, found = checks("-o", tmp_path / "feats.h5")
    assert code == 0 and found["locking"]["state"] == "note" and "--no-lock" in found["locking"]["hint"]
    monkeypatch.setattr(doctor, "reserve", refuse)
    monkeypatch.setattr(doctor, "usable_cpus", lambda: 1)
    code, found = checks("-o", tmp_path / "feats.h5")
    assert code == 1 and found["reserving"]["state"] == "bad"


def test_a_folder_that_cannot_be_written_is_bad(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,ro", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        code, found = checks("-o", tmp_path / "feats.h5")
        assert code == 1 and found["writing"]["state"] == "bad" and "Read-only" in found["writing"]["found"]
        assert "tmpfs" in found["output"]["found"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_model_of_a_run_is_looked_for_in_the_cache_in_folders_and_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = ("-o", tmp_path / "feats.h5")
    code, found = checks(*output, "--model", DEFAULT_MODEL)
    assert code == 1 and found["model"]["state"] == "bad"
    assert "not in the hub cache" in found["model"]["found"] and "hf download" in found["model"]["hint"]
    lines = internvit("doctor", *output).stdout  # the default model is the one that a run takes
    assert any(line.startswith("bad") and DEFAULT_MODEL in line for line in lines.splitlines())

    answer(monkeypatch, error=ConnectionRefusedError(111, "Connection refused"))
    code, found = checks(*output, "--model", DEFAULT_MODEL)
    assert code == 1 and "Connection refused" in found["model"]["found"]

    answer(monkeypatch, files=["config.json", "model.safetensors"])
    code, found = checks(*output, "--model", DEFAULT_MODEL)
    assert code == 0 and "the first run fetches it, about 0.6 GB" in found["model"]["found"]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hf_download(tmp_path / "hub", DEFAULT_MODEL, REFERENCE / "300m-standalone")
    code, found = checks(*output, "--model", "300m")
    assert code == 0 and "is in the hub cache" in found["model"]["found"]

    code, found = checks(*output, "--model", REFERENCE / "6b-chat")
    assert code == 0 and "in its folder" in found["model"]["found"]
    code, found = checks(*output, "--model", tmp_path / "hub")
    assert code == 1 and "config.json" in found["model"]["found"]


def plan(tmp_path: Path, *words: object) -> tuple[int, str]:
    if not (tmp_path / "imgs").exists():
        make_pictures(tmp_path / "imgs", 2)
    output = () if "-o" in words else ("-o", tmp_path / "feats.h5")
    model = () if "--model" in words else ("--model", "tiny-random")
    results = [
        internvit("plan", tmp_path / "imgs", *output, *model, *words),
        internvit("extract", tmp_path / "imgs", *output, *model, *words, "--dry-run"),
    ]
    assert (results[0].returncode, results[0].stderr) == (results[1].returncode, results[1].stderr)
    assert not (tmp_path / "feats.h5").exists()
    return results[0].returncode, results[0].stderr


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:1", "tpu"])
def test_a_device_that_no_machine_has_is_a_usage_error_of_a_plan_too(tmp_path: Path, device: str) -> None:
    code, told = plan(tmp_path, "--device", device)
    assert code == 2 and "not a device" in told
    if device == "gpu":
        assert "did you mean cuda" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "cuda"), "--device cuda"),
        (("--device", "cuda:7"), "--device cuda:7"),
        (("--devices", "all"), "no CUDA device"),
        (("--dtype", "fp8"), "--dtype fp8 on cpu"),
        (("--compile",), "--compile on cpu"),
        (("--device", "mps"), "--device mps"),
    ],
)
def test_what_this_machine_would_refuse_is_a_note_of_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    code, stderr = plan(tmp_path, *words)
    assert code == 0
    assert "note: a run on this machine would refuse this" in stderr and told in stderr


@pytest.mark.parametrize(
    ("words", "code"), [(("--device", "cpu", "--dtype", "fp8"), 1), (("--device", "cpu", "--compile"), 2)]
)
def test_what_no_device_of_that_kind_can_do_fails_a_plan_as_it_fails_a_run(
    tmp_path: Path, words: tuple[str, ...], code: int
) -> None:
    assert plan(tmp_path, *words)[0] == code
    run = internvit("extract", tmp_path / "imgs", "-o", tmp_path / "feats.h5", "--model", "tiny-random", *words)
    assert run.returncode == code


def test_an_output_that_a_run_would_refuse_is_a_note_of_a_plan_and_nothing_is_made(tmp_path: Path) -> None:
    full, file = tmp_path / "documents", tmp_path / "letter"
    full.mkdir()
    (full / "letter.txt").write_text("dear reader")
    file.write_text("dear reader")
    before = sorted(tmp_path.rglob("*"))
    for place, told in (
        (full, "holds other files"),
        (file, "is a file"),
        (tmp_path / "nowhere" / "feats.h5", "does not exist"),
    ):
        code, stderr = plan(tmp_path, "-o", place)
        assert code == 0 and "a run would refuse this output" in stderr and told in stderr
    code, stderr = plan(tmp_path, "-o", tmp_path / "new")
    assert code == 0 and "refuse" not in stderr
    assert {path for path in tmp_path.rglob("*") if "imgs" not in path.parts} == set(before)


def test_a_model_that_a_run_would_refuse_is_a_note_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, told = plan(tmp_path, "--model", "300m")
    assert code == 0 and "comes from the catalog" in told
    assert f"a run would refuse this model until it is downloaded: hf download {DEFAULT_MODEL} (about 0.6 GB" in told

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (REFERENCE / "300m-standalone").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    code, told = plan(tmp_path, "--model", folder)
    assert code == 0 and "note" not in told
    (folder / "model.safetensors").unlink()
    code, told = plan(tmp_path, "--model", folder)
    assert code == 0 and "a run would refuse this model" in told and "no model.safetensors" in told

    hf_download(tmp_path / "hub", "some/model", folder)  # without the weights
    code, told = plan(tmp_path, "--model", "some/model")
    assert code == 0 and "a run would refuse this model" in told and "not in the hub cache" in told
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    answer(monkeypatch, files=names)
    code, told = plan(tmp_path, "--model", "some/model")
    assert code == 0 and "a run fetches about" in told


@pytest.mark.parametrize("name", ["f.h5", "f"])
def test_an_output_of_another_recipe_is_a_note_of_a_plan(tmp_path: Path, name: str) -> None:
    make_pictures(tmp_path / "imgs", 1)
    line = [tmp_path / "imgs", "-o", tmp_path / name, "--model", "tiny-random", "--tokens", "none"]
    assert internvit("extract", *line).returncode == 0
    assert "a run would refuse" not in internvit("plan", *line).stderr
    for other in (("--max-tiles", "3"), ("--pool", "cls"), ("--dtype", "float16")):
        told = internvit("plan", *line, *other)
        assert told.returncode == 0 and "a run would refuse this output" in told.stderr, told
        assert "was made with another recipe" in told.stderr
        assert "a run would refuse" not in internvit("plan", *line, *other, "--overwrite").stderr


def test_a_damaged_output_is_a_note_of_a_plan_and_an_empty_folder_is_none(tmp_path: Path) -> None:
    make_pictures(tmp_path / "imgs", 1)
    line = [tmp_path / "imgs", "--model", "tiny-random", "-o"]
    (tmp_path / "empty").mkdir()
    assert "a run would refuse" not in internvit("plan", *line, tmp_path / "empty").stderr
    (tmp_path / "f.h5").write_bytes(b"no feature file")
    assert "a run would refuse this output" in internvit("plan", *line, tmp_path / "f.h5").stderr
