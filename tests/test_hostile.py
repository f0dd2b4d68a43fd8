"""Broken, odd and malicious pictures in one run: it ends, within bounds, and loses nothing but them."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crash_tracing as tracing
import h5py
import numpy as np
import pytest
from forking import PATIENCE
from PIL import Image, features
from run_helpers import Result, command, datasets, internvit, summary_of

from internvit_cli import open_features
from internvit_cli.config import Status
from internvit_cli.storage.skipped import read_skip_log

if TYPE_CHECKING:
    from collections.abc import Iterator

UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Root without its power over permissions: what a mode forbids is forbidden, as for any user."""
SMALL = ("--model", "tiny-random", "--dtype", "float32", "--tokens", "none", "--json")
PATIENT = ("--decode-timeout", PATIENCE)
"""No picture is skipped because the machine is slow."""
ENDLESS = "bomb/many_scans.jpg"
"""A picture that takes minutes on any machine."""
MOST_MEGABYTES = 1500
"""Of the largest process of a run, of which torch takes some 400."""
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""
"""Started in between: the peak of a process begins with that of the process which starts it."""
NEVER_OPENED = ("devzero", "stdin", "procmem", "fifo", "sock")


@dataclass(frozen=True)
class Run:
    """One run over hostile files, and what it took."""

    code: int
    summary: dict[str, Any]
    printed: str
    """On both streams."""
    megabytes: float
    """The most that one of its processes held in memory."""


def run_over(folder: Path, output: Path, *options: object, unprivileged: bool = False) -> Run:
    """Run from the command line, with the powers of root or without."""
    arguments = ["timeout", str(PATIENCE), *(UNPRIVILEGED if unprivileged else [])]
    arguments += command("extract", folder, "-o", output, *SMALL, *options)
    streams = [output.parent / f"{output.name}.{name}" for name in ("stdout", "stderr")]
    with streams[0].open("wb") as stdout, streams[1].open("wb") as stderr:
        peak = output.parent / f"{output.name}.peak"
        launcher = [sys.executable, "-c", MEASURE, peak, *arguments]
        code = subprocess.run(launcher, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr).returncode
    printed = [stream.read_text() for stream in streams]
    return Run(code, json.loads(printed[0]), "".join(printed), int(peak.read_text()) / 1000)


def here(folder: Path, output: Path, *options: object) -> Result:
    """The same in this process, for pictures that do no harm; workers are processes of their own in any case."""
    return internvit("extract", folder, "-o", output, *SMALL, *PATIENT, *options)


def assert_accounted(run: Run) -> None:
    """It ended by itself, within bounds, every image has an outcome, and nothing steers the terminal."""
    assert run.code == 3 and "Traceback" not in run.printed and "\x1b" not in run.printed
    assert run.summary["found"] == run.summary["done"] + run.summary["skipped"] and run.summary["pending"] == 0
    assert run.megabytes < MOST_MEGABYTES


@pytest.fixture(params=["root", "unprivileged"])
def unprivileged(request: pytest.FixtureRequest, tmp_path: Path) -> bool:
    if request.param == "root":
        return False
    secret = tmp_path / "secret"
    secret.touch(mode=0)
    if shutil.which("setpriv") is None or subprocess.run([*UNPRIVILEGED, "true"], capture_output=True).returncode != 0:
        pytest.skip("cannot give up root's powers here")
    assert subprocess.run([*UNPRIVILEGED, "cat", secret], capture_output=True).returncode != 0
    return True


@pytest.mark.sweep
def test_public_broken_pictures_come_out_as_plain_pillow_reads_them(
    hostile: Path, tmp_path: Path, unprivileged: bool
) -> None:
    assert_accounted(run_over(hostile, tmp_path / "f.h5", *PATIENT, unprivileged=unprivileged))
    if Image.__version__.split(".")[0] != "13" or not features.check("avif"):
        pytest.skip("the table of outcomes is that of Pillow 13")
    with (hostile / "OUTCOMES.tsv").open(newline="") as table:
        expected = {row["file"]: row["outcome"] for row in csv.DictReader(table, delimiter="\t")}
    expected["pillow__png_decompression_dos.png"] = "ok"  # only its text is hostile
    stored = open_features(tmp_path / "f.h5")
    assert {key: "ok" if stored[key].status is Status.DONE else "error" for key in stored} == {
        key: outcome for key, outcome in expected.items() if key in stored
    }
    assert len(stored) == len(expected)


@pytest.fixture
def endless(made: Path, tmp_path: Path) -> Iterator[Path]:
    """The picture that takes minutes, taken out of the tree for a while."""
    moved = tmp_path / "endless" / "many_scans.jpg"
    moved.parent.mkdir()
    shutil.move(made / ENDLESS, moved)
    yield moved
    shutil.move(moved, made / ENDLESS)


@pytest.mark.sweep
def test_a_picture_that_takes_minutes_is_skipped_and_the_others_are_done(endless: Path, made: Path) -> None:
    shutil.copy(made / "modes" / "gray.jpg", endless.parent)
    result = internvit("extract", endless.parent, "-o", endless.parent / "f.h5", *SMALL, "--decode-timeout", "4")
    assert result.returncode == 3 and summary_of(result)["reasons"] == {"timeout": 1}
    assert open_features(endless.parent / "f.h5")["gray.jpg"].is_done


@pytest.mark.sweep
def test_a_tree_of_hostile_files_costs_only_what_cannot_be_read(
    made: Path, endless: Path, tmp_path: Path, unprivileged: bool
) -> None:
    output = tmp_path / ("f" if unprivileged else "f.h5")
    run = run_over(made, output, *PATIENT, unprivileged=unprivileged)
    assert_accounted(run)
    print(f"\n{run.summary['found']} files, at most {run.megabytes:.0f} MB in one process")
    stored = open_features(output)
    status = {os.fsencode(key): image.status for key, image in stored.items()}
    for name in NEVER_OPENED:
        assert status[f"tree/{name}.jpg".encode()] is Status.NOT_REGULAR, name
    assert status[b"bomb/20000x20000_1bit.png"] is Status.TOO_LARGE
    assert status[b"tree/noread.jpg"] is (Status.UNREADABLE if unprivileged else Status.DONE)
    names = {b"names/" + name for name in os.listdir(os.fsencode(made / "names")) if name.lower().endswith(b".jpg")}
    assert names <= set(status), "every name comes back byte for byte"
    assert all(status[name] is Status.DONE for name in names)
    with (made / "MADE.tsv").open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
    for row in rows:
        found = status.get(row["path"].encode())
        if row["expect"] == "ok" and found is not None and not row["path"].startswith(("bomb/", "modes/")):
            assert found is Status.DONE, row
        # Of those that were meant to fail Pillow itself reads one, and of another only the text is hostile.
        if row["expect"] == "error" and row["path"] not in ("bomb/claims_9000sq_short.png", "bomb/ztxt60M.png"):
            assert found is not Status.DONE, row
    log = output / "skipped.jsonl" if unprivileged else Path(f"{output}.skipped.jsonl")
    lines = log.read_bytes().splitlines()
    assert all(json.loads(line)["reason"] for line in lines)
    assert b"\x1b" not in b"".join(lines)


@pytest.mark.sweep
def test_a_worker_has_the_memory_that_it_is_given_and_a_picture_that_takes_more_is_skipped(
    made: Path, tmp_path: Path
) -> None:
    """169 megapixels take 676 MB in RGB."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(made / "bomb" / "13000x13000_1bit.png", folder)
    shutil.copy(made / "modes" / "gray.jpg", folder)
    small = here(folder, tmp_path / "small.h5", "--worker-memory", "512MiB")
    assert small.returncode == 3 and summary_of(small)["reasons"] == {"too_large": 1}
    (entry,) = read_skip_log(str(tmp_path / "small.h5.skipped.jsonl"))
    assert entry["key"] == "13000x13000_1bit.png" and "--worker-memory" in entry["message"]
    assert here(folder, tmp_path / "large.h5", "--worker-memory", "2GiB").returncode == 0
    assert summary_of(here(folder, tmp_path / "limit.h5", "--max-pixels", "1000000"))["reasons"] == {"too_large": 1}


@pytest.mark.sweep
@pytest.mark.skipif(bool(tracing.why_not_traceable()), reason=tracing.why_not_traceable() or "strace")
def test_no_device_no_pipe_and_no_file_of_the_kernel_is_ever_opened(made: Path, tmp_path: Path) -> None:
    """By what the kernel itself saw of the whole run, workers included."""
    folder, trace = made / "tree", tmp_path / "trace"
    arguments = command("extract", folder, "-o", tmp_path / "f.h5", *SMALL, *PATIENT)
    traced = ["strace", "-f", "-qq", "-o", trace, "-e", "trace=?open,openat", *arguments]
    assert subprocess.run(traced, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE).returncode == 3
    opened = set(re.findall(rf'open(?:at)?\([^"]*"{re.escape(str(folder))}/([^"]*)"', trace.read_text()))
    assert {f"{name}.jpg" for name in NEVER_OPENED}.isdisjoint(opened)
    assert "hard.jpg" in opened and "noread.jpg" in opened, "the trace shows what is opened"


def test_sixteen_bit_and_float_pictures_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1))
    folders = {}
    for name, image in {
        "8bit.png": Image.fromarray(ramp),
        "16bit.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(ramp.astype(np.float32) / 255),
    }.items():
        folders[name] = tmp_path / name.split(".")[0]
        folders[name].mkdir()
        image.save(folders[name] / name)
        assert here(folders[name], tmp_path / f"{name}.h5").returncode == 0
    vectors = {name: datasets(tmp_path / f"{name}.h5")["pooled"] for name in folders}
    np.testing.assert_array_equal(vectors["16bit.png"], vectors["8bit.png"])
    np.testing.assert_allclose(vectors["float.tif"], vectors["8bit.png"], atol=0.02)


def test_a_background_shows_through_transparency(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (40, 40), (0, 0, 255)).save(tmp_path / "blue.png")
    for output, options in (("official.h5", ()), ("blue.h5", ("--background", "blue"))):
        result = here(tmp_path, tmp_path / output, *options)
        assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "official.h5") as official, h5py.File(tmp_path / "blue.h5") as blue:
        rows = [key.decode() for key in official["image/key"]]
        clear, red, through = rows.index("clear.png"), rows.index("red.png"), rows.index("blue.png")
        np.testing.assert_array_equal(official["pooled"][clear], official["pooled"][red])
        np.testing.assert_array_equal(blue["pooled"][clear], blue["pooled"][through])
