"""Compare the error of two ways to add LayerScale in bfloat16: after the product, or folded into its weights.

    python benchmarks/folding.py --shape 300m
    python benchmarks/folding.py --model MODEL --photos PHOTOS

Every row is a plan of where a block rounds to bfloat16:

    scaled     y = round(W a + b); x = round(x + y * scale). This is what `Kernels.residual_norm` does.
    folded     x = round(x + round(scale W) a + scale b): the product adds the residual, rounded once.
    carried    x = round(x + round(scale W) a), and the sum of all scale b so far is a float32 vector that norms add.

Products are computed in float32 from rounded inputs, as matrix units accumulate them, so the result does not depend on
the device. Errors are relative L2, against the same weights without any rounding: of patches, of class tokens, and of
the mean of patches, in which random errors cancel and systematic ones do not. Shapes use the letters of model/vit.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the usual name)

from internvit_cli.model.catalog import TINY_RANDOM, describe_model
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.loading import load_vit
from internvit_cli.model.stand_in import stand_in_checkpoint
from internvit_cli.model.vit import TileEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.model.vit import Block, InternViT

SHAPES = {"300m": "300m", "6b": "6b", "tiny": TINY_RANDOM}
PLANS = ("scaled", "folded", "carried")


def to_bfloat16(x: Tensor) -> Tensor:
    """Round to bfloat16; the type stays float32."""
    return x.to(torch.bfloat16).float()


def as_it_is(x: Tensor) -> Tensor:
    """Round nothing."""
    return x


class Added(NamedTuple):
    """A residual: hidden states, and a vector that still has to be added to every row."""

    x: Tensor
    """[1,T,C]."""
    pending: Tensor
    """[C]."""


class RoundedBlocks:
    """The blocks of a tower, rounded where a plan has it; without a plan nowhere, and with the exact GELU."""

    def __init__(self, vit: InternViT, plan: str | None) -> None:
        self._blocks: list[Block] = list(vit.encoder.layers)  # type: ignore[arg-type]
        self._plan = plan or "scaled"
        self._round: Callable[[Tensor], Tensor] = to_bfloat16 if plan else as_it_is
        self._gelu = "tanh" if plan else "none"  # on a card in 16 bits, GELU has the tanh form

    def __call__(self, x: Tensor) -> Tensor:
        """Run all blocks on hidden states [1,T,C]."""
        state = Added(x, torch.zeros_like(x[0, 0]))
        for block in self._blocks:
            state = self._add(state, self._attend(block, self._norm(state, block.norm1)), block.attn.proj, block.ls1)
            hidden = F.linear(self._norm(state, block.norm2), self._round(block.mlp.fc1.weight), block.mlp.fc1.bias)
            hidden = self._round(F.gelu(hidden, approximate=self._gelu))
            state = self._add(state, hidden, block.mlp.fc2, block.ls2)
        return self._round(state.x + state.pending)

    def _norm(self, state: Added, norm: nn.Module) -> Tensor:
        normed: Tensor = norm(state.x + state.pending)
        return self._round(normed)

    def _attend(self, block: Block, h: Tensor) -> Tensor:
        attn = block.attn
        qkv = self._round(F.linear(h, self._round(attn.qkv.weight), attn.qkv.bias))
        q, k, v = qkv.chunk(3, dim=-1)
        if attn.norms is not None:
            q, k = self._round(attn.norms[0](q)), self._round(attn.norms[1](k))
        q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self._round(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _add(self, state: Added, a: Tensor, layer: nn.Linear, scale: Tensor) -> Added:
        if self._plan == "scaled":
            y = self._round(F.linear(a, self._round(layer.weight), layer.bias))
            return Added(self._round(state.x + y * scale), state.pending)
        product = F.linear(a, self._round(layer.weight * scale[:, None]))
        bias = layer.bias * scale
        if self._plan == "folded":
            return Added(self._round(state.x + product + bias), state.pending)
        return Added(self._round(state.x + product), state.pending + bias)


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


def photographs(folder: Path, count: int, side: int) -> np.ndarray:
    """Return the centers of the first photographs, uint8 [n,S,S,3]."""
    tiles = []
    for path in sorted(folder.iterdir())[:count]:
        with Image.open(path) as image:
            tiles.append(np.asarray(ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))))
    return np.stack(tiles)


def tiles_of(arguments: argparse.Namespace, side: int) -> np.ndarray:
    """Return the tiles to encode, uint8 [n,S,S,3]."""
    if arguments.photos:
        return photographs(arguments.photos, arguments.tiles, side)
    return np.random.default_rng(1).integers(0, 256, (arguments.tiles, side, side, 3), np.uint8)


def checkpoint_of(arguments: argparse.Namespace) -> Checkpoint:
    card = describe_model(arguments.model or SHAPES[arguments.shape], allow_catalog=arguments.model is None)
    blocks = card.resolve_layer() if arguments.blocks is None else arguments.blocks
    return Checkpoint.open(card, layer=blocks) if arguments.model else stand_in_checkpoint(card, layer=blocks)


def parse_arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="300m", help="random weights in a model's shape")
    parser.add_argument("--model", help="trained weights instead")
    parser.add_argument("--photos", type=Path, help="a folder of photographs (default: random pixels)")
    parser.add_argument("--tiles", type=int, default=8)
    parser.add_argument("--blocks", type=int, help="number of blocks to run (default: all that run)")
    return parser.parse_args()


def print_head(checkpoint: Checkpoint, tiles: np.ndarray, first: str) -> None:
    """Print what is measured, and the head of the table."""
    print(f"{checkpoint.card.name}, {checkpoint.blocks} blocks, {len(tiles)} tiles of {tiles.shape[1]} pixels")
    print(f"| {first} | patches | class token | mean of patches | lowest cosine of a token |\n|---|---|---|---|---|")


def print_row(name: str, states: Tensor, exact: Tensor) -> None:
    """Print the errors of hidden states [n,T,C]."""
    patches = relative(states[:, 1:], exact[:, 1:])
    classes = relative(states[:, 0], exact[:, 0])
    means = relative(states[:, 1:].mean(1), exact[:, 1:].mean(1))
    cosine = float(F.cosine_similarity(states, exact, dim=-1).min())
    print(f"| {name} | {patches:.5f} | {classes:.5f} | {means:.5f} | {cosine:.6f} |", flush=True)


def main() -> None:
    arguments = parse_arguments(__doc__)
    checkpoint = checkpoint_of(arguments)
    card = checkpoint.card
    tiles = tiles_of(arguments, card.tile_size)
    vit = load_vit(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    embedding = TileEmbedding(
        vit.embeddings, normalization=card.normalization, tile_size=card.tile_size, dtype=torch.float32
    )
    with torch.inference_mode():
        embedded = [embedding(torch.from_numpy(tile)[None]) for tile in tiles]
        exact = torch.cat([RoundedBlocks(vit, None)(x) for x in embedded])
        print_head(checkpoint, tiles, "plan")
        for plan in PLANS:
            print_row(plan, torch.cat([RoundedBlocks(vit, plan)(to_bfloat16(x)) for x in embedded]), exact)


if __name__ == "__main__":
    main()
