"""Measure the cost of durability: the same run with and without checkpoints and syncs, alternately.

    python benchmarks/durability.py PHOTOS [--repeat 2] [--rounds 7] [--output FOLDER]

The encoder limits both (the shape of tiny-random, tokens stored). "Off" never syncs, and writes digests, CRCs and
statuses once at the end, as a tool without crash safety does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from internvit_cli.config import ComputeDtype
from internvit_cli.extract import writer_thread as storing
from internvit_cli.extract.pipeline import extract
from internvit_cli.options import ExtractOptions, ModelOptions, RunOptions, StoreOptions
from internvit_cli.runtime.signals import StopRequest

NEVER_SECONDS, NEVER_BYTES = 86_400.0, sys.maxsize


def spread(photos: Path, folder: Path, repeat: int) -> None:
    """Link the same photographs under several names."""
    for number in range(repeat):
        shutil.copytree(photos, folder / f"{number:03d}", ignore=shutil.ignore_patterns("*.tsv"))


def leave_alone(_descriptor: int) -> None:
    """Replace a sync."""


def run(pictures: Path, output: Path) -> float:
    """Return the seconds of the main part of one run."""
    options = ExtractOptions(
        sources=(str(pictures),),
        store=StoreOptions(str(output)),
        model=ModelOptions("tiny-random"),
        run=RunOptions(dtype=ComputeDtype.FLOAT32),
    )
    summary = extract(options, StopRequest())
    assert summary.counts.skipped == summary.counts.pending == 0
    return summary.stages.wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", default=tempfile.gettempdir(), help="a folder on the disk to measure")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    syncs = os.fdatasync, os.fsync
    limits = storing.CHECKPOINT_SECONDS, storing.CHECKPOINT_BYTES
    with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
        pictures = Path(scratch, "pictures")
        spread(arguments.photos, pictures, arguments.repeat)
        run(pictures, Path(scratch, "warm-up.h5"))
        for number in range(arguments.rounds):
            for side in ("on", "off") if number % 2 else ("off", "on"):
                if side == "off":
                    os.fdatasync = os.fsync = leave_alone
                    storing.CHECKPOINT_SECONDS, storing.CHECKPOINT_BYTES = NEVER_SECONDS, NEVER_BYTES
                output = Path(scratch, f"{side}-{number}.h5")
                seconds[side].append(run(pictures, output))
                os.fdatasync, os.fsync = syncs
                storing.CHECKPOINT_SECONDS, storing.CHECKPOINT_BYTES = limits
                nbytes = output.stat().st_size
                output.unlink()
                os.sync()  # the next run does not pay for what "off" left to the kernel
                time.sleep(0.5)
    report(seconds, nbytes)


def report(seconds: dict[str, list[float]], nbytes: int) -> None:
    ratios = [on / off for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    print(f"{nbytes / 1e6:.0f} MB per run")
    for side, values in seconds.items():
        print(f"checkpoints {side}: {statistics.median(values):.2f} s ({min(values):.2f}..{max(values):.2f})")
    print(f"on / off: median {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})")


if __name__ == "__main__":
    main()
