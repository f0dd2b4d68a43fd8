"""Photographs beside names that would like to be markup, their features, and the page of these, made once."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from run_helpers import extract, internvit

if TYPE_CHECKING:
    from pathlib import Path

FLOAT32 = ("--dtype", "float32", "--device", "cpu")
PHOTO = "040_imageio_768x512.png"
HOSTILE = (
    b"<script>alert(1).png",
    b"<!--<script>.png",
    b"<img src=x onerror=alert(1)>.png",
    b"line\nbreak.png",
    b"not-utf8-\xff.png",
    "\u2028 and \u202e turned.png".encode(),
    b"$script $data ${x}.png",
    b"quotes\"'`&amp;.png",
)


@pytest.fixture(scope="session")
def report_pictures(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs, some twice, beside names that would like to be markup."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(sorted(os.listdir(photos))[:12]):
        if not name.endswith(".tsv"):
            (folder / f"part-{number % 3}").mkdir(exist_ok=True)
            picture = Image.open(photos / name).convert("RGB")
            picture.thumbnail((300, 300))
            picture.save(folder / f"part-{number % 3}" / f"{name}.jpg", quality=95)
    photo = Image.open(photos / PHOTO).convert("RGB")
    photo.save(folder / "large.png")
    photo.resize((384, 256)).save(folder / "half.jpg")
    shutil.copy(folder / "half.jpg", folder / "same bytes.jpg")
    (folder / "</script><script>").mkdir(parents=True)  # two folders, and a key that holds the end of a script
    for number, raw in enumerate(HOSTILE):
        photo.rotate(20 * number).resize((96, 64 + number)).save(os.path.join(os.fsencode(folder), raw), "PNG")
    photo.resize((80, 60)).save(folder / "</script><script>" / "deep.png")
    (folder / "bad.jpg").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "large.png").read_bytes()[:5000])
    return folder


@pytest.fixture(scope="session")
def report_output(report_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "feats.h5"
    assert extract(report_pictures, "-o", output, "--max-tiles", 4, *FLOAT32).returncode == 3
    return output


@pytest.fixture(scope="session")
def report_page(report_output: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    result = internvit("report", report_output, "-o", path, "--samples", 6)
    assert result.returncode == 0, result.stderr
    return path
