"""Copy rows from a finished shard into the shard that replaces it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.config import Status
from internvit_cli.storage.format.layout import feature_name
from internvit_cli.storage.read.reader import OpenShard
from internvit_cli.storage.write.commit import ImageRows, ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.output import FinishedShard

CHECKPOINT_BYTES = 256_000_000


def reuse_rows(
    old: FinishedShard,
    table: ImageTable,
    writer: ShardWriter,
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> int:
    """Copy the rows of images that are pending in `table` and done in `old` from the same file.

    Each row's CRC is checked; a damaged row stays pending and is encoded again. When `stopped` returns true, the copied
    rows are committed and no more are copied.

    Args:
        old: The shard to copy from.
        table: The table of the shard to fill.
        writer: The writer of the shard to fill.
        stopped: Called before each image.
        on_progress: Called with the number of pending images checked so far and in total.

    Returns:
        The number of images copied.
    """
    source = OpenShard(old)
    rows = {key: row for row, key in enumerate(source.table.keys) if source.table.status[row] == Status.DONE}
    digests, checksums = old.backend.commit_records(old.path)
    copied = 0
    pending = np.flatnonzero(writer.status == Status.PENDING).tolist()
    for number, row in enumerate(pending):
        on_progress(number, len(pending))
        if stopped():
            break
        before = rows.get(table.keys[row])
        if before is None or not _is_same_file(table, row, source.table, before):
            continue
        image = _read_image(source, before, row, digests[before].tobytes())
        if image.checksum != int(checksums[before]):
            continue
        writer.write(image)
        copied += 1
        if writer.uncommitted_bytes >= CHECKPOINT_BYTES:
            writer.checkpoint()
    writer.checkpoint()
    return copied


def _is_same_file(table: ImageTable, row: int, old: ImageTable, before: int) -> bool:
    return all(
        getattr(table, name)[row] == getattr(old, name)[before]
        for name in ("file_size", "file_mtime_ns", "columns", "rows")
    )


def _read_image(source: OpenShard, before: int, row: int, digest: bytes) -> ImageRows:
    tiles = slice(*(int(offset) for offset in source.table.tile_offset[before : before + 2]))
    places = {name: tiles if feature_name(name).is_per_tile else slice(before, before + 1) for name in source.stored}
    return ImageRows(
        row, digest, {name: [source.rows(name, place.start, place.stop)] for name, place in places.items()}
    )
