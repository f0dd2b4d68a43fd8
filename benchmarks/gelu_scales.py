"""Compare the error of ways to scale the rows that go to fp8 after GELU, with the emulated fp8 network on a CPU.

    python benchmarks/gelu_scales.py --shape 300m --tiles 1
    python benchmarks/gelu_scales.py --model MODEL --photos PHOTOS --tiles 4

A product can quantize its own output only if it knows the scale before it has computed the row. Every row of the table
is a way to get scales:

    largest    from the largest magnitude of each row, as it is now; needs the whole row.
    bound      from |h| |w| + |b|, which no value of the row exceeds, with the longest row w of weights: known before.
    columns    from the largest magnitude of each 128 columns of a row: known within one program of a product.

Errors are relative L2 against float32, as in folding.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from folding import checkpoint_of, parse_arguments, print_head, print_row, tiles_of
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the usual name)

from internvit_cli.model.kernels.choice import base_dtype, plain_for
from internvit_cli.model.kernels.fp8 import FP8, LARGEST_FP8, dequantize, linear_gelu, quantize, scaled_linear
from internvit_cli.model.kernels.interface import QuantizedRows
from internvit_cli.model.loading import load_vit
from internvit_cli.model.vit import TileEmbedding

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.model.kernels.interface import Linear, Rows

CPU = torch.device("cpu")
COLUMNS = 128


def by_bound(h: Rows, layer: Linear) -> QuantizedRows:
    """Compute `Kernels.linear_gelu` with scales that are known before the product; |GELU(x)| is at most |x|."""
    values = F.gelu(scaled_linear(h, layer).float())
    weight = layer.weight.float() * layer.scale[:, None]  # type: ignore[attr-defined]
    bound = dequantize(h).norm(dim=-1, keepdim=True) * weight.norm(dim=1).max()
    if layer.bias is not None:
        bound = bound + layer.bias.float().abs().max()
    return QuantizedRows((values * (LARGEST_FP8 / bound)).to(FP8), bound / LARGEST_FP8)


def by_columns(h: Rows, layer: Linear) -> QuantizedRows:
    """Compute `Kernels.linear_gelu` with a scale per 128 columns; rows are dequantized, because a row has one scale."""
    values = F.gelu(scaled_linear(h, layer).float())
    blocks = quantize(values.unflatten(-1, (-1, min(COLUMNS, values.shape[-1]))))
    rows = dequantize(blocks).flatten(-2)
    return QuantizedRows(rows, torch.ones_like(rows[..., :1]))


WAYS: dict[str, Callable[[Rows, Linear], Rows]] = {"largest": linear_gelu, "bound": by_bound, "columns": by_columns}


def states(checkpoint: Checkpoint, tiles: np.ndarray, way: str | None) -> Tensor:
    """Return hidden states [n,T,C] as float32; without a way, they are computed in float32."""
    dtype = FP8 if way else torch.float32
    kernels = plain_for(CPU, dtype)
    if way:
        kernels = replace(kernels, linear_gelu=WAYS[way])
    card = checkpoint.card
    vit = load_vit(checkpoint, device=CPU, dtype=dtype, kernels=kernels)
    embedding = TileEmbedding(
        vit.embeddings,
        normalization=card.normalization,
        tile_size=card.tile_size,
        dtype=base_dtype(dtype),
        kernels=kernels,
    )
    found = []
    for tile in tiles:
        x, h = embedding.with_norm(torch.from_numpy(tile)[None], vit.encoder.first_norm)
        found.append(vit.encoder(x, h)[0].float())
    return torch.cat(found)


def main() -> None:
    arguments = parse_arguments(__doc__)
    checkpoint = checkpoint_of(arguments)
    tiles = tiles_of(arguments, checkpoint.card.tile_size)
    with torch.inference_mode():
        exact = states(checkpoint, tiles, None)
        print_head(checkpoint, tiles, "scales")
        for way in WAYS:
            print_row(way, states(checkpoint, tiles, way), exact)


if __name__ == "__main__":
    main()
