"""`internvit info OUT --matches CHECKPOINT`: whether a checkpoint has the weights behind stored features."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chat_helpers import extract_for
from run_helpers import internvit, make_pictures
from safetensors.numpy import load_file, save_file

from internvit_cli import open_features
from internvit_cli.model.matching import WeightsMatch, match_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = 4
TOWER = 4 + 14 * LAYERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """A standalone model, features of it, and a chat model whose tower is the same."""
    folder = tmp_path_factory.mktemp("matching")
    make_pictures(folder / "imgs", 1)
    for layout in ("standalone", "chat", "hf"):
        shutil.copytree(reference / f"300m-{layout}", folder / layout)
    how = {"pictures": folder / "imgs"}
    extract_for(folder / "standalone", folder / "feats.h5", "--max-tiles", 1, **how)
    extract_for(folder / "chat", folder / "chat.h5", "--max-tiles", 1, "--tokens", "projected", **how)
    return folder


def match(output: Path, checkpoint: Path | str) -> WeightsMatch:
    features = open_features(output)
    return match_weights(features.recipe, features.attributes, str(checkpoint))


def changed(folder: Path, target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A copy of a checkpoint whose tensors are changed."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
    return target


def nudge(*ends: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            if name.endswith(ends):
                tensors[name] = values + np.float32(1)

    return change


@pytest.mark.parametrize("layout", ["standalone", "chat", "hf"])
def test_a_tower_is_the_same_in_every_layout_and_inside_a_chat_model(folder: Path, layout: str) -> None:
    found = match(folder / "feats.h5", folder / layout)
    assert found.matches and found.tensors == TOWER and found.digest == found.recorded_digest
    assert found.summary.startswith("yes: ")


def test_tensors_that_differ_are_named_with_their_digests(folder: Path, tmp_path: Path) -> None:
    other = changed(folder / "chat", tmp_path / "trained", nudge("layers.1.ls1", "layers.3.mlp.fc1.bias"))
    found = match(folder / "feats.h5", other)
    assert not found.matches
    assert [tensor.name for tensor in found.different] == ["encoder.layers.1.ls1", "encoder.layers.3.mlp.fc1.bias"]
    for tensor in found.different:
        assert tensor.difference == "values" and tensor.digest != tensor.recorded_digest
        assert len(tensor.digest) == len(tensor.recorded_digest) == 64
    assert f"2 of {TOWER} tensors in {other} differ: encoder.layers.1.ls1 (values)" in found.summary


def test_a_third_of_the_joined_tensor_counts_for_the_whole(folder: Path, tmp_path: Path) -> None:
    other = changed(folder / "hf", tmp_path / "trained", nudge("layer.0.attention.k_proj.weight"))
    assert [tensor.name for tensor in match(folder / "feats.h5", other).different] == [
        "encoder.layers.0.attn.qkv.weight"
    ]


def test_the_same_values_in_another_type_are_said_to_be_of_another_type(folder: Path, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, np.ndarray]) -> None:
        for name, values in tensors.items():
            tensors[name] = values.astype(np.float16)

    other = changed(folder / "standalone", tmp_path / "half", narrow)
    found = match(folder / "feats.h5", other)
    assert len(found.different) == TOWER
    assert {tensor.difference for tensor in found.different} == {"type F16 instead of F32"}


def test_projected_tokens_need_the_projector_too(folder: Path, tmp_path: Path) -> None:
    assert match(folder / "chat.h5", folder / "hf").matches
    found = match(folder / "chat.h5", folder / "standalone")
    assert {tensor.difference for tensor in found.different} == {"no such tensor"}
    assert {tensor.name.partition(".")[0] for tensor in found.different} == {"mlp1"}
    other = changed(folder / "chat", tmp_path / "trained", nudge("mlp1.3.bias"))
    assert [tensor.name for tensor in match(folder / "chat.h5", other).different] == ["mlp1.3.bias"]
    assert match(folder / "feats.h5", other).matches  # visual tokens do not depend on it


def test_blocks_after_the_layer_of_the_features_do_not_matter(folder: Path, tmp_path: Path) -> None:
    other = changed(folder / "standalone", tmp_path / "trained", nudge("layers.3.ls1"))
    output = extract_for(
        folder / "standalone", tmp_path / "f.h5", "--layer", 2, "--max-tiles", 1, pictures=folder / "imgs"
    )
    found = match(output, other)
    assert found.matches
    assert found.settings == ("layer 4 instead of 2",)


def test_a_checkpoint_with_too_few_blocks_does_not_match(folder: Path) -> None:
    found = match(folder / "feats.h5", "tiny-random")
    assert not found.matches and "2 blocks, and the features are of layer 4" in found.summary


def test_without_the_original_weights_the_answer_is_no_without_names(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "standalone", tmp_path / "gone")
    output = extract_for(tmp_path / "gone", tmp_path / "f.h5", "--max-tiles", 1, pictures=folder / "imgs")
    shutil.rmtree(tmp_path / "gone")
    assert match(output, folder / "chat").matches  # which needs no original
    found = match(output, changed(folder / "chat", tmp_path / "trained", nudge("layers.1.ls1")))
    assert not found.matches and not found.different
    assert "which tensors differ is not known, because the weights are not available" in found.summary


def test_other_settings_of_a_checkpoint_are_told_apart_from_its_weights(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "chat", tmp_path / "other")
    path = tmp_path / "other" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    config = tmp_path / "other" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ps_version": "v1"}))
    found = match(folder / "feats.h5", tmp_path / "other")
    assert found.matches
    assert found.settings == (
        "mean (0.5, 0.5, 0.5) instead of (0.485, 0.456, 0.406)",
        "token order v1 instead of v2",
    )


def test_the_command_says_it_and_its_exit_code_too(folder: Path, tmp_path: Path) -> None:
    other = changed(folder / "chat", tmp_path / "trained", nudge("layers.1.ls1"))

    def info(*arguments: Any) -> Any:
        return internvit("info", folder / "feats.h5", "--matches", *arguments)

    same = info(folder / "chat")
    assert same.returncode == 0 and "yes: the 60 tensors" in " ".join(same.stdout.split())
    different = info(other)
    assert different.returncode == 1 and "encoder.layers.1.ls1 (values)" in " ".join(different.stdout.split())
    facts = json.loads(info(other, "--json").stdout)
    assert facts["exit_code"] == 1 and facts["error"].startswith("no: 1 of 60 tensors")
    assert facts["matches"]["different"][0]["name"] == "encoder.layers.1.ls1"
    assert json.loads(info(folder / "hf", "--json").stdout)["matches"]["matches"] is True
    missing = info(tmp_path / "nowhere")
    assert missing.returncode == 1 and "error: " in missing.stderr
