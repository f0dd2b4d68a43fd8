"""Measure time and memory of search and duplicates with many vectors; benchmarks/similarity.py measures quality.

    python benchmarks/search.py scale [--images 100000] [--index] [--duplicates] [--structureless] [--folder FOLDER]

The output has synthetic vectors of the 300M model's width, of which one in fifty is a near copy of another. Each
command runs in a separate process; memory is its peak without mapped files (RssAnon).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from outputs import write_output

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 20_000
COPIES_EVERY = 50
CLUSTER = 50
"""Average number of vectors around one center."""


def make_output(path: Path, images: int, width: int, *, structureless: bool) -> None:
    """Write an output of pooled vectors: clustered, correlated, with a large common part, and some near copies."""
    rng = np.random.default_rng(0)
    keys = [f"{row:08d}.jpg" for row in range(images)]
    digests = rng.integers(0, 256, (images, 32), np.uint8)
    write_output(path, keys, width, made_up(rng, images, width, structureless=structureless), digests=digests)


def made_up(rng: np.random.Generator, images: int, width: int, *, structureless: bool) -> Iterator[np.ndarray]:
    """Yield the vectors in blocks."""
    mixing = (rng.standard_normal((width, width)) * np.geomspace(3, 0.1, width)[:, None]).astype(np.float32)
    common = (60 * rng.standard_normal(width)).astype(np.float32)
    centers = rng.standard_normal((max(1, images // CLUSTER), width), np.float32)
    spread = 1.0 if structureless else 0.5
    for start in range(0, images, BLOCK):
        rows = min(BLOCK, images - start)
        vectors = spread * rng.standard_normal((rows, width), np.float32)
        if not structureless:
            vectors += centers[rng.integers(0, len(centers), rows)]
        vectors = vectors @ mixing + common
        copies = np.arange(1, rows, COPIES_EVERY)
        vectors[copies] = vectors[copies - 1] + 0.05 * rng.standard_normal((len(copies), width), np.float32) @ mixing
        yield vectors


def measured(arguments: list[str]) -> tuple[float, float, str]:
    """Return the seconds, the peak megabytes without mapped files, and the standard output of a command."""
    command = [sys.executable, "-m", "internvit_cli", *arguments, "-q"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = [0]
    watcher = threading.Thread(target=lambda: watch(process, most))
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    assert process.returncode == 0, arguments
    return time.perf_counter() - started, most[0] / 1000, output


def watch(process: subprocess.Popen[str], most: list[int]) -> None:
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon"):
                most[0] = max(most[0], int(line.split()[1]))
        time.sleep(0.02)


def scale(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "feats.h5"
        make_output(path, arguments.images, arguments.width, structureless=arguments.structureless)
        print(f"{arguments.images:,} images, {arguments.width} wide, {path.stat().st_size / 1e9:.2f} GB")
        keys = [part for number in range(0, 200, 2) for part in ("--key", f"{number:08d}.jpg")]
        runs: dict[str, list[str]] = {
            "search --raw, one query": ["search", str(path), *keys[:2], "--raw", "--json"],
            "search, one query": ["search", str(path), *keys[:2], "--json"],
            "search, 100 queries": ["search", str(path), *keys, "--json"],
        }
        if arguments.index:
            runs |= {
                "search --index, built": ["search", str(path), *keys, "--index", "--json"],
                "search --index, 100 queries": ["search", str(path), *keys, "--index", "--json"],
                "search --index, one query": ["search", str(path), *keys[:2], "--index", "--json"],
            }
        if arguments.duplicates:
            runs["duplicates"] = ["duplicates", str(path), "--json"]
        hits = {}
        for name, command in runs.items():
            seconds, megabytes, output = measured(command)
            told = json.loads(output)
            note = ""
            if name.startswith("search"):
                hits[name] = [{hit["key"] for hit in query["hits"]} for query in told["queries"]]
                exact = hits.get("search, 100 queries")
                if "100" in name and exact and "--index" in name:
                    shared = sum(len(one & other) for one, other in zip(exact, hits[name], strict=True))
                    note = f", recall of ten {shared / sum(map(len, exact)):.3f}"
            else:
                note = f", {len(told['similar']):,} groups of {arguments.images // COPIES_EVERY:,}, {told['how']}"
            print(f"  {name:30} {seconds:8.1f} s {megabytes:8.0f} MB{note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    large = commands.add_parser("scale")
    large.add_argument("--images", type=int, default=100_000)
    large.add_argument("--width", type=int, default=1024)
    large.add_argument("--index", action="store_true")
    large.add_argument("--structureless", action="store_true", help="no clusters: all vectors are equally far apart")
    large.add_argument("--duplicates", action="store_true")
    large.add_argument("--folder", default=os.environ.get("TMPDIR", "/tmp"))
    large.set_defaults(run=scale)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
