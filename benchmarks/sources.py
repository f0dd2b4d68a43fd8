"""Compare archives with the folder of the same pictures: images per second of decoding, and the time to list members.

    python benchmarks/sources.py PHOTOS [--rounds 5] [--members 1000000]

Decoding uses the decode workers of `extract` without an encoder, alternating between the folder, a tar and two zip
archives of the same pictures, each of which is in the page cache. The second part writes a tar archive of many tiny
members to a temporary file, and lists it.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from internvit_cli.config import PixelRule
from internvit_cli.decode.decoder import DecodeOptions, Decoder, FailedImage, decode_jobs
from internvit_cli.plan.scan import PlanOptions, plan_images
from internvit_cli.sources.archives import index_of
from internvit_cli.sources.discover import discover
from internvit_cli.sources.interface import DiscoverOptions

RULE = PixelRule()


def seconds_of(source: Path, workers: int) -> tuple[int, float, float]:
    """Return the images of a source, and the seconds to plan and to decode them."""
    started = time.perf_counter()
    listing = discover([str(source)], DiscoverOptions())
    plan = plan_images(listing, range(len(listing)), PlanOptions(RULE, workers, 60.0, 4 << 30))
    planned = time.perf_counter() - started
    rows = np.flatnonzero(plan.table.tile_counts > 0)
    decoder = Decoder(DecodeOptions(RULE, 13, workers, 60.0, 4 << 30))
    try:
        jobs = list(decode_jobs(plan.table, rows, listing.sources))
        for image in decoder.run(jobs[:workers]):  # wait until the workers are ready
            image.release()  # type: ignore[union-attr]
        started = time.perf_counter()
        for image in decoder.run(jobs):
            assert not isinstance(image, FailedImage), image
            image.release()
        return len(rows), planned, time.perf_counter() - started
    finally:
        decoder.close()


def pack(folder: Path, scratch: Path) -> dict[str, Path]:
    """Return the folder and its archives by name."""
    with tarfile.open(scratch / "photos.tar", "w") as archive:
        archive.add(folder, ".")
    for name, method in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(scratch / name, "w", method) as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
    archives = {name: scratch / name for name in ("photos.tar", "stored.zip", "deflated.zip")}
    return {"folder": folder} | archives


def list_many(members: int, scratch: Path) -> None:
    """Print how long it takes to list a tar archive of many members, and the memory that this takes."""
    path = scratch / "many.tar"
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        for number in range(members):
            info = tarfile.TarInfo(f"{number // 1000:06d}/{number:09d}.jpg")
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = len(index_of(bytes(path)).members)
    seconds = time.perf_counter() - started
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"\n{found:,} members of a tar archive listed in {seconds:.1f} s, {grown:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--members", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = pack(arguments.photos, Path(scratch))
        planned: dict[str, list[float]] = {name: [] for name in places}
        rates: dict[str, list[float]] = {name: [] for name in places}
        for _ in range(arguments.rounds):
            for name, place in places.items():
                images, planning, decoding = seconds_of(place, arguments.workers)
                planned[name].append(planning)
                rates[name].append(images / decoding)
        print("| source | images/s | to the folder | planning, s |")
        print("|---|---|---|---|")
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(values, rates["folder"], strict=True))
            print(
                f"| {name} | {statistics.median(values):.1f} | {ratio:.2f} | {statistics.median(planned[name]):.2f} |"
            )
        list_many(arguments.members, Path(scratch))


if __name__ == "__main__":
    main()
