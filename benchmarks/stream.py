"""Measure FeatureStream against pread of the same bytes in the same order, and the memory of its index.

    python benchmarks/stream.py [--images 400] [--rounds 5] [--keys 1000000] [--folder FOLDER]

The output has several shards of visual tokens of the 300M model's size (2 MiB per tile) in the page cache, so that the
disk does not decide. `pread` reads the tokens and the vector of each image with one call each, and holds them until the
next image is read, as a training loop does; `stream` yields samples with tensors; `cold` is a stream from the disk.
`index` is what the stream holds for many images with keys of 40 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from outputs import RECIPE, attributes_of

from internvit_cli import FeatureStream
from internvit_cli.config import Format, Status, Tokens
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.storage.format.layout import FeatureShape, NewShard
from internvit_cli.storage.output import Output
from internvit_cli.storage.write.commit import ImageRows, ShardWriter, create_shard

SHARDS = 4
WIDTH = 1024


def make_table(keys: list[bytes], columns: int, rows: int) -> ImageTable:
    """Return a table of pending images with one grid."""
    facts = {name: np.ones(len(keys), dtype) for name, dtype in COLUMN_DTYPES.items()} | {
        "columns": np.full(len(keys), columns),
        "rows": np.full(len(keys), rows),
        "width": np.full(len(keys), 448 * columns),
        "height": np.full(len(keys), 448 * rows),
        "thumbnail": np.full(len(keys), columns * rows > 1),
        "source": np.zeros(len(keys)),
    }
    return ImageTable.build(keys, np.full(len(keys), Status.PENDING, np.uint8), facts)


def write_shard(output: Output, number: int, keys: list[bytes], *, tokens: bool) -> None:
    """Write a finished shard, with 3 tiles per image if tokens are stored."""
    recipe = dataclasses.replace(RECIPE, tokens=Tokens.VISUAL if tokens else Tokens.NONE)
    table = make_table(keys, 2, 1) if tokens else make_table(keys, 1, 1)
    shape = FeatureShape(recipe.tokens, 256, 4 * WIDTH, WIDTH if tokens else 4, recipe.store_dtype, False)
    create_shard(output.backend, output.partial_path(number), NewShard(table, shape, attributes_of(recipe)))
    writer = ShardWriter(output.backend, output.partial_path(number), table)
    random = np.random.default_rng(number)
    values = random.standard_normal((3, 256, 4 * WIDTH)).astype(np.float16)
    vector = np.ones((1, shape.pooled_width), np.float32)
    for row in range(len(keys)):
        arrays = {"pooled": [vector]} | ({"visual_tokens": [values]} if tokens else {})
        writer.write(ImageRows(row, b"\1" * 32, arrays))
        if writer.uncommitted_bytes > 1 << 28:
            writer.checkpoint()
    writer.checkpoint()
    writer.close()
    output.publish(number, len(table), table.tiles, {})


def pread_rate(stream: FeatureStream) -> float:
    """Return bytes per second of reading what the stream reads, in its order."""
    held: dict[str, bytes] = {}
    total, started = 0, time.perf_counter()
    for position in stream.order().tolist():
        shard = stream._shards[int(np.searchsorted(stream._first, position, side="right")) - 1]
        image = shard.image(position - int(stream._first[stream._shards.index(shard)]), None)
        spans = (("visual_tokens", image._first_tile, image.tiles), ("pooled", image._row, 1))
        for name, first, count in spans:
            extent = shard.extents[name]
            descriptor = os.open(extent.path, os.O_RDONLY)
            size = extent.spec.row_bytes
            held[name] = os.pread(descriptor, count * size, extent.offset + first * size)
            os.close(descriptor)
            total += len(held[name])
    return total / (time.perf_counter() - started)


def stream_rate(stream: FeatureStream) -> float:
    """Return bytes per second of the samples of a stream."""
    total, started = 0, time.perf_counter()
    for sample in stream:
        total += sample["tokens"].nbytes + sample["pooled"].nbytes
    return total / (time.perf_counter() - started)


def cold_rate(stream: FeatureStream) -> float:
    """Return the rate once the system dropped the files from its cache; the host of a virtual disk may have them."""
    for path in {extent.path for shard in stream._shards for extent in shard.extents.values()}:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return stream_rate(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        output = Output(str(Path(folder, "feats")), Format.NPY)
        output.prepare()
        per_shard = options.images // SHARDS
        for number in range(SHARDS):
            write_shard(output, number, [b"%d/%06d.jpg" % (number, row) for row in range(per_shard)], tokens=True)
        stream = FeatureStream(output.path)
        stream_rate(stream)  # warms the page cache
        plain, streamed, processor = [], [], []
        for epoch in range(options.rounds):  # in turns, because other work on the machine comes and goes
            stream.set_epoch(epoch)
            begin = time.process_time()
            plain.append(pread_rate(stream))
            middle = time.process_time()
            streamed.append(stream_rate(stream))
            processor.append((middle - begin) / (time.process_time() - middle))
        cold = {ahead: cold_rate(FeatureStream(output.path, prefetch=ahead)) for ahead in (0, 4)}
        ratio = statistics.median(ours / theirs for ours, theirs in zip(streamed, plain, strict=True))
        print(f"pread   {statistics.median(plain) / 1e9:6.2f} GB/s")
        print(f"stream  {statistics.median(streamed) / 1e9:6.2f} GB/s, {ratio:.2f} of pread in the same round")
        print(f"        {statistics.median(processor):.2f} by processor time, which other work disturbs less")
        print(f"cold    {cold[0] / 1e9:6.2f} GB/s without reading ahead, {cold[4] / 1e9:.2f} GB/s with 4 samples")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        output = Output(str(Path(folder, "feats")), Format.NPY)
        output.prepare()
        for number in range(SHARDS):
            keys = [b"%02d/%033d.jpg" % (number, row) for row in range(options.keys // SHARDS)]
            write_shard(output, number, keys, tokens=False)
        del keys
        tracemalloc.start()
        stream = FeatureStream(output.path)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"index   {held / len(stream):.1f} bytes per image held, {peak / len(stream):.1f} at most while opening")
        print(f"        of {len(stream):,} images in {SHARDS} shards, with keys of 40 bytes")


if __name__ == "__main__":
    main()
