"""Measure how long a report of many images takes to make, open and search, and how large it is.

    python benchmarks/report.py PHOTOS [--images 20000] [--folder FOLDER]

The pictures are crops of photographs; `tiny-random` encodes them (one tile each, tokens stored), and `internvit report`
makes the page. Printed are the seconds and peak memory of that process without mapped files (RssAnon), the bytes of the
page, and, in a headless chromium, the seconds until the page is drawn, until a search is answered, and for one frame of
the map. FOLDER is kept, and its existing files are reused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tests")]

from browser import Browser, Page, why_no_browser  # noqa: E402 - from the tests
from search import measured  # noqa: E402 - beside this file

SIZES = ((480, 360), (360, 480), (512, 288))
FOLDERS = 12


def make_pictures(photos: Path, folder: Path, images: int) -> None:
    """Write different crops of the photographs, some of them saved again with losses."""
    chance = np.random.default_rng(0)
    opened = [Image.open(path).convert("RGB") for path in sorted(photos.iterdir()) if path.suffix in {".jpg", ".webp"}]
    crop = opened[0]
    for number in range(images):
        path = folder / f"folder-{number % FOLDERS:02d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 50 != 1:
            photo = opened[int(chance.integers(len(opened)))]
            width, height = SIZES[number % 3]
            share = chance.uniform(0.4, 1) * min(photo.width / width, photo.height / height)
            size = int(width * share), int(height * share)
            left, top = (int(chance.integers(whole - part + 1)) for whole, part in zip(photo.size, size, strict=True))
            crop = photo.resize((width, height), Image.Resampling.BOX, (left, top, left + size[0], top + size[1]))
        crop.save(path, quality=80 - 10 * (number % 50 == 1))


def in_browser(path: Path) -> None:
    with Browser() as browser:
        page = browser.page()
        started = time.perf_counter()
        page.open(path)
        print(f"  opened and drawn        {time.perf_counter() - started:8.2f} s")
        print(f"  memory of its script    {page.evaluate('performance.memory.usedJSHeapSize') / 1e6:8.0f} MB")
        page.evaluate("document.getElementById('search').focus()")
        started = time.perf_counter()
        page.type("0123")
        page.wait("document.querySelectorAll('.hits button').length > 0")
        print(f"  a search answered       {time.perf_counter() - started:8.2f} s")
        print(f"  one frame of the map    {frame(page):8.3f} s")
        for complaint in page.complaints:
            print(f"  COMPLAINT {complaint}")


def frame(page: Page) -> float:
    """Return the seconds of a frame while the map is zoomed, the median of twenty."""
    return page.evaluate("""(async () => {
        const times = [];
        for (let turn = 0; turn < 20; turn += 1) {
            const started = performance.now();
            document.querySelector(turn % 2 ? '.zoom button' : '.zoom button:nth-child(2)').click();
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            times.push(performance.now() - started);
        }
        return times.sort((one, other) => one - other)[10] / 1000;
    })()""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "pictures").exists():
            make_pictures(arguments.photos, folder / "pictures", arguments.images)
        output, page = folder / "feats.h5", folder / "report.html"
        options = ["--model", "tiny-random", "--device", "cpu", "--max-tiles", "1"]
        seconds, _, _ = measured(["extract", str(folder / "pictures"), "-o", str(output), *options])
        print(f"{arguments.images:,} images, {output.stat().st_size / 1e9:.2f} GB, extracted in {seconds:.0f} s")
        seconds, megabytes, told = measured(["report", str(output), "-o", str(page), "--json"])
        facts = json.loads(told)
        print(f"  made                    {seconds:8.1f} s {megabytes:8.0f} MB")
        print(f"  size                    {facts['bytes'] / 1e6:8.1f} MB, {facts['thumbnails']:,} thumbnails")
        if reason := why_no_browser():
            print(f"  not opened: {reason}")
        else:
            in_browser(page)


if __name__ == "__main__":
    main()
