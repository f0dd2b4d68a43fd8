"""Small shards of random rows for the tests of storage, and readers of finished ones that bypass our own."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from comparing import same_bytes

from internvit_cli.config import (
    ComputeDtype,
    Format,
    OnOverflow,
    Pool,
    Preprocess,
    Recipe,
    Skipped,
    Status,
    StoreDtype,
    TokenOrder,
    Tokens,
)
from internvit_cli.extract.changes import sources_to_json
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.sources import Source
from internvit_cli.storage.format.layout import FORMAT, FORMAT_VERSION, FeatureShape, NewShard
from internvit_cli.storage.output import Output
from internvit_cli.storage.write.commit import ImageRows, ShardWriter, create_shard

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TOKENS_PER_TILE, CHANNELS, POOLED_WIDTH = 4, 6, 5
EARLIER_LAYERS = (3, 21)
"""Of shards with several layers, whose names sort otherwise than their numbers."""

AWKWARD_KEYS = (
    b"a.jpg",
    b"sub/folder/b.png",
    b"line\nbreak\r.jpg",
    b"not-utf8-\xff\xfe.jpg",
    "snow-☃-é.jpg".encode(),
    b"quotes\"'\\ and \x1b[31m.jpg",
)

RECIPE = Recipe(
    weights_digest="0" * 64,
    layer=24,
    tile_size=56,  # four visual tokens
    min_tiles=1,
    max_tiles=12,
    thumbnail=True,
    preprocess=Preprocess.TILES,
    exif=True,
    background=None,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    tokens=Tokens.VISUAL,
    token_order=TokenOrder.V2,
    pool=Pool.MEAN,
    tile_pooled=False,
    compute_dtype=ComputeDtype.FLOAT32,
    store_dtype=StoreDtype.FLOAT16,
    on_overflow=OnOverflow.SKIP,
)


def make_table(
    grids: Sequence[tuple[int, int, int]], keys: Sequence[bytes] = (), failed: dict[int, Status] | None = None
) -> ImageTable:
    """One image for each (columns, rows, thumbnail); those in `failed` have the tiles of an unreadable header: none."""
    names = list(keys) or [b"%04d.jpg" % row for row in range(len(grids))]
    facts = {name: np.zeros(len(grids), dtype) for name, dtype in COLUMN_DTYPES.items()}
    status = np.zeros(len(grids), np.uint8)
    for row, (columns, rows, thumbnail) in enumerate(grids):
        facts["file_size"][row], facts["file_mtime_ns"][row] = 1000 + row, 1_700_000_000_000_000_000 + row
        if failed and row in failed:
            status[row] = failed[row]
            continue
        for name, value in (("columns", columns), ("rows", rows), ("thumbnail", thumbnail), ("orientation", 1)):
            facts[name][row] = value
        facts["width"][row], facts["height"][row] = 100 * columns + row, 100 * rows
    return ImageTable.build(names, status, facts)


def make_shard(
    table: ImageTable,
    tokens: Tokens = Tokens.VISUAL,
    store_dtype: StoreDtype = StoreDtype.FLOAT16,
    tile_pooled: bool = False,
    **recipe_changes: Any,
) -> NewShard:
    if tokens is Tokens.PATCH:  # whose tiles have four times as many
        recipe_changes = {"tile_size": 28} | recipe_changes
    recipe = dataclasses.replace(
        RECIPE, tokens=tokens, store_dtype=store_dtype, tile_pooled=tile_pooled, **recipe_changes
    )
    several = {"model_layers": 48} if recipe.earlier_layers else {}
    attributes = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "recipe": recipe.to_json(),
        "recipe_digest": recipe.digest,
        "sources": sources_to_json([Source(root=b"/pictures\xff")]),
        "created_by": "tests",
        "model": "tiny-random",
        "model_revision": "",
        "weights_digest": recipe.weights_digest,
        "batch_tiles": 8,
        "pooled_from": "global_view",
        **several,
    }
    shape = FeatureShape(
        tokens,
        TOKENS_PER_TILE,
        CHANNELS,
        POOLED_WIDTH,
        store_dtype,
        tile_pooled,
        recipe.earlier_layers,
        recipe.values_per_scale,
    )
    return NewShard(table, shape, attributes)


def random_image(shard: NewShard, row: int, seed: int = 0) -> ImageRows:
    """Random rows of one image, its tiles in two blocks when there are several."""
    rng = np.random.default_rng((seed, row))
    tiles = int(shard.table.tile_counts[row])
    cut = [0, tiles // 2, tiles] if tiles > 1 else [0, tiles]
    sizes = np.diff(cut).tolist()
    shape, arrays = shard.features, {}
    for suffix in ("", *(f"_layer_{layer}" for layer in shape.earlier_layers)):
        arrays[f"pooled{suffix}"] = [rng.standard_normal((1, POOLED_WIDTH), np.float32)]
        if shape.tokens is not Tokens.NONE:
            arrays[shape.tokens.dataset + suffix] = [_random_tokens(rng, shape, size) for size in sizes]
            if shape.store_dtype.is_scaled:
                spec = next(spec for spec in shape.row_datasets(1, tiles) if spec.name == shape.tokens.scales_dataset)
                arrays[shape.tokens.scales_dataset + suffix] = [
                    rng.uniform(0.1, 2, (size, *spec.shape[1:])).astype(spec.dtype) for size in sizes
                ]
        if shape.tile_pooled:
            arrays[f"tile_pooled{suffix}"] = [rng.standard_normal((size, POOLED_WIDTH), np.float32) for size in sizes]
    return ImageRows(row, rng.bytes(32), arrays)


def rows_of(image: ImageRows) -> dict[str, NDArray[Any]]:
    """One image's rows by dataset, as they lie on the disk: `pooled` is [1, d]."""
    return {name: np.concatenate(blocks) for name, blocks in image.arrays.items()}


def _random_tokens(rng: np.random.Generator, shape: FeatureShape, tiles: int) -> NDArray[Any]:
    size = (tiles, TOKENS_PER_TILE, CHANNELS)
    if shape.store_dtype is StoreDtype.BFLOAT16:
        # Any bits of finite numbers: exponents below 255.
        return (rng.integers(0, 0x7F80, size) | (rng.integers(0, 2, size) << 15)).astype("<u2")
    if shape.store_dtype is StoreDtype.INT8:
        return rng.integers(-127, 128, size).astype("|i1")
    if shape.store_dtype is StoreDtype.FP8:
        # Any bits of finite numbers: 127 and 255 are NaN.
        return (rng.integers(0, 127, size) | (rng.integers(0, 2, size) << 7)).astype("|u1")
    return rng.standard_normal(size, np.float32).astype(shape.store_dtype.numpy_name)


def expected_crc32(image: ImageRows) -> int:
    """CRC-32 over pooled, tokens, their scales, tile_pooled, in this order; then over those of each earlier layer."""
    rows, checksum = rows_of(image), 0
    for suffix in ("", *(f"_layer_{layer}" for layer in EARLIER_LAYERS)):
        for kind in ("pooled", "(visual|patch|projected)_tokens", "(visual|patch|projected)_scales", "tile_pooled"):
            for name in rows:
                if re.fullmatch(kind + suffix, name):
                    checksum = zlib.crc32(rows[name].tobytes(), checksum)
    return checksum


def pending_rows(shard: NewShard) -> list[int]:
    return np.flatnonzero(shard.table.status == Status.PENDING).tolist()


def fill_partial(
    output: Output, shard: NewShard, skips: dict[int, Skipped] | None = None, seed: int = 0
) -> dict[int, ImageRows]:
    """Make the output's next shard and commit rows for all its pending images but the skipped ones."""
    partial = output.partial_path(output.next_number())
    create_shard(output.backend, partial, shard)
    writer = ShardWriter(output.backend, partial, shard.table)
    written = {}
    for row in pending_rows(shard):
        if skips and row in skips:
            writer.skip(row, skips[row])
        else:
            written[row] = random_image(shard, row, seed)
            writer.write(written[row])
    writer.checkpoint()
    writer.close()
    return written


def publish(output: Output, shard: NewShard, superseded: dict[str, list[str]] | None = None) -> None:
    output.publish(output.next_number(), len(shard.table), shard.table.tiles, superseded or {})


def make_output(
    path: Path | str,
    shard: NewShard,
    shard_format: Format | None = None,
    skips: dict[int, Skipped] | None = None,
    seed: int = 0,
) -> dict[int, ImageRows]:
    """A finished output of one more shard; returns the rows that were written, by row."""
    output = Output(str(path), shard_format)
    output.prepare()
    written = fill_partial(output, shard, skips, seed)
    publish(output, shard)
    return written


@dataclasses.dataclass(frozen=True)
class PlainShard:
    """A finished shard as h5py, or numpy and json, see it."""

    arrays: dict[str, NDArray[Any]]
    """By their names in a file, `image/` included; keys apart."""
    keys: list[bytes]
    attributes: dict[str, Any]
    run_log: list[dict[str, Any]]


def read_plainly(path: str) -> PlainShard:
    """Read `.../feats.h5`, or the .npy files that begin with `.../shard-00000`."""
    return _read_h5(path) if path.endswith(".h5") else _read_npy(path)


def _read_h5(path: str) -> PlainShard:
    arrays: dict[str, NDArray[Any]] = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: arrays.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
        keys = [bytes(key) for key in arrays.pop("image/key")]
        log = bytes(arrays.pop("run_log")).rstrip(b"\0").splitlines()
        return PlainShard(arrays, keys, dict(file.attrs), [json.loads(line) for line in log])


def _read_npy(path: str) -> PlainShard:
    with open(f"{path}.json") as file:
        attributes = json.load(file)
    with open(f"{path}.images.jsonl") as file:
        entries = [json.loads(line) for line in file]
    columns = (*COLUMN_DTYPES, "status")
    arrays = {f"image/{name}": np.array([entry[name] for entry in entries]) for name in columns}
    counts = arrays["image/columns"] * arrays["image/rows"] + arrays["image/thumbnail"]
    arrays["image/tile_offset"] = np.concatenate([[0], np.cumsum(counts)])
    digests = [np.frombuffer(bytes.fromhex(entry["digest"]), np.uint8) for entry in entries]
    arrays["image/digest"] = np.array(digests).reshape(len(entries), 32)
    arrays["image/crc32"] = np.array([int(entry["crc32"], 16) for entry in entries])
    folder, prefix = os.path.split(path)
    for name in os.listdir(folder):
        if name.startswith(prefix) and name.endswith(".npy"):
            arrays[name.removeprefix(f"{prefix}.").removesuffix(".npy")] = np.load(os.path.join(folder, name))
    return PlainShard(arrays, [os.fsencode(entry["key"]) for entry in entries], attributes, attributes.pop("run_log"))


def assert_same_shard(one: PlainShard, other: PlainShard) -> None:
    """Equal bit for bit, the log of starts apart."""
    assert one.keys == other.keys
    assert one.attributes == other.attributes
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype, name
        assert same_bytes(array, other.arrays[name]), name
