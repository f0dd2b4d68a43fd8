"""`internvit export --to vllm`, `npy-folder` and `pt-folder`: one file per image, named after its key."""

from __future__ import annotations

import itertools
import json
import os
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import storage_helpers as helpers
import torch
from exchange_helpers import NOT_AN_IMAGE, fails, make, mixed_shard, names_in, ok
from hypothesis import given
from hypothesis import strategies as st

from internvit_cli import open_features
from internvit_cli.config import StoreDtype, TokenOrder, Tokens
from internvit_cli.export.file_names import MOST_BYTES, file_name, key_of

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = ["vllm", "npy-folder", "pt-folder"]
PROJECTED = {"tokens": Tokens.PROJECTED}


def index_of(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    return {line["key"]: line for line in lines}


def load(folder: Path, name: str) -> np.ndarray:
    if name.endswith(".npy"):
        array: np.ndarray = np.load(folder / name)
        return array
    return torch.load(folder / name, weights_only=True).float().numpy()


# ------------------------------------------------------------------------------------------------------- names


@given(st.binary(min_size=1, max_size=300), st.sampled_from([".npy", ".pt"]))
def test_a_name_gives_its_key_back_and_is_one_plain_visible_name(key: bytes, suffix: str) -> None:
    name = file_name(key, suffix)
    assert name.endswith(suffix) and len(name) <= MOST_BYTES and "/" not in name and not name.startswith(".")
    assert name.isascii() and name.isprintable()
    found = key_of(name, suffix)
    assert found == key if found is not None else len(key) > 60


def test_keys_that_only_differ_in_what_is_escaped_have_names_of_their_own() -> None:
    keys = [b"a/b", b"a%2Fb", b".a", b"%2Ea", b"a ", b"a+", b"\xff", b"%FF", b"%%", b"x" * 300, b"x" * 301]
    assert len({file_name(key, ".npy") for key in keys}) == len(keys)


# ------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        *itertools.product(TARGETS[1:], StoreDtype),
        *(("vllm", dtype) for dtype in StoreDtype if dtype is not StoreDtype.BFLOAT16),
    ],
)
def test_every_image_has_its_tokens_in_a_file_that_the_index_names(
    tmp_path: Path, target: str, dtype: StoreDtype
) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED, store_dtype=dtype))
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", target)
    features, index = open_features(tmp_path / "a.h5"), index_of(tmp_path / "new")
    assert list(index) == list(features)
    for key, image in features.items():
        line = index[key]
        if not image.is_done:
            assert line["file"] is None and line["status"] == image.status.word and line["reason"]
            continue
        values = load(tmp_path / "new", line["file"])
        expected = image.projected_tokens
        if target == "vllm":
            expected = expected.astype(np.float16).reshape(-1, expected.shape[-1])
            assert values.dtype == np.float16 and values.ndim == 2
        np.testing.assert_array_equal(values, expected)
        assert line["shape"] == list(values.shape)
        assert line["token_count"] == image.tiles * expected.shape[-2] if target != "vllm" else len(values)
        assert os.fsencode(key) == key_of(line["file"], os.path.splitext(line["file"])[1])
    named = {line["file"] for line in index.values()} - {None}
    assert set(names_in(tmp_path / "new")) == named | {"index.jsonl", "export.json"}
    facts = json.loads((tmp_path / "new" / "export.json").read_text())
    assert facts["to"] == target and facts["holds"] == "projected tokens"
    assert facts["attributes"]["recipe"] == features.attributes["recipe"]


def test_a_pt_file_keeps_bfloat16(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED, store_dtype=StoreDtype.BFLOAT16))
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", "pt-folder")
    image = open_features(tmp_path / "a.h5").done[0]
    line = index_of(tmp_path / "new")[image.key]
    tensor = torch.load(tmp_path / "new" / line["file"], weights_only=True)
    assert line["dtype"] == "bfloat16" and tensor.dtype is torch.bfloat16
    assert torch.equal(tensor, image.to_torch())


@pytest.mark.parametrize("target", TARGETS[1:])
def test_without_tokens_a_file_holds_the_vector_of_its_image(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5")
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", target, "--no-tokens")
    for image in open_features(tmp_path / "a.h5").done.values():
        line = index_of(tmp_path / "new")[image.key]
        np.testing.assert_array_equal(load(tmp_path / "new", line["file"]), image.pooled)
        assert line["token_count"] == 0


@pytest.mark.parametrize("target", TARGETS)
def test_tokens_are_in_the_order_in_which_the_model_reads_them(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED, token_order=TokenOrder.V1))
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", target)
    image = open_features(tmp_path / "a.h5").done[0]
    values = load(tmp_path / "new", index_of(tmp_path / "new")[image.key]["file"])
    np.testing.assert_array_equal(values.reshape(image.tokens.shape), image.chat_tokens().numpy())
    assert (image.chat_tokens().numpy() != image.tokens).any()


def test_one_of_several_layers_is_chosen(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", mixed_shard(earlier_layers=helpers.EARLIER_LAYERS))
    said = fails(2, "export", tmp_path / "a.h5", tmp_path / "new", "--to", "npy-folder")
    assert "one layer" in said and "--layer" in said
    layer = helpers.EARLIER_LAYERS[0]
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", "npy-folder", "--layer", layer)
    image = open_features(tmp_path / "a.h5", layer).done[0]
    np.testing.assert_array_equal(load(tmp_path / "new", index_of(tmp_path / "new")[image.key]["file"]), image.tokens)
    assert json.loads((tmp_path / "new" / "export.json").read_text())["layer"] == layer


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("arguments", [(), ("--no-tokens",)])
def test_vllm_takes_projected_tokens_alone(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    make(tmp_path / "a.h5")
    said = fails(2, "export", tmp_path / "a.h5", tmp_path / "new", "--to", "vllm", *arguments)
    assert "projected tokens" in said and "internvit project" in said
    assert not (tmp_path / "new").exists()


def test_a_value_beyond_float16_is_an_error_that_names_its_image(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED, store_dtype=StoreDtype.BFLOAT16))  # of any size
    said = fails(1, "export", tmp_path / "a.h5", tmp_path / "new", "--to", "vllm")
    assert "the tokens of 'a.jpg' do not fit into float16" in said and "npy-folder" in said
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.exporting").exists()


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_row_is_named_and_nothing_is_left(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["projected_tokens"][10, 0, 0] += 1
    before = names_in(tmp_path)
    assert "the rows of 'not-utf8-" in fails(1, "export", tmp_path / "a.h5", tmp_path / "new", "--to", target)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_is_replaced_only_when_asked_for_and_only_if_it_is_such_a_folder(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED))
    helpers.make_output(tmp_path / "b.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)]), **PROJECTED))
    export = ("export", tmp_path / "b.h5", tmp_path / "new", "--to", target)
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", target)
    assert "exists already" in fails(2, *export)
    ok(*export, "--overwrite")
    assert len(index_of(tmp_path / "new")) == 1 and len(names_in(tmp_path / "new")) == 3
    (tmp_path / "new" / "notes.txt").write_text("precious")
    assert "notes.txt" in fails(2, *export, "--overwrite")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.npy").write_text("precious")
    assert "a.npy" in fails(2, "export", tmp_path / "b.h5", tmp_path / "mine", "--to", target, "--overwrite")
    assert (tmp_path / "mine" / "a.npy").read_text() == "precious"
    assert "holds other files" in fails(2, "export", tmp_path / "b.h5", tmp_path / "new", "--overwrite")


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("new", ("--shard-size", "1MB"), "a file per image"),
        ("new", ("--widen",), "--widen"),
        ("new.h5", (), "names a h5 file"),
        ("new.npy", (), "into a folder"),
    ],
)
def test_what_does_not_apply_to_a_file_per_image_is_refused(
    tmp_path: Path, name: str, arguments: tuple[str, ...], said: str
) -> None:
    make(tmp_path / "a.h5", mixed_shard(**PROJECTED))
    assert said in fails(2, "export", tmp_path / "a.h5", tmp_path / name, "--to", "npy-folder", *arguments)


def test_the_reason_of_a_skipped_image_is_in_the_index(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    ok("export", tmp_path / "a.h5", tmp_path / "new", "--to", "npy-folder")
    reasons = [line["reason"] for line in index_of(tmp_path / "new").values() if line["status"] == "not_an_image"]
    assert reasons and all(NOT_AN_IMAGE.message in reason for reason in reasons)
