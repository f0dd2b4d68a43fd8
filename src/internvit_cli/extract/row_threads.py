"""Write the rows of several images in parallel; images share no bytes."""

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
"""One thread copies about 2 GB/s into the page cache; four keep up with any card."""
WAITING_PER_THREAD = 2
SMALL_BYTES = 1 << 17
"""An image up to this size is written in less time than it takes to hand it over."""


class RowThreads:
    """Writes images in threads and yields those that are written. One thread calls it; close it before the files."""

    def __init__(self, write: Callable[[ImageRows], WrittenImage]) -> None:
        """Start without threads; `write` is called in several threads at a time, each for another image."""
        self._write = write
        self._threads = max(1, min(MOST_THREADS, usable_cpus()))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="rows")
        self._written: deque[Future[tuple[WrittenImage, float]]] = deque()
        self._busy_seconds = 0.0
        self.waited_seconds = 0.0
        """Seconds that the caller waited because all threads were busy."""

    @property
    def busy_seconds(self) -> float:
        """Seconds that the threads wrote, divided by their number."""
        return self._busy_seconds / self._threads

    def put(self, image: ImageRows) -> None:
        """Write an image, usually in a thread.

        Raises:
            OutputError: The disk failed.
        """
        if image.nbytes > SMALL_BYTES:
            self._written.append(self._pool.submit(self._timed, image))
        else:
            done: Future[tuple[WrittenImage, float]] = Future()
            done.set_result(self._timed(image))
            self._written.append(done)

    def written(self, *, is_end: bool = False) -> Iterator[WrittenImage]:
        """Yield images that were written since the last call, in the order of `put`.

        Args:
            is_end: Whether to wait for all of them; otherwise this waits only while the threads have a long queue.

        Raises:
            OutputError: The disk failed.
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
        """Wait until no thread is writing; images that were not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def _timed(self, image: ImageRows) -> tuple[WrittenImage, float]:
        started = time.perf_counter()
        return self._write(image), time.perf_counter() - started
