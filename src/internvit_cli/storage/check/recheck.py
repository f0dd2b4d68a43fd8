"""Check what an earlier run left unfinished for contradictory records and damaged rows.

Every committed row is read again during the encoding, at the speed of the disk, before its file gets its final name.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from internvit_cli.config import Status
from internvit_cli.storage.check.checksums import CommittedRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

    from internvit_cli.plan.table import ImageTable
    from internvit_cli.storage.skipped import SkipLog
    from internvit_cli.storage.write.commit import ShardWriter

CHECK_THREADS = 1
"""The other CPUs are for the encoder and the decode workers."""
POLL_SECONDS = 0.2


def contradictory_rows(table: ImageTable, writer: ShardWriter, skip_log: SkipLog) -> list[int]:
    """Return rows whose status cannot be what was committed, so that their images must be encoded again.

    A done image has a digest; a skipped one has none and is listed with its reason. An image whose header could not be
    read keeps its status, because there is nothing to decode.

    Args:
        table: The shard's index.
        writer: The writer of the shard, just opened.
        skip_log: The list of skipped images.
    """
    status, has_digest = writer.status, writer.digest.any(axis=1)
    suspects = (status == Status.DONE) & ~has_digest
    skipped = (status > Status.DONE) & (table.width > 0)
    suspects |= skipped & has_digest
    unexplained = [row for row in np.flatnonzero(skipped & ~has_digest).tolist() if table.keys[row] not in skip_log]
    return sorted([*np.flatnonzero(suspects).tolist(), *unexplained])


class Recheck:
    """Compares committed rows with their CRCs in its own thread. Use it as a context manager, which ends the thread."""

    def __init__(self, table: ImageTable, writer: ShardWriter) -> None:
        """Prepare to read what is committed so far; nothing is read before the context is entered."""
        self._rows = CommittedRows(writer.extents, table.with_status(writer.status.copy()), writer.checksums.copy())
        self._damaged: list[int] = []
        self._failure: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="recheck", daemon=True)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self._rows.nbytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled = True
        self._thread.join()

    def damaged_rows(self, stopped: Callable[[], bool]) -> list[int]:
        """Wait for the end; return rows that differ from what was committed or are unreadable, none if `stopped`."""
        while self._thread.is_alive() and not stopped():
            self._thread.join(POLL_SECONDS)
        if self._failure is not None:
            raise self._failure
        return [] if self._thread.is_alive() else self._damaged

    def _run(self) -> None:
        try:
            for checked in self._rows.check(CHECK_THREADS):
                self._damaged += [problem.row for problem in checked.problems]
                if self._cancelled:
                    return
        except BaseException as error:  # noqa: BLE001 - raised again in `damaged_rows`
            self._failure = error
