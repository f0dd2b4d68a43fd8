"""A model that lies in the hub cache is used from there, and what is missing is named with the way to get it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_helpers import COMMIT, OLDER, answer, hf_download, use_cache
from model_helpers import reference_card, safetensors_bytes
from run_helpers import command, internvit, make_pictures

from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model import hub
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.known import cached_state
from internvit_cli.model.layouts import expected_shapes

CONFIG = {
    "model_type": "intern_vit_6b",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "image_size": 28,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """What the hub has: a whole checkpoint in one file, without any optional file."""
    folder = tmp_path / "stored"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors(folder)))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    use_cache(monkeypatch, tmp_path / "hub")
    return tmp_path / "hub"


def tensors(folder: Path) -> dict[str, np.ndarray]:
    shapes = expected_shapes(describe_model(str(folder)).vision, 2, None)
    generator = np.random.default_rng(0)
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


def in_shards(folder: Path) -> None:
    """The same weights in two shards, the second of which holds one tensor."""
    weights = tensors(folder)
    last = {"encoder.layers.1.ls2": weights.pop("encoder.layers.1.ls2")}
    (folder / "model.safetensors").unlink()
    (folder / "model-00001-of-00002.safetensors").write_bytes(safetensors_bytes(weights))
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors_bytes(last))
    weight_map = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(last, "model-00002-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def opened(name: str, **options: Any) -> Checkpoint:
    card = describe_model(name, **options)
    return Checkpoint.open(card, layer=card.resolve_layer())


def refusal(name: str, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        opened(name, **options)
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", ["300m", DEFAULT_MODEL])
def test_the_default_model_is_used_offline_as_hf_download_leaves_it(
    cache: Path, stored: Path, name: str, shards: bool
) -> None:
    if shards:
        in_shards(stored)
    hf_download(cache, DEFAULT_MODEL, stored)
    assert opened(name).digest() == opened(str(stored)).digest()
    assert opened(name).card.revision == COMMIT
    assert cached_state(DEFAULT_MODEL) == "yes"


def test_a_hub_that_cannot_be_reached_costs_one_short_try_and_a_note(
    cache: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_download(cache, "some/model", stored)
    asked = answer(monkeypatch, error=OSError(101, "Network is unreachable"))
    checkpoint = opened("some/model")
    assert asked == [("some/model", None)]
    (unreachable, normalized) = checkpoint.card.notes
    assert "Network is unreachable" in unreachable and COMMIT[:12] in unreachable and "HF_HUB_OFFLINE" in unreachable
    assert "ImageNet" in normalized


def test_a_hub_that_never_answers_is_left_after_a_while(
    cache: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    answer(monkeypatch)

    class Api:
        def model_info(self, *_: Any, **__: Any) -> None:
            time.sleep(60)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert "no answer, after 0." in refusal("some/model").message
    hf_download(cache, "some/model", stored)
    assert "no answer" in opened("some/model").card.notes[0]


def test_what_answers_in_the_place_of_the_hub_is_no_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, error=json.JSONDecodeError("Expecting value", "<html>", 0))
    assert "not from the Hugging Face hub" in refusal("some/model").message


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("config.json", "config.json is not in the hub cache"),
        ("model-00002-of-00002.safetensors", "model-00002-of-00002.safetensors is not in the hub cache"),
        ("model.safetensors", "model.safetensors is not in the hub cache"),
    ],
)
def test_what_is_really_missing_is_named_with_the_way_to_get_it(
    cache: Path, stored: Path, without: str, words: str
) -> None:
    if "-of-" in without:
        in_shards(stored)
    hf_download(cache, DEFAULT_MODEL, stored, without=[without])
    error = refusal("300m")
    assert words in error.message and "offline mode is on" in error.message
    assert f"hf download {DEFAULT_MODEL}" in error.hint
    assert cached_state(DEFAULT_MODEL) == "partly"


def test_a_shard_that_nothing_wanted_is_in_may_be_missing(cache: Path, stored: Path) -> None:
    in_shards(stored)
    hf_download(cache, "some/model", stored, without=["model-00002-of-00002.safetensors"])
    Checkpoint.open(describe_model("some/model"), layer=1).digest()
    assert "model-00002" in refusal("some/model").message


def test_a_link_to_a_deleted_blob_is_a_missing_file(cache: Path, stored: Path) -> None:
    snapshot = hf_download(cache, "some/model", stored)
    os.remove(os.path.realpath(snapshot / "model.safetensors"))
    assert "model.safetensors is not in the hub cache" in refusal("some/model").message


@pytest.mark.parametrize("absent", [(), ("preprocessor_config.json", "processor_config.json", INDEX)])
def test_optional_files_that_are_not_there_count_as_absent(
    cache: Path, stored: Path, absent: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_download(cache, "some/model", stored, absent=absent)
    assert opened("some/model").card.mean == (0.485, 0.456, 0.406)
    answer(monkeypatch, error=OSError("no network"))
    assert opened("some/model", revision=COMMIT).card.mean == (0.485, 0.456, 0.406)


def test_a_commit_that_is_whole_in_the_cache_is_asked_about_by_nobody(
    cache: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards(stored)
    (stored / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    hf_download(cache, "some/model", stored)
    asked = answer(monkeypatch, error=OSError("no network"))
    assert opened("some/model", revision=COMMIT).card.mean == (0.5, 0.5, 0.5)
    assert asked == []


def test_a_commit_whose_preprocessor_did_not_arrive_is_asked_about(
    cache: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stored / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    hf_download(cache, "some/model", stored, without=["preprocessor_config.json"])

    def download(repo: str, filename: str, **_: Any) -> str:
        return str(stored / filename)

    answer(monkeypatch, files=[path.name for path in stored.iterdir()], download=download)
    assert describe_model("some/model", revision=COMMIT).mean == (0.5, 0.5, 0.5)


def test_the_preprocessor_of_the_cache_counts(cache: Path, stored: Path) -> None:
    (stored / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    hf_download(cache, "some/model", stored)
    card = describe_model("some/model")
    assert card.mean == (0.5, 0.5, 0.5) and not card.notes


def test_a_file_that_the_hub_has_and_the_cache_lacks_is_fetched(
    cache: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards(stored)
    (stored / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    missing = ["model-00002-of-00002.safetensors", "preprocessor_config.json"]
    hf_download(cache, "some/model", stored, without=missing)
    fetched = []

    def download(repo: str, filename: str, *, revision: str, **_: Any) -> str:
        fetched.append(filename)
        return str(stored / filename)

    answer(monkeypatch, files=[path.name for path in stored.iterdir()], download=download)
    assert opened("some/model").card.mean == (0.5, 0.5, 0.5)
    assert sorted(fetched) == sorted(missing)


def test_a_download_by_commit_leaves_no_branch_and_serves_all_the_same(cache: Path, stored: Path) -> None:
    hf_download(cache, "some/model", stored, ref=None)
    checkpoint = opened("some/model")
    assert checkpoint.card.revision == COMMIT
    assert "its only cached commit" in checkpoint.card.notes[0]


def test_a_main_whose_commit_is_not_there_gives_way_to_the_only_one_that_is(cache: Path, stored: Path) -> None:
    snapshot = hf_download(cache, "some/model", stored, commit=OLDER)
    (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
    (snapshot.parent / COMMIT).mkdir()  # begun, and empty
    assert opened("some/model").card.revision == OLDER
    with pytest.raises(ModelError, match="not in the hub cache"):
        describe_model("some/model", revision=COMMIT)


def test_several_commits_without_a_main_are_listed(cache: Path, stored: Path) -> None:
    hf_download(cache, "some/model", stored, ref=None)
    hf_download(cache, "some/model", stored, commit=OLDER, ref=None)
    error = refusal("some/model")
    assert COMMIT in error.hint and OLDER in error.hint and "--revision" in error.hint
    assert opened("some/model", revision=OLDER).card.revision == OLDER


def test_main_wins_over_other_commits_and_branches_are_known_by_name(cache: Path, stored: Path) -> None:
    hf_download(cache, "some/model", stored)
    hf_download(cache, "some/model", stored, commit=OLDER, ref="v1")
    assert describe_model("some/model").revision == COMMIT
    assert describe_model("some/model", revision="v1").revision == OLDER


def test_an_update_that_did_not_finish_points_to_the_older_files(cache: Path, stored: Path) -> None:
    hf_download(cache, "some/model", stored, commit=OLDER, ref=None)
    hf_download(cache, "some/model", stored, without=["model.safetensors"])
    assert f"--revision {OLDER}" in refusal("some/model").hint


@pytest.mark.parametrize("text", ["", "main", "../../../etc", "x" * 100_000, COMMIT.upper()])
def test_a_ref_that_names_no_commit_counts_as_none(cache: Path, stored: Path, text: str) -> None:
    snapshot = hf_download(cache, "some/model", stored)
    (snapshot.parent.parent / "refs" / "main").write_text(text)
    assert "its only cached commit" in opened("some/model").card.notes[0]


def test_folders_of_a_cache_are_models(cache: Path, stored: Path, tmp_path: Path) -> None:
    snapshot = hf_download(cache, "some/model", stored)
    digest = opened(str(stored)).digest()
    repo = snapshot.parent.parent
    for folder in (repo, snapshot.parent, snapshot, f"{repo}/"):
        checkpoint = opened(str(folder))
        assert checkpoint.digest() == digest
        assert checkpoint.card.recorded_name == str(snapshot)
    assert opened(str(repo), revision="main").digest() == digest
    assert opened(repo.name).card.name == "some/model"  # the folder's name alone is the hub id
    moved = tmp_path / "elsewhere"
    shutil.copytree(repo, moved, symlinks=True)
    assert opened(str(moved)).digest() == digest
    with pytest.raises(UsageError, match=OLDER):
        opened(str(repo), revision=OLDER)


def test_an_empty_cache_folder_says_what_it_is(cache: Path) -> None:
    (cache / "models--some--model" / "snapshots").mkdir(parents=True)
    assert "without any files" in refusal(str(cache / "models--some--model")).message


def test_every_command_uses_the_model_of_the_cache_offline(tmp_path: Path, cache: Path) -> None:
    hf_download(cache, "some/InternVL", Path(str(reference_card("300m", "chat").directory)))
    pictures = make_pictures(tmp_path / "imgs", 3)
    output = tmp_path / "feats.h5"
    words = ("--model", "some/InternVL", "--device", "cpu", "--dtype", "float32", "-q")
    assert internvit("extract", tmp_path / "imgs", "-o", output, *words).returncode == 0
    again = internvit("extract", tmp_path / "imgs", "-o", output, *words, "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["encoded"] == 0
    for arguments in (("search", output, pictures[0]), ("verify", output, "--re-extract", "2")):
        result = internvit(*arguments, "--device", "cpu")
        assert result.returncode == 0, result.stderr
    assert internvit("plan", tmp_path / "imgs", *words).returncode == 0


@pytest.mark.parametrize(("variable", "inner"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub")])
def test_the_variables_of_the_hub_say_where_its_cache_is(
    tmp_path: Path, stored: Path, monkeypatch: pytest.MonkeyPatch, variable: str, inner: str
) -> None:
    hf_download(tmp_path / "hf" / inner, DEFAULT_MODEL, stored)
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "hf"))
    # In a process of its own, since variables are read when huggingface_hub is loaded.
    result = subprocess.run(command("models", "--json"), capture_output=True, text=True, timeout=300)
    assert json.loads(result.stdout)["models"][0]["cached"] == "yes"


def test_a_plan_with_a_model_of_timm_fetches_no_weights(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_intern300m_patch14_448"}))
    fetched = []

    def download(repo: str, filename: str, **_: Any) -> str:
        fetched.append(filename)
        return str(tmp_path / filename)

    answer(monkeypatch, files=["config.json", "model.safetensors"], download=download)
    make_pictures(tmp_path / "imgs", 1)
    result = internvit("plan", tmp_path / "imgs", "--model", "timm/vit_intern300m_patch14_448.ogvl_2pt5")
    assert result.returncode == 0 and "a run fetches about 0.6 GB" in result.stderr
    assert fetched == ["config.json"]


def test_models_says_cached_only_where_a_run_would_work(cache: Path, stored: Path) -> None:
    hf_download(cache, DEFAULT_MODEL, stored)
    hf_download(cache, "OpenGVLab/InternViT-300M-448px", stored, without=["model.safetensors"])
    listed = json.loads(internvit("models", "--json").stdout)["models"]
    states = {model["name"]: model["cached"] for model in listed}
    assert states[DEFAULT_MODEL] == "yes"
    assert states["OpenGVLab/InternViT-300M-448px"] == "partly"
    assert states["OpenGVLab/InternViT-6B-448px-V2_5"] == "no"
    lines = internvit("models").stdout.splitlines()
    assert lines[0].split() == ["name", "short", "download", "tokens/tile", "bytes/tile", "cached"]
    assert "608.0 MB" in lines[1] and "2.1 MB" in lines[1] and lines[1].split()[-1] == "yes"
