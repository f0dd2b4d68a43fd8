"""Compare storing rows with plain `os.pwrite` of the same bytes, with the same reserved space and the same syncs.

    python benchmarks/writing.py [FOLDER] [--gigabytes 4] [--rounds 5]

Both sides alternately write the rows of the same images (13 tiles of the 300M's visual tokens: 27 MB each) to the same
disk. "internvit" is the sink of a run, with its thread, CRCs, digests, statuses and checkpoints; "pwrite" only writes
and syncs as often. Time is measured from the creation of the file, including its reservation, to the last sync.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from outputs import RECIPE, attributes_of

from internvit_cli.config import Format, StoreDtype, Tokens
from internvit_cli.extract.writer_thread import CHECKPOINT_BYTES, ShardSink
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.storage.durable import reserve, sync_data, write_all
from internvit_cli.storage.format.layout import FeatureShape, NewShard
from internvit_cli.storage.output import Output
from internvit_cli.storage.skipped import SkipLog
from internvit_cli.storage.write.commit import ImageRows, ShardWriter, create_shard

TILES, TOKENS, CHANNELS, HIDDEN = 13, 256, 4096, 1024
IMAGE_BYTES = TILES * TOKENS * CHANNELS * 2


def make_shard(images: int) -> NewShard:
    columns = {name: np.zeros(images, dtype) for name, dtype in COLUMN_DTYPES.items()}
    columns["columns"][:], columns["rows"][:], columns["thumbnail"][:] = 4, 3, 1
    columns["width"][:] = columns["height"][:] = columns["orientation"][:] = 1
    table = ImageTable.build([b"%08d.jpg" % row for row in range(images)], np.zeros(images, np.uint8), columns)
    attributes = attributes_of(replace(RECIPE, tokens=Tokens.VISUAL))
    return NewShard(table, FeatureShape(Tokens.VISUAL, TOKENS, CHANNELS, HIDDEN, StoreDtype.FLOAT16, False), attributes)


def run_internvit(folder: Path, images: int, rows: np.ndarray, kind: Format) -> float:
    output = Output(str(folder / ("feats.h5" if kind is Format.H5 else "feats")), kind)
    output.prepare()
    shard = make_shard(images)
    vector = np.zeros(HIDDEN, np.float32)
    started = time.perf_counter()
    create_shard(output.backend, output.partial_path(0), shard)
    writer = ShardWriter(output.backend, output.partial_path(0), shard.table)
    sink = ShardSink(writer, SkipLog(output.skipped_path), shard.table.keys)
    for row in range(images):
        sink.put(ImageRows(row, bytes(32), {"pooled": [vector[None]], "visual_tokens": [rows]}))
    sink.close()
    seconds = time.perf_counter() - started
    writer.close()
    return seconds


def run_pwrite(folder: Path, images: int, rows: np.ndarray) -> float:
    path = folder / "plain"
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        os.truncate(path, images * IMAGE_BYTES)
        reserve(str(path))
        written = 0
        for row in range(images):
            write_all(file.fileno(), rows, row * IMAGE_BYTES)
            written += IMAGE_BYTES
            if written >= CHECKPOINT_BYTES:
                sync_data(file.fileno())
                written = 0
        sync_data(file.fileno())
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    images = max(1, int(arguments.gigabytes * 1e9 / IMAGE_BYTES))
    rows = np.random.default_rng(0).standard_normal((TILES, TOKENS, CHANNELS), np.float32).astype("<f2")
    sides = {
        "pwrite": lambda folder: run_pwrite(folder, images, rows),
        "internvit, HDF5": lambda folder: run_internvit(folder, images, rows, Format.H5),
        "internvit, .npy": lambda folder: run_internvit(folder, images, rows, Format.NPY),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds + 1):  # the first round warms up the disk and the page cache
        for name, side in sides.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                rate = images * IMAGE_BYTES / side(Path(folder)) / 1e9
            os.sync()
            if number:
                rates[name].append(rate)
    print(f"{images} images, {images * IMAGE_BYTES / 1e9:.2f} GB, {arguments.rounds} rounds\n")
    print("| side | GB/s, median (least..most) | ratio to pwrite, median (least..most) |")
    print("|---|---|---|")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["pwrite"], strict=True)]
        print(
            f"| {name} | {statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    main()
