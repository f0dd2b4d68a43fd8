"""Train the projector of a chat model on stored visual tokens: InternVL's first stage, MLP warm-up.

The tower and the language model are frozen in that stage, so the tower gives the same tokens in every epoch, and need
not run again. This program never opens a picture:

    python examples/tiny_chat.py tiny-chat
    internvit extract examples/images -o visual.h5 --model tiny-chat
    python examples/warm_up.py visual.h5 tiny-chat captions.jsonl projector.safetensors

captions.jsonl has lines such as {"key": "street.jpg", "text": "A street."}. The result is a projector that
`internvit project visual.h5 chat.h5 --model projector.safetensors` applies.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from internvit_cli import Features, open_features


def freeze_all_but_projector(model: Any) -> Any:
    """Leave gradients to the projector alone, and return it."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    return projector


def visual_tokens(model: Any, pixel_values: Tensor) -> Tensor:
    """Return the visual tokens [tiles, T, 4C] of pixels [tiles, 3, S, S], as the tower gives them to the projector."""
    inner = model.model
    with torch.no_grad():
        hidden = inner.vision_tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = int(hidden.shape[1] ** 0.5)
        shuffled = inner.pixel_shuffle(hidden.unflatten(1, (side, side)), scale_factor=0.5)
    tokens: Tensor = shuffled.flatten(1, 2)
    return tokens


def training_loss(model: Any, tokenizer: Any, tokens: Tensor, placeholder: str, text: str) -> Tensor:
    """Return the loss of a caption after an image, in which only the caption counts.

    Args:
        model: An InternVLForConditionalGeneration.
        tokenizer: Its tokenizer.
        tokens: Visual tokens [tiles, T, 4C].
        placeholder: The text that stands for the image in the prompt.
        text: The caption.
    """
    prompt = tokenizer(placeholder + "\n", return_tensors="pt").input_ids
    answer = tokenizer(text + (tokenizer.eos_token or ""), return_tensors="pt", add_special_tokens=False).input_ids
    labels = torch.cat((torch.full_like(prompt, -100), answer), dim=1)
    projector = model.model.multi_modal_projector
    projected = projector(tokens.to(next(projector.parameters()).dtype))
    loss: Tensor = model(
        input_ids=torch.cat((prompt, answer), dim=1),
        labels=labels,
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=projected)},
    ).loss
    return loss


def train(
    model: Any, tokenizer: Any, features: Features, captions: list[dict[str, str]], epochs: int = 1
) -> list[float]:
    """Train the projector, one caption per step, and return the losses."""
    optimizer = torch.optim.AdamW(freeze_all_but_projector(model).parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    for _ in range(epochs):
        for caption in captions:
            image = features[caption["key"]]
            loss = training_loss(model, tokenizer, image.to_torch(), image.placeholder(), caption["text"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main(output: str, model_name: str, captions_file: str, target: str) -> None:
    """Train for three epochs, and write the projector."""
    model = InternVLForConditionalGeneration.from_pretrained(model_name)
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    captions = [json.loads(line) for line in Path(captions_file).read_text().splitlines()]
    losses = train(model, tokenizer, open_features(output), captions, epochs=3)
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    projector = model.model.multi_modal_projector
    save_file({f"multi_modal_projector.{name}": value for name, value in projector.state_dict().items()}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
