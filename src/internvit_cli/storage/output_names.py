"""What the name of an output stands for: one HDF5 file, a folder, or nothing that can be written."""

from __future__ import annotations

import os
import re

from internvit_cli.errors import OutputError, UsageError
from internvit_cli.options import named_path

SINGLE_FILE_SUFFIXES = (".h5", ".hdf5")
EXPORTED_SUFFIXES = (".parquet", ".safetensors", ".tar", ".csv")
"""Of files that `internvit export` writes beside feature files."""
PARTIAL = ".partial"
"""What the name of a shard ends in while it is filled."""
OWN_SUFFIXES = (PARTIAL, ".lock", ".exporting", ".tmp")
"""Of what lies beside an output while it is made."""
DATA_FILE_SUFFIXES = frozenset(
    {
        *EXPORTED_SUFFIXES,
        *(".npy", ".npz", ".mat", ".hdf", ".h4", ".he5", ".h5ad", ".nc", ".nc4", ".zarr", ".lance", ".lmdb", ".mdb"),
        *(".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib", ".msgpack", ".onnx", ".gguf"),
        *(".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml", ".xls", ".xlsx", ".ods"),
        *(".arrow", ".feather", ".ipc", ".orc", ".avro", ".pq", ".db", ".sqlite", ".sqlite3", ".duckdb"),
        *(".tfrecord", ".tfrecords", ".beton", ".mds", ".faiss", ".usearch", ".log", ".md", ".html", ".htm", ".pdf"),
        *(".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar"),
        *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".svg", ".mp4", ".mov", ".webm"),
    }
)
"""Names that look like a file of a format: no folder is made by such a name, unless a slash asks for one."""
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
SYSTEM_FOLDERS = ("/dev", "/proc", "/sys")
MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - a name that users give


def suffix_of(path: str) -> str:
    """The last part of a name with its dot, in small letters, such as `.h5`; empty for a name without a dot."""
    _, dot, last = os.path.basename(path.rstrip("/")).rpartition(".")
    return dot + last.lower()


def says_folder(path: str) -> bool:
    """Whether a name stands for a folder whatever it ends in: it has a slash at its end, or is a folder already."""
    return path.endswith("/") or os.path.isdir(path)


def is_single_file(path: str) -> bool:
    """Whether features by that name are one HDF5 file; otherwise they are a folder of shards."""
    return suffix_of(path) in SINGLE_FILE_SUFFIXES and not says_folder(path)


def unfinished_path(path: str) -> str:
    """What a run has left of an output that it did not finish; empty where the output is there, or nothing of it."""
    name = path.rstrip("/")
    partial = name + PARTIAL
    return partial if not os.path.exists(path) and suffix_of(name) != PARTIAL and os.path.exists(partial) else ""


def unfinished_shards(path: str) -> list[str]:
    """Names of the shards in a folder that a run has not filled; empty for what is no folder."""
    try:
        names = os.listdir(path)
    except OSError:
        return []
    return sorted(name for name in names if name.startswith("shard-") and name.endswith(PARTIAL))


def missing(path: str) -> OutputError:
    """The error of an output that is to be read and is not there."""
    if partial := unfinished_path(path):
        return OutputError(
            f"{path} is not there yet: the run that makes it has not finished",
            f"run the same internvit extract command again, or read what is there: {partial}",
        )
    return OutputError(f"{path} is not there", "check the path")


def check_features_name(path: str, option: str = "-o") -> None:
    """Refuse a name by which no features can be written.

    Raises:
        UsageError: it is the name of a file of another format, of something unfinished, or of no file at all.
    """
    check_place(path, option)
    name, suffix = named_path(path), suffix_of(path)
    if suffix in DATA_FILE_SUFFIXES and not says_folder(path):
        what = (
            ".npy features are a folder of shards"
            if suffix == ".npy"
            else f"features are not written to {suffix} files"
        )
        raise UsageError(f"{option} {path}: {what}", _other_names(name, suffix, option))


def check_file_name(path: str, suffixes: tuple[str, ...], option: str, what: str) -> None:
    """Refuse a name by which no file of a format can be written.

    Args:
        path: as a user gives it.
        suffixes: one of which it has to end in.
        option: that it is the value of.
        what: such a file is, for the message.

    Raises:
        UsageError: it ends in none of them, or something that is no file has it.
    """
    check_place(path, option)
    hint = f"name a file that ends in {suffixes[0]}"
    if suffix_of(path) not in suffixes or path.endswith("/"):
        raise UsageError(f"{option} {path}: not a {what}", hint)
    if os.path.isdir(path):
        raise UsageError(f"{option} {path} is a folder", hint)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{option} {path} is not a regular file", hint)


def check_folder_name(path: str, option: str) -> None:
    """Refuse a name by which no folder of pictures should be made.

    Raises:
        UsageError: it looks like the name of a file.
    """
    check_place(path, option)
    if suffix_of(path) in {*DATA_FILE_SUFFIXES, *SINGLE_FILE_SUFFIXES} and not says_folder(path):
        raise UsageError(
            f"{option} {path} names a file, and a folder belongs there", f"a folder by that name is {option} {path}/"
        )


def check_place(path: str, option: str) -> None:
    """Refuse a name by which nothing can be written.

    Raises:
        UsageError: it is empty, standard output, an address, the name of something unfinished, or lies where the
            system shows its devices.
    """
    name, suffix = named_path(path), suffix_of(path)
    if path == "-":
        raise UsageError(
            f"{option} -: nothing is written to standard output", "name a file or a folder; ./- is one called -"
        )
    if name and not name.strip():  # such as a shell's "$OUT " with an empty variable
        raise UsageError(f"{option} {path!r}: a name of blanks alone", "name a file or a folder")
    if URL.match(path):
        raise UsageError(f"{option} {path}: not a local path", "write to a local disk, and copy the result from there")
    if suffix == PARTIAL or (suffix in OWN_SUFFIXES and not says_folder(path)):
        raise UsageError(
            f"{option} {path}: {suffix} is how the name of something unfinished ends",
            f"name {name.removesuffix(suffix)}: the same command continues what is unfinished",
        )
    parent, base = os.path.split(os.path.abspath(path))
    for place in (os.path.join(os.path.realpath(parent), base), os.path.realpath(path)):
        is_memory = place == MEMORY_FOLDER or place.startswith(f"{MEMORY_FOLDER}/")
        if not is_memory and any(place == folder or place.startswith(f"{folder}/") for folder in SYSTEM_FOLDERS):
            raise UsageError(
                f"{option} {path} lies in {os.path.dirname(place)}, where the system has its devices and no files",
                "name a file or a folder on a disk",
            )


def _other_names(name: str, suffix: str, option: str) -> str:
    """What to write instead of a name that is refused."""
    stem = name
    while suffix_of(stem) in DATA_FILE_SUFFIXES or suffix_of(stem) in SINGLE_FILE_SUFFIXES:
        stem = stem[: -len(suffix_of(stem))]
    if suffix in EXPORTED_SUFFIXES:
        return f"use {option} {stem}.h5, and afterwards: internvit export {stem}.h5 {name}"
    if suffix in (".npy", ".npz"):
        return f"use {option} {stem}/ for a folder of .npy files, or {option} {stem}.h5 for one file"
    written = ", ".join(EXPORTED_SUFFIXES)
    return f"use {option} {stem}.h5 or a folder, {option} {stem}/; internvit export turns either into {written}"
