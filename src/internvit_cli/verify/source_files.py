"""Check whether the pictures of rows are still the same files."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.config import Skipped
from internvit_cli.plan.table import modified_ns
from internvit_cli.sources.files import open_or_skip

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from internvit_cli.verify.result import StoredRow

HASH_BLOCK = 1 << 20
PICTURES_AHEAD = 8
"""Queued pictures per thread."""


class PictureState(Enum):
    """The state of a picture compared with the digest of its row."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    """The size differs, or the time and the bytes differ."""
    MISSING = "missing"
    """The file is gone, or cannot be read."""
    CONTRADICTS = "contradicts"
    """Size and time are unchanged, but the digest differs: the digest or the picture was damaged."""


class CheckedPicture(NamedTuple):
    """The state of a picture, and the bytes read."""

    state: PictureState
    nbytes: int
    """Read."""


def check_pictures(rows: Sequence[StoredRow], threads: int) -> Iterator[tuple[StoredRow, CheckedPicture]]:
    """Check the pictures of some rows in parallel, and yield them in order; those of another size are not read."""
    waiting: deque[tuple[StoredRow, Future[CheckedPicture]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="pictures") as pool:
        for row in rows:
            if len(waiting) == threads * PICTURES_AHEAD:
                first, picture = waiting.popleft()
                yield first, picture.result()
            waiting.append((row, pool.submit(check_picture, row)))
        for last, picture in waiting:
            yield last, picture.result()


def check_picture(row: StoredRow) -> CheckedPicture:
    """Compare the digest of a row with its picture."""
    opened = open_or_skip(row.picture)
    if isinstance(opened, Skipped):
        return CheckedPicture(PictureState.MISSING, 0)
    with os.fdopen(opened.descriptor, "rb", buffering=0):
        file = opened.stream()
        if opened.status.st_size != int(row.shard.table.file_size[row.number]):
            return CheckedPicture(PictureState.CHANGED, 0)
        hasher, nbytes = hashlib.sha256(), 0
        try:
            while block := file.read(HASH_BLOCK):
                hasher.update(block)
                nbytes += len(block)
        except OSError:
            return CheckedPicture(PictureState.MISSING, nbytes)
    if hasher.digest() == row.digest:
        return CheckedPicture(PictureState.UNCHANGED, nbytes)
    is_untouched = modified_ns(opened.status) == int(row.shard.table.file_mtime_ns[row.number])
    return CheckedPicture(PictureState.CONTRADICTS if is_untouched else PictureState.CHANGED, nbytes)
