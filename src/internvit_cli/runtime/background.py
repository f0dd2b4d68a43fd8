"""Run one piece of work in a thread beside the rest of a command, and take its result where it is needed."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class CancelledError(Exception):
    """Raised by work that was asked to end before it was complete."""


class Background(Generic[T]):
    """Work that runs in a thread of its own from the moment at which this is created.

    Whoever creates one has to call `cancel` in the end, whatever happens, so that the thread does not outlive the run.
    What the work raises is raised by `result`, so errors appear where the result is needed, however fast the work is.

    >>> answer = Background(lambda is_cancelled: 6 * 7, "answer")
    >>> answer.result()
    42
    >>> answer.cancel()
    """

    def __init__(self, work: Callable[[Callable[[], bool]], T], name: str) -> None:
        """Start the work.

        Args:
            work: Called with a function that says whether it is to end; then it raises a CancelledError soon.
            name: The name of the thread.
        """
        self._is_cancelled = threading.Event()
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """Return the result of the work, after waiting for it, or raise what it raised."""
        return self._future.result()

    def cancel(self) -> None:
        """End the work, and wait until its thread has ended; a result that is there already is kept."""
        self._is_cancelled.set()
        self._thread.join()

    def _run(self, work: Callable[[Callable[[], bool]], T]) -> None:
        try:
            self._future.set_result(work(self._is_cancelled.is_set))
        except BaseException as error:  # noqa: BLE001 - raised again in `result`
            self._future.set_exception(error)
