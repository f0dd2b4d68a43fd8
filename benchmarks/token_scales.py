"""Compare the error of coarse tokens with one and with several scales per token, on tokens stored in float32.

internvit extract PHOTOS -o fine --model MODEL --store-dtype float32 [--tokens patch]
python benchmarks/token_scales.py fine
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from internvit_cli import open_features
from internvit_cli.config import scales_per_token
from internvit_cli.model.kernels.plain import dequantize_tokens, quantize_tokens

TOKENS = 12_000
"""Tokens that are measured, drawn from every second image."""
FORMS = [(torch.int8, 0), *((torch.int8, values) for values in (256, 192, 128, 96, 64, 32)), (torch.uint8, 0)]
FORMS += [(torch.uint8, 128), (torch.uint8, 64)]
"""The stored type (uint8 holds the bits of fp8), and the number of values that share a scale; 0 for one per token."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="an output with tokens in float32")
    features = open_features(parser.parse_args().output)
    tokens = sample([image.tokens for image in list(features.values())[::2] if image.is_done])
    size = tokens.shape[-1]
    print(f"{len(tokens):,} tokens of {size} values")
    print("| type | values per scale | relative error | lowest cosine | bytes of the scales |\n|---|---|---|---|---|")
    for dtype, values in FORMS:
        count = scales_per_token(size, values) if values else 0
        stored, scales = quantize_tokens(tokens, dtype, count)
        error, cosine = compare(dequantize_tokens(stored, scales), tokens)
        share = scales.nbytes / stored.nbytes
        name = "int8" if dtype is torch.int8 else "fp8"
        print(f"| {name} | {values or 'all'} | {error:.2%} | {cosine:.5f} | {share:.2%} |")


def sample(arrays: list[np.ndarray]) -> torch.Tensor:
    """Return some tokens of all images, [n, C] float32."""
    whole = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays])
    chosen = np.random.default_rng(0).permutation(len(whole))[:TOKENS]
    return torch.from_numpy(whole[chosen].astype(np.float32))


def compare(read_back: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float]:
    """Return the relative L2 error of all tokens, and the lowest cosine of one."""
    one, other = read_back.double(), tokens.double()
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=-1)
    return float((one - other).norm() / other.norm()), float(cosine.min())


if __name__ == "__main__":
    main()
