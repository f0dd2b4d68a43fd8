"""Create the folder of a probe's results, completely or not at all, and what every kind of result says of itself."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from internvit_cli import __version__
from internvit_cli.errors import UsageError, one_line
from internvit_cli.storage.durable import disk_errors, folder_for, rename_durably, sync_path, write_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from internvit_cli.probe.parts import PartOptions
    from internvit_cli.storage.read.reader import Features

RESULTS, PER_CLASS, PER_IMAGE = "results.json", "per_class.csv", "per_image.csv"
WORST, HEAD = "worst.png", "head.safetensors"
OF_CLASSIFICATION = (RESULTS, PER_CLASS, "predictions.csv", "confusion.png", WORST, HEAD)
"""The files of a classification; worst.png and the head only if there are any."""
OF_SEGMENTATION = (RESULTS, PER_CLASS, PER_IMAGE, WORST)
STAGING = ".probing"
REPLACED = ".replaced"


def check_folder(path: str, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything, unless these are results that may be replaced.

    Raises:
        UsageError: It does.
    """
    if not os.path.lexists(path):
        return
    if not os.path.isdir(path) or os.path.islink(path):
        raise UsageError(f"-o {path} is not a folder", "choose another name")
    names = os.listdir(path)
    if strange := sorted({*names} - {*OF_CLASSIFICATION, *OF_SEGMENTATION}):
        raise UsageError(f"-o {path} holds other files, such as {one_line(strange[0])}", "name a new or empty folder")
    if names and not overwrite:
        raise UsageError(f"-o {path} exists already", "choose another name, or replace it with --overwrite")


def write_folder(path: str, files: Mapping[str, bytes], *, overwrite: bool) -> None:
    """Write all files into a folder beside the final one, and rename it.

    Args:
        path: The folder to create.
        files: The bytes of each file.
        overwrite: Whether results in that folder may be replaced.

    Raises:
        UsageError: The folder holds something.
        NoSpaceError: The disk is full.
    """
    path = os.path.abspath(path)
    check_folder(path, overwrite=overwrite)
    staged, replaced = path + STAGING, path + REPLACED
    with folder_for(path), disk_errors(path):
        for leftover in (staged, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        os.mkdir(staged)
        try:
            for name, data in files.items():
                write_file(os.path.join(staged, name), data)
            sync_path(staged)
            if os.path.lexists(path):
                os.rename(path, replaced)
            rename_durably(staged, path)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def origin(options: PartOptions, features: Features, notes: Collection[str]) -> dict[str, Any]:
    """Return what any result follows from, for results.json and `--json`: settings, recipe, versions."""
    return {
        "seed": options.seed,
        "test_fraction": None if options.test_path is not None else options.test_fraction,
        "model": features.attributes.get("model"),
        "layer": features.layer,
        "recipe": json.loads(features.recipe.to_json()),
        "versions": {"internvit": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "notes": list(notes),
    }


def json_file(facts: Mapping[str, Any]) -> bytes:
    """Return a JSON object as the bytes of a file."""
    return (json.dumps(facts, indent=2) + "\n").encode()


def csv_file(rows: Iterable[Sequence[object]]) -> bytes:
    """Return rows as the bytes of a .csv file; the first row has the names of columns."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
