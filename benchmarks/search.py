"""Time and memory of searching and of finding duplicates among many vectors, and how good the ranking is.

    python benchmarks/search.py scale [--images 100000] [--index] [--duplicates] [--structureless] [--folder FOLDER]
    python benchmarks/search.py quality PHOTOS [--model tiny-random]

`scale` makes an output of made-up vectors of the 300M model's width, one in fifty the near copy of another, and runs
each command in a process of its own: seconds, and the most memory beyond what mapped files take (RssAnon). `quality`
encodes what becomes of photographs when they are saved anew, made smaller or cropped, and tells how often each finds
its original first, and the cosines on both sides of a threshold.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from internvit_cli.config import (
    ComputeDtype,
    OnOverflow,
    Pool,
    Preprocess,
    Recipe,
    Status,
    StoreDtype,
    TokenOrder,
    Tokens,
)
from internvit_cli.storage.commit import create_shard
from internvit_cli.storage.layout import DIGEST, FORMAT, FORMAT_VERSION, POOLED, STATUS, FeatureShape, NewShard
from internvit_cli.storage.output import Output
from internvit_cli.table import COLUMN_DTYPES, ImageTable
from internvit_cli.use.spaces import RAW, fit_whitening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 20_000
COPIES_EVERY = 50
CLUSTER = 50
"""Vectors that lie around one centre, on average."""


# ---------------------------------------------------------------------------------------------------------------- scale


def make_output(path: Path, images: int, width: int, *, structureless: bool) -> None:
    """An output of pooled vectors: clustered, correlated, with a large common part, and some near copies."""
    columns = {name: np.zeros(images, dtype) for name, dtype in COLUMN_DTYPES.items()}
    columns["columns"][:] = columns["rows"][:] = columns["orientation"][:] = 1
    table = ImageTable.build([b"%08d.jpg" % row for row in range(images)], np.zeros(images, np.uint8), columns)
    recipe = Recipe(
        weights_digest="0" * 64,
        layer=24,
        tile_size=448,
        min_tiles=1,
        max_tiles=12,
        thumbnail=True,
        preprocess=Preprocess.TILES,
        exif=True,
        background=None,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        tokens=Tokens.NONE,
        token_order=TokenOrder.V2,
        pool=Pool.MEAN,
        tile_pooled=False,
        compute_dtype=ComputeDtype.BFLOAT16,
        store_dtype=StoreDtype.FLOAT16,
        on_overflow=OnOverflow.SKIP,
    )
    attributes = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "recipe": recipe.to_json(), "recipe_digest": recipe.digest,
        "sources": json.dumps([{"root": "/nowhere", "name": ""}]), "created_by": "benchmark", "model": "none",
        "model_revision": "", "weights_digest": "0" * 64, "batch_tiles": 0, "pooled_from": "global_view",
    }  # fmt: skip
    shard = NewShard(table, FeatureShape(Tokens.NONE, 0, 0, width, StoreDtype.FLOAT16, False), attributes)
    output = Output(str(path))
    output.prepare()
    partial = output.partial_path(0)
    create_shard(output.backend, partial, shard)
    extents = output.backend.extents(partial)
    rng = np.random.default_rng(0)
    mixing = (rng.standard_normal((width, width)) * np.geomspace(3, 0.1, width)[:, None]).astype(np.float32)
    common = (60 * rng.standard_normal(width)).astype(np.float32)
    centres = rng.standard_normal((max(1, images // CLUSTER), width), np.float32)
    spread = 1.0 if structureless else 0.5
    with open(partial, "r+b") as file:
        for start in range(0, images, BLOCK):
            rows = min(BLOCK, images - start)
            vectors = spread * rng.standard_normal((rows, width), np.float32)
            if not structureless:
                vectors += centres[rng.integers(0, len(centres), rows)]
            vectors = vectors @ mixing + common
            copies = np.arange(1, rows, COPIES_EVERY)
            vectors[copies] = (
                vectors[copies - 1] + 0.05 * rng.standard_normal((len(copies), width), np.float32) @ mixing
            )
            file.seek(extents[POOLED].offset + 4 * width * start)
            file.write(vectors.astype("<f4").tobytes())
        file.seek(extents[STATUS].offset)
        file.write(np.full(images, Status.DONE, np.uint8).tobytes())
        file.seek(extents[DIGEST].offset)
        file.write(rng.integers(0, 256, (images, 32), np.uint8).tobytes())
    output.publish(0, images, table.tiles, {})


def measured(arguments: list[str]) -> tuple[float, float, str]:
    """Seconds, most megabytes of memory that is not a mapped file, and standard output of a command."""
    command = [sys.executable, "-m", "internvit_cli", *arguments, "-q"]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    most = [0]
    watcher = threading.Thread(target=lambda: watch(process, most))
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    assert process.returncode == 0, arguments
    return time.perf_counter() - started, most[0] / 1000, output


def watch(process: subprocess.Popen[str], most: list[int]) -> None:
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon"):
                most[0] = max(most[0], int(line.split()[1]))
        time.sleep(0.02)


def scale(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "feats.h5"
        make_output(path, arguments.images, arguments.width, structureless=arguments.structureless)
        print(f"{arguments.images:,} images, {arguments.width} wide, {path.stat().st_size / 1e9:.2f} GB")
        keys = [part for number in range(0, 200, 2) for part in ("--key", f"{number:08d}.jpg")]
        runs: dict[str, list[str]] = {
            "search --raw, one query": ["search", str(path), *keys[:2], "--raw", "--json"],
            "search, one query": ["search", str(path), *keys[:2], "--json"],
            "search, 100 queries": ["search", str(path), *keys, "--json"],
        }
        if arguments.index:
            runs |= {
                "search --index, built": ["search", str(path), *keys, "--index", "--json"],
                "search --index, 100 queries": ["search", str(path), *keys, "--index", "--json"],
                "search --index, one query": ["search", str(path), *keys[:2], "--index", "--json"],
            }
        if arguments.duplicates:
            runs["duplicates"] = ["duplicates", str(path), "--json"]
        hits = {}
        for name, command in runs.items():
            seconds, megabytes, output = measured(command)
            told = json.loads(output)
            note = ""
            if name.startswith("search"):
                hits[name] = [{hit["key"] for hit in query["hits"]} for query in told["queries"]]
                exact = hits.get("search, 100 queries")
                if "100" in name and exact and "--index" in name:
                    shared = sum(len(one & other) for one, other in zip(exact, hits[name], strict=True))
                    note = f", recall of ten {shared / sum(map(len, exact)):.3f}"
            else:
                note = f", {len(told['similar']):,} groups of {arguments.images // COPIES_EVERY:,}, {told['how']}"
            print(f"  {name:30} {seconds:8.1f} s {megabytes:8.0f} MB{note}", flush=True)


# -------------------------------------------------------------------------------------------------------------- quality


def saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return Image.open(stream)


def smaller(image: Image.Image, share: float) -> Image.Image:
    return image.resize((round(image.width * share), round(image.height * share)), Image.Resampling.BICUBIC)


def cropped(image: Image.Image, share: float, at: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    width, height = int(image.width * share), int(image.height * share)
    left, top = int((image.width - width) * at[0]), int((image.height - height) * at[1])
    return image.crop((left, top, left + width, top + height))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG at 90": lambda image: saved(image, "JPEG", 90),
    "JPEG at 50": lambda image: saved(image, "JPEG", 50),
    "JPEG at 20": lambda image: saved(image, "JPEG", 20),
    "WebP at 50": lambda image: saved(image, "WEBP", 50),
    "half as large": lambda image: smaller(image, 0.5),
    "a quarter as large": lambda image: smaller(image, 0.25),
    "middle 95 %": lambda image: cropped(image, 0.95),
    "middle 90 %": lambda image: cropped(image, 0.9),
    "corner 90 %": lambda image: cropped(image, 0.9, (0.0, 0.0)),
    "middle 80 %": lambda image: cropped(image, 0.8),
    "middle 60 %": lambda image: cropped(image, 0.6),
    "brighter by 20 %": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "in grey": lambda image: image.convert("L"),
    "mirrored": ImageOps.mirror,
}
TWINS = {
    "055_exif-orientation_1200x1800.jpg": "021_exif-orientation_1200x1800.jpg",
    "074_metadata-extractor_776x909.jpg": "057_metadata-extractor_776x909.webp",
    "072_opensfm_1024x768.jpg": "052_opensfm_1024x768.jpg",
}
"""Photographs of the set that show what another one shows."""


class Vectors:
    """An array with the little of `PooledVectors` that fitting a space asks for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, wanted: object) -> np.ndarray:
        return self.array[wanted]


def quality(arguments: argparse.Namespace) -> None:
    from internvit_cli import Extractor

    files = sorted(path for path in Path(arguments.photos).iterdir() if path.suffix not in {".tsv", ".txt"})

    def pictures() -> Iterator[Image.Image]:
        for path in files:
            upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            yield upright
            yield from (change(upright) for change in CHANGES.values())

    with Extractor(arguments.model, tokens=Tokens.NONE, dtype="float32") as extractor:
        vectors = np.stack([image.pooled for image in extractor.stream(pictures())])
    vectors = vectors.reshape(len(files), 1 + len(CHANGES), -1)
    scenes = np.array([TWINS.get(path.name, path.name) for path in files])
    print(f"{len(files)} photographs, {arguments.model}")
    originals = np.ascontiguousarray(vectors[:, 0])
    spaces = {"raw": RAW, "whitened": fit_whitening(Vectors(originals))}  # type: ignore[arg-type]
    print(f"{'':22}" + "".join(f"{name + ': first':>18}{'lowest, 5 %':>20}" for name in spaces))
    embedded = {name: space.embed(vectors.reshape(-1, vectors.shape[2])) for name, space in spaces.items()}
    embedded = {name: values.reshape(vectors.shape) for name, values in embedded.items()}
    for number, change in enumerate(CHANGES, 1):
        line = f"{change:22}"
        for values in embedded.values():
            scores = values[:, number] @ values[:, 0].T
            first = scenes[scores.argmax(axis=1)] == scenes
            own = np.diag(scores)
            line += f"{first.mean():17.0%} {own.min():11.4f}, {np.percentile(own, 5):.4f}"
        print(line)
    for name, values in embedded.items():
        others = (values[:, 0] @ values[:, 0].T)[scenes[:, None] != scenes[None]]
        print(f"different photographs, {name}: median {np.median(others):.3f}, highest {others.max():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    large = commands.add_parser("scale")
    large.add_argument("--images", type=int, default=100_000)
    large.add_argument("--width", type=int, default=1024)
    large.add_argument("--index", action="store_true")
    large.add_argument("--structureless", action="store_true", help="no clusters: every vector as far from every other")
    large.add_argument("--duplicates", action="store_true")
    large.add_argument("--folder", default=os.environ.get("TMPDIR", "/tmp"))
    large.set_defaults(run=scale)
    good = commands.add_parser("quality")
    good.add_argument("photos")
    good.add_argument("--model", default="tiny-random")
    good.set_defaults(run=quality)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
