"""What docs/consuming.md hands to engines that the tests do not install has the shapes that those take."""

from __future__ import annotations

import base64
import io
import re
import shutil
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from chat_helpers import Chat, extract_for, make_chat_model
from folders import EXAMPLES, ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGE = ROOT / "docs" / "consuming.md"
BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```", re.DOTALL | re.MULTILINE)
HIDDEN, TOKENS = 48, 13 * 256


class Engine:
    """Takes what an engine would take, and remembers it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.options = options
        self.given: list[Any] = []

    def generate(self, *args: Any, **options: Any) -> list[str]:
        self.given.append((args, options))
        return ["an answer"]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page leaves behind when all of its blocks have run, with stand-ins for the engines."""
    folder: Path = tmp_path_factory.mktemp("page")
    shutil.copytree(EXAMPLES, folder / "imgs")
    (folder / "imgs" / "holiday").mkdir()
    shutil.copy(folder / "imgs" / "lund.jpg", folder / "imgs" / "holiday" / "beach.jpg")
    chat = Chat(make_chat_model(folder / "tiny-chat"))
    pictures = {"pictures": folder / "imgs"}
    extract_for(chat.folder, folder / "chat.h5", "--tokens", "projected", "--store-dtype", "float16", **pictures)
    extract_for("tiny-random", folder / "feats.h5", "--store-dtype", "float16", **pictures)
    vllm, sglang = ModuleType("vllm"), ModuleType("sglang")
    vllm.LLM, vllm.SamplingParams, sglang.Engine = Engine, dict, Engine
    found: dict[str, Any] = {"chat": Engine()}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(sys.modules, "vllm", vllm)
        patch.setitem(sys.modules, "sglang", sglang)
        for block in BLOCK.findall(PAGE.read_text()):
            exec(compile(block, str(PAGE), "exec"), found)
    return found


def test_vllm_gets_one_2d_float16_array_per_image_of_the_prompt(names: dict[str, Any]) -> None:
    assert names["llm"].options == {"enable_mm_embeds": True, "limit_mm_per_prompt": {"image": 0}}
    ((prompt, _), _) = names["llm"].given[0]
    images = prompt["multi_modal_data"]["image"]
    assert prompt["prompt"].count("<image>") == len(images) == 2
    assert all(image.shape == (TOKENS, HIDDEN) and image.dtype is torch.float16 for image in images)


def test_the_server_gets_the_array_as_a_npy_file_in_base64(names: dict[str, Any]) -> None:
    part = names["messages"][0]["content"][0]
    array = np.load(io.BytesIO(base64.b64decode(part["image_embeds"])))
    assert part["type"] == "image_embeds"
    assert array.shape == (TOKENS, HIDDEN) and array.dtype == np.float16


def test_sglang_gets_one_dict_with_the_tokens_of_all_images(names: dict[str, Any]) -> None:
    (_, options) = names["engine"].given[0]
    (entry,) = options["image_data"]
    assert entry["format"] == "precomputed_embedding" and entry["feature"].shape == (2 * TOKENS, HIDDEN)
    assert options["prompt"].count("<IMG_CONTEXT>") == 2 * TOKENS


def test_the_official_code_gets_features_for_every_placeholder(names: dict[str, Any]) -> None:
    """As in its generate: the features are flattened and put where the prompt has the context token."""
    (_, options) = names["chat"].given[0]
    selected = options["input_ids"].reshape(-1) == names["chat"].img_context_token_id
    assert options["visual_features"].shape == (26, 256, HIDDEN)
    assert int(selected.sum()) == options["visual_features"].reshape(-1, HIDDEN).shape[0]
    assert options["pixel_values"] is not None


def test_folders_in_the_style_of_llava_hold_what_a_projector_takes(names: dict[str, Any]) -> None:
    assert names["sequence"].shape == (TOKENS, 256)
    assert np.array_equal(names["array"].reshape(TOKENS, 256), names["sequence"].numpy())
