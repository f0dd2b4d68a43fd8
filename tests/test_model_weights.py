"""One set of weights is used, and a folder with several, or with none that can be read, is refused by their names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hub_helpers import answer, hf_download, use_cache
from model_helpers import open_all, safetensors_bytes, with_header
from run_helpers import internvit, make_pictures

from internvit_cli.errors import ModelError
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.layouts import expected_shapes
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli.model.checkpoint import Checkpoint

CONFIG = {
    "model_type": "intern_vit_6b",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "image_size": 28,
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's config alone."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def weights(folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = expected_shapes(describe_model(str(folder)).vision, 2, None)
    generator = np.random.default_rng(seed)
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


def save(folder: Path, name: str = SINGLE, seed: int = 0) -> None:
    """A whole tower in one file; each seed is another."""
    (folder / name).write_bytes(safetensors_bytes(weights(folder, seed)))


def save_shards(folder: Path, seed: int = 1, names: tuple[str, str] = SHARDS, index: str | None = INDEX) -> None:
    """The tower in two files."""
    tensors = weights(folder, seed)
    parts = [
        {name: array for name, array in tensors.items() if ("layers.1." in name) is last} for last in (False, True)
    ]
    for name, part in zip(names, parts, strict=True):
        (folder / name).write_bytes(safetensors_bytes(part))
    if index:
        weight_map = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def digest_of(folder: Path, seed: int) -> str:
    other = folder / f"seed{seed}"
    other.mkdir()
    save(other, seed=seed)
    digest = opened(other).digest()
    shutil.rmtree(other)
    return digest


def opened(path: Any) -> Checkpoint:
    return open_all(describe_model(str(path)))


def refusal(path: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        opened(path)
    assert "\n" not in caught.value.message + caught.value.hint
    assert len(caught.value.message) < 1000
    return caught.value


# ----------------------------------------------------------------------------------------------------- several sets


def test_a_whole_file_beside_an_index_with_its_shards_is_refused_until_one_is_named(folder: Path) -> None:
    save(folder, seed=0)
    save_shards(folder, seed=1)
    error = refusal(folder)
    for name in (SINGLE, INDEX, *SHARDS):
        assert name in error.message
    assert f"--model {folder}/{SINGLE}" in error.hint and f"--model {folder}/{INDEX}" in error.hint
    assert opened(folder / SINGLE).digest() == digest_of(folder, 0)
    assert opened(folder / INDEX).digest() == digest_of(folder, 1)


def test_a_named_file_is_recorded_and_found_again(folder: Path) -> None:
    save(folder, seed=0)
    save_shards(folder, seed=1)
    pictures = make_pictures(folder / "imgs", 2)
    output = folder / "feats.h5"
    words = ("extract", folder / "imgs", "-o", output, "--device", "cpu", "--dtype", "float32", "-q")
    assert internvit(*words, "--model", folder / SINGLE, "--tile-size", "28").returncode == 0
    assert open_features(str(output)).attributes["model"] == str(folder / SINGLE)
    result = internvit(*words, "--model", folder / SINGLE, "--json")
    assert json.loads(result.stdout)["encoded"] == 0
    assert internvit(*words, "--model", folder / INDEX).returncode == 5
    for command in (("search", output, pictures[0]), ("verify", output, "--re-extract", "2")):
        result = internvit(*command, "--device", "cpu")
        assert result.returncode == 0, result.stderr


def test_a_stale_index_beside_a_whole_file_is_left_alone_and_said(folder: Path) -> None:
    save(folder, seed=0)
    save_shards(folder, seed=1)
    for shard in SHARDS:
        (folder / shard).unlink()
        checkpoint = opened(folder)
        assert checkpoint.digest() == digest_of(folder, 0)
        assert INDEX in checkpoint.notes[0] and shard in checkpoint.notes[0] and SINGLE in checkpoint.notes[0]


def test_a_merged_model_saved_over_an_old_folder_gives_its_own_features_or_none(folder: Path) -> None:
    save_shards(folder, seed=1)
    assert opened(folder).digest() == digest_of(folder, 1)
    save(folder, seed=2)
    refusal(folder)
    for name in (INDEX, *SHARDS):
        (folder / name).unlink()
    assert opened(folder).digest() == digest_of(folder, 2)


def test_an_index_of_the_whole_file_itself_is_one_set(folder: Path) -> None:
    save(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(weights(folder), SINGLE)}))
    assert opened(folder).digest() == digest_of(folder, 0)


def test_two_sets_on_the_hub_are_refused_before_either_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    save(stored, seed=0)
    save_shards(stored, seed=1)
    use_cache(monkeypatch, tmp_path / "hub")
    fetched: list[str] = []

    def download(repo: str, filename: str, **_: Any) -> str:
        fetched.append(filename)
        return str(stored / filename)

    answer(monkeypatch, files=[path.name for path in stored.iterdir()], download=download)
    error = refusal("some/model")
    assert fetched == ["config.json", INDEX]
    assert f"hf://some/model/{SINGLE}" in error.hint
    assert opened(f"hf://some/model/{SINGLE}").digest() == digest_of(tmp_path, 0)
    assert opened(f"https://huggingface.co/some/model/blob/main/{INDEX}").digest() == digest_of(tmp_path, 1)


# ---------------------------------------------------------------------------------------------------------- other names


@pytest.mark.parametrize("name", ["vit.safetensors", "consolidated.safetensors", "model.fp16.safetensors"])
def test_the_only_file_of_weights_serves_by_any_name_and_is_said(folder: Path, name: str) -> None:
    save(folder, name)
    checkpoint = opened(folder)
    assert checkpoint.digest() == digest_of(folder, 0)
    assert name in checkpoint.notes[0]
    assert opened(folder / name).notes == ()


def test_several_files_by_other_names_are_named(folder: Path) -> None:
    for seed, name in enumerate(("model.bf16.safetensors", "model.fp16.safetensors")):
        save(folder, name, seed)
    error = refusal(folder)
    assert "model.bf16.safetensors, model.fp16.safetensors" in error.message
    assert f"--model {folder}/model.bf16.safetensors" in error.hint
    assert opened(folder / "model.fp16.safetensors").digest() == digest_of(folder, 1)


@pytest.mark.parametrize("other", ["model.fp16.safetensors", "consolidated.safetensors", "adapter_model.safetensors"])
def test_files_by_other_names_beside_the_standard_one_are_not_read_and_said(folder: Path, other: str) -> None:
    save(folder, seed=0)
    (folder / other).write_bytes(b"nonsense")
    checkpoint = opened(folder)
    assert checkpoint.digest() == digest_of(folder, 0)
    assert checkpoint.notes == (f"the weights are those of {SINGLE}: {other} is not read",)


def test_older_shards_that_the_index_does_not_name_are_not_read_and_said(folder: Path) -> None:
    save_shards(folder, seed=1)
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"nonsense")
    checkpoint = opened(folder)
    assert checkpoint.digest() == digest_of(folder, 1)
    assert checkpoint.notes == (f"the weights are those of {INDEX}: model-00003-of-00003.safetensors is not read",)


@pytest.mark.parametrize(
    ("names", "index"),
    [
        (SHARDS, None),
        (("x-00001-of-00002.fp16.safetensors", "x-00002-of-00002.fp16.safetensors"), None),
        (("a.safetensors", "b.safetensors"), "model.safetensors.index.fp16.json"),
        (("a.safetensors", "b.safetensors"), "diffusion_pytorch_model.safetensors.index.json"),
    ],
)
def test_shards_without_an_index_or_with_one_of_another_name_serve(
    folder: Path, names: tuple[str, str], index: str | None
) -> None:
    save_shards(folder, 1, names, index)
    assert opened(folder).digest() == digest_of(folder, 1)


def test_a_missing_shard_is_named_with_and_without_an_index(folder: Path) -> None:
    save_shards(folder)
    (folder / SHARDS[1]).unlink()
    assert SHARDS[1] in refusal(folder).message
    (folder / INDEX).unlink()
    assert SHARDS[1] in refusal(folder).message


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    save_shards(folder, index=None)
    shutil.copy(folder / SHARDS[0], folder / SHARDS[1])
    assert "is in" in refusal(folder).message


@pytest.mark.parametrize(
    ("name", "words", "hint"),
    [
        ("pytorch_model.bin", "only pickle weights (pytorch_model.bin)", "save_file"),
        ("intern_vit_6b_224px.pth", "only pickle weights", "save_file"),
        ("pytorch_model-00001-of-00002.bin", "only pickle weights", "save_file"),
        ("model-q4_k_m.gguf", "model-q4_k_m.gguf is GGUF weights", "safetensors"),
        ("vision.onnx", "ONNX", "safetensors"),
        ("flax_model.msgpack", "Flax", "safetensors"),
        ("tf_model.h5", "TensorFlow", "safetensors"),
        ("training_args.bin", "there is no model.safetensors", "complete checkpoint"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_in_other_formats_are_refused_by_what_they_are(
    folder: Path, name: str, words: str, hint: str, with_config: bool
) -> None:
    (folder / name).touch()
    if not with_config:
        (folder / "config.json").unlink()
        if name == "training_args.bin":
            words, hint = "config.json: No such file", ""
    error = refusal(folder)
    assert words in error.message and hint in error.hint


@pytest.mark.parametrize("base", ["OpenGVLab/InternVL3-1B", None])
def test_an_adapter_is_refused_with_the_model_it_is_for(folder: Path, base: str | None) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes({"a.lora_A.weight": np.zeros(2, np.float32)}))
    error = refusal(folder)
    assert "a LoRA adapter" in error.message and (base or "not a model") in error.message
    assert "merge" in error.hint


# ------------------------------------------------------------------------------------------------------- hostile files


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 608000000\n"


@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "preprocessor_config.json", "processor_config.json"])
def test_a_git_lfs_pointer_is_named_with_the_command_that_fetches_the_file(folder: Path, name: str) -> None:
    if name == INDEX:
        save_shards(folder)
    else:
        save(folder)
    (folder / name).write_bytes(LFS)
    error = refusal(folder)
    assert name in error.message and "Git LFS pointer" in error.message
    assert "git lfs pull" in error.hint and str(folder) in error.hint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"PK\x03\x04" + bytes(50), "PyTorch or ZIP"),
        (b"\x80\x02}q\x00." + bytes(50), "pickle"),
        (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"", "truncated, or not a safetensors file"),
        (b"nonsense", "truncated, or not a safetensors file"),
        (bytes(100), "not valid JSON"),
    ],
)
def test_other_bytes_in_the_place_of_weights_are_named(folder: Path, text: bytes, words: str) -> None:
    (folder / SINGLE).write_bytes(text)
    assert words in refusal(folder).message


PLACES = ("config.json", SINGLE, INDEX, "preprocessor_config.json", "processor_config.json")


def put(kind: str, path: Path) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(path.parent)
            listener.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 8 << 30)
    else:
        path.symlink_to(kind)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "/dev/zero", "/dev/null", "loop", "nowhere", "sparse"])
def test_what_is_no_regular_file_of_a_sane_size_is_one_line_and_never_waited_for(
    folder: Path, place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    if place == INDEX:
        save_shards(folder)
    else:
        save(folder)
    put(place if kind == "loop" else kind, folder / place)
    error = refusal(folder)
    assert place in error.message


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 1 << 20},
        {"hidden_size": 1 << 30, "num_attention_heads": 1},
        {"intermediate_size": 1 << 40},
        {"image_size": 14 << 20},
        {"num_attention_heads": 10**400},
        {"layer_norm_eps": 10**400},
        {"hidden_size": "8" * 100_000},
        {"model_type": [14] * 100_000},
        {"model_type": {"a": 1}},
        {"model_type": [14, 14], "architectures": ["InternVisionModel"]},
        {"patch_size": [14, [14]]},
        {"norm_type": ["rms_norm"]},
        {"architectures": 7, "model_type": "x"},
        {"hidden_act": ["gelu"] * 1000},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_made_up_config_is_refused_at_once_in_one_bounded_line(folder: Path, changes: dict[str, Any]) -> None:
    save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    error = refusal(folder)
    assert "config.json" in error.message and len(error.message) < len(str(folder)) + 300


@pytest.mark.sweep
def test_deep_or_crowded_json_is_refused_before_it_takes_memory(folder: Path) -> None:
    save(folder)
    for text in (
        "[" * 200_000,
        '{"a":' * 90_000,
        '{"a": [' + "[]," * 200_000 + "1]}",
        "{" + '"a":{},' * 150_000 + '"b":1}',
    ):
        (folder / "config.json").write_text(text)
        assert "config.json" in refusal(folder).message
    header = json.dumps({f"t{n}": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for n in range(310_000)})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / SINGLE).write_bytes(with_header(header.encode(), bytes(4)))
    assert "tensors, which no valid file has" in refusal(folder).message
    header = json.dumps({"." * 3_000_000: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}})
    (folder / SINGLE).write_bytes(with_header(header.encode(), bytes(4)))
    assert "name of a tensor has 3,000,000 characters" in refusal(folder).message
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x" * 3_000_000: "a.safetensors"}}))
    assert "name of a tensor has 3,000,000 characters" in refusal(folder).message


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory in kilobytes")
def test_a_million_layers_take_no_memory(folder: Path) -> None:
    save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 1 << 20}))
    code = (
        "import sys\n"
        "from internvit_cli.cli.app import run\n"
        "run(['plan', sys.argv[1], '--model', sys.argv[1]])\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    make_pictures(folder, 1)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 300_000
    assert "num_hidden_layers" in done.stderr and "Traceback" not in done.stderr


def test_a_cached_model_is_as_mistrusted_as_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    save(stored)
    (stored / SINGLE).write_bytes(LFS)
    use_cache(monkeypatch, tmp_path / "hub")
    hf_download(tmp_path / "hub", "some/model", stored)
    assert "git lfs pull" in refusal("some/model").hint
