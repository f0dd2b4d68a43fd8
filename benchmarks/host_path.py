"""Measure the host's work for a fast device: a complete `extract` with a simulated card.

    python benchmarks/host_path.py PHOTOS [--output FOLDER] [--copies 6] [--workers 4] [--rates 700 0]

Everything except the device is real (planning, decode workers, batches, the launcher with its buffers, writing with
CRCs and syncs). The device "computes" a batch by waiting (a rate of 0 does not wait) and returns features of the 300M
shape, 256 x 4,096 float16 per tile, which are 2.1 MB. Several decode workers per core and OMP_NUM_THREADS=16 show
contention of threads that otherwise appears only on machines with many cores. PHOTOS are linked several times; put the
output on tmpfs, so that the disk is not the limit.

It prints tiles per second; the share of the time in which the device was idle; the CPU time of the parent process per
tile, by thread; and how often the host copies a tile's pixels and its features in addition to decoding and writing,
which is found from the addresses of their memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE_ENVIRONMENT = {"OMP_NUM_THREADS": "16"}
BATCH = 32
HIDDEN, BLOCKS, HEADS = 1024, 1, 16
"""The 300M's width, which determines the shape of its features; the simulated card does not compute."""
THREADS = {
    "MainThread": "fill batches",
    "decode": "talk to workers",
    "sink": "hand over rows",
    "rows": "write rows and CRCs",
    "commit": "sync",
}


def make_checkpoint(folder: Path, blocks: int = BLOCKS, dtype: str = "float32") -> None:
    """Write random weights of some blocks of the 300M's width in transformers' layout."""
    import torch
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        image_size=[448, 448],
        attention_bias=True,
        norm_type="layer_norm",
    )
    InternVLVisionModel(config).to(getattr(torch, dtype)).save_pretrained(folder)


def link_photos(photos: Path, folder: Path, copies: int) -> None:
    folder.mkdir()
    for path in sorted(photos.iterdir()):
        if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}:
            for number in range(copies):
                (folder / f"{path.stem}-{number}{path.suffix}").symlink_to(path)


# ------------------------------------------------------------------------------------------------- the simulated card


class Clock:
    """A device that is busy with one batch at a time."""

    def __init__(self, rate: float) -> None:
        self.seconds_per_tile = 1 / rate if rate else 0.0
        self.first = self.until = 0.0
        self.idle = 0.0
        self.tiles = 0

    def run(self, tiles: int) -> float:
        """Begin a batch as soon as the last one is done; return the time at which it will be done."""
        now = time.perf_counter()
        self.first = self.first or now
        self.idle += max(0.0, now - max(self.until, self.first))
        self.until = max(now, self.until) + tiles * self.seconds_per_tile
        self.tiles += tiles
        return self.until


class Event:
    """The end of a batch."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def elapsed_time(self, _: Event) -> float:
        return 0.0

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at - time.perf_counter()))


def install(clock: Clock, copies: Counter[str]) -> None:
    """Make extract encode on the simulated card, and count copies of tiles and features."""
    import torch

    from internvit_cli.encode import batches, cuda, encoder
    from internvit_cli.storage.write.commit import RowWriter

    pinned: list[tuple[int, int]] = []

    def pin(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(shape, dtype=dtype)
        pinned.append((memory.data_ptr(), memory.data_ptr() + memory.numel() * memory.element_size()))
        return memory

    def is_pinned(array: NDArray[Any]) -> bool:
        return any(start <= array.ctypes.data < end for start, end in pinned)

    class StandIn(cuda.CudaLauncher):
        def launch(self, tiles: Any, size: int, placed: Any = ()) -> Any:
            # One copy brought them here from the workers' memory; outside the buffer, another copy follows.
            # Tiles that were cut on the device were never copied by the host.
            from_host = len(tiles) - sum(len(one.tiles) for one in placed)
            copies["in"] += from_host * (1 if is_pinned(tiles[0]) else 2)
            return super().launch(tiles, size, placed)

        def cut(self, _: Any, views: Any) -> Any:
            side = self.model.spec.tile_size
            return torch.empty((sum(view.tiles for view in views), side, side, 3), dtype=torch.uint8)

        def register(self, memory: Any) -> None: ...

        def close(self) -> None: ...

        def _enqueue(self, slot: cuda.Slot) -> None:
            slot.host_layers = [pool.take() for pool in self._pools]
            slot.finished.at = clock.run(len(slot.tiles))

        def _capture(self) -> None: ...

    put = RowWriter.put

    def counted_put(self: RowWriter, name: str, position: int, rows: Any, checksum: int) -> int:
        if name == "visual_tokens":
            copies["out"] += len(rows) * (not is_pinned(rows))
        return put(self, name, position, rows, checksum)

    for name in ("Stream", "Event"):
        setattr(torch.cuda, name, Event)
    for name in ("stream", "device"):
        setattr(torch.cuda, name, lambda *_: nullcontext())
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(torch.cuda, name, lambda *_: None)
    cuda._pinned = pin
    RowWriter.put = counted_put  # type: ignore[method-assign]
    load = encoder._load_model
    encoder.find_fit_device = lambda *_, **__: torch.device("meta")  # as for a card, nothing is prepared for a CPU
    encoder._load_model = lambda checkpoint, options, _: load(checkpoint, options, torch.device("cpu"))
    encoder._make_runner = lambda model, options: batches.BatchRunner(StandIn(model, model.device), options.batch_tiles)


# ------------------------------------------------------------------------------------------------------------ measuring


class ThreadTimes(threading.Thread):
    """CPU seconds of each thread of this process by name, including threads that have ended."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="measure")
        self._names: dict[int, str] = {}
        self._seconds: dict[int, float] = {}
        self._before: dict[int, float] = {}

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.05)

    def look(self) -> None:
        tick = os.sysconf("SC_CLK_TCK")
        self._names |= {thread.native_id or 0: thread.name for thread in threading.enumerate()}
        for task in Path("/proc/self/task").iterdir():
            try:
                fields = (task / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            self._seconds[int(task.name)] = (int(fields[11]) + int(fields[12])) / tick

    def begin(self) -> None:
        """Start counting here, so that start-up time is excluded."""
        self.look()
        self._before = dict(self._seconds)

    def by_name(self) -> Counter[str]:
        self.look()
        found: Counter[str] = Counter()
        for thread, seconds in self._seconds.items():
            name = self._names.get(thread, "other").split("_")[0].split("-")[0]
            if name != "measure":
                found[THREADS.get(name, "other")] += seconds - self._before.get(thread, 0.0)
        return found


def run_side(arguments: argparse.Namespace, rate: float) -> None:
    from internvit_cli.config import ComputeDtype, Resize, Tokens
    from internvit_cli.extract.pipeline import extract
    from internvit_cli.options import ExtractOptions, ModelOptions, PictureOptions, RunOptions, StoreOptions
    from internvit_cli.runtime.signals import StopRequest
    from internvit_cli.sources.interface import DiscoverOptions

    clock, copies, times = Clock(rate), Counter[str](), ThreadTimes()
    install(clock, copies)
    times.start()
    run, first = clock.run, threading.Event()

    def begin_and_run(tiles: int) -> float:
        if not first.is_set():
            first.set()
            times.begin()
        return run(tiles)

    clock.run = begin_and_run  # type: ignore[method-assign]
    options = ExtractOptions(
        sources=(f"{arguments.scratch}/photos",),
        discover=DiscoverOptions(follow_links=True),
        pictures=PictureOptions(max_tiles=arguments.max_tiles),
        store=StoreOptions(output=f"{arguments.scratch}/feats", tokens=Tokens(arguments.tokens)),
        model=ModelOptions(name=f"{arguments.scratch}/model"),
        run=RunOptions(
            dtype=ComputeDtype.FLOAT32,
            batch_tiles=BATCH,
            workers=arguments.workers,
            resize=Resize(arguments.resize),
        ),
    )
    summary = extract(options, StopRequest())
    stages, tiles = summary.stages, summary.tiles
    figures = {
        "tiles": tiles,
        "tiles_per_second": tiles / stages.wall,
        "images_per_second": summary.counts.done / stages.wall,
        "idle": clock.idle / stages.wall,
        "cpu_ms": {name: 1000 * seconds / tiles for name, seconds in times.by_name().items()},
        "copies": {name: copies[name] / tiles for name in ("in", "out")},
        "write_share": stages.write / stages.wall,
    }
    print(json.dumps(figures))


def print_crc_rates() -> None:
    """The CRC-32 of one tile's features: the library in use, and zlib."""
    import zlib

    from internvit_cli.runtime.crc import crc32

    data, rates = os.urandom(2 * 256 * 4096), []
    for compute in (crc32, zlib.crc32):
        seconds = []
        for _ in range(30):
            started = time.perf_counter()
            compute(data)
            seconds.append(time.perf_counter() - started)
        rates.append(len(data) / min(seconds) / 1e9)
    print(f"CRC-32 of a tile: {rates[0]:.1f} GB/s; zlib: {rates[1]:.1f} GB/s\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--output", default="/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2 * (os.cpu_count() or 1))
    parser.add_argument("--rates", type=float, nargs="+", default=[700.0, 0.0], help="tiles per second; 0: at once")
    parser.add_argument("--max-tiles", type=int, default=12)
    parser.add_argument("--tokens", default="visual", choices=["visual", "none"])
    parser.add_argument("--resize", default="cpu", choices=["cpu", "device"], help="device: as if it took no time")
    parser.add_argument("--side", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run_side(arguments, arguments.side)
        return
    cores, workers = os.cpu_count(), arguments.workers
    print(f"{cores} cores, {workers} decode workers, batches of {BATCH}, output in {arguments.output}\n")
    print_crc_rates()
    print("| device, tiles/s | tiles/s | images/s | idle | writing | copies in, out | parent's CPU, ms per tile |")
    print("|---|---|---|---|---|---|---|")
    for rate in arguments.rates:
        with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
            link_photos(arguments.photos.resolve(), Path(scratch, "photos"), arguments.copies)
            make_checkpoint(Path(scratch, "model"))
            command = [sys.executable, __file__, str(arguments.photos), "--side", str(rate), "--scratch", scratch]
            command += ["--workers", str(arguments.workers), "--max-tiles", str(arguments.max_tiles)]
            command += ["--tokens", arguments.tokens, "--resize", arguments.resize]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | SIDE_ENVIRONMENT
            )
        found = json.loads(done.stdout.splitlines()[-1])
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in sorted(found["cpu_ms"].items(), key=lambda item: -item[1]))
        copies = ", ".join(f"{found['copies'][name]:.2f}" for name in ("in", "out"))
        print(
            f"| {rate or 'at once':>7} | {found['tiles_per_second']:.0f} | {found['images_per_second']:.0f} | "
            f"{found['idle']:.0%} | "
            f"{found['write_share']:.0%} | {copies} | {sum(found['cpu_ms'].values()):.2f} ({parts}) |"
        )


if __name__ == "__main__":
    main()
