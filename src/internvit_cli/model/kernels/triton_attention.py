"""Compute attention over packed q, k and v in Triton, without transposing, and without a block for the class token.

A tile has T = 1 + N tokens; N = 1024 is a whole number of blocks, but 1025 is not. The softmax of every query therefore
starts from the key of the class token, after which the N patch keys remain. The query of the class token, which is one
row, is handled by a program without matrix units, beside those of the patches of the same tile and head.

Shapes use the letters of vit.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class AttentionBlocks(NamedTuple):
    """How the work is divided, which decides the speed and the last bits."""

    queries: int
    """Patch queries per program."""
    keys: int
    """Patch keys per step."""
    class_keys: int
    """Patch keys per step for the query of the class token."""
    warps: int
    stages: int
    """Number of steps whose keys and values are loaded at once."""
    ahead: bool
    """Whether the scores of the next step are computed early, which overlaps work but needs more registers."""


HOPPER_BLOCKS = {
    16: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    32: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    64: AttentionBlocks(128, 64, 64, 8, 4, ahead=False),
    128: AttentionBlocks(128, 64, 32, 8, 3, ahead=True),
}
"""Blocks by head size D for an H100; `benchmarks/encoder.py --sweep-attention` tries others. At D = 64 a multiprocessor
has room for two programs, of which one computes scores while the other computes weights. At D = 128 there is room for
only one, which overlaps both itself. No registers are spilled, which would make matrix products wait for each other."""

OTHER_BLOCKS = {
    16: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    32: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    64: AttentionBlocks(128, 64, 64, 8, 3, ahead=False),
    128: AttentionBlocks(128, 64, 32, 8, 3, ahead=False),
}
"""Blocks for other cards, whose matrix units read everything from registers, within 99 KiB of shared memory."""

HOPPER = (9, 0)
LARGE_SHARED_MEMORY = {9, 10}
"""Major compute capabilities with 227 KiB of shared memory that matrix units can read: Hopper and Blackwell's B200."""


def blocks_for(head_size: int, capability: tuple[int, int]) -> AttentionBlocks | None:
    """Return how to divide the work for a head size and a compute capability; None if nothing fits."""
    return (HOPPER_BLOCKS if capability[0] in LARGE_SHARED_MEMORY else OTHER_BLOCKS).get(head_size)


@triton.jit
def _load_rows(at: tl.tensor, row: tl.tensor, PATCHES: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Load a block of rows, with zeros after the last patch; whole blocks need no mask."""
    return tl.load(at) if PATCHES % BLOCK == 0 else tl.load(at, mask=row[:, None] < PATCHES, other=0.0)


@triton.jit
def _scores(q: tl.tensor, k_at: tl.tensor, row: tl.tensor, PATCHES: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """Return products of queries and a block of keys, [QUERIES,KEYS], with minus infinity after the last patch."""
    k = _load_rows(k_at, row, PATCHES, KEYS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    return scores if PATCHES % KEYS == 0 else tl.where(row[None, :] < PATCHES, scores, float("-inf"))


@triton.jit
def _weigh(
    scores: tl.tensor, v: tl.tensor, highest: tl.tensor, total: tl.tensor, out: tl.tensor, scale: tl.tensor
) -> tl.tensor:
    """Add a block of keys to the softmax: log2 of the largest weight, sum of weights, and weighted values."""
    highest_now = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    weights = tl.exp2(scores * scale - highest_now[:, None])
    shrink = tl.exp2(highest - highest_now)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return highest_now, total, out


@triton.jit
def _attend_patches(
    base: tl.tensor,
    target: tl.tensor,
    block: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    PATCHES: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Compute a block of patch queries of one tile and head, from query block * QUERIES on."""
    stride = 3 * width  # from token to token
    channels = tl.arange(0, D)
    row = block * QUERIES + tl.arange(0, QUERIES)
    q = _load_rows(base + (1 + row)[:, None] * stride + channels[None, :], row, PATCHES, QUERIES)

    class_key = tl.load(base + width + channels).to(tl.float32)
    class_value = tl.load(base + 2 * width + channels).to(tl.float32)
    highest = tl.sum(q.to(tl.float32) * class_key[None, :], axis=1) * scale  # [QUERIES]
    total = tl.full([QUERIES], 1.0, tl.float32)
    out = tl.zeros([QUERIES, D], tl.float32) + class_value[None, :]

    key = tl.arange(0, KEYS)
    k_at = base + width + (1 + key)[:, None] * stride + channels[None, :]
    v_at = k_at + width
    if AHEAD:
        scores = _scores(q, k_at, key, PATCHES, KEYS)
        for start in range(KEYS, PATCHES, KEYS):
            k_at += KEYS * stride
            following = _scores(q, k_at, start + key, PATCHES, KEYS)
            highest, total, out = _weigh(scores, tl.load(v_at), highest, total, out, scale)
            v_at += KEYS * stride
            scores = following
        v = _load_rows(v_at, (PATCHES - 1) // KEYS * KEYS + key, PATCHES, KEYS)
        highest, total, out = _weigh(scores, v, highest, total, out, scale)
    else:
        for start in range(0, PATCHES, KEYS):
            scores = _scores(q, k_at, start + key, PATCHES, KEYS)
            v = _load_rows(v_at, start + key, PATCHES, KEYS)
            highest, total, out = _weigh(scores, v, highest, total, out, scale)
            k_at += KEYS * stride
            v_at += KEYS * stride

    out_at = target + (1 + row)[:, None] * width + channels[None, :]
    out = (out / total[:, None]).to(q.dtype)
    if PATCHES % QUERIES == 0:
        tl.store(out_at, out)
    else:
        tl.store(out_at, out, mask=row[:, None] < PATCHES)


@triton.jit
def _attend_class(
    base: tl.tensor,
    target: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    PATCHES: tl.constexpr,
    D: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """Compute the class token's query of one tile and head, with a softmax per lane that are joined at the end."""
    stride = 3 * width
    channels = tl.arange(0, D)
    q = tl.load(base + channels)
    query = q.to(tl.float32)
    class_key = tl.load(base + width + channels).to(tl.float32)
    class_value = tl.load(base + 2 * width + channels).to(tl.float32)
    class_score = tl.sum(query * class_key, axis=0) * scale

    highest = tl.zeros([KEYS], tl.float32) + class_score
    total = tl.zeros([KEYS], tl.float32)
    out = tl.zeros([KEYS, D], tl.float32)
    key = tl.arange(0, KEYS)
    k_at = base + width + (1 + key)[:, None] * stride + channels[None, :]
    v_at = k_at + width
    for start in range(0, PATCHES, KEYS):
        k = _load_rows(k_at, start + key, PATCHES, KEYS).to(tl.float32)
        v = _load_rows(v_at, start + key, PATCHES, KEYS).to(tl.float32)
        scores = tl.sum(k * query[None, :], axis=1) * scale  # [KEYS]
        if PATCHES % KEYS != 0:
            scores = tl.where(start + key < PATCHES, scores, float("-inf"))
        highest_now = tl.maximum(highest, scores)
        weights = tl.exp2(scores - highest_now)
        shrink = tl.exp2(highest - highest_now)
        total = total * shrink + weights
        out = out * shrink[:, None] + weights[:, None] * v
        highest = highest_now
        k_at += KEYS * stride
        v_at += KEYS * stride

    overall = tl.max(highest, axis=0)
    shrink = tl.exp2(highest - overall)
    class_weight = tl.exp2(class_score - overall)
    sum_of_weights = tl.sum(total * shrink, axis=0) + class_weight
    joined = (tl.sum(out * shrink[:, None], axis=0) + class_weight * class_value) / sum_of_weights
    tl.store(target + channels, joined.to(q.dtype))


@triton.jit
def _attention(
    qkv: tl.tensor,
    out: tl.tensor,
    heads: tl.tensor,
    scale: tl.tensor,
    PATCHES: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CLASS_KEYS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Compute a block of queries of one tile and head per program; the last block is that of the class token."""
    blocks = tl.cdiv(PATCHES, QUERIES) + 1
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    tile = (tl.program_id(0) // blocks // heads).to(tl.int64)  # offsets of a large batch exceed 32 bits
    width = heads * D
    base = qkv + tile * (1 + PATCHES) * (3 * width) + head * D
    target = out + tile * (1 + PATCHES) * width + head * D
    if block == blocks - 1:
        _attend_class(base, target, width, scale, PATCHES, D, CLASS_KEYS)
    else:
        _attend_patches(base, target, block, width, scale, PATCHES, D, QUERIES, KEYS, AHEAD)


def attention(qkv: Tensor, heads: int, cut: AttentionBlocks) -> Tensor:
    """Compute attention of packed q, k and v [B,T,3C], contiguous, with heads in order in each third -> [B,T,C].

    Args:
        qkv: float16 or bfloat16 on CUDA; also float32 in Triton's interpreter.
        heads: H; D = C / H is a power of two, at least 16.
        cut: How the work is divided, from `blocks_for`.
    """
    B, T, width = qkv.shape
    D, patches = width // 3 // heads, T - 1
    out = torch.empty((B, T, width // 3), dtype=qkv.dtype, device=qkv.device)
    grid = (B * heads * (triton.cdiv(patches, cut.queries) + 1),)
    _attention[grid](
        qkv,
        out,
        heads,
        D**-0.5 * LOG2_E,
        PATCHES=patches,
        D=D,
        QUERIES=cut.queries,
        KEYS=cut.keys,
        CLASS_KEYS=cut.class_keys,
        AHEAD=cut.ahead,
        num_warps=cut.warps,
        num_stages=cut.stages,
        enable_fp_fusion=True,  # scores * scale - highest is one instruction
    )
    return out
