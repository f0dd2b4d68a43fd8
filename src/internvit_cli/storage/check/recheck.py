"""What an earlier run left unfinished is not taken on trust: records that contradict each other, rows that decayed.

Every committed row is read again beside the encoding, at the speed of the disk, before its file gets a final name.
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
"""The encoder and the decode workers need the others."""
POLL_SECONDS = 0.2


def contradictory_rows(table: ImageTable, writer: ShardWriter, skip_log: SkipLog) -> list[int]:
    """Rows whose status cannot be what was committed, so that their images have to be done again.

    A done image has a digest, a skipped one has none, and is listed with its reason. An image whose header could not be
    read keeps its status: there is nothing to decode.

    Args:
        table: the shard's index.
        writer: the shard, just opened.
        skip_log: the list of skipped images.
    """
    status, has_digest = writer.status, writer.digest.any(axis=1)
    suspects = (status == Status.DONE) & ~has_digest
    skipped = (status > Status.DONE) & (table.width > 0)
    suspects |= skipped & has_digest
    unexplained = [row for row in np.flatnonzero(skipped & ~has_digest).tolist() if table.keys[row] not in skip_log]
    return sorted([*np.flatnonzero(suspects).tolist(), *unexplained])


class Recheck:
    """Compares committed rows with their CRCs in a thread of its own. Use it as a context, which ends the thread."""

    def __init__(self, table: ImageTable, writer: ShardWriter) -> None:
        """Prepare to read what is committed by now; nothing is read before `start`."""
        self._rows = CommittedRows(writer.extents, table.with_status(writer.status.copy()), writer.checksums.copy())
        self._damaged: list[int] = []
        self._failure: BaseException | None = None
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name="recheck", daemon=True)

    @property
    def nbytes(self) -> int:
        """Bytes there are to read."""
        return self._rows.nbytes

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled = True
        self._thread.join()

    def damaged_rows(self, stopped: Callable[[], bool]) -> list[int]:
        """Wait for the end; rows that are not what was committed, or cannot be read. None of them after `stopped`."""
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
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
            self._failure = error
