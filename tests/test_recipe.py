"""Two recipes never share an output: each thing that decides a value is changed in turn, and refused by its name."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from run_helpers import internvit, make_pictures, state_of
from safetensors.numpy import load_file, save_file

from internvit_cli import config, open_features
from internvit_cli.config import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OUTPUTS = {"file": ("feats.h5",), "npy folder": ("feats",), "h5 folder": ("feats", "--format", "h5")}
GIVEN = ("--dtype", "float32", "--tokens", "projected")

OPTIONS = {
    "layer": ("--layer", "1"),
    "tile_size": ("--tile-size", "224"),
    "min_tiles": ("--min-tiles", "2"),
    "max_tiles": ("--max-tiles", "3"),
    "thumbnail": ("--no-thumbnail",),
    "preprocess": ("--preprocess", "clip"),
    "exif": ("--no-exif",),
    "background": ("--background", "white"),
    "tokens": ("--tokens", "patch"),
    "pool": ("--pool", "cls"),
    "tile_pooled": ("--tile-pooled",),
    "store_dtype": ("--store-dtype", "float32"),
    "compute_dtype": ("--dtype", "bfloat16"),
    "on_overflow": ("--on-overflow", "clamp"),
    "truncated": ("--truncated", "accept"),
    "grey_range": ("--grey-range", "4095"),
    "earlier_layers": ("--layer", "-2,-1", "--tokens", "visual"),
}


def change_a_weight(model: Path) -> None:
    for file in sorted(model.glob("*.safetensors")):
        tensors = load_file(file)
        if names := [name for name in sorted(tensors) if name.endswith("layers.0.mlp.fc1.bias")]:
            tensors[names[0]] = tensors[names[0]].copy()
            tensors[names[0]].view(np.uint8)[0] ^= 1
            save_file(tensors, file)
            return
    raise AssertionError("no such tensor")


def change_json(name: str, **values: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    return change


MODEL_CHANGES = {
    "weights_digest": change_a_weight,
    "mean": change_json("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "std": change_json("preprocessor_config.json", image_std=[0.5, 0.5, 0.5]),
    "rescale_factor": change_json("preprocessor_config.json", rescale_factor=0.00784313725490196),
    "token_order": change_json("config.json", ps_version="v1"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """Two pictures, a model of the smallest size in a folder of its own, and an output of each kind."""
    folder = tmp_path_factory.mktemp("recipes")
    make_pictures(folder / "pictures", 2)
    shutil.copytree(reference / "300m-chat", folder / "model", copy_function=shutil.copyfile)
    for kind in OUTPUTS:
        (folder / kind).mkdir()
        result = extract(folder, kind)
        assert result.returncode == 0, result.stderr
    return folder


def extract(folder: Path, kind: str, *options: str, model: Path | None = None) -> Any:
    name, *own = OUTPUTS[kind]
    where = ("-o", folder / kind / name, "--model", model or folder / "model")
    return internvit("extract", folder / "pictures", *where, *own, *GIVEN, *options)


def test_every_field_of_a_recipe_is_changed_by_one_of_these_tests() -> None:
    fields = set(Recipe.__dataclass_fields__)
    by_project = {"projector_digest", "projected_from"}  # test_project.py
    by_version = {"numerics_version", "values_per_scale"}  # below, and test_earlier_versions.py
    assert fields == {*OPTIONS, *MODEL_CHANGES, *by_version, *by_project}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("field", OPTIONS)
def test_another_option_is_refused_by_its_field_and_touches_nothing(made: Path, kind: str, field: str) -> None:
    before = state_of(made / kind)
    result = extract(made, kind, *OPTIONS[field])
    assert result.returncode == 5, result.stderr
    assert f"{field} was " in result.stderr and "hint: give the same " in result.stderr
    assert state_of(made / kind) == before


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("field", MODEL_CHANGES)
def test_another_model_by_the_same_name_is_refused_by_its_field(
    made: Path, tmp_path: Path, kind: str, field: str
) -> None:
    """The folder keeps its name: only what is in it changes."""
    before, kept = state_of(made / kind), tmp_path / "kept"
    shutil.copytree(made / "model", kept)
    try:
        MODEL_CHANGES[field](made / "model")
        result = extract(made, kind)
    finally:
        shutil.rmtree(made / "model")
        shutil.copytree(kept, made / "model")
    assert result.returncode == 5, result.stderr
    assert f"{field} was " in result.stderr
    assert state_of(made / kind) == before
    assert extract(made, kind).returncode == 0


@pytest.mark.parametrize("kind", OUTPUTS)
def test_rows_of_an_older_arithmetic_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(config, "NUMERICS_VERSION", config.NUMERICS_VERSION + 1)
    defaults = (config.NUMERICS_VERSION, *Recipe.__init__.__defaults__[1:])
    monkeypatch.setattr(Recipe.__init__, "__defaults__", defaults)
    result = extract(made, kind)
    assert result.returncode == 5 and "numerics_version was " in result.stderr


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_picture_with_other_bytes_is_done_again_and_no_other(made: Path, tmp_path: Path, kind: str) -> None:
    """Another size, or another time: either is looked into; the same bytes at another time change nothing."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    pictures = sorted((folder / "pictures").rglob("*.*"))
    assert extract(folder, kind, f"--relocate={made}={folder}", model=made / "model").returncode == 0
    output = folder / kind / OUTPUTS[kind][0]
    before = {key: image.pooled for key, image in open_features(output).items()}
    facts = pictures[0].stat()
    Image.new("RGB", (64, 48), "teal").save(pictures[0])
    data = pictures[0].read_bytes()
    pictures[0].write_bytes(data.ljust(facts.st_size, b"\0"))  # the same size, if it can be
    os.utime(pictures[1])
    result = extract(folder, kind, "--json", model=made / "model")
    assert result.returncode == 0 and json.loads(result.stdout)["encoded"] == 1, result.stderr
    after = open_features(output)
    changed = {key for key in before if not np.array_equal(before[key], after[key].pooled)}
    assert changed == {str(pictures[0].relative_to(folder / "pictures"))}
