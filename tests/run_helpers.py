"""The command line, run in this process or in one of its own, pictures to run it on, and what lies on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    return internvit("extract", "--model", "tiny-random", *arguments)


def summary_of(result: Result) -> dict[str, object]:
    return json.loads(result.stdout)


def make_pictures(folder: Path, count: int, seed: int = 0, size: int = 120) -> list[Path]:
    """Random pictures of many sizes, in two folders, JPEG and PNG in turn."""
    random = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        width, height = random.integers(30, size, 2)
        path = folder / f"part{number % 2}" / f"{number:03d}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
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


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.005)


def finish(arguments: list[str], code: int = 0) -> None:
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert run.returncode == code, run.stderr


def bounds(arguments: list[str], output: Path) -> tuple[float, float]:
    """Seconds from the start of an uninterrupted run until it touches its output, and until it ends."""
    started = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begun = 0.0
    while process.poll() is None:
        if not begun and any(output.parent.iterdir()):
            begun = time.monotonic() - started
        time.sleep(0.005)
    return begun, time.monotonic() - started
