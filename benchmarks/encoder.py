"""Compare tiles per second of our encoder and transformers' InternVLVisionModel (sdpa): same shape and weights.

Both encode the same uint8 tiles to float16 visual tokens on the host, alternately in one process. Our encoder gets
them as in `internvit extract`; transformers gets whole batches and normalizes them on the device.

    python benchmarks/encoder.py --shape 300m --dtype bfloat16 --repeats 5
    python benchmarks/encoder.py --shape 300m --dtype bfloat16 fp8 --batch 1 4 64 128 --operations --sweep-attention

On a CUDA card, the output also has transformers in a CUDA graph at small batches, the share of the speed of a matrix
product of 8192^3, errors against float32, the time to the first batch, and how much a row depends on its neighbors.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from dataclasses import replace

import numpy as np
import torch
import transformers
from peers import Graphed, Transformers

from internvit_cli.config import ComputeDtype
from internvit_cli.encode.devices import find_device
from internvit_cli.encode.encoder import Encoder
from internvit_cli.encode.options import EncoderOptions
from internvit_cli.model.catalog import TINY_RANDOM, describe_model
from internvit_cli.model.stand_in import stand_in_checkpoint
from internvit_cli.runtime.workers import usable_cpus

SHAPES = {"300m": "300m", "6b": "6b", "tiny": TINY_RANDOM}
LARGEST_GRAPHED = 8
"""Largest batch in tiles for which transformers is also run in a CUDA graph."""
COMPARED_TILES = 8
"""Number of tiles whose tokens are compared with float32."""

Encode = "Callable[[np.ndarray], np.ndarray]"


def ours(encoder: Encoder, tiles: np.ndarray) -> np.ndarray:
    """Encode uint8 [n,S,S,3] to float16 visual tokens [n,N/4,4C], with batches in flight as in `internvit extract`."""
    if encoder.info.device_name == "cpu":
        torch.set_num_threads(1)
    size = encoder.info.batch_tiles
    batches = [encoder.submit(list(tiles[i : i + size])) for i in range(0, len(tiles), size)]
    return np.concatenate([batch.result().tokens for batch in batches])


def in_batches(encode: Encode, batch: int) -> Encode:
    """Return an encoder that splits any number of tiles into batches."""
    return lambda tiles: np.concatenate([encode(tiles[i : i + batch]) for i in range(0, len(tiles), batch)])


def measured(sides: dict[str, Encode], tiles: np.ndarray, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of every side for all tiles; sides alternate after a warm-up each."""
    for encode in sides.values():
        encode(tiles)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, encode in sides.items():
            start = time.perf_counter()
            encode(tiles)
            seconds[name].append(time.perf_counter() - start)
    return seconds


class Bench:
    """One shape on one device: the encoders to compare, and the table's rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = find_device(arguments.device)
        card = describe_model(SHAPES[arguments.shape], allow_catalog=True)
        self.card = replace(card, name=f"{arguments.shape} shape")
        self.blocks = card.resolve_layer() if arguments.blocks is None else arguments.blocks
        self.checkpoint = stand_in_checkpoint(self.card, layer=self.blocks)
        self.dtypes = [ComputeDtype(dtype) for dtype in arguments.dtype]
        self.ceiling: float | None = None
        """Tiles per second if all work ran at the speed of a large matrix product; None on a CPU."""
        self.notes: list[str] = []
        """The kernels in use, for the lines below the table."""

    def options(self, dtype: ComputeDtype, batch: int, **changes: bool) -> EncoderOptions:
        return EncoderOptions(
            device=str(self.device),
            dtype=dtype,
            batch_tiles=batch,
            tile_size=self.card.tile_size,
            threads=self.arguments.threads,
            **changes,
        )

    def tiles(self, count: int) -> np.ndarray:
        side = self.card.tile_size
        return np.random.default_rng(1).integers(0, 256, (count, side, side, 3), np.uint8)

    @property
    def operations_a_tile(self) -> float:
        """Floating-point operations per tile: linear layers and attention; a multiply-add counts as two."""
        vision = self.card.vision
        tokens, width = 1 + (self.card.tile_size // vision.patch_size) ** 2, vision.hidden_size
        linear = 2 * tokens * width * (4 * width + 2 * vision.mlp_size)
        return self.blocks * (linear + 4.0 * tokens**2 * width) + 2.0 * tokens * 588 * width

    def peer_dtype(self, dtype: ComputeDtype) -> torch.dtype:
        """Return the type of transformers in the comparison with ours."""
        return torch.bfloat16 if dtype is ComputeDtype.FP8 else getattr(torch, dtype.value)

    def speed(self, batch: int) -> None:
        """Measure and print the rows for one batch size: every dtype, ours and transformers'."""
        on_cpu = self.device.type == "cpu"
        count = self.arguments.tiles or (batch if on_cpu else max(8 * batch, 32))
        tiles = self.tiles(count)
        for dtype in dict.fromkeys(self.peer_dtype(dtype) for dtype in self.dtypes):
            peer = Transformers(self.checkpoint, self.device, dtype, self.arguments.threads)
            sides: dict[str, Encode] = {"transformers": in_batches(peer.encode, batch)}
            if self.device.type == "cuda" and batch <= LARGEST_GRAPHED:
                sides["transformers, graph"] = in_batches(Graphed(peer, batch, self.card.tile_size).encode, batch)
            mine = [one for one in self.dtypes if self.peer_dtype(one) is dtype]
            with EncoderStack(self, mine, batch) as encoders:
                sides |= encoders
                self.rows(batch, measured(sides, tiles, self.arguments.repeats), count, str(dtype).split(".")[1])

    def rows(self, batch: int, seconds: dict[str, list[float]], count: int, dtype: str) -> None:
        """Print rows of the table."""
        rate = {name: count / statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            spread = f"{count / max(values):.2f} to {count / min(values):.2f}"
            ratio = rate[name] / rate["transformers"]
            best = min(seconds["transformers"]) / min(values)
            share = "" if self.ceiling is None else f" {rate[name] / self.ceiling:.2f} |"
            print(
                f"| {self.arguments.shape} | {dtype} | {batch} | {name} | {rate[name]:.2f} | {spread} "
                f"| {ratio:.2f} | {best:.2f} |{share}",
                flush=True,
            )

    def errors(self, batch: int) -> None:
        """Print errors against transformers in float32: the largest difference, and the lowest cosine of a token."""
        tiles = self.tiles(COMPARED_TILES if self.device.type == "cuda" else batch)
        exact = in_batches(Transformers(self.checkpoint, self.device, torch.float32, self.arguments.threads).encode, 2)
        reference = exact(tiles).astype(np.float32)
        print(f"\nAgainst transformers in float32, {len(tiles)} tiles, values up to {np.abs(reference).max():.4g}:")
        print("| encoder | largest difference | relative L2 error | lowest token cosine |\n|---|---|---|---|")
        for dtype in dict.fromkeys(self.peer_dtype(dtype) for dtype in self.dtypes):
            peer = Transformers(self.checkpoint, self.device, dtype, self.arguments.threads)
            error_row(f"transformers {dtype}", in_batches(peer.encode, 2)(tiles), reference)
        for dtype in self.dtypes:
            with Encoder.load(self.checkpoint, self.options(dtype, batch)) as encoder:
                error_row(f"ours {dtype.value}", ours(encoder, tiles), reference)


class EncoderStack:
    """Our encoders of several dtypes, loaded and closed together."""

    def __init__(self, bench: Bench, dtypes: list[ComputeDtype], batch: int) -> None:
        self._bench, self._dtypes, self._batch = bench, dtypes, batch
        self._encoders: list[Encoder] = []

    def __enter__(self) -> dict[str, Encode]:
        sides = {}
        for dtype in self._dtypes:
            variants = {"ours": {}, "ours, plain": {"fused": False}, "ours, compiled": {"compile": True}}
            for name in ("ours", *self._bench.arguments.also):
                encoder = Encoder.load(
                    self._bench.checkpoint, self._bench.options(dtype, self._batch, **variants[name])
                )
                self._encoders.append(encoder)
                label = name if dtype is not ComputeDtype.FP8 else f"{name}, fp8"
                sides[label] = lambda tiles, encoder=encoder: ours(encoder, tiles)
                self._bench.notes.append(f"{label}, {self._batch} tiles per batch: {encoder.info.kernels}")
        return sides

    def __exit__(self, *error: object) -> None:
        for encoder in self._encoders:
            encoder.close()


def error_row(name: str, tokens: np.ndarray, reference: np.ndarray) -> None:
    tokens = tokens.astype(np.float32)
    product = (tokens * reference).sum(-1)
    cosine = product / (np.linalg.norm(tokens, axis=-1) * np.linalg.norm(reference, axis=-1))
    relative = np.linalg.norm(tokens - reference) / np.linalg.norm(reference)
    print(f"| {name} | {np.abs(tokens - reference).max():.4g} | {relative:.5f} | {cosine.min():.6f} |", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="300m")
    dtypes = [dtype.value for dtype in ComputeDtype if dtype is not ComputeDtype.AUTO]
    parser.add_argument("--dtype", choices=dtypes, nargs="+", default=["bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", help="tiles per batch (default: 2 per core on a CPU, else 64)")
    parser.add_argument(
        "--tiles", type=int, default=None, help="tiles per measurement (default: one batch; CUDA: eight)"
    )
    parser.add_argument("--blocks", type=int, default=None, help="number of blocks to run (default: all that run)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    also = ["ours, plain", "ours, compiled"]
    parser.add_argument("--also", choices=also, nargs="*", default=[], help="CUDA: further variants of ours")
    parser.add_argument("--operations", action="store_true", help="CUDA: the time of every operation")
    parser.add_argument(
        "--sweep-attention", action="store_true", help="CUDA: other ways to split attention, best first"
    )
    parser.add_argument("--first-batch", action="store_true", help="CUDA: only the time to the first batch, as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    bench = Bench(arguments)
    batches = arguments.batch or [2 * arguments.threads if bench.device.type == "cpu" else 64]
    if arguments.first_batch:
        from on_cuda import first_batch

        print(first_batch(bench, batches[0]))
        return
    print(f"{platform.platform()}, {os.cpu_count()} cores, {arguments.threads} threads; device {bench.device}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; {bench.blocks} blocks")
    share = ""
    if bench.device.type == "cuda":
        import on_cuda

        bench.ceiling = on_cuda.print_ceiling(bench)
        share = " share of the ceiling |"
    print(f"\n| shape | dtype | batch | encoder | tiles/s (median) | range | ratio | ratio of the best |{share}")
    print("|---|---|---|---|---|---|---|---|" + "---|" * bool(share), flush=True)
    for batch in batches:
        bench.speed(batch)
    print("", *dict.fromkeys(bench.notes), sep="\n")
    bench.errors(max(batches))
    if bench.device.type == "cuda":
        on_cuda.print_all(bench, max(batches))


if __name__ == "__main__":
    main()
