"""Handle signals while a command runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from internvit_cli.errors import ExitCode
from internvit_cli.runtime.signals import StopRequest

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def exit_code_of(number: int) -> int:
    """Return the exit code of a command that a signal ended."""
    return 128 + number


def end_on_interrupt() -> None:
    """Make Ctrl-C end the process at once and without a traceback, for phases without work to save."""
    signal.signal(signal.SIGINT, _end)


def _end(_number: int, _frame: Any) -> None:
    if os.isatty(2):
        with suppress(OSError):
            os.write(2, b"\n")  # so that the prompt does not follow a half-drawn line
    os._exit(ExitCode.SIGINT)


@contextmanager
def compiled_code_may_take_long() -> Iterator[None]:
    """Make Ctrl-C end the process inside compiled code too, where a Python handler would have to wait."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ignore_signals_at_end() -> None:
    """Ignore signals once the result is complete, because the interpreter takes some time to exit."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Make the first signal end the work after the batch in flight, and the second end it at once.

    A SIGHUP never ends the work at once: when a terminal closes, the kernel and the shell both send it, and a service
    manager sends it after SIGTERM, so a second one does not mean that somebody is impatient. Under nohup it is ignored
    from the start, and stays ignored.
    """
    stop = StopRequest()
    handler = _StopHandler(stop)
    numbers = [one for one in STOP_SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield stop
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


class _StopHandler:
    """Signal handler that requests a stop."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._is_last_warning = False
        """Whether the next signal other than SIGHUP ends the process."""

    def __call__(self, number: int, _frame: Any) -> None:
        if number != signal.SIGHUP:
            if self._is_last_warning:
                os._exit(exit_code_of(number))
            self._is_last_warning = True
        if self._stop.signal:
            return
        if self._stop.is_working:
            # A signal handler must not call print(), which may be what was interrupted. The reader of stderr may have
            # received the same signal: Ctrl-C also ends the tee of `2>&1 | tee log`.
            with suppress(OSError):
                os.write(2, b"\nstopping after the batch in flight; a second signal stops at once\n")
        self._stop.request(number)
