"""Measure time and memory of `plan`, resuming, a run without work, `info` and `verify` against the number of images.

    python benchmarks/scale.py [--images 1000 10000 100000 1000000] [--folder FOLDER]
    python benchmarks/scale.py --photos PHOTOS      # only planning: headers of real photographs per second

The pictures are hard links to 64 JPEG files of some kilobytes, a thousand per folder, so that a million of them take no
space. The unfinished file holds random vectors for all pictures but the last ten, written as `extract` writes them
(without tokens, which would take terabytes for a million images and only add bytes). Each command runs in a separate
process; memory is the peak resident set of its largest process, as counted by the kernel.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

FILES = 64
PER_FOLDER = 1000
PENDING = 10
PHOTOS = 20_000
MODEL = ("--model", "tiny-random", "--dtype", "float32", "--tokens", "none", "--quiet")


class Cost(NamedTuple):
    """Time and memory of one command."""

    seconds: float
    megabytes: float


def make_pictures(folder: Path, images: int) -> None:
    """Create hard links to a few small files."""
    random = np.random.default_rng(0)
    originals = folder / "originals"
    originals.mkdir(parents=True)
    for number in range(FILES):
        width, height = random.integers(200, 640, 2).tolist()
        pixels = random.integers(0, 255, (8, 8, 3), np.uint8)
        data = io.BytesIO()
        Image.fromarray(pixels).resize((width, height)).save(data, "JPEG", quality=60)
        (originals / f"{number:02d}.jpg").write_bytes(data.getvalue())
    for number in range(images):
        if number % PER_FOLDER == 0:
            (folder / "pictures" / f"{number // PER_FOLDER:05d}").mkdir(parents=True)
        place = folder / "pictures" / f"{number // PER_FOLDER:05d}" / f"{number:08d}.jpg"
        os.link(originals / f"{number % FILES:02d}.jpg", place)


def plan_photos(photos: Path, folder: Path) -> None:
    """Plan hard links to real photographs, 20,000 and 40,000 of them."""
    originals = folder / "originals"
    shutil.copytree(photos, originals)
    files = sorted(path for path in originals.iterdir() if path.is_file())
    for number in range(2 * PHOTOS):
        place = (
            folder
            / "pictures"
            / f"{number // PHOTOS}"
            / f"{number // PER_FOLDER:03d}"
            / f"{number}-{number % len(files)}"
        )
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(files[number % len(files)], place.with_suffix(files[number % len(files)].suffix))
    half, whole = folder / "pictures" / "0", folder / "pictures"
    for pictures in (whole, half, whole, half, whole, half):
        cost = run("plan", pictures, "-o", folder / "feats.h5", *MODEL)
        images = PHOTOS if pictures == half else 2 * PHOTOS
        print(f"{images:,} photographs: {cost.seconds:.2f} s, {images / cost.seconds:,.0f}/s, {cost.megabytes:.0f} MB")


def run(*arguments: object, code: int = 0) -> Cost:
    """Run a command line in a separate process."""
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "internvit_cli", *map(str, arguments)], stdout=subprocess.DEVNULL
    ) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise SystemExit(f"{arguments[0]} ended with {process.returncode}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss / 1000)


FILL = """
import sys
import numpy as np
from internvit_cli.extract import run_engine
from internvit_cli.cli.app import run
from internvit_cli.encode.interface import EncoderInfo
from internvit_cli.storage.write.commit import ImageRows

class Engine:
    workers, notes = 0, ()

    def __init__(self, _checkpoint, options, _workload):
        self.info = EncoderInfo("none", options.encoder.dtype, batch_tiles=1, batch_tiles_to_record=0, kernels="")

    def encode(self, job, *_):
        '''Write random vectors instead of decoding and encoding; then the run dies.'''
        random = np.random.default_rng(0)
        vectors = random.standard_normal((4096, 64), np.float32)
        pending = [image.row for image in job.images.jobs][:-int(sys.argv[3])]
        for row in pending:
            job.images.sink.put(ImageRows(row, random.bytes(32), {"pooled": [vectors[row % 4096][None]]}))
        job.images.sink.close()
        sys.exit(0)

    def close(self):
        pass

run_engine.start_engine = Engine
run(["extract", sys.argv[1], "-o", sys.argv[2], *sys.argv[4:]])
"""


def fill(pictures: Path, output: Path, *more: str) -> None:
    """Write an output of all pictures but the last ten, as an interrupted run leaves it."""
    command = [sys.executable, "-c", FILL, str(pictures), str(output), str(PENDING), *MODEL, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def measure(images: int, folder: Path) -> dict[str, Cost]:
    """Measure all commands with a number of images."""
    make_pictures(folder, images)
    pictures, output = folder / "pictures", folder / "feats.h5"
    costs = {
        "plan, cold": run("plan", pictures, "-o", output, *MODEL),
        "plan": run("plan", pictures, "-o", output, *MODEL),
    }
    fill(pictures, output)
    assert Path(f"{output}.partial").exists()
    costs["info of the unfinished file"] = run("info", f"{output}.partial")
    costs["resume, ten images left"] = run("extract", pictures, "-o", output, *MODEL)
    costs["nothing to do"] = run("extract", pictures, "-o", output, *MODEL)
    costs["info"] = run("info", output)
    costs["verify, rows and index"] = run("verify", output, "--no-pictures", "-q")
    shards = folder / "feats"
    fill(pictures, shards, "--format", "npy")
    run("extract", pictures, "-o", shards, *MODEL)
    costs["info of .npy shards"] = run("info", shards)
    return costs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--photos", type=Path, help="plan only these photographs")
    arguments = parser.parse_args()
    if arguments.photos:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            plan_photos(arguments.photos, Path(scratch))
        return
    table: dict[str, list[Cost]] = {}
    for images in arguments.images:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            for name, cost in measure(images, Path(scratch)).items():
                table.setdefault(name, []).append(cost)
    print("| command | " + " | ".join(f"{images:,} images" for images in arguments.images) + " |")
    print("|---" * (1 + len(arguments.images)) + "|")
    for name, costs in table.items():
        print(f"| {name} | " + " | ".join(f"{cost.seconds:.2f} s, {cost.megabytes:.0f} MB" for cost in costs) + " |")


if __name__ == "__main__":
    main()
