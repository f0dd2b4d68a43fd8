"""Define InternViT for inference, both families in one module.

    300M family: LayerNorm, biases on q, k and v.
    6B family:   RMSNorm, no such biases, an RMS norm over all heads of q and of k.
    Both:        14 px patches, a class token, a learned position table, pre-norm blocks with LayerScale, exact GELU,
                 and no norm after the last block.

Letters in shapes are B tiles, T = 1 + N tokens (class token first, then N patches row by row), C hidden size, H heads,
D = C / H, M mlp size, S side of a tile in pixels, P = 14. Parameters have the names of the published checkpoints,
so that a state dict loads unchanged; docs/model.md describes them.
"""

# ruff: noqa: N806, N812  (shape letters, and the name that everyone gives torch.nn.functional)

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit_cli.config import PATCH_SIZE
from internvit_cli.model.kernels.interface import Kernels, Norm, Rows, class_rows, linear_part
from internvit_cli.model.kernels.plain import (
    PATCH_VALUES,
    attend_by_head,
    attend_class,
    attend_fused,
    best_attention,
    plain_kernels,
)
from internvit_cli.model.unshuffle import pixel_unshuffle

if TYPE_CHECKING:
    from internvit_cli.model.card import VisionConfig
    from internvit_cli.model.pixels import Normalization

__all__ = [
    "Block",
    "BlockStack",
    "Embeddings",
    "InternViT",
    "Projector",
    "TileEmbedding",
    "attend_by_head",
    "attend_fused",
    "best_attention",
    "pixel_unshuffle",
]

PLAIN = plain_kernels()


def _norm(config: VisionConfig) -> Norm:
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, config.eps)


class Attention(nn.Module):
    """Self-attention over all tokens of a tile."""

    def __init__(self, config: VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_heads
        self.kernels = kernels
        self.qkv = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(C, config.eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(C, config.eps) if config.qk_norm else None
        self.proj = nn.Linear(C, C)

    @property
    def norms(self) -> tuple[Norm, Norm] | None:
        """The norms of q and of k over all heads together; None if there are none."""
        return None if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def forward(self, h: Rows) -> Tensor:
        """Normed rows [B,T,C] -> [B,T,C]."""
        qkv = self.kernels.linear(h, self.qkv)  # [B,T,3C]
        out = self.kernels.attention(qkv, self.num_heads, self.norms)  # [B,T,C]
        return self.kernels.linear(out, self.proj)

    def of_class(self, h: Rows) -> Tensor:
        """Return the class token's row of `forward`, [B,1,C], from normed rows [B,T,C]: its query and all keys."""
        C = h.shape[-1] if isinstance(h, Tensor) else h.values.shape[-1]
        q = self.kernels.linear(class_rows(h), linear_part(self.qkv, slice(0, C)))  # [B,1,C]
        kv = self.kernels.linear(h, linear_part(self.qkv, slice(C, 3 * C)))  # [B,T,2C]
        return self.kernels.linear(attend_class(q, kv, self.num_heads, self.norms), self.proj)


class MLP(nn.Module):
    """Two linear layers around a GELU, which is exact (erf), or the tanh form on CUDA in 16 bits."""

    def __init__(self, config: VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, h: Rows) -> Tensor:
        """Normed rows [B,T,C] -> [B,T,C]."""
        hidden = self.kernels.linear_gelu(h, self.fc1)  # [B,T,M]
        return self.kernels.linear(hidden, self.fc2)


class Block(nn.Module):
    """One transformer block: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x)).

    Adding y * scale to x and the norm after it are one operation. A block therefore takes x with norm1 already applied,
    and leaves its last y to be added together with the next block's norm1.
    """

    def __init__(self, config: VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.norm1 = _norm(config)
        self.attn = Attention(config, kernels)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = _norm(config)
        self.mlp = MLP(config, kernels)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor, h: Rows) -> tuple[Tensor, Tensor]:
        """Return x and y [B,T,C] for x and h = norm1(x); the output of the block is x + y * ls2. May overwrite x."""
        x, h = self.kernels.residual_norm(x, self.attn(h), self.ls1, self.norm2)
        return x, self.mlp(h)

    def of_class(self, x: Tensor, h: Rows) -> tuple[Tensor, Tensor]:
        """Return the class token's rows of `forward`, [B,1,C] each, with one query and one row of the MLP."""
        y = self.attn.of_class(h)  # [B,1,C]
        x, h = self.kernels.residual_norm(x[:, :1].contiguous(), y, self.ls1, self.norm2)
        return x, self.mlp(h)


class Embeddings(nn.Module):
    """Patch embedding, class token and position table. They stay in float32, so that results round only once."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.grid = config.grid
        self.class_embedding = nn.Parameter(torch.empty(1, 1, C))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.grid**2, C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def position_table(self, rows: int, columns: int) -> Tensor:
        """Return the position table for a picture of rows x columns patches, float32 [1,1+N,C].

        The trained grid is interpolated with a bicubic filter without antialiasing in float32; its own size is
        unchanged.
        """
        table = self.position_embedding.float()
        if (rows, columns) == (self.grid, self.grid):
            return table
        patches = table[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)  # [1,C,grid,grid]
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False, antialias=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed normalized pixels [B,3,height,width] as float32 [B,1+N,C]."""
        B, _, height, width = pixel_values.shape
        if height % PATCH_SIZE or width % PATCH_SIZE:
            raise ValueError(f"{height} x {width} pixels do not divide into patches of {PATCH_SIZE}")
        rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
        patches = pixel_values.float().reshape(B, 3, rows, PATCH_SIZE, columns, PATCH_SIZE)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, PATCH_VALUES)  # (channel, y, x) in each
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)  # [B,N,C]
        x = torch.cat([self.class_embedding.expand(B, -1, -1), x], dim=1)
        return x + self.position_table(rows, columns)


class TileEmbedding(nn.Module):
    """Embeddings of square uint8 tiles of one size, with normalization, biases and positions folded into two tensors.

    With r levels per rescaled unit (255, unless the checkpoint rescales in another way), (u/r - mean)/std * w =
    (u - 128) * w/(r std) + (128/r - mean)/std * w. As u - 128 is exact even in bfloat16, pixels are never rounded, and
    tiles go to the device as bytes.
    """

    weight: Tensor
    table: Tensor

    def __init__(
        self,
        embeddings: Embeddings,
        *,
        normalization: Normalization,
        tile_size: int,
        dtype: torch.dtype,
        kernels: Kernels = PLAIN,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        side = tile_size // PATCH_SIZE  # patches along a side
        device = embeddings.class_embedding.device
        embeddings = copy.deepcopy(embeddings).cpu()  # the CPU has float64, and gives the same table for every device
        w = embeddings.patch_embedding.weight.double()  # [C,3,P,P]
        bias = embeddings.patch_embedding.bias
        assert bias is not None
        levels = 1 / normalization.rescale_factor  # exactly 255 for 1/255
        mean = torch.tensor(normalization.mean, dtype=torch.float64)  # [3]
        std = torch.tensor(normalization.std, dtype=torch.float64)
        scaled = w / (levels * std)[:, None, None]
        offset = torch.einsum("ckyx,k->c", w, (128 / levels - mean) / std) + bias.double()  # [C]
        table = embeddings.position_table(side, side)[0].double()  # [1+N,C]
        table[0] += embeddings.class_embedding[0, 0].double()
        table[1:] += offset
        weight = scaled.permute(0, 2, 3, 1).flatten(1)  # [C,588], in the order of a tile (y, x, channel)
        weight = F.pad(weight, (0, kernels.patch_columns - PATCH_VALUES))
        self.register_buffer("weight", weight.to(dtype).contiguous().to(device), persistent=False)
        self.register_buffer("table", table.to(dtype).to(device), persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """Embed uint8 RGB tiles [B,S,S,3] as [B,1+N,C] in the compute dtype."""
        return self.with_norm(tiles, None)[0]

    def with_norm(self, tiles: Tensor, norm: Norm | None) -> tuple[Tensor, Rows | None]:
        """Embed uint8 RGB tiles [B,S,S,3] as [B,1+N,C] in the compute dtype, and return its normed rows with a norm."""
        values = self.kernels.patches(tiles, self.weight.shape[1], self.weight.dtype)  # [B,N,columns]
        return self.kernels.embed(F.linear(values, self.weight), self.table, norm)


class BlockStack(nn.Module):
    """The stack of blocks, which is a module of its own only for the names in checkpoints."""

    def __init__(
        self, config: VisionConfig, blocks: int, kernels: Kernels, earlier_layers: tuple[int, ...] = ()
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.earlier_layers = earlier_layers
        self.layers = nn.ModuleList([Block(config, kernels) for _ in range(blocks)])

    @property
    def first_norm(self) -> Norm | None:
        """The norm that gives `h` of `forward`; None if no block runs."""
        return cast("Block", self.layers[0]).norm1 if len(self.layers) else None

    def forward(self, x: Tensor, h: Rows | None = None) -> tuple[Tensor, ...]:
        """Run the blocks on hidden states. May overwrite x.

        Args:
            x: Hidden states [B,T,C].
            h: The rows of `x` after the first norm, if they are known.

        Returns:
            Hidden states [B,T,C]: after the last block, then after each of `earlier_layers`.
        """
        return self._run(x, h, class_only=False)

    def of_class(self, x: Tensor, h: Rows | None = None) -> tuple[Tensor, ...]:
        """Return the class token's rows of `forward`, [B,1,C] each; the last block computes only these."""
        return self._run(x, h, class_only=True)

    def _run(self, x: Tensor, h: Rows | None, *, class_only: bool) -> tuple[Tensor, ...]:
        if self.first_norm is None:
            return (x[:, :1] if class_only else x,)
        if h is None:
            h = self.kernels.norm(x, self.first_norm)
        blocks = cast("list[Block]", list(self.layers))
        kept = self._kept(0, x, class_only=class_only)
        for number, (block, following) in enumerate(pairwise(blocks), 1):
            x, y = block(x, h)  # [B,T,C] each
            x, h = self.kernels.residual_norm(x, y, block.ls2, following.norm1)
            kept += self._kept(number, x, class_only=class_only)
        last = blocks[-1]
        x, y = last.of_class(x, h) if class_only else last(x, h)
        return torch.addcmul(x, y, last.ls2), *kept

    def _kept(self, layer: int, x: Tensor, *, class_only: bool) -> list[Tensor]:
        """Return a copy of a layer's hidden state if it is needed, because the next block may overwrite it."""
        return [(x[:, :1] if class_only else x).clone()] if layer in self.earlier_layers else []


class InternViT(nn.Module):
    """The vision tower with the blocks that run."""

    def __init__(
        self, config: VisionConfig, *, blocks: int, kernels: Kernels = PLAIN, earlier_layers: tuple[int, ...] = ()
    ) -> None:
        """Create a tower without weights.

        Args:
            config: The shape of the tower.
            blocks: The number of blocks that run.
            kernels: The operations.
            earlier_layers: Numbers of blocks after which hidden states are returned too, ascending, below `blocks`.
        """
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = BlockStack(config, blocks, kernels, earlier_layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the hidden state of the last block that runs, [B,1+N,C], for normalized pixels [B,3,height,width].

        Height and width are multiples of 14. The dtype is that of the blocks.
        """
        return self.hidden_states(pixel_values)[0]

    def hidden_states(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the result of `forward`, followed by the hidden states of the earlier layers."""
        x = self.embeddings(pixel_values)
        first = next(self.encoder.parameters(), x)
        states: tuple[Tensor, ...] = self.encoder(x.to(first.dtype))
        return states


class Projector(nn.Sequential):
    """The checkpoint's mlp1, from visual tokens [B,N/4,4C] to tokens of the language model's size [B,N/4,L]."""

    def __init__(self, hidden_size: int, projector_size: int) -> None:
        super().__init__(
            nn.LayerNorm(4 * hidden_size, eps=1e-5),
            nn.Linear(4 * hidden_size, projector_size),
            nn.GELU(),
            nn.Linear(projector_size, projector_size),
        )
