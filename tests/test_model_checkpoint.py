"""Every layout gives the same tensors; a broken checkpoint is an error that names what is wrong with it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from model_helpers import (
    FAMILIES,
    LAYOUTS,
    open_all,
    reference_card,
    safetensors_bytes,
    tiny_card,
    with_header,
)

from internvit_cli.errors import ModelError, UsageError
from internvit_cli.model.catalog import describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.layouts import expected_shapes
from internvit_cli.model.safetensors_header import parse_header, read_safetensors_header

CONFIG = {
    "model_type": "intern_vit_6b",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "image_size": 28,
}
CLS = "embeddings.class_embedding"


@pytest.fixture
def directory(tmp_path):
    """A sound little 6B checkpoint in one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(weights(tmp_path)))
    return tmp_path


def weights(directory) -> dict[str, np.ndarray]:
    shapes = expected_shapes(describe_model(str(directory)).vision, 2, None)
    generator = np.random.default_rng(0)
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


def rewrite(directory, tensors) -> None:
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))


def shard(directory, weight_map, shards) -> None:
    (directory / "model.safetensors").unlink()
    for name, tensors in shards.items():
        (directory / name).write_bytes(safetensors_bytes(tensors))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(directory, **options) -> ModelError:
    with pytest.raises(ModelError) as caught:
        open_all(describe_model(str(directory)), **options)
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
def test_the_digest_is_the_same_in_every_layout(family):
    assert len({open_all(reference_card(family, layout)).digest() for layout in LAYOUTS}) == 1


def test_the_digest_is_of_the_tensors_used_and_of_nothing_else():
    card = reference_card("300m", "chat")
    digests = [
        open_all(card).digest(),
        open_all(card, projector=True).digest(),
        open_all(card, -2).digest(),
        open_all(reference_card("6b", "chat")).digest(),
    ]
    assert len(set(digests)) == 4
    assert open_all(reference_card("300m", "hf"), projector=True).digest() == digests[1]


def test_one_changed_bit_changes_the_digest(directory):
    before = open_all(describe_model(str(directory))).digest()
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_all(describe_model(str(directory))).digest() != before


def test_queries_keys_and_values_in_parts_are_their_rows_joined(directory):
    tensors = weights(directory)
    name = "encoder.layers.1.attn.qkv.weight"
    whole = open_all(describe_model(str(directory)))
    digest, data = whole.digest(), whole.read(name)
    for block in range(2):
        q, k, v = np.split(tensors.pop(f"encoder.layers.{block}.attn.qkv.weight"), 3)
        for letter, part in zip("qkv", (q, k, v), strict=True):
            tensors[f"encoder.layer.{block}.attention.{letter}_proj.weight"] = part
    rewrite(directory, tensors)
    parts = open_all(describe_model(str(directory)))
    assert parts.digest() == digest
    assert (parts.read(name) == data).all()


def test_a_read_tensor_belongs_to_the_caller(directory):
    checkpoint = open_all(describe_model(str(directory)))
    first = checkpoint.read(CLS)
    first[:] = 0
    assert checkpoint.read(CLS).any()
    assert first.flags.owndata


def test_blocks_that_do_not_run_are_not_read(directory):
    checkpoint = open_all(describe_model(str(directory)), 1)
    assert not any(name.startswith("encoder.layers.1.") for name in checkpoint.weights)


def test_only_shards_that_hold_something_wanted_are_opened(directory):
    tensors = weights(directory)
    prefixed = {f"vision_model.{name}": array for name, array in tensors.items()}
    weight_map = dict.fromkeys(prefixed, "a.safetensors") | {"language_model.embed": "b.safetensors"}
    shard(directory, weight_map, {"a.safetensors": prefixed})
    assert open_all(describe_model(str(directory))).digest()


def test_a_missing_tensor_is_named(directory):
    tensors = weights(directory)
    del tensors["encoder.layers.1.ls2"]
    rewrite(directory, tensors)
    assert "'encoder.layers.1.ls2' is missing" in refusal(directory).message
    open_all(describe_model(str(directory)), 1)  # its block does not run


@pytest.mark.parametrize("name", ["encoder.layers.0.attn.qkv.bias", "encoder.layers.2.ls1", "norm.weight"])
def test_an_extra_tensor_is_named(directory, name):
    rewrite(directory, weights(directory) | {name: np.zeros(24, np.float32)})
    assert f"unexpected tensor {name!r}" in refusal(directory).message


def test_a_misshapen_tensor_is_named_with_both_shapes(directory):
    rewrite(directory, weights(directory) | {CLS: np.zeros((1, 1, 9), np.float32)})
    assert f"{CLS!r} has shape (1, 1, 9), not (1, 1, 8)" in refusal(directory).message


def test_a_tensor_that_is_there_twice_is_an_error(directory):
    rewrite(directory, weights(directory) | {"embeddings.cls_token": np.zeros((1, 1, 8), np.float32)})
    assert "are the same tensor" in refusal(directory).message


def test_two_towers_are_refused(directory):
    tensors = weights(directory)
    rewrite(directory, tensors | {f"vision_model.{name}": array for name, array in tensors.items()})
    assert "2 whole vision towers" in refusal(directory).message


def test_a_checkpoint_without_a_tower_is_refused(directory):
    rewrite(directory, {"language_model.embed": np.zeros(3, np.float32)})
    assert "no vision tower" in refusal(directory).message


def test_quantized_weights_are_refused(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    assert "quantized" in refusal(directory).message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "intern_vit_6b_224px.pth", "model.pt"])
def test_pickle_weights_are_refused_with_the_way_to_convert_them(directory, name):
    (directory / "model.safetensors").rename(directory / name)
    error = refusal(directory)
    assert name in error.message
    assert "safetensors" in error.hint


def test_a_directory_without_weights_says_what_it_looked_for(directory):
    (directory / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(directory).message


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "a.bin", 5, "", ".."])
def test_an_index_may_not_point_outside_its_directory(directory, place):
    shard(directory, {CLS: place}, {})
    assert "not a shard beside the index" in refusal(directory).message


def test_an_index_that_names_a_missing_shard_or_a_missing_tensor_is_an_error(directory):
    tensors = weights(directory)
    shard(directory, dict.fromkeys(tensors, "a.safetensors"), {})
    assert "a.safetensors" in refusal(directory).message
    moved = {name: array for name, array in tensors.items() if name != CLS}
    (directory / "a.safetensors").write_bytes(safetensors_bytes(moved))
    assert CLS in refusal(directory).message


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": []}', "[]"])
def test_a_broken_index_is_an_error(directory, index):
    shard(directory, {}, {})
    (directory / "model.safetensors.index.json").write_text(index)
    refusal(directory)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -100])
def test_a_truncated_file_is_an_error_that_names_it(directory, keep):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refusal(directory).message


def test_a_file_that_shrinks_after_it_was_opened_is_an_error(directory):
    checkpoint = open_all(describe_model(str(directory)))
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelError, match="became shorter"):
        checkpoint.digest()
    path.unlink()
    with pytest.raises(ModelError, match="No such file"):
        checkpoint.read(CLS)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(offsets=(0, 80))}, "truncated: tensor 'a'"),
        ({"a": entry(offsets=(8, 0))}, "'a': data_offsets"),
        ({"a": entry(offsets=(-8, 0))}, "'a': data_offsets"),
        ({"a": entry(offsets=(0,))}, "'a': data_offsets"),
        ({"a": entry(shape=(3,))}, "'a': 8 bytes are not F32"),
        ({"a": entry(shape=(-2,))}, "'a': shape"),
        ({"a": entry(shape=(True, 2))}, "'a': shape"),
        ({"a": entry(shape=(2, 1 << 70))}, "'a': shape"),
        ({"a": entry(dtype="F128")}, "'a': unknown dtype"),
        ({"a": entry(dtype=None)}, "'a': unknown dtype"),
        ({"a": 5}, "'a'"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "'b' overlaps"),
        ([], "not a JSON object"),
    ],
)
def test_a_header_that_lies_is_an_error_that_names_the_tensor(tmp_path, header, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(json.dumps(header).encode(), bytes(16)))
    with pytest.raises(ModelError) as caught:
        read_safetensors_header(str(path))
    assert words in caught.value.message
    assert str(path) in caught.value.message


def test_a_name_that_occurs_twice_is_an_error():
    one = json.dumps(entry())
    with pytest.raises(ModelError, match="JSON"):
        parse_header(f'{{"a": {one}, "a": {one}}}'.encode(), path="x", file_size=1000)


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="not a safetensors file"):
        read_safetensors_header(str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "BF16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries({"dtype": json_values, "shape": json_values, "data_offsets": json_values})
headers = st.dictionaries(st.text(max_size=4), entries | json_values, max_size=4)


@given(st.binary(max_size=300) | headers.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"a":' * 50_000)
@example(b"9" * 10_000)
def test_whatever_bytes_come_the_header_reader_gives_tensors_or_a_model_error(data):
    try:
        tensors = parse_header(data, path="x", file_size=8 + len(data) + 64)
    except ModelError:
        return
    for tensor in tensors.values():
        assert 8 + len(data) <= tensor.begin <= tensor.end <= 8 + len(data) + 64


@given(st.data())
def test_a_reference_header_with_one_flipped_byte_gives_tensors_or_a_model_error(data):
    text = bytearray(reference_header())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] = data.draw(st.integers(0, 255))
    try:
        parse_header(bytes(text), path="x", file_size=10_000_000)
    except ModelError:
        return


def reference_header() -> bytes:
    path = reference_card("300m", "standalone").directory
    with open(f"{path}/model.safetensors", "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def test_a_projector_is_wanted_only_of_a_model_that_has_one():
    with pytest.raises(UsageError, match="no projector"):
        Checkpoint.open(tiny_card(), layer=2, projector=True)


def test_a_projector_of_another_size_is_named(tmp_path):
    shutil.copytree(reference_card("300m", "hf").directory, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["text_config"]["hidden_size"] = 50
    (tmp_path / "m" / "config.json").chmod(0o644)
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    card = describe_model(str(tmp_path / "m"))
    open_all(card)
    with pytest.raises(ModelError, match=r"multi_modal_projector\.linear_1\.weight"):
        open_all(card, projector=True)
