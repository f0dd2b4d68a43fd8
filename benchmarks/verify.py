"""Compare the speed of `internvit verify` with plain reads of the same file, alternating in one run.

    python benchmarks/verify.py [FOLDER] [--gigabytes 4] [--rounds 5] [--tokens visual|none] [--format h5|npy]

It writes an output of random rows with the shape of the 300M model in FOLDER (default: the folder of temporary files).
Before a cold measurement, the file is dropped from the page cache (posix_fadvise) and comes from the disk; before a
warm one, it is in memory. `dd` and `pread` only read, in blocks of 16 MB; `verify` computes every CRC.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from outputs import RECIPE, attributes_of

from internvit_cli.config import (
    Format,
    StoreDtype,
    Tokens,
)
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.storage.format.layout import FeatureShape, NewShard
from internvit_cli.storage.output import Output
from internvit_cli.storage.write.commit import ImageRows, ShardWriter, create_shard
from internvit_cli.verify.checks import verify
from internvit_cli.verify.result import VerifyOptions

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 16 << 20
HIDDEN, TOKENS, CHANNELS = 1024, 256, 4096
TILES = (1, 3, 5, 7, 13)


def make_shard(nbytes: int, tokens: Tokens) -> NewShard:
    """Return a shard with about this many bytes."""
    mean = 4 * HIDDEN + (statistics.mean(TILES) * TOKENS * CHANNELS * 2 if tokens is not Tokens.NONE else 0)
    images = max(1, int(nbytes / mean))
    columns = {name: np.zeros(images, dtype) for name, dtype in COLUMN_DTYPES.items()}
    columns["columns"][:], columns["rows"][:] = np.resize(TILES, images), 1
    columns["width"][:] = columns["height"][:] = columns["orientation"][:] = 1
    table = ImageTable.build([b"%08d.jpg" % row for row in range(images)], np.zeros(images, np.uint8), columns)
    attributes = attributes_of(replace(RECIPE, tokens=tokens))
    return NewShard(table, FeatureShape(tokens, TOKENS, CHANNELS, HIDDEN, StoreDtype.FLOAT16, False), attributes)


def make_output(path: Path, shard: NewShard, shard_format: Format) -> None:
    output = Output(str(path), shard_format)
    output.prepare()
    partial = output.partial_path(0)
    create_shard(output.backend, partial, shard)
    writer = ShardWriter(output.backend, partial, shard.table)
    random = np.random.default_rng(0)
    tile = random.standard_normal((max(TILES), TOKENS, CHANNELS), np.float32).astype("<f2")
    vectors = random.standard_normal((4096, HIDDEN), np.float32)
    for row, tiles in enumerate(shard.table.tile_counts.tolist()):
        tile[0, 0, 0] = row % 1000
        arrays = {"pooled": [vectors[row % 4096][None]]}
        if shard.features.tokens is not Tokens.NONE:
            arrays["visual_tokens"] = [tile[:tiles]]
        writer.write(ImageRows(row, random.bytes(32), arrays))
    writer.checkpoint()
    writer.close()
    output.publish(0, len(shard.table), shard.table.tiles, {})


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.npy"))


def forget(path: Path) -> None:
    """Drop a synced file from the page cache."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_dd(path: Path) -> None:
    for file in files_of(path):
        subprocess.run(["dd", f"if={file}", "of=/dev/null", f"bs={BLOCK}"], check=True, capture_output=True)


def run_pread(path: Path) -> None:
    buffer = bytearray(BLOCK)
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        offset = 0
        while got := os.preadv(descriptor, [buffer], offset):
            offset += got
        os.close(descriptor)


def run_verify(path: Path) -> None:
    verdict = verify(VerifyOptions(str(path), pictures=False))
    assert not verdict.findings, verdict.findings[0]


SIDES: dict[str, Callable[[Path], None]] = {"dd": run_dd, "pread": run_pread, "verify": run_verify}


def measure(path: Path, rounds: int) -> dict[tuple[str, bool], list[float]]:
    """Return the seconds of every side, cold and warm, with sides alternating."""
    seconds: dict[tuple[str, bool], list[float]] = {}
    for _ in range(rounds):
        for is_cold in (True, False):
            for name, side in SIDES.items():
                if is_cold:
                    forget(path)
                else:
                    run_pread(path)
                started = time.perf_counter()
                side(path)
                seconds.setdefault((name, is_cold), []).append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", choices=["visual", "none"], default="visual")
    parser.add_argument("--format", choices=[kind.value for kind in Format], default="h5")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        path = Path(scratch) / ("feats.h5" if options.format == "h5" else "feats")
        shard = make_shard(int(options.gigabytes * 1e9), Tokens(options.tokens))
        make_output(path, shard, Format(options.format))
        nbytes = sum(file.stat().st_size for file in files_of(path))
        print(f"{len(shard.table):,} images, {nbytes / 1e9:.2f} GB, {options.format}, tokens {options.tokens}")
        report(measure(path, options.rounds), nbytes)


def report(seconds: dict[tuple[str, bool], list[float]], nbytes: int) -> None:
    print("\n| file | side | GB/s, median (least..most) | share of pread |")
    print("|---|---|---|---|")
    for (name, is_cold), values in sorted(seconds.items(), key=lambda item: not item[0][1]):
        rates = sorted(nbytes / value / 1e9 for value in values)
        share = statistics.median(seconds["pread", is_cold]) / statistics.median(values)
        middle = f"{statistics.median(rates):.2f} ({rates[0]:.2f}..{rates[-1]:.2f})"
        print(f"| {'on disk' if is_cold else 'in memory'} | {name} | {middle} | {share:.2f} |")


if __name__ == "__main__":
    main()
