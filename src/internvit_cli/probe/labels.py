"""Read the label of every image, from the folder in its key or from a table."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.errors import UsageError, one_line, system_words
from internvit_cli.runtime.untrusted import opened, parse_json
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FOLDER = "folder"
"""The value of `--labels` that takes labels from keys."""
SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
KEY_COLUMNS = ("key", "path", "file", "filename", "file_name", "image")
LABEL_COLUMNS = ("label", "class", "category", "target", "y")
SPLIT_COLUMNS = ("split", "subset", "part")
TRAIN, TEST = "train", "test"
SPLITS = {"train": TRAIN, "training": TRAIN, "test": TEST, "val": TEST, "valid": TEST, "validation": TEST}
"""Words of a split column, in any case."""


@dataclass(frozen=True, slots=True)
class Label:
    """The label of an image."""

    name: str
    split: str | None = None
    """`train` or `test`; None if the table does not say."""


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of images by key."""

    by_key: dict[str, Label]
    source: str
    """Where they come from, in words."""
    names_keys: bool
    """Whether a table names the keys, so that one it names may be missing."""

    @property
    def has_split(self) -> bool:
        """Whether the labels say which images are for testing."""
        return any(label.split is not None for label in self.by_key.values())


@dataclass(frozen=True, slots=True)
class _Columns:
    key: str
    label: str
    split: str | None


def labels_of_keys(keys: Iterable[str], depth: int) -> Labels:
    """Return labels from keys: the folder at `depth`, counted from 1; images outside such a folder have none."""
    by_key = {}
    for key in keys:
        folders = key.split("/")[:-1]
        if len(folders) >= depth:
            by_key[key] = Label(folders[depth - 1])
    return Labels(by_key, "the folders of keys" if depth == 1 else f"the folders of keys at depth {depth}", False)


def read_labels(path: str) -> Labels:
    """Read a table of keys and labels, and of splits if it has such a column.

    Args:
        path: A .csv or .tsv file with a line of names, .jsonl with one object per line, or .parquet.

    Raises:
        UsageError: The file cannot be read, lacks a column, or gives one key two labels.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            f"--labels {path}: not a table of labels", f"give {FOLDER}, or a file that ends in {', '.join(SUFFIXES)}"
        )
    try:
        names, rows = _parquet_rows(path) if suffix == ".parquet" else _text_rows(path, suffix)
    except OSError as error:
        raise UsageError(f"--labels {path}: {system_words(error)}", "check the name and the permissions") from error
    except (ValueError, csv.Error) as error:
        raise UsageError(
            f"--labels {path}: not a {suffix[1:]} table: {one_line(str(error))}", "check the file in an editor"
        ) from error
    columns = _Columns(
        _column(path, names, KEY_COLUMNS), _column(path, names, LABEL_COLUMNS), _first(names, SPLIT_COLUMNS)
    )
    split = f" and {columns.split}" if columns.split else ""
    source = f"{os.path.basename(path)}, columns {columns.key}, {columns.label}{split}"
    return Labels(_by_key(path, rows, columns), source, names_keys=True)


def _text_rows(path: str, suffix: str) -> tuple[Sequence[str], Sequence[dict[str, Any]]]:
    with opened(path) as file:
        text = file.read().decode("utf-8-sig")
    if suffix == ".jsonl":
        rows = [parse_json(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is no object")
        return list(dict.fromkeys(name for row in rows for name in row)), rows
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
    return list(reader.fieldnames or ()), list(reader)


def _parquet_rows(path: str) -> tuple[Sequence[str], Sequence[dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"--labels {path}: parquet needs pyarrow, which is not installed", "pip install 'internvit-cli[parquet]'"
        ) from error
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = [name for name in names if name.lower() in {*KEY_COLUMNS, *LABEL_COLUMNS, *SPLIT_COLUMNS}]
        return names, [row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist()]
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _first(names: Sequence[str], known: Sequence[str]) -> str | None:
    return next((name for wanted in known for name in names if name.strip().lower() == wanted), None)


def _column(path: str, names: Sequence[str], known: Sequence[str]) -> str:
    found = _first(names, known)
    if found is None:
        listed = one_line(", ".join(names)) if names else "none"
        raise UsageError(
            f"--labels {path}: no column is named {' or '.join(known)}; its columns are {listed}",
            f"name the column {known[0]} in the first line",
        )
    return found


def _by_key(path: str, rows: Iterable[dict[str, Any]], columns: _Columns) -> dict[str, Label]:
    by_key: dict[str, Label] = {}
    for row in rows:
        key, name = row.get(columns.key), row.get(columns.label)
        if key is None or name is None or name == "":
            continue  # an image without a label
        label = Label(str(name), _split(path, str(key), row.get(columns.split)) if columns.split else None)
        if by_key.setdefault(str(key), label) != label:
            raise UsageError(
                f"--labels {path}: {one_line(str(key))} is both {one_line(by_key[str(key)].name)} and "
                f"{one_line(label.name)}",
                "give each key one label",
            )
    if not by_key:
        raise UsageError(f"--labels {path}: it holds no labels", "check the file")
    return by_key


def _split(path: str, key: str, word: Any) -> str | None:
    if word is None or word == "":
        return None
    split = SPLITS.get(str(word).strip().lower())
    if split is None:
        raise UsageError(
            f"--labels {path}: the split of {one_line(key)} is {one_line(str(word))!r}", f"write {TRAIN} or {TEST}"
        )
    return split


def check_keys(labels: Labels, keys: Sequence[str], path: str) -> None:
    """Refuse a table that names keys which no output has.

    Raises:
        UsageError: Names the first of them.
    """
    known = set(keys)
    unknown = [key for key in labels.by_key if key not in known]
    if labels.names_keys and unknown:
        example = one_line(keys[0]) if keys else "missing"
        raise UsageError(
            f"{counted(len(unknown), 'key')} of the labels are not in {path}, such as {one_line(unknown[0])}",
            f"keys are as {example}; if the table is for more images than these, use --ignore-unknown",
        )
