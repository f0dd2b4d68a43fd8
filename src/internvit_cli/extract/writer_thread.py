"""Write finished images and make checkpoints in a thread while other images are encoded."""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from internvit_cli.extract.row_threads import RowThreads
from internvit_cli.storage.write.commit import ImageRows, WrittenImage

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from internvit_cli.config import Skipped
    from internvit_cli.storage.skipped import SkipLog
    from internvit_cli.storage.write.commit import ShardWriter

CHECKPOINT_SECONDS = 2.0
CHECKPOINT_BYTES = 256_000_000
MOST_WAITING = 16
"""Maximum finished images that wait for the disk."""


class SkippedImage(NamedTuple):
    """An image that could not be used."""

    row: int
    skipped: Skipped


FinishedImage = ImageRows | WrittenImage | SkippedImage


class _Mark(Enum):
    """Markers from a sink's queue in place of images."""

    NOTHING = "no image for a while"
    END = "no image any more"


class Sink(ABC):
    """Takes finished images in its own thread. After a failure, it drops all further images."""

    def __init__(self, write: Callable[[ImageRows], WrittenImage]) -> None:
        """Start the thread; `write` stores the rows of one image, in several threads at a time."""
        self._rows = RowThreads(write)
        self._queue: queue.Queue[FinishedImage | _Mark] = queue.Queue(MOST_WAITING)
        self._failure: BaseException | None = None
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="sink")
        self._thread.start()

    @property
    def busy_seconds(self) -> float:
        """Seconds of this thread and of the threads that write, which are divided by their number."""
        return self._busy_seconds - self._rows.waited_seconds + self._rows.busy_seconds

    def put(self, image: FinishedImage) -> None:
        """Hand over a finished image, after waiting while too many images wait for the disk.

        Raises:
            InternvitError: An earlier image could not be written.
        """
        if self._failure is not None:
            raise self._failure
        self._queue.put(image)

    def close(self) -> None:
        """Finish all images and end; no thread writes rows after this. A second call does nothing.

        Raises:
            InternvitError: The disk failed.
        """
        if not self._thread.is_alive():
            return
        self._queue.put(_Mark.END)
        self._thread.join()
        self._rows.close()
        if self._failure is not None:
            raise self._failure

    @abstractmethod
    def take(self, image: WrittenImage | SkippedImage) -> None:
        """Record an image whose rows are written, or that has none."""

    @abstractmethod
    def on_idle(self, *, is_end: bool) -> None:
        """Do what is due; called after each image, in idle moments, and at the end."""

    def _run(self) -> None:
        is_end = False
        while not is_end:
            image = self._next()
            is_end = image is _Mark.END
            if self._failure is not None:
                continue
            started = time.perf_counter()
            try:
                if isinstance(image, ImageRows):
                    self._rows.put(image)
                elif not isinstance(image, _Mark):
                    self.take(image)
                for written in self._rows.written(is_end=is_end):
                    self.take(written)
                self.on_idle(is_end=is_end)
            except BaseException as error:  # noqa: BLE001 - raised again in `put` or `close`
                self._failure = error
            self._busy_seconds += time.perf_counter() - started

    def _next(self) -> FinishedImage | _Mark:
        try:
            return self._queue.get(timeout=CHECKPOINT_SECONDS)
        except queue.Empty:
            return _Mark.NOTHING


class ShardSink(Sink):
    """Writes the rows of one shard, or records those that other processes wrote, and commits them periodically.

    Several threads write rows. A commit waits for the disk in its own thread, and covers only rows whose writes have
    returned.
    """

    def __init__(self, writer: ShardWriter, skip_log: SkipLog, keys: Any) -> None:
        self._writer = writer
        self._skip_log = skip_log
        self._keys = keys
        self._skips: list[SkippedImage] = []
        self._first_skip = 0.0
        self._commits = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commit: Future[None] | None = None
        super().__init__(writer.write_rows)

    def take(self, image: WrittenImage | SkippedImage) -> None:
        """Record an image, which is done after the next checkpoint."""
        if isinstance(image, WrittenImage):
            self._writer.record(image)
            return
        self._first_skip = self._first_skip if self._skips else time.monotonic()
        self._skips.append(image)

    def on_idle(self, *, is_end: bool) -> None:
        """Make a checkpoint if one is due and the last one has finished."""
        if self._commit is not None and (is_end or self._commit.done()):
            commit, self._commit = self._commit, None
            commit.result()
        if is_end:
            self._commits.shutdown()
            self.commit(*self._taken())
        elif self._is_due and self._commit is None:
            self._commit = self._commits.submit(self.commit, *self._taken())

    def close(self) -> None:
        """Finish all images and end; no thread writes to the shard after this, even if something failed.

        After a failure, a commit that has begun is completed: its rows are written, and nothing of it may be lost.

        Raises:
            InternvitError: The disk failed.
        """
        try:
            super().close()
        finally:
            self._commits.shutdown()

    @property
    def _is_due(self) -> bool:
        waiting = time.monotonic() - self._first_skip if self._skips else 0.0
        seconds = max(self._writer.uncommitted_seconds, waiting)
        return seconds >= CHECKPOINT_SECONDS or self._writer.uncommitted_bytes >= CHECKPOINT_BYTES

    def _taken(self) -> tuple[list[SkippedImage], NDArray[Any]]:
        """Return the skipped images and the rows of the next commit; the rows include those of skipped images."""
        skips, self._skips = self._skips, []
        for image in skips:
            self._writer.skip(image.row, image.skipped)
        return skips, self._writer.take_uncommitted()

    def commit(self, skips: list[SkippedImage], rows: NDArray[Any]) -> None:
        """Commit rows, after the reasons of skipped images, so that every skipped status has its line."""
        self._skip_log.append((self._keys[image.row], image.skipped) for image in skips)
        self._writer.commit(rows)
