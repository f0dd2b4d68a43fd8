"""Measure for `encoder.py` on CUDA: ceiling, stability, operations, ways to split attention, the first batch."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvit_cli.config import ComputeDtype, TokenOrder
from internvit_cli.encode.encoder import Encoder
from internvit_cli.model import features
from internvit_cli.model.kernels import fp8, plain
from internvit_cli.model.kernels.interface import StorePlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from encoder import Bench

OPERATION_TILES = 64
"""Tiles in the batch on which single operations are timed."""


def seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the seconds of one call on the card: the median, after a warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def print_ceiling(bench: Bench) -> float:
    """Print the speed of a large matrix product, and return the tiles per second that it would allow."""
    a, b = (torch.randn(8192, 8192, device=bench.device).bfloat16() for _ in range(2))
    speed = 2 * 8192**3 / seconds(lambda: a @ b)
    ceiling = speed / bench.operations_a_tile
    print(f"{torch.cuda.get_device_name(bench.device)}; triton {_triton_version()}")
    print(
        f"matrix product 8192^3 in bfloat16: {speed / 1e12:.0f} TFLOP/s, for {bench.operations_a_tile / 1e9:.1f} GFLOP"
    )
    print(f"per tile: a ceiling of {ceiling:.1f} tiles/s", flush=True)
    return ceiling


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def print_all(bench: Bench, batch: int) -> None:
    """Print everything except the table of speeds, cheap and important results first."""
    print_stability(bench, batch)
    if bench.arguments.operations:
        print_operations(bench)
    if bench.arguments.sweep_attention:
        print_sweep(bench)
    print_first_batches(bench, batch)


def print_stability(bench: Bench, batch: int) -> None:
    """Print how much a tile's tokens depend on its neighbors and on its place in the batch."""
    tiles = bench.tiles(2 * batch)
    print(f"\nA tile in batches of {batch}, largest difference of its tokens:")
    print("| dtype | other neighbors, same place | another place | again, all the same |\n|---|---|---|---|")
    for dtype in bench.dtypes:
        with Encoder.load(bench.checkpoint, bench.options(dtype, batch)) as encoder:

            def encode(chosen: np.ndarray, encoder: Encoder = encoder) -> np.ndarray:
                return encoder.submit(list(chosen)).result().tokens.astype(np.float32)

            first = encode(tiles[:batch])
            mixed = encode(np.concatenate([tiles[: batch // 2], tiles[batch + batch // 2 :]]))
            alone = encode(tiles[:1])
            neighbors = max(
                np.abs(mixed[: batch // 2] - first[: batch // 2]).max(initial=0), np.abs(alone - first[:1]).max()
            )
            turned = encode(np.roll(tiles[:batch], batch // 2, axis=0))
            place = np.abs(np.roll(turned, -(batch // 2), axis=0) - first).max()
            again = np.abs(encode(tiles[:batch]) - first).max()
        print(f"| {dtype.value} | {neighbors:.4g} | {place:.4g} | {again:.4g} |", flush=True)


def first_batch(bench: Bench, batch: int) -> str:
    """Return as JSON the seconds from the weights on the card to the first features, and the compiled kernels."""
    dtype, weights = bench.dtypes[0], 0.0
    load_vit = features.load_vit

    def timed_load(*arguments: object, **options: object) -> object:
        nonlocal weights
        start = time.perf_counter()
        vit = load_vit(*arguments, **options)
        torch.cuda.synchronize()
        weights = time.perf_counter() - start
        return vit

    torch.zeros(1, device=bench.device)  # the creation of the context is not measured
    features.load_vit = timed_load
    before, start = _cached_kernels(), time.perf_counter()
    options = bench.options(dtype, batch) if bench.arguments.batch else bench.options(dtype, None)
    with Encoder.load(bench.checkpoint, options) as encoder:
        encoder.submit(list(bench.tiles(1))).result()
        taken = time.perf_counter() - start - weights
        return json.dumps(
            {
                "seconds": round(taken, 2),
                "weights": round(weights, 2),
                "compiled": _cached_kernels() - before,
                "batch": encoder.info.batch_tiles,
                "kernels": encoder.info.kernels,
            }
        )


def _cached_kernels() -> int:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in folder.glob("*/*.cubin"))


def print_first_batches(bench: Bench, batch: int) -> None:
    """Measure first batches in new processes, because this one has already loaded and compiled kernels."""
    print("\nFrom the weights on the card to the first batch, a new process each:")
    print(
        "| dtype | batch | Triton's cache | seconds | reading weights, seconds | kernels |\n|---|---|---|---|---|---|"
    )
    for dtype, size in product(bench.dtypes, (batch, None)):
        command = [sys.executable, Path(__file__).with_name("encoder.py"), "--first-batch", "--dtype", dtype.value]
        command += ["--shape", bench.arguments.shape, "--device", str(bench.device), "--blocks", str(bench.blocks)]
        command += ["--batch", str(size)] if size else []
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"| {dtype.value} | {size or 'measured'} | failed: {result.stderr.strip().splitlines()[-1]} | | | |")
            continue
        found = json.loads(result.stdout.splitlines()[-1])
        cache = f"cold, {found['compiled']} compiled" if found["compiled"] else "warm"
        chosen = f"{found['batch']}" if size else f"measured: {found['batch']}"
        print(
            f"| {dtype.value} | {chosen} | {cache} | {found['seconds']} | {found['weights']} | {found['kernels']} |",
            flush=True,
        )


def print_operations(bench: Bench) -> None:
    """Print the time of every operation of a block, the input and the output, ours and plain, in both dtypes."""
    from internvit_cli.model.kernels.choice import plain_for
    from internvit_cli.model.kernels.triton_kernels import triton_kernels

    print(f"\nOperations on {OPERATION_TILES} tiles, microseconds per tile; GB/s of reads and writes, or TFLOP/s:")
    print("| operation | dtype | plain | ours | rate of ours |\n|---|---|---|---|---|")
    dtypes = [dtype for dtype in bench.dtypes if dtype in {ComputeDtype.BFLOAT16, ComputeDtype.FP8}]
    for dtype in dtypes:
        kind = fp8.FP8 if dtype is ComputeDtype.FP8 else torch.bfloat16
        tables = plain_for(bench.device, kind), triton_kernels(kind, plain.attend_fused)
        with torch.inference_mode():
            for name, (call, work, unit) in _operations(bench, kind).items():
                times = [seconds(lambda table=table, call=call: call(table)) for table in tables]
                rate = work / times[1] / (1e12 if unit == "TFLOP/s" else 1e9)
                each = [f"{1e6 * one / OPERATION_TILES:.2f}" for one in times]
                print(f"| {name} | {dtype.value} | {each[0]} | {each[1]} | {rate:.0f} {unit} |", flush=True)


def _operations(bench: Bench, kind: torch.dtype) -> dict[str, tuple[Callable, float, str]]:
    """Return operations by name: a function that runs one on a table of kernels, its work, and the unit of the work."""
    vision, B = bench.card.vision, OPERATION_TILES  # noqa: N806
    N, C, M = (bench.card.tile_size // 14) ** 2, vision.hidden_size, vision.mlp_size  # noqa: N806
    rows, small = B * (1 + N), 1 if kind is fp8.FP8 else 2

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=bench.device).bfloat16()

    norm = (nn.RMSNorm if vision.norm == "rms_norm" else nn.LayerNorm)(C, vision.eps).to(bench.device, torch.bfloat16)
    x, y, wide, qkv = some(B, 1 + N, C), some(B, 1 + N, C), some(B, 1 + N, M), some(B, 1 + N, 3 * C)
    qk = (nn.RMSNorm(C, vision.eps).to(x), nn.RMSNorm(C, vision.eps).to(x)) if vision.qk_norm else None
    tiles = torch.randint(0, 256, (B, *[bench.card.tile_size] * 2, 3), device=bench.device, dtype=torch.uint8)
    plan = StorePlan(N // 4, 4 * C, torch.float16, TokenOrder.V2, clamp=False, infinite_from=65520.0, mean=True)
    found: dict[str, tuple[Callable, float, str]] = {
        "patches": (lambda k: k.patches(tiles, k.patch_columns, torch.bfloat16), B * N * 588 * 3.0, "GB/s"),
        "embed": (lambda k: k.embed(x[:, 1:].contiguous(), x[0], norm), rows * C * (8.0 + small), "GB/s"),
        "residual_norm": (lambda k: k.residual_norm(x, y, norm.weight, norm), rows * C * (6.0 + small), "GB/s"),
        "attention": (lambda k: k.attention(qkv, vision.num_heads, qk), 4.0 * B * (1 + N) ** 2 * C, "TFLOP/s"),
        "store": (lambda k: k.store(x[:, 1:], plan), B * N * C * 4.0, "GB/s"),
    }
    for name, width, size, gelu in (("qkv", C, 3 * C, 0), ("proj", C, C, 0), ("fc1 + gelu", C, M, 1), ("fc2", M, C, 0)):
        layer = nn.Linear(width, size, device=bench.device, dtype=torch.bfloat16)
        layer = fp8.Fp8Linear(layer) if kind is fp8.FP8 else layer
        h = wide if width == M and M != C else x
        h = fp8.quantize(h) if kind is fp8.FP8 and name != "proj" else h
        operation = "linear_gelu" if gelu else "linear"
        found[name] = (
            lambda k, h=h, layer=layer, operation=operation: getattr(k, operation)(h, layer),
            2.0 * rows * width * size,
            "TFLOP/s",
        )
    return found


def print_sweep(bench: Bench) -> None:
    """Print attention split in many ways, best first, and PyTorch's attention for comparison."""
    from internvit_cli.model.kernels import triton_attention
    from internvit_cli.model.kernels.triton_attention import AttentionBlocks

    vision = bench.card.vision
    B, H, D = OPERATION_TILES, vision.num_heads, vision.head_dim  # noqa: N806
    T = 1 + (bench.card.tile_size // 14) ** 2  # noqa: N806
    work = 4.0 * B * H * T * T * D
    now = triton_attention.blocks_for(D, torch.cuda.get_device_capability(bench.device))
    qkv = torch.randn(B, T, 3 * H * D, device=bench.device).bfloat16()
    q, k, v = (part.reshape(B, T, H, D).transpose(1, 2) for part in qkv.chunk(3, -1))
    speeds: dict[object, float] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            speeds[backend.name] = _speed(lambda: plain.attend_fused(q, k, v), work)
    for queries, keys, warps, stages, ahead in product((64, 128, 256), (64, 128), (4, 8), (2, 3, 4), (False, True)):
        blocks = AttentionBlocks(queries, keys, 4096 // D, warps, stages, ahead)
        if queries * keys // warps in range(512, 4097):
            speeds[blocks] = _speed(lambda blocks=blocks: triton_attention.attention(qkv, H, blocks), work)
    best = max((blocks for blocks in speeds if isinstance(blocks, AttentionBlocks)), key=speeds.__getitem__)
    for class_keys in (16, 32, 128):
        blocks = best._replace(class_keys=class_keys)
        speeds[blocks] = _speed(lambda blocks=blocks: triton_attention.attention(qkv, H, blocks), work)
    print(f"\nAttention, {B} tiles of {T} tokens, {H} heads of {D}; ours now: {now}")
    print("| cut | TFLOP/s |\n|---|---|")
    for blocks in sorted(speeds, key=speeds.__getitem__, reverse=True)[:15]:
        print(f"| {blocks} | {speeds[blocks]:.0f} |", flush=True)


def _speed(call: Callable[[], object], work: float) -> float:
    """Return TFLOP/s; 0 if the call does not fit on the card."""
    try:
        with torch.inference_mode():
            return work / seconds(call, 10) / 1e12
    except Exception as error:  # noqa: BLE001  (compilers and drivers have their own classes)
        print(f"<!-- {type(error).__name__}: {' '.join(str(error).split())[:120]} -->")
        return 0.0
