"""Tiles a second of our encoder against transformers' InternVLVisionModel (sdpa): same shape, weights, dtype, machine.

Both get the same uint8 tiles and give visual tokens in float16 on the host, in one process, in turns. Our encoder gets
them as it does in `internvit extract`; transformers gets whole batches and normalises them on the device.

    python benchmarks/encoder.py --shape 300m --dtype bfloat16 --repeats 5
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
import transformers
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvit_cli.config import ComputeDtype
from internvit_cli.encoder import Encoder, EncoderOptions, find_device
from internvit_cli.model.card import IMAGENET_MEAN, IMAGENET_STD, ModelCard
from internvit_cli.model.catalog import TINY_RANDOM, describe_model
from internvit_cli.model.checkpoint import Checkpoint, Weight, expected_shapes
from internvit_cli.model.vit import pixel_unshuffle
from internvit_cli.workers import usable_cpus

SHAPES = {"300m": "300m", "6b": "6b", "tiny": TINY_RANDOM}
NATIVE_NAMES = (
    ("class_embedding", "cls_token"),
    ("position_embedding", "position_embeddings"),
    ("patch_embedding.", "patch_embeddings.projection."),
    ("encoder.layers.", "encoder.layer."),
    (".ls", ".lambda_"),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
)


def random_checkpoint(card: ModelCard, blocks: int) -> Checkpoint:
    """Random weights in memory, small enough that hidden states stay of order one."""
    generator = np.random.default_rng(0)
    weights = {}
    for name, shape in expected_shapes(card.vision, blocks, None).items():
        array = generator.standard_normal(shape, np.float32)
        array *= 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        if ".norm" in name and name.endswith("weight"):
            array += 1
        weights[name] = Weight("F32", shape, (array,))
    return Checkpoint(card, blocks, weights)


class Transformers:
    """What people run today: the native class, whole batches, all cores for each operation."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        vision = checkpoint.card.vision
        config = InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=checkpoint.blocks,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.mlp_size,
            image_size=[vision.image_size] * 2,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            norm_type=vision.norm,
            layer_norm_eps=vision.eps,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model = InternVLVisionModel(config)
        self.model.load_state_dict(native_state(checkpoint, device, dtype), assign=True)
        self.model.eval().requires_grad_(False)
        self.threads = threads
        self.device, self.dtype = device, dtype
        self.mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 [B,S,S,3] -> float16 visual tokens [B,N/4,4C]."""
        torch.set_num_threads(self.threads)
        pixels = torch.from_numpy(tiles).to(self.device).permute(0, 3, 1, 2).float() / 255
        pixels = ((pixels - self.mean) / self.std).to(self.dtype)
        hidden = self.model(pixel_values=pixels).last_hidden_state
        return pixel_unshuffle(hidden[:, 1:], "v2").half().cpu().numpy()


def native_state(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state = {}
    for name, weight in checkpoint.weights.items():
        tensor = torch.from_numpy(checkpoint.read(name).view(np.float32).reshape(weight.shape)).to(device, dtype)
        for ours, theirs in NATIVE_NAMES:
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part.clone()
        else:
            state[name] = tensor
    return state


def ours(encoder: Encoder, tiles: np.ndarray) -> np.ndarray:
    if encoder.device_name == "cpu":
        torch.set_num_threads(1)
    size = encoder.batch_tiles
    batches = [encoder.submit(list(tiles[i : i + size])) for i in range(0, len(tiles), size)]
    return np.concatenate([batch.result().tokens for batch in batches])


def timed(call, *arguments) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = call(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="300m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=None, help="tiles a batch (default: 2 a core on a CPU, else 64)")
    parser.add_argument("--tiles", type=int, default=None, help="tiles a measurement (default: one batch; CUDA: eight)")
    parser.add_argument("--blocks", type=int, default=None, help="run only so many blocks (default: all that run)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    arguments = parser.parse_args()

    device = find_device(arguments.device)
    card = replace(describe_model(SHAPES[arguments.shape], allow_catalog=True), name=f"{arguments.shape} shape")
    dtype = ComputeDtype(arguments.dtype or "bfloat16")
    batch = arguments.batch or (2 * arguments.threads if device.type == "cpu" else 64)
    count = arguments.tiles or (batch if device.type == "cpu" else 8 * batch)
    blocks = card.resolve_layer() if arguments.blocks is None else arguments.blocks
    checkpoint = random_checkpoint(card, blocks)
    tiles = np.random.default_rng(1).integers(0, 256, (count, card.tile_size, card.tile_size, 3), np.uint8)

    options = EncoderOptions(
        device=str(device), dtype=dtype, batch_tiles=batch, tile_size=card.tile_size, threads=arguments.threads
    )
    with Encoder.load(checkpoint, options) as encoder:
        theirs = Transformers(checkpoint, device, getattr(torch, dtype.value), arguments.threads)

        def baseline(tiles: np.ndarray) -> np.ndarray:
            return np.concatenate([theirs.encode(tiles[i : i + batch]) for i in range(0, len(tiles), batch)])

        _, mine = timed(ours, encoder, tiles)
        _, reference = timed(baseline, tiles)
        difference = np.abs(mine.astype(np.float32) - reference.astype(np.float32)).max()
        seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
        for _ in range(arguments.repeats):
            seconds["transformers"].append(timed(baseline, tiles)[0])
            seconds["ours"].append(timed(ours, encoder, tiles)[0])
        device_name = encoder.device_name

    rate = {name: count / statistics.median(values) for name, values in seconds.items()}
    spread = {name: f"{count / max(values):.2f} to {count / min(values):.2f}" for name, values in seconds.items()}
    print(f"{platform.platform()}, {os.cpu_count()} cores, {arguments.threads} threads; device {device_name}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {blocks} blocks; largest difference")
    print(f"between the two {difference:.4g}, of values up to {np.abs(reference.astype(np.float32)).max():.4g}\n")
    print("| shape | dtype | batch | encoder | tiles/s (median) | range | ratio | ratio of the best |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("transformers", "ours"):
        print(
            f"| {arguments.shape} | {dtype.value} | {batch} | {name} | {rate[name]:.2f} | {spread[name]} "
            f"| {rate[name] / rate['transformers']:.2f} | {min(seconds['transformers']) / min(seconds[name]):.2f} |"
        )


if __name__ == "__main__":
    main()
