"""Measure the effect of keeping freed memory in the process (`runtime/malloc.py`) on encoding and decoding.

    python benchmarks/allocator.py PHOTOS [--rounds 5]

Each round runs every case twice, with and without, alternately and in separate processes: batches of the default size
through the encoder with the shape of tiny-random, and all pictures of a folder through one decoder. The effect on the
encoder shrinks as batches grow, because a thread's own memory pool is then reused before it is returned.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from internvit_cli.runtime import malloc as allocator

CASES = ("bfloat16", "float32", "decode")
REPEATS = 15


def encode(dtype: str) -> float:
    """Return tiles per second, the median of some batches."""
    from internvit_cli.config import ComputeDtype
    from internvit_cli.encode import encoder as encoder_module
    from internvit_cli.encode.options import EncoderOptions
    from internvit_cli.model.catalog import TINY_RANDOM, describe_model
    from internvit_cli.model.stand_in import stand_in_checkpoint

    encoder_module.keep_freed_memory = lambda: None  # main decides
    card = describe_model(TINY_RANDOM)
    checkpoint = stand_in_checkpoint(card, layer=card.resolve_layer(None))
    options = EncoderOptions(device="cpu", dtype=ComputeDtype(dtype))
    with encoder_module.Encoder.load(checkpoint, options) as encoder:
        tiles = list(np.random.default_rng(0).integers(0, 256, (encoder.info.batch_tiles, 448, 448, 3), np.uint8))
        return statistics.median(_rates(lambda: len(encoder.submit(tiles).result().pooled), time.perf_counter))


def decode(folder: str) -> float:
    """Return tiles per second of processor time."""
    from internvit_cli.config import PixelRule
    from internvit_cli.decode.pictures import decode_tiles
    from internvit_cli.plan.headers import Header, read_header
    from internvit_cli.plan.tiling import choose_grid

    rule = PixelRule()
    paths = [os.path.join(os.fsencode(folder), name) for name in sorted(os.listdir(os.fsencode(folder)))]
    headers = [(path, read_header(path, rule)) for path in paths]
    jobs = [(path, h, choose_grid(h.width, h.height, rule.tiling)) for path, h in headers if isinstance(h, Header)]
    tiles = np.empty((rule.tiling.max_tiles + 1, 448, 448, 3), np.uint8)

    def all_pictures() -> int:
        return sum(decode_tiles(*job, rule, tiles).tiles for job in jobs)

    return statistics.median(_rates(all_pictures, time.process_time))


def _rates(work, clock) -> list[float]:
    work()
    rates = []
    for _ in range(REPEATS):
        start = clock()
        count = work()
        rates.append(count / (clock() - start))
    return rates


def run_child(case: str, folder: str, *, keeps: bool) -> float:
    command = [sys.executable, __file__, folder, "--child", case, *(["--keep"] if keeps else [])]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.keep:
            allocator.keep_freed_memory()
        print(decode(arguments.photos) if arguments.child == "decode" else encode(arguments.child))
        return
    print("| case | without, tiles/s | with, tiles/s | ratio, median (least..most) |\n|---|---|---|---|")
    for case in CASES:
        pairs = [
            [run_child(case, arguments.photos, keeps=keeps) for keeps in (False, True)] for _ in range(arguments.rounds)
        ]
        without, kept = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        print(f"| {case} | {without:.0f} | {kept:.0f} | {spread} |")


if __name__ == "__main__":
    main()
