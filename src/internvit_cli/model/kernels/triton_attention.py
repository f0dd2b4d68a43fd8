"""Attention over packed q, k and v in Triton: nothing is transposed, and the class token costs no block of its own.

A tile has T = 1 + N tokens, and N = 1024 is a whole number of blocks where 1025 is not. So the softmax of every query
starts from the class token's key, after which the N patch keys remain; and the class token's own query, one row, is
answered by a program without matrix units, beside those of the patches of the same tile and head.

Letters in shapes as in vit.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


class AttentionBlocks(NamedTuple):
    """How the work is cut; the numbers decide the speed and the last bits."""

    queries: int
    """Patch queries of one program."""
    keys: int
    """Patch keys of one step."""
    class_keys: int
    """Patch keys of one step of the class token's query."""
    warps: int
    stages: int
    """Steps whose keys and values are on their way at once."""
    ahead: bool
    """Whether the scores of the next step are computed while this step's become weights; takes more registers."""


HOPPER_BLOCKS = {
    16: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    32: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    64: AttentionBlocks(128, 64, 64, 8, 4, ahead=False),
    128: AttentionBlocks(128, 64, 32, 8, 3, ahead=True),
}
"""By head size D, for an H100; `benchmarks/encoder.py --sweep-attention` tries others. At D = 64 a multiprocessor has
room for two programs, and one computes scores while the other computes weights. At D = 128 there is room for only one,
which does both at a time by itself. No register is spilled, after which matrix products would wait for each other."""

OTHER_BLOCKS = {
    16: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    32: AttentionBlocks(128, 64, 64, 4, 3, ahead=False),
    64: AttentionBlocks(128, 64, 64, 8, 3, ahead=False),
    128: AttentionBlocks(128, 64, 32, 8, 3, ahead=False),
}
"""For other cards, whose matrix units take everything from registers; within 99 KiB of shared memory."""

HOPPER = (9, 0)
LARGE_SHARED_MEMORY = {9, 10}
"""Major compute capabilities with 227 KiB for a program, and matrix units that read it: Hopper, Blackwell's B200."""


def blocks_for(head_size: int, capability: tuple[int, int]) -> AttentionBlocks | None:
    """How to cut the work for heads of that size on a card of that compute capability; None where nothing fits."""
    return (HOPPER_BLOCKS if capability[0] in LARGE_SHARED_MEMORY else OTHER_BLOCKS).get(head_size)


@triton.jit
def _load_rows(at: tl.tensor, row: tl.tensor, PATCHES: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """A block of rows; those after the last patch are zeros. Where blocks are whole there is nothing to mask."""
    return tl.load(at) if PATCHES % BLOCK == 0 else tl.load(at, mask=row[:, None] < PATCHES, other=0.0)


@triton.jit
def _scores(q: tl.tensor, k_at: tl.tensor, row: tl.tensor, PATCHES: tl.constexpr, KEYS: tl.constexpr) -> tl.tensor:
    """Products of queries and a block of keys, [QUERIES,KEYS]; minus infinity after the last patch."""
    k = _load_rows(k_at, row, PATCHES, KEYS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    return scores if PATCHES % KEYS == 0 else tl.where(row[None, :] < PATCHES, scores, float("-inf"))


@triton.jit
def _weigh(
    scores: tl.tensor, v: tl.tensor, highest: tl.tensor, total: tl.tensor, out: tl.tensor, scale: tl.tensor
) -> tl.tensor:
    """The softmax so far, with one more block of keys: log2 of the largest weight, sum of weights, weighed values."""
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
    """Patch queries block * QUERIES and following of one tile and head."""
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
    """The class token's query of one tile and head: each of KEYS lanes has a softmax of its own, joined at the end."""
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
    """One program is a block of queries of one tile and head; the last block of each is the class token's."""
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
    """Packed q, k and v [B,T,3C], contiguous, heads in order within each third -> [B,T,C] in the same type.

    Args:
        qkv: float16 or bfloat16 on CUDA; float32 too in Triton's interpreter.
        heads: H; D = C / H is a power of two from 16.
        cut: how to cut the work, from `blocks_for`.
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
