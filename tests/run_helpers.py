"""The command line, run in this process or in one of its own, pictures to run it on, and what lies on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from PIL import Image

from internvit_cli.cli.app import run

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "internvit_cli", *map(str, arguments)]


def internvit(*arguments: object) -> Result:
    """Run a command line in this process: the same code as the shell's, without importing torch each time."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run([str(argument) for argument in arguments])
    return Result(int(code), stdout.getvalue(), stderr.getvalue())


def extract(*arguments: object) -> Result:
    """Extract with random weights, in float32 unless told otherwise: the fastest type is measured, and may change."""
    dtype = () if "--dtype" in arguments else ("--dtype", "float32")
    return internvit("extract", "--model", "tiny-random", *dtype, *arguments)


def summary_of(result: Result) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


SHAPES = ((1, 1), (2, 1), (1, 1), (1, 2), (3, 2), (1, 3))
"""Columns and rows of the tiles that pictures have: some of one, most of a few, since each costs its time."""


def make_pictures(folder: Path, count: int, seed: int = 0, size: int = 120) -> list[Path]:
    """Random pictures of several sizes and shapes, in two folders, JPEG and PNG in turn.

    Args:
        folder: where they go.
        count: how many.
        seed: of their pixels.
        size: the most that a side may have, pixels.
    """
    random = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        columns, rows = SHAPES[int(random.integers(len(SHAPES)))]
        unit = int(random.integers(10, size // max(columns, rows)))
        path = folder / f"part{number % 2}" / f"{number:03d}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (rows * unit, columns * unit, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        paths.append(path)
    return paths


def datasets(path: Path) -> dict[str, np.ndarray]:
    """Every dataset of an HDF5 file but the log of runs, which holds times."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
    found.pop("run_log")
    return found


def assert_same_content(left: Path, right: Path) -> None:
    ours, theirs = datasets(left), datasets(right)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


def state_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of modification and content of every file below a folder."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
