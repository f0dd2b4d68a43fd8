"""The real command, to be killed a thousand times: only pixels and weights are stand-ins, and torch is never loaded.

From the lock to the last rename everything is `internvit_cli`'s own code, run through its command line. In place of
pictures' pixels and a model there are random rows that follow from the SHA-256 of each file, so that the right content
of every row is known and no two rows are alike: a swap, a stale row or a zero cannot hide.

    python crash_driver.py [--inline] [...] -- extract PICTURES -o OUT
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import os
import sys
import types
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from shortcuts import build_command_once

from internvit_cli.cli import app
from internvit_cli.config import PATCH_SIZE, ComputeDtype, Skipped, Status, StoreDtype, Tokens
from internvit_cli.decode.decoder import DecodedImage, FailedImage
from internvit_cli.encode.interface import EncoderInfo
from internvit_cli.encode.tile_features import LayerFeatures, TileFeatures
from internvit_cli.extract import engine, run_plan, shard_filler, shard_plan, writer_thread
from internvit_cli.extract.writer_thread import ShardSink
from internvit_cli.plan import scan
from internvit_cli.plan.headers import header_reader
from internvit_cli.runtime.workers import FinishedTask
from internvit_cli.storage.durable import disk_errors, sync_data, sync_together
from internvit_cli.storage.format.layout import FeatureShape
from internvit_cli.storage.write import commit, reuse
from internvit_cli.storage.write.commit import ImageRows, RowWriter, ShardWriter, WrittenImage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from typing_extensions import Self

    from internvit_cli.extract.writer_thread import FinishedImage, SkippedImage
    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.format.layout import Extent

POOLED_WIDTH = 5
SPOILED = b"spoiled"
"""A picture with this in its name has a header and cannot be decoded."""
ALWAYS = ("--model", "tiny-random", "--dtype", "float32", "--tile-pooled")


@dataclass(frozen=True)
class Behavior:
    """How a run differs from a plain one."""

    tokens: tuple[int, int] = (4, 6)
    """Tokens of a tile and values of a token: sets the size of a row."""
    checkpoint_bytes: int = 600
    """A few images; time makes no checkpoint, so that every run makes the same calls."""
    inline: bool = False
    """Rows are written by the main thread, so that the N-th call of a run is always the same one."""
    report: bool = False
    """Print the number of settled images after each checkpoint."""
    misordered: bool = False
    """The wrong order, for tests of the tests: statuses are on the disk before rows are."""
    no_reserve: bool = False
    """As on a filesystem without fallocate: the space is not set aside."""
    fill_disk: str = ""
    """A file that takes all the space there is ..."""
    fill_disk_after: int = 0
    """... after so many pictures."""
    shard_images: int = 0
    """Images of a shard, however few bytes they are; 0 goes by --shard-size."""


def features(
    digest: bytes, tile: int, tokens: tuple[int, ...], layer: int | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """One tile's rows of the file with this digest: tokens [T, C] float16 and vector [d] float32.

    Those of an earlier layer, and of the main one without it.
    """
    seed = [int.from_bytes(digest, "little"), tile]
    random = np.random.default_rng(seed if layer is None else [*seed, layer])
    return random.standard_normal(tokens, np.float32).astype("<f2"), random.standard_normal(POOLED_WIDTH, np.float32)


# ------------------------------------------------------------------------------------------------------- the stand-ins


class InlinePool:
    """Planning's worker pool without processes."""

    def __init__(self, spec: Any, count: int, task_seconds: float) -> None:
        self._read = header_reader(*spec.arguments)
        self._finished: list[FinishedTask] = []

    capacity = 4

    @property
    def outstanding(self) -> int:
        return len(self._finished)

    def submit(self, task_id: int, payload: Any, *, alone: bool = False) -> None:
        self._finished.append(FinishedTask(task_id, self._read(payload), 0.0))

    def wait(self, timeout: float | None = None) -> list[FinishedTask]:
        finished, self._finished = self._finished, []
        return finished

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class DigestDecoder:
    """Tiles that say which file and which tile of it they are."""

    tile_size = 4
    tiles = 1 << 30
    """The most that an image may have."""
    busy_seconds = 0.0
    pids = ()
    behavior = Behavior()
    pictures = itertools.count()
    """Of all shards."""

    def __init__(self, options: Any) -> None:
        pass

    def run(self, jobs: Any, stopped: Callable[[], bool]) -> Iterator[DecodedImage | FailedImage]:
        for job in jobs:
            if stopped():
                return
            if self.behavior.fill_disk and next(self.pictures) == self.behavior.fill_disk_after:
                fill_disk(self.behavior.fill_disk)
            facts = os.stat(job.path)
            if (facts.st_size, facts.st_mtime_ns) != (job.header.file_size, job.header.file_mtime_ns):
                yield FailedImage(job.row, Skipped(Status.CHANGED, "", "the file changed after it was planned"), 0)
                continue
            if SPOILED in job.path:
                yield FailedImage(job.row, Skipped(Status.TRUNCATED, "OSError", "image file is truncated"), 0)
                continue
            with open(job.path, "rb") as file:
                digest = hashlib.sha256(file.read()).digest()
            count = job.grid.columns * job.grid.rows
            count += count > 1  # the thumbnail
            tiles = np.zeros((count, self.tile_size, self.tile_size, 3), np.uint8)
            for tile, pixels in enumerate(tiles):
                pixels.reshape(-1)[:33] = np.frombuffer(digest + bytes([tile]), np.uint8)
            yield DecodedImage(job.row, tiles, digest, lambda: None)

    def suits(self, options: Any) -> bool:
        return True

    def close(self) -> None:
        pass


class DigestEncoder:
    """Random rows that follow from the tiles."""

    info = EncoderInfo("none", ComputeDtype.FLOAT32, batch_tiles=4, batch_tiles_to_record=4, kernels="none")
    device_seconds = 0.0
    resizes = False
    tokens = (4, 6)
    layers: tuple[int | None, ...] = (None,)

    @classmethod
    def load(cls, checkpoint: Any, options: Any) -> DigestEncoder:
        encoder = cls()
        encoder.layers = (None, *options.earlier_layers)
        return encoder

    def buffer(self) -> NDArray[Any]:
        side = DigestDecoder.tile_size
        return np.empty((self.info.batch_tiles, side, side, 3), np.uint8)

    def submit(self, tiles: NDArray[Any], placed: Any) -> Any:
        assert not placed
        names = [tile.reshape(-1)[:33].tobytes() for tile in tiles]
        layers = []
        for layer in self.layers:
            rows = [features(name[:32], name[32], self.tokens, layer) for name in names]
            layers.append(LayerFeatures(np.stack([one for one, _ in rows]), np.stack([one for _, one in rows])))
        batch = TileFeatures(tuple(layers), np.zeros(len(names), np.uint8), clamped=0)
        return types.SimpleNamespace(result=lambda: batch)

    def close(self) -> None:
        pass


class InlineSink(ShardSink):
    """The sink's work, done by whoever puts."""

    def _run(self) -> None:
        """The thread itself ends at once."""

    def put(self, image: FinishedImage) -> None:
        self._do(
            lambda: self.take(self._writer.write_rows(image) if isinstance(image, ImageRows) else image), is_end=False
        )
        if self._commit is None and self._is_due:
            self._do(lambda: self.commit(*self._taken()), is_end=False)

    def close(self) -> None:
        self._do(lambda: None, is_end=True)

    def _stored(self, image: FinishedImage) -> WrittenImage | SkippedImage:
        return self._writer.write_rows(image) if isinstance(image, ImageRows) else image

    def _do(self, work: Callable[[], None], *, is_end: bool) -> None:
        if self._failure is None:
            try:
                work()
                if is_end:
                    self.on_idle(is_end=True)
            except BaseException as error:  # noqa: BLE001 - as the thread does
                self._failure = error
        if self._failure is not None:
            raise self._failure


class MisorderedRows(RowWriter):
    """Keeps rows back until it is told."""

    def __init__(self, extents: Mapping[str, Extent]) -> None:
        super().__init__(extents)
        self._late: list[tuple[str, int, NDArray[Any]]] = []

    def put(self, name: str, position: int, rows: NDArray[Any], checksum: int) -> int:
        self._late.append((name, position, rows))
        return zlib.crc32(np.ascontiguousarray(rows).data, checksum)

    def catch_up(self) -> None:
        for name, position, rows in self._late:
            super().put(name, position, rows, 0)
        self._late.clear()


class MisorderedWriter(ShardWriter):
    """Statuses first, rows after them, and no sync between: what the power-cut test must be able to see."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._rows.close()
        self._rows = self._late_rows = MisorderedRows(self.extents)
        self._descriptors = self._rows.descriptors

    def commit(self, rows: NDArray[Any]) -> int:
        committed = super().commit(rows)
        self._late_rows.catch_up()
        return committed


def sync_in_turn(descriptors: Mapping[str, int]) -> None:
    """Files one after another, by the thread that is traced: the N-th call of a run is always the same one."""
    for path, descriptor in descriptors.items():
        with disk_errors(path):
            sync_data(descriptor)


SPLIT = shard_plan.ShardSize.split


def fill_disk(path: str) -> None:
    """Write a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def prepare(behavior: Behavior) -> None:
    """Put the stand-ins in place."""
    build_command_once()
    stand_in = types.ModuleType("internvit_cli.encode.encoder")
    stand_in.Encoder = DigestEncoder  # type: ignore[attr-defined]
    sys.modules["internvit_cli.encode.encoder"] = stand_in
    scan.WorkerPool = InlinePool  # type: ignore[assignment,misc]
    DigestDecoder.behavior, DigestEncoder.tokens = behavior, behavior.tokens
    engine.Decoder = DigestDecoder  # type: ignore[assignment,misc]
    shape = FeatureShape(Tokens.VISUAL, *behavior.tokens, POOLED_WIDTH, StoreDtype.FLOAT16, tile_pooled=True)
    run_plan.feature_shape = lambda options, card, recipe: replace(shape, earlier_layers=recipe.earlier_layers)
    writer_thread.CHECKPOINT_SECONDS, writer_thread.CHECKPOINT_BYTES = 3600.0, behavior.checkpoint_bytes
    reuse.CHECKPOINT_BYTES = behavior.checkpoint_bytes
    commit.sync_together = sync_in_turn if behavior.inline else sync_together
    shard_filler.ShardSink = InlineSink if behavior.inline else ShardSink  # type: ignore[misc]
    if behavior.misordered:
        shard_filler.ShardWriter = MisorderedWriter  # type: ignore[assignment,misc]
    by_images = lambda _, table: cut(table, behavior.shard_images)  # noqa: E731
    shard_plan.ShardSize.split = by_images if behavior.shard_images else SPLIT  # type: ignore[method-assign]
    if behavior.no_reserve:
        commit.reserve = lambda path: None
    if behavior.report:
        _report_checkpoints()


def cut(table: ImageTable, images: int) -> Iterator[ImageTable]:
    """A table in parts of so many images."""
    for start in range(0, len(table), images):
        yield table.take(np.arange(start, min(start + images, len(table))))


def _report_checkpoints() -> None:
    commit = ShardWriter.commit
    settled: dict[int, set[int]] = {}

    def commit_and_tell(writer: ShardWriter, rows: NDArray[Any]) -> int:
        known = settled.setdefault(id(writer), set(np.flatnonzero(writer.status).tolist()) - set(rows.tolist()))
        committed = commit(writer, rows)
        known.update(rows.tolist())
        os.write(1, b"%d\n" % len(known))
        return committed

    ShardWriter.commit = commit_and_tell  # type: ignore[assignment,method-assign]


def run(arguments: list[str]) -> int:
    """Run one command line, such as `extract PICTURES -o OUT`; returns the exit code."""
    tokens = DigestDecoder.behavior.tokens[0]  # as many as a tile of this size has
    return int(app.run([*arguments, *ALWAYS, "--tile-size", str(2 * PATCH_SIZE * math.isqrt(tokens))]))


def main() -> None:
    own, command = sys.argv[1:], []
    if "--" in own:
        cut = own.index("--")
        own, command = own[:cut], own[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name in ("inline", "report", "misordered", "no-reserve"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--tokens", type=int, nargs=2, default=(4, 6))
    parser.add_argument("--checkpoint-bytes", type=int, default=600)
    parser.add_argument("--fill-disk", default="")
    parser.add_argument("--fill-disk-after", type=int, default=0)
    parser.add_argument("--shard-images", type=int, default=0)
    parser.add_argument("--moment", default="", help="when it is struck, as `moments.Moment.plan` gives it")
    options = vars(parser.parse_args(own))
    moment = options.pop("moment")
    prepare(Behavior(**options | {"tokens": tuple(options["tokens"])}))
    if moment:
        import moments

        moments.arm(moment)
    assert "torch" not in sys.modules
    sys.exit(run(command))


if __name__ == "__main__":
    main()
