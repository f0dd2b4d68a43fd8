"""Broken, odd and malicious pictures in one run: it ends, within bounds, and loses nothing but them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image, features
from test_extract import command, datasets

from internvit_cli import open_features
from internvit_cli.config import Status

UNPRIVILEGED = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
"""Root without its power over permissions: what a mode forbids is forbidden, as for any user."""
SMALL = ("--model", "tiny-random", "--dtype", "float32", "--tokens", "none", "--decode-timeout", "8", "--json")


def run_over(folder: Path, output: Path, *, unprivileged: bool = False) -> tuple[int, dict[str, object], str]:
    """Exit code, summary and everything printed of one bounded run."""
    arguments = command("extract", folder, "-o", output, *SMALL)
    if unprivileged:
        arguments = [*UNPRIVILEGED, *arguments]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL)
    return result.returncode, json.loads(result.stdout), result.stdout + result.stderr


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


def test_public_broken_pictures_come_out_as_plain_pillow_reads_them(
    hostile: Path, tmp_path: Path, unprivileged: bool
) -> None:
    code, summary, printed = run_over(hostile, tmp_path / "f.h5", unprivileged=unprivileged)
    assert code == 3 and "Traceback" not in printed
    assert summary["found"] == summary["done"] + summary["skipped"] and summary["pending"] == 0  # type: ignore[operator]
    if Image.__version__.split(".")[0] != "13" or not features.check("avif"):
        pytest.skip("the table of outcomes is that of Pillow 13")
    with (hostile / "OUTCOMES.tsv").open(newline="") as table:
        expected = {row["file"]: row["outcome"] for row in csv.DictReader(table, delimiter="\t")}
    stored = open_features(tmp_path / "f.h5")
    assert {key: "ok" if stored[key].status is Status.DONE else "error" for key in stored} == {
        key: outcome for key, outcome in expected.items() if key in stored
    }
    assert len(stored) == len(expected)


def test_a_tree_of_hostile_files_costs_only_what_cannot_be_read(made: Path, tmp_path: Path, unprivileged: bool) -> None:
    started = time.monotonic()
    code, summary, printed = run_over(made, tmp_path / "f.h5", unprivileged=unprivileged)
    assert code == 3 and "Traceback" not in printed and "\x1b" not in printed
    assert time.monotonic() - started < 200
    assert summary["found"] == summary["done"] + summary["skipped"] and summary["pending"] == 0  # type: ignore[operator]
    stored = open_features(tmp_path / "f.h5")
    status = {os.fsencode(key): image.status for key, image in stored.items()}
    for name in ("devzero", "stdin", "procmem", "fifo", "sock"):
        assert status[f"tree/{name}.jpg".encode()] is Status.NOT_REGULAR, name
    assert status[b"bomb/many_scans.jpg"] is Status.TIMEOUT
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
        # Pillow itself reads two of those that were meant to fail.
        if row["expect"] == "error" and "claims_9000sq_short" not in row["path"]:
            assert found is not Status.DONE, row
    lines = Path(f"{tmp_path}/f.h5.skipped.jsonl").read_bytes().splitlines()
    assert all(json.loads(line)["reason"] for line in lines)
    assert b"\x1b" not in b"".join(lines)


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
        assert run_over(folders[name], tmp_path / f"{name}.h5")[0] == 0
    vectors = {name: datasets(tmp_path / f"{name}.h5")["pooled"] for name in folders}
    np.testing.assert_array_equal(vectors["16bit.png"], vectors["8bit.png"])
    np.testing.assert_allclose(vectors["float.tif"], vectors["8bit.png"], atol=0.02)


def test_a_background_shows_through_transparency(tmp_path: Path) -> None:
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (40, 40), (0, 0, 255)).save(tmp_path / "blue.png")
    for output, options in (("official.h5", ()), ("blue.h5", ("--background", "blue"))):
        result = subprocess.run(
            [*command("extract", tmp_path, "-o", tmp_path / output), *SMALL, *options], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "official.h5") as official, h5py.File(tmp_path / "blue.h5") as blue:
        rows = [key.decode() for key in official["image/key"]]
        clear, red, through = rows.index("clear.png"), rows.index("red.png"), rows.index("blue.png")
        np.testing.assert_array_equal(official["pooled"][clear], official["pooled"][red])
        np.testing.assert_array_equal(blue["pooled"][clear], blue["pooled"][through])
