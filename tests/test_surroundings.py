"""`internvit models` and `internvit doctor`: what is known by name, and whether this machine is fit for a run."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from run_helpers import internvit, state_of

from internvit_cli import doctor
from internvit_cli.model.catalog import KNOWN_MODELS

if TYPE_CHECKING:
    from pathlib import Path


def checks(*arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    result = internvit("doctor", *arguments, "--json")
    found = json.loads(result.stdout)
    assert found["exit_code"] == result.returncode
    return result.returncode, {check["name"]: check for check in found["checks"]}


def test_every_known_model_is_listed_with_its_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = {model["name"]: model for model in json.loads(internvit("models", "--json").stdout)["models"]}
    assert set(models) == {*(model.repo for model in KNOWN_MODELS), "tiny-random"}
    small = models["OpenGVLab/InternViT-300M-448px-V2_5"]
    assert small["parameters"] == 304_012_288 and small["licence"] == "MIT"
    assert (small["tokens"], small["token_size"], small["bytes_per_tile"]) == (256, 4096, 2_097_152)
    large = models["OpenGVLab/InternViT-6B-448px-V1-0"]
    assert large["parameters"] == 5_905_251_200 and large["blocks"] == 45
    assert models["tiny-random"]["cached"] == "built in"
    table = internvit("models").stdout.splitlines()
    assert all(len(line) <= 80 for line in table) and len(table) == len(models) + 4


def test_a_model_in_the_hub_cache_is_said_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from internvit_cli.model import known

    monkeypatch.setattr(known, "cached_file", lambda repo, name: "x" if "300M" in repo and "json" in name else None)
    models = {model["name"]: model["cached"] for model in json.loads(internvit("models", "--json").stdout)["models"]}
    assert models["OpenGVLab/InternViT-300M-448px"] == "weights"
    assert models["OpenGVLab/InternViT-6B-448px-V2_5"] == "no"


def test_a_machine_that_will_do_is_said_to_do_and_left_as_it_was(tmp_path: Path) -> None:
    before = state_of(tmp_path)
    code, found = checks("-o", tmp_path / "feats.h5")
    assert code == 0
    wanted = {"versions", "processor", "memory", "pictures", "open files", "shared memory", "workers", "hub cache"}
    assert wanted | {"output", "writing", "reserving", "locking", "devices"} <= set(found)
    assert not [name for name, check in found.items() if check["state"] == "bad"]
    assert "torch" in found["versions"]["found"] and "free" in found["output"]["found"]
    assert state_of(tmp_path) == before
    lines = internvit("doctor", "-o", tmp_path / "feats.h5").stdout.splitlines()
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
