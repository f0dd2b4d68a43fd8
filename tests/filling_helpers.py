"""A shard to be filled from real pictures by an encoder that has no model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import storage_helpers as helpers

from internvit_cli.config import ComputeDtype, PixelRule, Status, TilingRule
from internvit_cli.decode.decoder import DecodeJob, DecodeOptions, Decoder
from internvit_cli.encode.interface import EncoderInfo
from internvit_cli.encode.tile_features import LayerFeatures, TileFeatures
from internvit_cli.errors import DeviceError
from internvit_cli.extract.encode_loop import EncodeJob, EncodeLoop, EncodeResult, EncodeRules
from internvit_cli.extract.writer_thread import ShardSink
from internvit_cli.plan.headers import Header, read_header
from internvit_cli.plan.table import ImageTable
from internvit_cli.plan.tiling import choose_grid, has_thumbnail
from internvit_cli.storage.format.layout import stored_recipe
from internvit_cli.storage.skipped import SkipLog
from internvit_cli.storage.write.commit import ShardWriter, create_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from internvit_cli.storage.output import Output

SIDE = 28
RULE = PixelRule(TilingRule(tile_size=SIDE, max_tiles=6))
TOO_LARGE, NOT_A_NUMBER, CLAMPED = 250, 251, 252
"""Colors of pictures for which the encoder below gives such values."""


class Encoder:
    """Features that can be told from the pixels, and verdicts by color; no model."""

    device_seconds = 0.0
    resizes = False

    def __init__(self, batch_tiles: int, fail_after: int | None = None) -> None:
        self.info = EncoderInfo("none", ComputeDtype.FLOAT32, batch_tiles, batch_tiles_to_record=0, kernels="none")
        self.sizes: list[int] = []
        self._fail_after = fail_after

    def buffer(self) -> NDArray[Any]:
        return np.empty((self.info.batch_tiles, SIDE, SIDE, 3), np.uint8)

    def submit(self, tiles: Sequence[NDArray[Any]], placed: Sequence[Any]) -> Any:
        assert not placed
        self.sizes.append(len(tiles))
        assert len(tiles) <= self.info.batch_tiles
        if self._fail_after is not None and len(self.sizes) > self._fail_after:
            raise DeviceError("out of memory", "smaller")
        return Pending(features_of(np.stack(tiles)))


@dataclass(frozen=True)
class Pending:
    features: TileFeatures

    def result(self) -> TileFeatures:
        return self.features


def features_of(tiles: NDArray[Any]) -> TileFeatures:
    red = tiles[:, 0, 0, 0]
    pooled = tiles.reshape(len(tiles), -1)[:, : helpers.POOLED_WIDTH * 97 : 97].astype(np.float32)
    size = helpers.TOKENS_PER_TILE * helpers.CHANNELS
    tokens = tiles.reshape(len(tiles), -1)[:, : size * 89 : 89].astype(np.float16)
    fits = np.select([red == TOO_LARGE, red == NOT_A_NUMBER], [1, 2], 0).astype(np.uint8)
    tokens = tokens.reshape(len(tiles), helpers.TOKENS_PER_TILE, helpers.CHANNELS)
    return TileFeatures((LayerFeatures(tokens, pooled),), fits, int((red == CLAMPED).sum()))


@dataclass
class Stop:
    signal: int = 0


class Shard:
    """Pictures, the shard that is to hold their features, and a decoder of one worker, which keeps their order."""

    def __init__(self, paths: Sequence[Path], output: Output, *, tile_pooled: bool = False) -> None:
        self.paths = paths
        self.output = output
        headers = [read_header(os.fsencode(path), RULE) for path in paths]
        self.headers = [header for header in headers if isinstance(header, Header)]
        assert len(self.headers) == len(paths)
        grids = [choose_grid(header.width, header.height, RULE.tiling) for header in self.headers]
        self.jobs = [
            DecodeJob(row, os.fsencode(paths[row]), self.headers[row], grids[row]) for row in range(len(paths))
        ]
        columns: dict[str, Any] = {
            name: np.array([getattr(header, name) for header in self.headers]) for name in Header._fields
        }
        columns |= {
            "source": np.zeros(len(paths)),
            "columns": np.array([grid.columns for grid in grids]),
            "rows": np.array([grid.rows for grid in grids]),
            "thumbnail": np.array([has_thumbnail(grid, thumbnail=True) for grid in grids]),
        }
        keys = [os.fsencode(path.name) for path in paths]
        self.new = helpers.make_shard(
            ImageTable.build(keys, np.zeros(len(paths), np.uint8), columns), tile_pooled=tile_pooled
        )
        output.prepare()
        create_shard(output.backend, output.partial_path(0), self.new)

    def fill(
        self,
        encoder: Encoder,
        *,
        stop: Stop | None = None,
        on_progress: Callable[[Any], None] = lambda _: None,
        strict: bool = False,
        is_begun: bool = False,
        pool_all_tiles: bool = False,
    ) -> EncodeResult:
        """Fill what is pending, as one run does."""
        table = self.output.partial().stored.table
        writer = ShardWriter(self.output.backend, self.output.partial_path(0), table)
        rows = np.flatnonzero(writer.status == Status.PENDING).tolist()
        is_begun = is_begun or bool((writer.status == Status.DONE).any())
        recipe = dataclasses.replace(stored_recipe(self.new.attributes, ""), thumbnail=not pool_all_tiles)
        rules = EncodeRules(recipe, is_begun, strict)
        sink = ShardSink(writer, SkipLog(self.output.skipped_path), table.keys)
        job = EncodeJob(table.keys, [self.jobs[row] for row in rows], sink, rules)
        decoder = Decoder(DecodeOptions(RULE, 7, 1, 30, 4 << 30))
        with contextlib.closing(decoder), contextlib.closing(writer):
            return EncodeLoop(job, decoder, encoder, stop or Stop(), on_progress).run()  # type: ignore[arg-type]

    @property
    def status(self) -> list[int]:
        """On the disk."""
        return self.output.partial().stored.table.status.tolist()

    def publish(self) -> helpers.PlainShard:
        helpers.publish(self.output, self.new)
        return helpers.read_plainly(self.output.final_path(0))
