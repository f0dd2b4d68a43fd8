"""Stored tokens take the place of pictures in language models."""

from __future__ import annotations

import inspect
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from chat_helpers import Chat, example, extract_for, make_chat_model

from internvit_cli import Extractor, OutputError, SkippedImageError, UnknownKeyError, UsageError, open_features

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli import Features

KEYS = ["portrait.jpg", "cobbles.webp"]
QUESTION = "What do these pictures have in common?"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat(make_chat_model(tmp_path_factory.mktemp("chat") / "tiny-chat"))


@pytest.fixture(scope="module")
def features(chat: Chat) -> Features:
    return open_features(extract_for(chat.folder, chat.folder.parent / "chat.h5", "--tokens", "projected"))


# ------------------------------------------------------------------------------------------------ placeholders


def test_an_image_has_256_tokens_per_tile_and_its_thumbnail_is_a_tile(features: Features) -> None:
    image = features["portrait.jpg"]
    assert image.has_thumbnail
    assert image.token_count == (image.grid.columns * image.grid.rows + 1) * 256 == np.prod(image.tokens.shape[:2])


@pytest.mark.parametrize(
    ("style", "label"),
    [("plain", ""), ("image", "Image-3: "), ("frame", "Frame-3: "), ("old-frame", "Frame3: "), ("IMAGE", "Image-3: ")],
)
def test_a_placeholder_is_a_label_and_one_context_token_per_visual_token(
    features: Features, style: str, label: str
) -> None:
    image = features["cobbles.webp"]
    assert image.placeholder(style, 3) == f"{label}<img>{'<IMG_CONTEXT>' * image.token_count}</img>"


def test_a_style_that_does_not_exist_is_refused_with_those_that_do(features: Features) -> None:
    with pytest.raises(UsageError, match="'bold'") as caught:
        features[0].placeholder("bold")
    assert "plain, image, frame, old-frame" in caught.value.hint


def test_tokens_are_counted_even_where_none_are_stored(tmp_path: Path) -> None:
    output = extract_for("tiny-random", tmp_path / "v.h5", "--tokens", "none", "--max-tiles", 4)
    for image in open_features(output).values():
        assert image.token_count == image.tiles * 256


def test_tiles_that_are_not_whole_tokens_have_no_count(tmp_path: Path) -> None:
    output = extract_for("tiny-random", tmp_path / "v.h5", "--tokens", "patch", "--max-tiles", 1, "--tile-size", 70)
    with pytest.raises(UsageError, match="70 pixels"):
        open_features(output)[0].placeholder()


def test_a_skipped_image_has_neither_tokens_nor_a_placeholder() -> None:
    with Extractor("tiny-random", device="cpu", max_tiles=1) as extractor:
        skipped = extractor(b"no picture")
    for use in (lambda: skipped.token_count, skipped.placeholder, skipped.chat_tokens):
        with pytest.raises(SkippedImageError, match="not_an_image"):
            use()


# ------------------------------------------------------------------------------------------------ transformers


def test_the_prompt_is_that_of_the_official_code(features: Features) -> None:
    one, two = (features[key].placeholder() for key in KEYS)
    assert features.to_transformers(KEYS[0]).text == f"{one}\n"
    assert features.to_transformers(KEYS).text == f"Image-1: {one}\nImage-2: {two}\n"
    assert features.to_transformers(KEYS, "frame").text == f"Frame-1: {one}\nFrame-2: {two}\n"
    assert features.to_transformers(KEYS, "plain").text == f"{one}\n{two}\n"
    everything = features.to_transformers()
    assert everything.token_count == sum(image.token_count for image in features.values())


def test_a_chat_model_says_the_same_of_stored_tokens_as_of_pictures(chat: Chat, features: Features) -> None:
    """Logits and loss within the difference of two implementations of the tower in float32; generated ids equal."""
    images = features.to_transformers(KEYS)
    prompt = chat.prompt(images.text + QUESTION)
    with torch.inference_mode():
        pixels = {"pixel_values": chat.pixel_values(*KEYS)}
        expected = chat.model(**prompt, **pixels, labels=prompt["input_ids"])
        found = chat.model(**prompt, mm_encoder_outputs=images.mm_encoder_outputs, labels=prompt["input_ids"])
        assert expected.logits.std() > 0.1  # so that equal ones mean something
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-4)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        length = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(
            chat.model.generate(**prompt, mm_encoder_outputs=images.mm_encoder_outputs, **length),
            chat.model.generate(**prompt, **pixels, **length),
        )
        blind = chat.model(**prompt, mm_encoder_outputs=features.to_transformers(KEYS[::-1]).mm_encoder_outputs)
        assert (blind.logits - expected.logits).abs().max() > 0.01  # the pictures matter


def test_tokens_that_the_model_itself_made_give_its_own_bits(chat: Chat, features: Features) -> None:
    """What passes through `to_transformers` is not changed: logits, loss and ids are equal bit for bit."""
    images = features.to_transformers(KEYS)
    prompt = chat.prompt(images.text + QUESTION)
    labels = prompt["input_ids"]
    with torch.inference_mode():
        pixels = chat.pixel_values(*KEYS)
        own = chat.model.get_image_features(pixels, return_dict=True).pooler_output
        images.image_tokens.copy_(own)
        outputs = [
            chat.model(**prompt, pixel_values=pixels, labels=labels),
            chat.model(**prompt, mm_encoder_outputs=images.mm_encoder_outputs, labels=labels),
        ]
        embeds = images.inputs_embeds(chat.model, prompt["input_ids"])
        outputs.append(chat.model(inputs_embeds=embeds, attention_mask=prompt["attention_mask"], labels=labels))
    for output in outputs[1:]:
        assert torch.equal(output.logits, outputs[0].logits)
        assert torch.equal(output.loss, outputs[0].loss)


def test_embeddings_serve_versions_without_the_argument(chat: Chat, features: Features) -> None:
    images = features.to_transformers(KEYS)
    prompt = chat.prompt(images.text + QUESTION)
    length = {"max_new_tokens": 8, "do_sample": False}
    with torch.inference_mode():
        embeds = images.inputs_embeds(chat.model, prompt["input_ids"])
        without = chat.model.generate(inputs_embeds=embeds, attention_mask=prompt["attention_mask"], **length)
        whole = chat.model.generate(**prompt, mm_encoder_outputs=images.mm_encoder_outputs, **length)
    assert torch.equal(without, whole[:, prompt["input_ids"].shape[1] :])


def test_beams_can_be_searched_twice_with_the_same_inputs(chat: Chat, features: Features) -> None:
    images = features.to_transformers(KEYS[1])
    prompt = chat.prompt(images.text + QUESTION)
    length = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with torch.inference_mode():
        first, second = (
            chat.model.generate(**prompt, mm_encoder_outputs=images.mm_encoder_outputs, **length) for _ in range(2)
        )
    assert torch.equal(first, second)


def test_the_installed_transformers_takes_the_argument(chat: Chat) -> None:
    assert "mm_encoder_outputs" in inspect.signature(chat.model.forward).parameters


def test_a_prompt_with_other_placeholders_is_refused(chat: Chat, features: Features) -> None:
    images = features.to_transformers(KEYS)
    prompt = chat.prompt(features.to_transformers(KEYS[0]).text)
    with pytest.raises(UsageError, match="image tokens, but the images have"):
        images.inputs_embeds(chat.model, prompt["input_ids"])


def test_only_projected_tokens_fit_a_chat_model(tmp_path: Path, chat: Chat) -> None:
    output = extract_for(chat.folder, tmp_path / "v.h5", "--tokens", "visual", "--max-tiles", 1)
    with pytest.raises(OutputError, match="projected tokens") as caught:
        open_features(output).to_transformers(KEYS)
    assert "internvit project" in caught.value.hint


def test_no_image_and_an_unknown_image_are_refused(features: Features) -> None:
    with pytest.raises(UsageError, match="at least one image"):
        features.to_transformers([])
    with pytest.raises(UnknownKeyError, match="street"):
        features.to_transformers(["stret.jpg"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_type_of_tokens_for_a_chat_model_is_that_of_to_torch(tmp_path: Path, chat: Chat, dtype: str) -> None:
    arguments = ("--tokens", "projected", "--store-dtype", dtype, "--max-tiles", 1)
    image = open_features(extract_for(chat.folder, tmp_path / "p.h5", *arguments))[0]
    assert torch.equal(image.chat_tokens(), image.to_torch())


def test_old_chat_models_get_their_own_order_of_tokens(tmp_path: Path, reference: Path) -> None:
    """`ps_version` v1 reads a tile column by column; everything else of the reader is row by row."""
    model = tmp_path / "old"
    shutil.copytree(reference / "300m-chat", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"ps_version": "v1"}))
    image = open_features(extract_for(model, tmp_path / "p.h5", "--tokens", "projected", "--max-tiles", 1))[0]
    by_row = image.to_torch().unflatten(1, (4, 4))
    assert torch.equal(image.chat_tokens().unflatten(1, (4, 4)), by_row.transpose(1, 2))


def test_the_example_gives_the_answer_of_the_pictures(chat: Chat, features: Features) -> None:
    question = "What is this?"
    text = example("answer").answer(features.path, str(chat.folder), question, ["cobbles.webp"])
    prompt = chat.prompt(features["cobbles.webp"].placeholder() + "\n" + question)
    pixels = chat.pixel_values("cobbles.webp")
    with torch.inference_mode():
        ids = chat.model.generate(**prompt, pixel_values=pixels, max_new_tokens=20, do_sample=False)
    expected = chat.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == expected != ""
