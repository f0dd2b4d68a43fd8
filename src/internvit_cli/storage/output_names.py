"""Decide what the name of an output means: one HDF5 file, a folder, or something that cannot be written."""

from __future__ import annotations

import os
import re

from internvit_cli.errors import OutputError, UsageError
from internvit_cli.options import named_path

SINGLE_FILE_SUFFIXES = (".h5", ".hdf5")
EXPORTED_SUFFIXES = (".parquet", ".safetensors", ".tar", ".csv")
"""Suffixes of files that `internvit export` writes in addition to feature files."""
PARTIAL = ".partial"
"""Suffix of a shard while it is filled."""
OWN_SUFFIXES = (PARTIAL, ".lock", ".exporting", ".tmp")
"""Suffixes of temporary files beside an output."""
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
"""Suffixes that look like a file format: no folder is created under such a name unless it ends in a slash."""
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
SYSTEM_FOLDERS = ("/dev", "/proc", "/sys")
MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - a name that users give


def suffix_of(path: str) -> str:
    """Return the suffix of a name with its dot, in lower case, such as `.h5`; empty for a name without a dot."""
    _, dot, last = os.path.basename(path.rstrip("/")).rpartition(".")
    return dot + last.lower()


def says_folder(path: str) -> bool:
    """Return whether a name means a folder whatever its suffix: it ends in a slash, or is a folder already."""
    return path.endswith("/") or os.path.isdir(path)


def is_single_file(path: str) -> bool:
    """Return whether a name means one HDF5 file; otherwise it means a folder of shards."""
    return suffix_of(path) in SINGLE_FILE_SUFFIXES and not says_folder(path)


def unfinished_path(path: str) -> str:
    """Return the path of an unfinished output; empty if the output is finished or does not exist at all."""
    name = path.rstrip("/")
    partial = name + PARTIAL
    return partial if not os.path.exists(path) and suffix_of(name) != PARTIAL and os.path.exists(partial) else ""


def unfinished_shards(path: str) -> list[str]:
    """Return the names of the unfinished shards in a folder; empty if it is not a folder."""
    try:
        names = os.listdir(path)
    except OSError:
        return []
    return sorted(name for name in names if name.startswith("shard-") and name.endswith(PARTIAL))


def missing(path: str) -> OutputError:
    """Return the error for an output that should be read but does not exist."""
    if partial := unfinished_path(path):
        return OutputError(
            f"{path} is not there yet: the run that makes it has not finished",
            f"run the same internvit extract command again, or read what is there: {partial}",
        )
    return OutputError(f"{path} is not there", "check the path")


def check_features_name(path: str, option: str = "-o") -> None:
    """Refuse a name under which no features can be written.

    Raises:
        UsageError: It is the name of a file of another format, of something unfinished, or not of a file.
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
    """Refuse a name under which no file of a format can be written.

    Args:
        path: The name as given by the user.
        suffixes: The allowed suffixes.
        option: The option that has this value.
        what: What such a file is called in the message.

    Raises:
        UsageError: It ends in none of them, or something with that name is not a regular file.
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
    """Refuse a name under which no folder of pictures should be created.

    Raises:
        UsageError: It looks like the name of a file.
    """
    check_place(path, option)
    if suffix_of(path) in {*DATA_FILE_SUFFIXES, *SINGLE_FILE_SUFFIXES} and not says_folder(path):
        raise UsageError(
            f"{option} {path} names a file, but it must be a folder",
            f"for a folder with that name, use {option} {path}/",
        )


def check_place(path: str, option: str) -> None:
    """Refuse a name under which nothing can be written.

    Raises:
        UsageError: It is empty, standard output, an address, the name of something unfinished, or in a folder of
            devices.
    """
    name, suffix = named_path(path), suffix_of(path)
    if path == "-":
        raise UsageError(
            f"{option} -: nothing is written to standard output", "name a file or a folder; ./- is a file called -"
        )
    if name and not name.strip():  # such as "$OUT " in a shell when the variable is empty
        raise UsageError(f"{option} {path!r}: the name has only blanks", "name a file or a folder")
    if URL.match(path):
        raise UsageError(f"{option} {path}: not a local path", "write to a local disk, and copy the result from there")
    if suffix == PARTIAL or (suffix in OWN_SUFFIXES and not says_folder(path)):
        raise UsageError(
            f"{option} {path}: names of unfinished outputs end in {suffix}",
            f"name {name.removesuffix(suffix)}: the same command continues the unfinished output",
        )
    parent, base = os.path.split(os.path.abspath(path))
    for place in (os.path.join(os.path.realpath(parent), base), os.path.realpath(path)):
        is_memory = place == MEMORY_FOLDER or place.startswith(f"{MEMORY_FOLDER}/")
        if not is_memory and any(place == folder or place.startswith(f"{folder}/") for folder in SYSTEM_FOLDERS):
            raise UsageError(
                f"{option} {path} is in {os.path.dirname(place)}, which is for devices and not for files",
                "name a file or a folder on a disk",
            )


def _other_names(name: str, suffix: str, option: str) -> str:
    """Suggest names instead of one that is refused."""
    stem = name
    while suffix_of(stem) in DATA_FILE_SUFFIXES or suffix_of(stem) in SINGLE_FILE_SUFFIXES:
        stem = stem[: -len(suffix_of(stem))]
    if suffix in EXPORTED_SUFFIXES:
        return f"use {option} {stem}.h5, and afterwards: internvit export {stem}.h5 {name}"
    if suffix in (".npy", ".npz"):
        return f"use {option} {stem}/ for a folder of .npy files, or {option} {stem}.h5 for one file"
    written = ", ".join(EXPORTED_SUFFIXES)
    return f"use {option} {stem}.h5 or a folder, {option} {stem}/; internvit export turns either into {written}"
