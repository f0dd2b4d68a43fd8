"""A tiny chat model of InternVL's kind, features of pictures for it, and its own run from pixels."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from folders import EXAMPLES, ROOT
from PIL import Image, ImageOps
from run_helpers import internvit

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


def example(name: str) -> ModuleType:
    """A program of examples/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_chat_model(folder: Path) -> Path:
    example("tiny_chat").main(folder)
    return folder


def extract_for(model: Path | str, output: Path, *arguments: object, pictures: Path = EXAMPLES) -> Path:
    """Features in float32, on the CPU."""
    types = ("--dtype", "float32", "--device", "cpu", "-q")
    dtype = () if "--store-dtype" in arguments else ("--store-dtype", "float32")
    result = internvit("extract", pictures, "-o", output, "--model", model, *types, *dtype, *arguments)
    assert result.returncode == 0, result.stderr
    return output


@dataclass
class Chat:
    """A chat model on the disk, and loaded as transformers loads it."""

    folder: Path

    @cached_property
    def model(self) -> Any:
        from transformers import InternVLForConditionalGeneration

        return InternVLForConditionalGeneration.from_pretrained(self.folder).eval()

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)

    def pixel_values(self, *names: str) -> torch.Tensor:
        """The tiles of upright example pictures as transformers' processor makes them, [tiles, 3, 448, 448]."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        processor = GotOcr2ImageProcessorPil.from_pretrained(self.folder)
        pictures = [ImageOps.exif_transpose(Image.open(EXAMPLES / name)).convert("RGB") for name in names]
        return torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures])

    def prompt(self, text: str) -> dict[str, torch.Tensor]:
        found = self.tokenizer(text, return_tensors="pt")
        return {"input_ids": found.input_ids, "attention_mask": found.attention_mask}
