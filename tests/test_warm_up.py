"""examples/warm_up.py: training a projector on stored tokens is training it on pictures."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING

import pytest
import torch
from chat_helpers import Chat, example, extract_for, make_chat_model
from run_helpers import internvit

from internvit_cli import open_features

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli import Features

KEY, TEXT = "cobbles.webp", "Cobbles."


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_chat_model(tmp_path_factory.mktemp("chat") / "tiny-chat"))


@pytest.fixture(scope="module")
def features(chat: Chat) -> Features:
    return open_features(extract_for(chat.folder, chat.folder.parent / "visual.h5"))


def step(chat: Chat, features: Features, tokens: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """A training step on tokens; returns the loss, and the projector's weights afterwards."""
    warm_up, model = example("warm_up"), copy.deepcopy(chat.model)
    projector = warm_up.freeze_all_but_projector(model)
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = warm_up.training_loss(model, chat.tokenizer, tokens, features[KEY].placeholder(), TEXT)
    loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.multi_modal_projector.{name}" for name in projector.state_dict()}
    return loss.item(), projector.state_dict()


def test_a_step_on_stored_tokens_is_a_step_on_pictures(chat: Chat, features: Features) -> None:
    """Loss and updated weights agree within the rounding of two implementations of the tower in float32."""
    from_pixels = example("warm_up").visual_tokens(chat.model, chat.pixel_values(KEY))
    expected_loss, expected = step(chat, features, from_pixels)
    loss, found = step(chat, features, features[KEY].to_torch())
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    other, _ = step(chat, features, from_pixels.flip(1))
    assert abs(other - expected_loss) > 0.01  # the tokens matter


def test_the_loss_is_that_of_the_whole_model_from_pixels(chat: Chat, features: Features) -> None:
    loss, _ = step(chat, features, features[KEY].to_torch())
    prompt = chat.prompt(features[KEY].placeholder() + "\n")["input_ids"]
    answer = chat.prompt(TEXT + chat.tokenizer.eos_token)["input_ids"]
    labels = torch.cat((torch.full_like(prompt, -100), answer), dim=1)
    with torch.no_grad():
        ids = torch.cat((prompt, answer), dim=1)
        whole = chat.model(input_ids=ids, pixel_values=chat.pixel_values(KEY), labels=labels).loss
    assert loss == pytest.approx(whole.item(), rel=1e-5)


def test_the_trained_projector_is_one_that_project_applies(
    chat: Chat, features: Features, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = tmp_path / "captions.jsonl"
    captions.write_text("".join(json.dumps({"key": KEY, "text": TEXT}) + "\n" for _ in range(3)))
    target = tmp_path / "projector.safetensors"
    example("warm_up").main(features.path, str(chat.folder), str(captions), str(target))
    first, last = (float(word) for word in capsys.readouterr().out.split() if word.replace(".", "").isdigit())
    assert last < first
    result = internvit("project", features.path, tmp_path / "mine.h5", "--model", target, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    internvit("project", features.path, tmp_path / "old.h5", "--model", chat.folder, "--device", "cpu")
    assert (open_features(tmp_path / "mine.h5")[KEY].tokens != open_features(tmp_path / "old.h5")[KEY].tokens).any()
