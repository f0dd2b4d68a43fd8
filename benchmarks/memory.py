"""Measure the peak memory of an extraction against the number of images; it must not grow.

    python benchmarks/memory.py [--images 100 2000]

The pictures are small and random, the model is tiny-random, and tokens are stored. The figures are the peak resident
sets of the main process and of its largest worker, as counted by the kernel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image


def make_pictures(folder: Path, count: int) -> None:
    random = np.random.default_rng(0)
    for number in range(count):
        pixels = random.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")


def peak_of(pid: int) -> int:
    """Return the peak resident set of a process so far in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def run(images: int) -> tuple[int, int, float]:
    """Return the peaks of the main process and of the largest worker in bytes, and the seconds of the run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        make_pictures(folder, images)
        command = [sys.executable, "-m", "internvit_cli", "extract", str(folder), "-o", f"{scratch}/f.h5", "-q"]
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--model", "tiny-random", "--max-tiles", "2"])
        workers = [0]

        def watch() -> None:
            while process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                workers[0] = max([workers[0], *(peak_of(int(child)) for child in children)])
                time.sleep(0.1)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"the run over {images} images ended with {process.returncode}")
        return usage.ru_maxrss * 1024, workers[0], time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 2000])
    print("| images | peak of the main process, MB | of its largest worker, MB | seconds |")
    print("|---|---|---|---|")
    for images in parser.parse_args().images:
        main_process, worker, seconds = run(images)
        print(f"| {images:,} | {main_process / 1e6:.0f} | {worker / 1e6:.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
