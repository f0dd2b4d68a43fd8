"""What the workers of test_workers.py run."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

FOR_EVER = 3600
"""Seconds: longer than any test, and short enough that nothing stays for good when one fails."""


def _touch(path: str) -> None:
    open(path, "w").close()


def double() -> Any:
    return lambda number: number * 2


def obey() -> Any:
    """Tasks that say what to do: (what, argument)."""

    def handle(task: tuple[str, Any]) -> Any:
        what, argument = task
        match what:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "die once":  # a file that is there tells that it happened before
                if not os.path.exists(argument):
                    _touch(argument)
                    os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(argument)
            case "raise":
                raise ValueError(argument)
            case "sleep":
                time.sleep(argument)
            case "hang":  # a file tells that it has begun
                _touch(argument)
                time.sleep(FOR_EVER)
            case "hold":  # from one file to the next: what to make when it begins, and what to wait for
                begun, end = argument
                _touch(begun)
                while not os.path.exists(end):
                    time.sleep(0.005)
            case "allocate":
                try:
                    return len(bytearray(argument))
                except MemoryError:
                    return "MemoryError"
            case "pid":
                return os.getpid()
            case "cwd":
                return os.getcwd()
        return argument

    return handle


def broken() -> Any:
    raise ZeroDivisionError("no such luck")


def dies_at_start() -> Any:
    os._exit(3)


def dies_at_first_start(marker: str) -> Any:
    """Killed while it starts, once; like a machine that is short of memory for a moment."""
    if not os.path.exists(marker):
        _touch(marker)
        os.kill(os.getpid(), signal.SIGKILL)
    return obey()


def writes_to(descriptor: int) -> Any:
    return lambda text: os.write(descriptor, text)


def slow_copy(seconds: float, rule: Any, shape: Any, descriptor: int) -> Any:
    """The real decoder, after a pause in which it can be killed."""
    from internvit_cli.decode.decoder import tile_decoder

    decode = tile_decoder(rule, shape, descriptor)

    def handle(task: Any) -> Any:
        time.sleep(seconds)
        return decode(task)

    return handle


def deadly(name: bytes, rule: Any, shape: Any, descriptor: int) -> Any:
    """The real decoder, but for one picture that crashes it, as a bug in a C library does."""
    from internvit_cli.decode.decoder import tile_decoder

    decode = tile_decoder(rule, shape, descriptor)

    def handle(task: Any) -> Any:
        if task[0].endswith(name):
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(task)

    return handle


def endless(name: bytes, marker: str, rule: Any, shape: Any, descriptor: int) -> Any:
    """The real decoder, but for one picture that it never finishes; a file tells that it has begun."""
    from internvit_cli.decode.decoder import tile_decoder

    decode = tile_decoder(rule, shape, descriptor)

    def handle(task: Any) -> Any:
        if task[0].endswith(name):
            _touch(marker)
            time.sleep(FOR_EVER)
        return decode(task)

    return handle


def deadly_header(name: bytes, rule: Any) -> Any:
    """The real header reader, but for one file that crashes it."""
    from internvit_cli.plan.headers import header_reader

    read = header_reader(rule)

    def handle(paths: list[bytes]) -> Any:
        if any(path.endswith(name) for path in paths):
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(paths)

    return handle
