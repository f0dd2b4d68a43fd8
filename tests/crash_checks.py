"""What must hold of an output at any moment of a run of the crash driver, read with plain h5py, numpy and json."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crash_driver
import h5py
import numpy as np
import storage_helpers
from comparing import same_bytes
from PIL import Image

from internvit_cli.config import Status

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = {"file": ("feats.h5",), "npy folder": ("feats",), "h5 folder": ("feats", "--format", "h5")}
"""Every kind of output: its name, and the options that it takes."""
ALL_KINDS = KINDS | {"several layers": ("feats", "--layer", "0,-2,-1")}
"""And one whose images have rows in more datasets than any other's."""
LAYERS = (None, 0, 1)
"""Its layers, by what the names of their datasets end in: the main one's in nothing."""


def shards_of(kind: str, size: str) -> list[str]:
    """The option that makes a folder have several shards; one file has none."""
    return [] if kind == "file" else ["--shard-size", size]


def make_pictures(folder: Path, names: list[str], seed: int = 0) -> None:
    """Small random pictures of many shapes; one called bad has no header, one called spoiled cannot be decoded."""
    random = np.random.default_rng(seed)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "bad" in name:
            path.write_bytes(b"no picture" + random.bytes(20))
            continue
        width, height = random.integers(20, 70, 2)
        Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8)).save(path)


def digests_of(folder: Path) -> dict[str, bytes]:
    """SHA-256 of every picture, by key."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}


@dataclass(frozen=True)
class Rows:
    """A shard as it lies on the disk, finished or not."""

    keys: list[str]
    tiles: list[int]
    """Tiles of each image."""
    arrays: dict[str, Any]
    """By name, without `image/`; of .npy shards also those that have been moved to their final names."""


def read_shard(path: Path) -> Rows:
    """Read `feats.h5`, `feats.h5.partial`, `shard-00000.partial/`, or the .npy files of `shard-00000`."""
    if ".h5" in path.name:
        with h5py.File(path) as file:
            columns = {name: item[...] for name, item in file["image"].items()}
            keys = [key.decode() for key in columns.pop("key")]
            arrays = columns | {name: file[name][...] for name in file if name not in ("image", "run_log")}
        return Rows(keys, np.diff(columns["tile_offset"]).astype(int).tolist(), arrays)
    shard = path.parent / path.name.removesuffix(".partial")
    unfinished = path.is_dir()
    index = path / "images.jsonl" if unfinished else Path(f"{shard}.images.jsonl")
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    tiles = [entry["columns"] * entry["rows"] + entry["thumbnail"] for entry in entries]
    arrays = {file.name.split(".")[1]: np.load(file) for file in shard.parent.glob(f"{shard.name}.*.npy")}
    if unfinished:
        arrays |= {file.stem: np.load(file) for file in path.glob("*.npy")}
    else:
        arrays["status"] = np.array([entry["status"] for entry in entries])
        arrays["digest"] = np.array([list(bytes.fromhex(entry["digest"])) for entry in entries])
        arrays["crc32"] = np.array([int(entry["crc32"], 16) for entry in entries])
    return Rows([entry["key"] for entry in entries], tiles, arrays)


def check_rows(rows: Rows, known: dict[str, set[bytes]], explained: set[str]) -> set[str]:
    """Every settled row is right byte for byte; returns their keys.

    Args:
        rows: what is on the disk.
        known: the digests that a key's file has had.
        explained: keys with a line in the list of skipped images, or with a newer row.
    """
    arrays = rows.arrays
    offsets = np.concatenate([[0], np.cumsum(rows.tiles)])
    for row, (key, status) in enumerate(zip(rows.keys, arrays["status"].tolist(), strict=True)):
        if status == Status.PENDING:
            continue
        digest = bytes(arrays["digest"][row].tolist())
        checksum = 0
        for layer in LAYERS if "pooled_layer_0" in arrays else LAYERS[:1]:
            suffix = "" if layer is None else f"_layer_{layer}"
            pooled = arrays[f"pooled{suffix}"][row]
            if status != Status.DONE:
                assert key in explained, f"{key} is skipped without a reason"
                assert np.isnan(pooled).all(), f"{key} is skipped and has a vector"
                continue
            assert digest in known[key], f"{key} has the digest of another file"
            tokens = arrays[f"visual_tokens{suffix}"][offsets[row] : offsets[row + 1]]
            vectors = arrays[f"tile_pooled{suffix}"][offsets[row] : offsets[row + 1]]
            tiles = range(rows.tiles[row])
            expected = [crash_driver.features(digest, tile, tokens.shape[1:], layer) for tile in tiles]
            assert _are_equal(tokens, [part for part, _ in expected]), f"{key} has wrong tokens"
            assert _are_equal(vectors, [part for _, part in expected]), f"{key} has wrong vectors"
            assert _are_equal(pooled, [expected[-1][1]]), f"{key} has a wrong vector"
            checksum = zlib.crc32(pooled.tobytes() + tokens.tobytes() + vectors.tobytes(), checksum)
        assert status != Status.DONE or checksum == arrays["crc32"][row], f"{key} has a wrong CRC"
    return {key for key, status in zip(rows.keys, arrays["status"].tolist(), strict=True) if status != Status.PENDING}


def _are_equal(stored: NDArray[Any], expected: list[NDArray[Any]]) -> bool:
    return same_bytes(stored, b"".join(part.tobytes() for part in expected))


def check_output(output: Path, known: dict[str, set[bytes]]) -> int:
    """What holds at any moment: final names are whole, settled rows are right. Returns the number of settled images."""
    folder = output.parent if output.suffix == ".h5" else output
    for array in folder.glob("*.npy"):
        np.load(array)
    finished = [read_shard(path) for path in finished_shards(output)]
    assert all((rows.arrays["status"] != Status.PENDING).all() for rows in finished), "not complete"
    explained = skipped_keys(output)
    settled: set[str] = set()
    for rows in reversed([*finished, *map(read_shard, folder.glob("*.partial"))]):
        settled |= check_rows(rows, known, explained)
        explained |= set(rows.keys)
    return len(settled)


def finished_shards(output: Path) -> list[Path]:
    """The shards under a final name: a file, or those of a folder that the manifest names, or that are HDF5."""
    if output.suffix == ".h5":
        return [output] if output.exists() else []
    named = {output / f"{name}{suffix}" for name, suffix in _manifest(output)}
    return sorted(named | set(output.glob("*.h5")))


def _manifest(output: Path) -> list[tuple[str, str]]:
    path = output / "manifest.json"
    shards = json.loads(path.read_text())["shards"] if path.exists() else []
    return [(shard["name"], ".h5" if shard["format"] == "h5" else "") for shard in shards]


def skip_log(output: Path) -> Path:
    return Path(f"{output}.skipped.jsonl") if output.suffix == ".h5" else output / "skipped.jsonl"


def skipped_keys(output: Path) -> set[str]:
    path = skip_log(output)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return {json.loads(line)["key"] for line in lines if line.endswith(b"\n")}


def assert_same_output(one: Path, other: Path) -> None:
    """The same files, and in every dataset the same bytes; logs of starts and numbers of attempts apart."""
    assert _names(one) == _names(other)
    assert skipped_keys(one) == skipped_keys(other)
    for left, right in zip(finished_shards(one), finished_shards(other), strict=True):
        storage_helpers.assert_same_shard(
            storage_helpers.read_plainly(str(left)), storage_helpers.read_plainly(str(right))
        )
    if one.suffix != ".h5":
        assert (one / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


def _names(output: Path) -> list[str]:
    """All files below an output's folder, temporary ones and locks too."""
    return sorted(str(path.relative_to(output.parent)) for path in output.parent.rglob("*") if path.is_file())
