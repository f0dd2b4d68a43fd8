"""InternViT, both families in one module, as inference needs it.

    300M family: LayerNorm, biases on q, k and v.
    6B family:   RMSNorm, no such biases, an RMS norm over all heads of q and of k.
    Both:        14 px patches, a class token, a learned position table, pre-norm blocks with LayerScale, exact GELU,
                 and no norm after the last block.

Letters in shapes: B tiles, T = 1 + N tokens (class token first, then N patches row by row), C hidden size, H heads,
D = C / H, M mlp size, S side of a tile in pixels, P = 14. Parameters have the names of the published checkpoints
(FACTS 2a), so that a state dict loads as it is. Semantics: FACTS 3.
"""

# ruff: noqa: N806, N812  (shape letters, and the name that everyone gives torch.nn.functional)

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit_cli.config import PATCH_SIZE

if TYPE_CHECKING:
    from internvit_cli.model.card import VisionConfig

PATCH_VALUES = 3 * PATCH_SIZE**2  # 588 numbers in a patch

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B,H,T,D] -> [B,H,T,D]."""


def attend_fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own fused attention, [B,H,T,D] each."""
    return F.scaled_dot_product_attention(q, k, v)


def attend_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matmul, softmax, matmul, one head at a time, so that a head's scores stay in the cache; [B,H,T,D] each.

    In bfloat16 on CPUs without AMX this takes half the time of the fused kernel (FACTS 10), and with AMX 1.5 times.
    """
    B, H, T, D = q.shape
    out = q.new_empty(B, T, H, D)
    for b in range(B):
        for h in range(H):
            scores = torch.matmul(q[b, h] * D**-0.5, k[b, h].t())  # [T,T]
            torch.matmul(torch.softmax(scores, dim=-1), v[b, h], out=out[b, :, h])  # [T,D]
    return out.transpose(1, 2)


def best_attention(device: torch.device, dtype: torch.dtype) -> Attend:
    """The faster one here: a fixed rule, never a measurement, because the two differ in their last bits."""
    by_head = device.type == "cpu" and dtype is torch.bfloat16 and platform.machine() == "x86_64" and not _has_amx()
    return attend_by_head if by_head else attend_fused


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch 2.5 and later
    return supported is None or bool(supported())


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32 and rounded to x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[...,C] -> [...,C]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _norm(config: VisionConfig) -> nn.Module:
    if config.norm == "rms_norm":
        return RMSNorm(config.hidden_size, config.eps)
    return nn.LayerNorm(config.hidden_size, config.eps)


class Attention(nn.Module):
    """Self-attention over all tokens of a tile."""

    def __init__(self, config: VisionConfig, attend: Attend) -> None:
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_heads
        self.attend = attend
        self.qkv = nn.Linear(C, 3 * C, bias=config.qkv_bias)
        self.q_norm = RMSNorm(C, config.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(C, config.eps) if config.qk_norm else None
        self.proj = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C]."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B,T,C] each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)  # over all heads joined, before the split
        q, k, v = (part.reshape(B, T, self.num_heads, -1).transpose(1, 2) for part in (q, k, v))  # [B,H,T,D]
        out = self.attend(q, k, v)  # [B,H,T,D]
        y: Tensor = self.proj(out.transpose(1, 2).reshape(B, T, C))
        return y


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C]."""
        hidden = self.fc1(x)  # [B,T,M]
        y: Tensor = self.fc2(torch.ops.aten.gelu_(hidden))  # in place: M is the widest tensor there is
        return y


class Block(nn.Module):
    """One transformer block: x + ls1 * attn(norm1(x)), then x + ls2 * mlp(norm2(x))."""

    def __init__(self, config: VisionConfig, attend: Attend) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.attn = Attention(config, attend)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.norm2 = _norm(config)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C]."""
        x = torch.addcmul(x, self.attn(self.norm1(x)), self.ls1)  # [B,T,C]
        return torch.addcmul(x, self.mlp(self.norm2(x)), self.ls2)


class Embeddings(nn.Module):
    """Patches, class token and position table. Kept in float32: small, and all that is made of them rounds once."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.grid = config.grid
        self.class_embedding = nn.Parameter(torch.empty(1, 1, C))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.grid**2, C))
        self.patch_embedding = nn.Conv2d(3, C, kernel_size=PATCH_SIZE, stride=PATCH_SIZE)

    def position_table(self, rows: int, columns: int) -> Tensor:
        """The position table for a picture of rows x columns patches, float32 [1,1+N,C].

        Bicubic, no antialiasing, in float32, always from the trained grid; at that grid's size the table itself.
        """
        table = self.position_embedding.float()
        if (rows, columns) == (self.grid, self.grid):
            return table
        patches = table[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)  # [1,C,grid,grid]
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", align_corners=False, antialias=False)
        return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B,3,height,width] -> float32 [B,1+N,C]."""
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
    """Embeddings of square uint8 tiles of one size: normalisation, biases and positions folded into two tensors.

    (u/255 - mean)/std * w = (u - 128) * w/(255 std) + (128/255 - mean)/std * w, and u - 128 is exact even in bfloat16,
    so that pixels are never rounded and the tile goes to the device as the bytes it is.
    """

    weight: Tensor
    table: Tensor

    def __init__(
        self,
        embeddings: Embeddings,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        tile_size: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.side = tile_size // PATCH_SIZE  # patches along a side
        device = embeddings.class_embedding.device
        embeddings = copy.deepcopy(embeddings).cpu()  # where float64 is, and the same table for every device
        w = embeddings.patch_embedding.weight.double()  # [C,3,P,P]
        bias = embeddings.patch_embedding.bias
        assert bias is not None
        channel_mean = torch.tensor(mean, dtype=torch.float64)
        channel_std = torch.tensor(std, dtype=torch.float64)
        scaled = w / (255 * channel_std)[:, None, None]
        offset = torch.einsum("ckyx,k->c", w, (128 / 255 - channel_mean) / channel_std) + bias.double()  # [C]
        table = embeddings.position_table(self.side, self.side)[0].double()  # [1+N,C]
        table[0] += embeddings.class_embedding[0, 0].double()
        table[1:] += offset
        weight = scaled.permute(0, 2, 3, 1).flatten(1)  # [C,588], in a tile's own order (y, x, channel)
        self.register_buffer("weight", weight.to(dtype).contiguous().to(device), persistent=False)
        self.register_buffer("table", table.to(dtype).to(device), persistent=False)

    def forward(self, tiles: Tensor) -> Tensor:
        """uint8 RGB [B,S,S,3] -> [B,1+N,C] in the compute dtype."""
        B, side, C = len(tiles), self.side, self.weight.shape[0]
        patches = tiles.reshape(B, side, PATCH_SIZE, side, PATCH_SIZE, 3).transpose(2, 3)  # [B,side,side,P,P,3]
        values = patches.reshape(B, side * side, PATCH_VALUES).to(self.weight.dtype).sub_(128)  # [B,N,588]
        x = self.weight.new_empty(B, 1 + side * side, C)
        x[:, 0] = self.table[0]
        torch.add(F.linear(values, self.weight), self.table[1:], out=x[:, 1:])
        return x


class Encoder(nn.Module):
    """The stack of blocks; a module of its own only because checkpoints name it so."""

    def __init__(self, config: VisionConfig, blocks: int, attend: Attend) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(config, attend) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,C] -> [B,T,C]."""
        for block in self.layers:
            x = block(x)  # [B,T,C]
        return x


class InternViT(nn.Module):
    """The vision tower, as many blocks of it as run."""

    def __init__(self, config: VisionConfig, *, blocks: int, attend: Attend = attend_fused) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, blocks, attend)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B,3,height,width] -> hidden state of the last block that runs, [B,1+N,C].

        Height and width are any multiples of 14. The dtype is that of the blocks.
        """
        x = self.embeddings(pixel_values)
        first = next(self.encoder.parameters(), x)
        hidden: Tensor = self.encoder(x.to(first.dtype))
        return hidden


class Projector(nn.Sequential):
    """The checkpoint's mlp1: visual tokens [B,N/4,4C] -> tokens of the language model's size [B,N/4,L]."""

    def __init__(self, hidden_size: int, projector_size: int) -> None:
        super().__init__(
            nn.LayerNorm(4 * hidden_size, eps=1e-5),
            nn.Linear(4 * hidden_size, projector_size),
            nn.GELU(),
            nn.Linear(projector_size, projector_size),
        )


def unshuffle_view(patch_tokens: Tensor, order: str) -> Tensor:
    """Patch tokens of square tiles [B,N,C] as a view [B,h/2,w/2,2,2,C]: each 2 x 2 neighbourhood together.

    Args:
        patch_tokens: row by row, without the class token; N is the square of an even number.
        order: v2 has the neighbourhoods row by row; v1 column by column, as older chat checkpoints were trained.
    """
    B, N, C = patch_tokens.shape
    side = math.isqrt(N)
    if order not in {"v1", "v2"} or side * side != N or side % 2:
        raise ValueError(f"no {order} unshuffle of {N} patches")
    x = patch_tokens.reshape(B, side // 2, 2, side // 2, 2, C)  # [B,h/2,2,w/2,2,C], a view
    rows, columns = (1, 3) if order == "v2" else (3, 1)
    return x.permute(0, rows, columns, 2, 4, 5)


def pixel_unshuffle(patch_tokens: Tensor, order: str) -> Tensor:
    """Patch tokens [B,N,C] -> visual tokens [B,N/4,4C]; within one: (row 0, column 0), (0,1), (1,0), (1,1)."""
    return unshuffle_view(patch_tokens, order).flatten(3).flatten(1, 2)
