"""Compare a decode worker with Pillow alone: the same pictures, one core each, alternating in one run.

    python benchmarks/decode.py PHOTOS [--rounds 5] [--max-tiles 1]

"Pillow alone" is what any program must do: open, convert to RGB, and resize to the grid of tiles and to the thumbnail,
in a process that does nothing else and keeps nothing. A worker also hashes the file, checks it against the plan, cuts
the tiles and copies them into shared memory. A worker of `--resize device` leaves resizing and cutting to the device,
and copies the whole picture into shared memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from internvit_cli.config import PixelRule, TilingRule
from internvit_cli.decode.decoder import DecodeJob, DecodeOptions, Decoder, FailedImage
from internvit_cli.plan.headers import Header, read_header
from internvit_cli.plan.tiling import choose_grid, has_thumbnail, tile_count


def jobs_of(folder: str, rule: PixelRule) -> list[DecodeJob]:
    jobs = []
    for name in sorted(os.listdir(folder)):
        path = os.fsencode(os.path.join(folder, name))
        header = read_header(path, rule)
        if isinstance(header, Header):
            jobs.append(DecodeJob(len(jobs), path, header, choose_grid(header.width, header.height, rule.tiling)))
    return jobs


def pillow(jobs: list[DecodeJob]) -> float:
    """Return the seconds of Pillow alone in this process."""
    from PIL import Image

    turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    started = time.perf_counter()
    for job in jobs:
        picture = Image.open(os.fsdecode(job.path)).convert("RGB")
        if job.header.orientation in turns:
            picture = picture.transpose(turns[job.header.orientation])
        sizes = [(448 * job.grid.columns, 448 * job.grid.rows)]
        sizes += [(448, 448)] if has_thumbnail(job.grid, thumbnail=True) else []
        for width, height in sizes:  # in the order of passes that training used
            picture.resize((width, picture.height), Image.Resampling.BICUBIC).resize(
                (width, height), Image.Resampling.BICUBIC
            )
    return time.perf_counter() - started


def worker(jobs: list[DecodeJob], rule: PixelRule, *, uncut: bool) -> float:
    """Return the seconds of one worker, including its queue and its shared memory."""
    most = max(tile_count(job.grid, thumbnail=True) for job in jobs)
    largest = max(3 * job.header.width * job.header.height for job in jobs)
    decoder = Decoder(DecodeOptions(rule, most, 1, 60.0, 4 << 30, picture_bytes=largest * uncut))
    try:
        release(decoder.run_uncut(jobs[:1]))
        started = time.perf_counter()
        release(decoder.run_uncut(jobs))
        return time.perf_counter() - started
    finally:
        decoder.close()


def release(images) -> None:
    for image in images:
        assert not isinstance(image, FailedImage), image
        image.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tiles", type=int, default=12)
    parser.add_argument("--pillow", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    rule = PixelRule(TilingRule(max_tiles=arguments.max_tiles))
    jobs = jobs_of(arguments.photos, rule)
    if arguments.pillow:
        print(pillow(jobs))
        return
    pixels = sum(job.header.width * job.header.height for job in jobs) / 1e6
    seconds: dict[str, list[float]] = {"Pillow alone": [], "worker": [], "worker of --resize device": []}
    command = [sys.executable, __file__, arguments.photos, "--pillow", "--max-tiles", str(arguments.max_tiles)]
    for _ in range(arguments.rounds):
        finished = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds["Pillow alone"].append(float(finished.stdout))
        seconds["worker"].append(worker(jobs, rule, uncut=False))
        seconds["worker of --resize device"].append(worker(jobs, rule, uncut=True))
    print(f"{len(jobs)} pictures, {pixels:.0f} megapixels")
    for name, values in seconds.items():
        print(f"{name}: {pixels / statistics.median(values):.1f} megapixels/s")
    alone = seconds.pop("Pillow alone")
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(alone, values, strict=True)]
        print(f"{name} / Pillow alone: {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})")


if __name__ == "__main__":
    main()
