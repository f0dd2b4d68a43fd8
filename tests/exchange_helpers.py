"""Outputs of random rows to export, merge and compare, and what any reader makes of them."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import storage_helpers as helpers
from forking import PATIENCE
from run_helpers import Result, internvit

from internvit_cli.config import Format, Skipped, Status, StoreDtype, Tokens
from internvit_cli.storage.output import Output
from internvit_cli.storage.skipped import SkipLog
from internvit_cli.storage.write.commit import ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from internvit_cli.storage.format.layout import NewShard

GRIDS = [(1, 1, 0), (2, 3, 1), (1, 1, 0), (3, 1, 1), (1, 2, 1), (1, 1, 0)]
TRUNCATED = Skipped(Status.TRUNCATED, "OSError", "image file is truncated")
NOT_AN_IMAGE = Skipped(Status.NOT_AN_IMAGE, "PIL.UnidentifiedImageError", "in no supported picture format")
RUN = {"device": "cpu", "ended": "2026-01-01", "images": 4}


def mixed_shard(keys: tuple[bytes, ...] = helpers.AWKWARD_KEYS, **options: Any) -> NewShard:
    """Six awkwardly named images, one of which has no readable header."""
    return helpers.make_shard(helpers.make_table(GRIDS, keys, {2: Status.NOT_AN_IMAGE}), **options)


def make(
    path: Path, shard: NewShard | None = None, shard_format: Format | None = None, seed: int = 0
) -> dict[int, Any]:
    """A finished output with a skipped image, its list, and a log; returns the rows that were written."""
    shard = shard or mixed_shard()
    output = Output(str(path), shard_format)
    output.prepare()
    written = helpers.fill_partial(output, shard, {4: TRUNCATED}, seed)
    log = SkipLog(output.skipped_path)
    log.append([(shard.table.keys[2], NOT_AN_IMAGE), (shard.table.keys[4], TRUNCATED)])
    writer = ShardWriter(output.backend, output.partial_path(0), shard.table)
    writer.append_run_log(RUN)
    writer.close()
    helpers.publish(output, shard)
    return written


def make_partial(path: Path, shard: NewShard, rows: list[int]) -> None:
    """An unfinished output of which some rows are committed."""
    output = Output(str(path))
    output.prepare()
    partial = output.partial_path(0)
    from internvit_cli.storage.write.commit import create_shard

    create_shard(output.backend, partial, shard)
    writer = ShardWriter(output.backend, partial, shard.table)
    for row in rows:
        writer.write(helpers.random_image(shard, row))
    writer.checkpoint()
    writer.close()


def plain(path: Path, number: int = 0) -> helpers.PlainShard:
    """A shard as h5py, or numpy and json, see it."""
    return helpers.read_plainly(Output(str(path)).final_path(number))


def least_shard_size(*arguments: object) -> str:
    """The least that `--shard-size` may be, as the command itself says; a shard of that size holds one image."""
    hint = fails(2, *arguments, "--shard-size", "1").partition("give ")[2]
    return hint.partition(" ")[0].replace(",", "")


def ok(*arguments: object) -> Result:
    """Run a command that has to succeed."""
    result = internvit(*arguments)
    assert result.returncode == 0, result.stderr
    return result


def fails(code: int, *arguments: object) -> str:
    """Run a command that has to end with a code; returns what it says. There always is a way out."""
    result = internvit(*arguments)
    assert result.returncode == code, result.stderr
    assert "hint: " in result.stderr
    return result.stderr


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program that has the helpers at hand."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def wide(images: int) -> NewShard:
    """A shard whose images have about 1.8 MB each."""
    helpers.TOKENS_PER_TILE, helpers.CHANNELS = 256, 512
    return helpers.make_shard(helpers.make_table([(3, 2, 1)] * images), tile_size=448)


ALL_ROWS = [
    {"tokens": tokens, "store_dtype": dtype, "tile_pooled": tile_pooled}
    for tokens, dtype, tile_pooled in [
        *((tokens, StoreDtype.FLOAT16, True) for tokens in Tokens),
        *((Tokens.VISUAL, dtype, False) for dtype in StoreDtype),
    ]
]
ALL_ROWS.append(ALL_ROWS[-1] | {"tile_pooled": True, "earlier_layers": helpers.EARLIER_LAYERS})
"""What a shard may hold."""


def image_of(shard: NewShard, written: dict[int, Any], row: int) -> dict[str, np.ndarray]:
    """The rows of an image by dataset."""
    rows = helpers.rows_of(written[row])
    return {name: array[0] if name.startswith("pooled") else array for name, array in rows.items()}
