"""Rows of several images on their way to the disk at the same time: no two images share a byte."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from internvit_cli.runtime.workers import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from internvit_cli.storage.write.commit import ImageRows, WrittenImage

MOST_THREADS = 4
"""One thread copies about 2 GB/s into the page cache; a card gives no more than four of them take."""
WAITING_PER_THREAD = 2
SMALL_BYTES = 1 << 17
"""An image that is no larger is written in less time than it takes to hand it over."""


class RowThreads:
    """Writes images in threads and says which are written. One thread calls it; close it before the files."""

    def __init__(self, write: Callable[[ImageRows], WrittenImage]) -> None:
        """Start with no thread; `write` is called in several at a time, each time for another image."""
        self._write = write
        self._threads = max(1, min(MOST_THREADS, usable_cpus()))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="rows")
        self._written: deque[Future[tuple[WrittenImage, float]]] = deque()
        self._busy_seconds = 0.0
        self.waited_seconds = 0.0
        """Time that the caller waited because all threads had enough to do."""

    @property
    def busy_seconds(self) -> float:
        """Time that the threads wrote, divided by their number."""
        return self._busy_seconds / self._threads

    def put(self, image: ImageRows) -> None:
        """Have an image written.

        Raises:
            OutputError: the disk failed.
        """
        if image.nbytes > SMALL_BYTES:
            self._written.append(self._pool.submit(self._timed, image))
        else:
            done: Future[tuple[WrittenImage, float]] = Future()
            done.set_result(self._timed(image))
            self._written.append(done)

    def written(self, *, is_end: bool = False) -> Iterator[WrittenImage]:
        """Yield images that are written and were not yielded before, in the order in which they were put.

        Args:
            is_end: wait for all of them; otherwise only while more wait than the threads soon come to.

        Raises:
            OutputError: the disk failed.
        """
        while self._written:
            is_full = len(self._written) > WAITING_PER_THREAD * self._threads
            if not (is_end or is_full or self._written[0].done()):
                return
            started = time.perf_counter()
            image, seconds = self._written.popleft().result()
            self.waited_seconds += time.perf_counter() - started
            self._busy_seconds += seconds
            yield image

    def close(self) -> None:
        """Wait until no thread writes any more; what was not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _timed(self, image: ImageRows) -> tuple[WrittenImage, float]:
        started = time.perf_counter()
        return self._write(image), time.perf_counter() - started
