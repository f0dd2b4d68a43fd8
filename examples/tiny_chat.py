"""Write a tiny InternVL chat model with random weights, to try a whole way from pictures to an answer on any machine.

    python examples/tiny_chat.py tiny-chat

It has InternVL's architecture in transformers' layout: a tower of two blocks for tiles of 448 pixels, a projector, a
language model of two layers, and a tokenizer of single bytes. Its answers mean nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast, set_seed

SPECIAL = ["<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>"]
LLM_HIDDEN_SIZE = 48


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, and InternVL's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    wrapped.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return wrapped


def make_model(vocabulary: int, image_token_id: int) -> InternVLForConditionalGeneration:
    """Return the model in float32, with the same random weights on every call."""
    set_seed(0)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": [448, 448],
            "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": LLM_HIDDEN_SIZE,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32768,
            "initializer_range": 0.3,  # large enough for logits that differ
        },
        image_token_id=image_token_id,
    )
    return InternVLForConditionalGeneration(config).eval().to(torch.float32)


def main(folder: Path) -> None:
    """Write the model, its tokenizer and the configuration of its image processor to a folder."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "GotOcr2ImageProcessorPil",
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 12,
        "size": {"height": 448, "width": 448},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
