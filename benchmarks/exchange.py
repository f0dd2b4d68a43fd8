"""Compare exports of one file with `cp` of it, alternately, each until its data is on the disk.

    python benchmarks/exchange.py [--megabytes 1500] [--rounds 3] [--folder DIR]

The file holds random rows of 13 tiles of 256 visual tokens of 1,024 float16. Every figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import storage_helpers as helpers

TARGETS = ("npy", "copy.h5", "copy.safetensors", "copy.tar", "copy.parquet")
IMAGE_BYTES = 13 * 256 * 1024 * 2


def make_file(path: Path, images: int) -> None:
    helpers.TOKENS_PER_TILE, helpers.CHANNELS, helpers.POOLED_WIDTH = 256, 1024, 1024
    shard = helpers.make_shard(helpers.make_table([(4, 3, 1)] * images), tile_size=448)
    helpers.make_output(path, shard)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def timed(command: list[str]) -> tuple[float, int]:
    """Return the seconds, and the peak resident set in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.stderr.read().decode() if process.stderr else "")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        source = Path(scratch) / "feats.h5"
        # In a separate process, whose peak memory does not count for the children of this one.
        images = max(1, arguments.megabytes * 1_000_000 // IMAGE_BYTES)
        maker = multiprocessing.get_context("spawn").Process(target=make_file, args=(source, images))
        maker.start()
        maker.join()
        size = source.stat().st_size
        export = [sys.executable, "-m", "internvit_cli", "export", str(source)]
        sides = {"cp and sync": ["sh", "-c", f"cp {source} {scratch}/cp && sync {scratch}/cp"]}
        sides |= {f"export to {name}": [*export, f"{scratch}/{name}", "-q"] for name in TARGETS}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks: dict[str, int] = dict.fromkeys(sides, 0)
        for _ in range(arguments.rounds):
            for name, command in sides.items():
                took, peak = timed(command)
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
                for made in ("cp", *TARGETS):
                    remove(Path(scratch) / made)
        print(f"a file of {size / 1e6:.0f} MB")
        print("| | MB/s | of cp | peak memory, MB |")
        print("|---|---|---|---|")
        reference = statistics.median(seconds["cp and sync"])
        for name, took in seconds.items():
            median = statistics.median(took)
            print(f"| {name} | {size / median / 1e6:.0f} | {reference / median:.2f} | {peaks[name] / 1e6:.0f} |")


if __name__ == "__main__":
    main()
