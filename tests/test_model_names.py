"""What a user gives as --model stands for one thing, or is refused in one line that says what was meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvit_cli.config import DEFAULT_MODEL
from internvit_cli.errors import InternvitError, ModelError, UsageError
from internvit_cli.model.names import parse_model_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = f"https://huggingface.co/{DEFAULT_MODEL}"


@pytest.mark.parametrize(
    ("address", "revision"),
    [
        (PAGE, None),
        (PAGE + "/", None),
        (PAGE + ".git", None),
        (PAGE + "?library=transformers#usage", None),
        (PAGE + "/tree/main", None),
        (PAGE + "/blob/main/config.json", None),
        (PAGE + "/resolve/main/README.md?download=true", None),
        (PAGE + "/discussions/3", None),
        (PAGE + f"/tree/{COMMIT}", COMMIT),
        (PAGE + f"/commit/{COMMIT}", COMMIT),
        (PAGE + "/tree/refs%2Fpr%2F3", "refs/pr/3"),
        (PAGE + "/blob/v2/model-00001-of-00003.safetensors", "v2"),
        (PAGE.replace("https", "http"), None),
        (PAGE.removeprefix("https://"), None),
        (PAGE.replace("huggingface.co", "hf.co"), None),
        (PAGE.replace("https://", "HTTPS://www."), None),
        (f"hf://{DEFAULT_MODEL}", None),
        (f"hf://{DEFAULT_MODEL}@v2", "v2"),
        ("models--OpenGVLab--InternViT-300M-448px-V2_5", None),
        ("opengvlab/internvit-300m-448px-v2_5", None),
    ],
)
def test_addresses_of_the_hub_are_a_model_and_a_revision(address: str, revision: str | None) -> None:
    named = parse_model_name(address)
    assert (named.repo, named.revision, named.weights_file) == (DEFAULT_MODEL, revision, None)


@pytest.mark.parametrize(
    "address", [PAGE + "/blob/main/model.fp16.safetensors", f"hf://{DEFAULT_MODEL}/model.fp16.safetensors"]
)
def test_the_address_of_a_file_of_weights_chooses_it(address: str) -> None:
    named = parse_model_name(address)
    assert (named.repo, named.weights_file) == (DEFAULT_MODEL, "model.fp16.safetensors")
    assert parse_model_name(named.recorded) == named


def test_the_endpoint_of_the_environment_is_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org:8443")
    assert parse_model_name("https://hub.example.org:8443/a/b/tree/x").revision == "x"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://huggingface.co/OpenGVLab", "not the page of a model"),
        ("https://huggingface.co", "not the page of a model"),
        ("https://huggingface.co/datasets/a/b", "not the page of a model"),
        ("https://huggingface.co/spaces/a/b", "not the page of a model"),
        ("https://www.modelscope.cn/models/OpenGVLab/InternVL3-1B", "not an address of the Hugging Face hub"),
        ("https://github.com/OpenGVLab/InternVL", "not an address of the Hugging Face hub"),
        ("s3://bucket/model", "not an address of the Hugging Face hub"),
        ("file:///models/x", "not an address of the Hugging Face hub"),
        (PAGE + "/tree/main/mlp_projector", "a folder within"),
        (PAGE + "/blob/main/sub/model.safetensors", "a folder within"),
        (PAGE + "/tree/..%2F..", "not a branch"),
        (PAGE + "/blob/main/pytorch_model.bin", "pickle"),
        (PAGE + "/blob/main/model.gguf", "GGUF"),
        ("https://huggingface.co/a--b/c", "hub id"),
    ],
)
def test_other_addresses_are_refused_by_what_they_are(address: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        parse_model_name(address)
    assert "\n" not in caught.value.message + caught.value.hint


def test_an_address_and_a_revision_must_agree() -> None:
    assert parse_model_name(PAGE + "/tree/main", "v2").revision == "v2"
    assert parse_model_name(PAGE + "/tree/v2", "v2").revision == "v2"
    assert parse_model_name(PAGE + "/tree/main", "main").revision == "main"
    with pytest.raises(UsageError, match="the address says v2"):
        parse_model_name(PAGE + "/tree/v2", "v3")


def test_files_stand_for_their_folder_or_for_themselves(tmp_path) -> None:
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "a-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    assert parse_model_name(f"{folder}/config.json") == parse_model_name(folder)
    assert parse_model_name(f"{folder}/a-00001-of-00002.safetensors") == parse_model_name(folder)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        named = parse_model_name(f"{folder}/{name}")
        assert (named.directory, named.weights_file) == (folder, name)
        assert parse_model_name(named.recorded) == named


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.gguf", "GGUF"),
        ("vit.onnx", "ONNX"),
        ("pytorch_model.bin", "pickle"),
        ("intern_vit_6b_224px.pth", "pickle"),
        ("notes.txt", "neither the folder of a checkpoint"),
        ("tf_model.h5", "TensorFlow"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, name: str, words: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=words):
        parse_model_name(str(tmp_path / name))
    with pytest.raises(UsageError, match="--revision"):
        parse_model_name(str(tmp_path / name), "main")


@pytest.mark.parametrize(
    "name", ["https://", "hf://", "hf:///", "://", "https://huggingface.co//", "huggingface.co/", "\0", "a\0/b"]
)
def test_whatever_is_given_is_refused_without_a_traceback(name: str) -> None:
    with pytest.raises(InternvitError):
        parse_model_name(name)


parts = st.sampled_from(
    ["huggingface.co", "hf.co", "hf:", "https:", "", "/", "//", "tree", "blob", "main", "@", "..", "a", "b"]
)


@given(st.text(max_size=60) | st.lists(parts, max_size=9).map("/".join) | st.lists(parts, max_size=9).map("".join))
def test_any_text_is_a_name_or_one_line(text: str) -> None:
    try:
        parse_model_name(text)
    except InternvitError as error:
        assert "\n" not in error.message.replace(text, "")
