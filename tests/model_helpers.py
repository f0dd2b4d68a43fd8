"""What the tests of the model and the encoder share: reference checkpoints, and small ones made on the spot."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from folders import REFERENCE

from internvit_cli.model.catalog import TINY_RANDOM, describe_model
from internvit_cli.model.checkpoint import Checkpoint, Weight
from internvit_cli.model.layouts import expected_shapes

if TYPE_CHECKING:
    from internvit_cli.model.card import ModelCard

LAYOUTS = ("standalone", "chat", "hf")
FAMILIES = ("300m", "6b")


def reference_card(family: str, layout: str) -> ModelCard:
    return describe_model(str(REFERENCE / f"{family}-{layout}"))


def open_all(card: ModelCard, layer: int | None = None, *, projector: bool = False) -> Checkpoint:
    return Checkpoint.open(card, layer=card.resolve_layer(layer), projector=projector)


def tiny_card(**changes: Any) -> ModelCard:
    """tiny-random at 56 px, which takes a few milliseconds."""
    card = describe_model(TINY_RANDOM)
    return replace(card, vision=replace(card.vision, image_size=56, **changes), tile_size=56)


def random_checkpoint(card: ModelCard, blocks: int, *, projector: bool = False) -> Checkpoint:
    """Random weights in memory, with hidden states of order one."""
    generator = np.random.default_rng(0)
    weights = {}
    shapes = expected_shapes(card.vision, blocks, card.projector_size if projector else None)
    for name, shape in shapes.items():
        array = generator.standard_normal(shape, np.float32) / math.sqrt(math.prod(shape[1:]))
        if len(shape) == 1:
            array = array * 0.1 + (name.endswith("weight"))
        weights[name] = Weight("F32", shape, (array.astype(np.float32),))
    return Checkpoint(card, blocks, weights)


def random_tiles(count: int, size: int = 56, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8))


def relative_error(value: Any, reference: Any) -> float:
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A sound safetensors file of float32 tensors, made by hand."""
    header, data = {}, b""
    for name, array in tensors.items():
        piece = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data
