"""Ask a chat model about pictures of which only stored tokens exist: no picture is opened, and the tower does not run.

python examples/tiny_chat.py tiny-chat
internvit extract examples/images -o chat.h5 --model tiny-chat --tokens projected
python examples/answer.py chat.h5 tiny-chat "What do these pictures have in common?" street.jpg lund.jpg
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from internvit_cli import open_features


def answer(output: str, model_name: str, question: str, keys: list[str]) -> str:
    """Return the model's answer to a question about stored images."""
    model = InternVLForConditionalGeneration.from_pretrained(model_name).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    images = open_features(output).to_transformers(keys)
    prompt = images.text + question
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            mm_encoder_outputs=images.mm_encoder_outputs,
            max_new_tokens=20,
            do_sample=False,
        )
    text: str = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return text


if __name__ == "__main__":
    print(answer(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
