"""Write messages to stderr and results to stdout."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TextIO

from internvit_cli import errors
from internvit_cli.errors import InternvitError

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")

_make_way: Callable[[], AbstractContextManager[None]] = nullcontext
"""Clears the progress line at the bottom of the terminal while another line is written above it."""
_lost: OSError | None = None
"""Why a result could not be written to standard output, although its reader still exists."""


def fail(error: InternvitError, *, as_json: bool = False) -> int:
    """Print an error with its hint, and return its exit code."""
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    if as_json:
        print_json({"exit_code": int(error.exit_code), "error": error.message, "hint": error.hint})
    return int(error.exit_code)


def say(line: str) -> None:
    """Print a message for people to stderr."""
    _write(sys.stderr, printable_line(line))


def print_line(line: str = "") -> None:
    """Print one line of a result to stdout."""
    _write(sys.stdout, printable_line(line))


def print_json(value: dict[str, Any]) -> None:
    """Print a JSON object on one line to stdout, in ASCII."""
    _write(sys.stdout, json.dumps(value, ensure_ascii=True))


def print_text(text: str) -> None:
    """Print lines that already have their layout to stdout."""
    _write(sys.stdout, text.rstrip("\n"))


def write_raw(text: str) -> None:
    """Write text of our own, including escape sequences, to stdout without a newline."""
    _write(sys.stdout, text, end="")


def write_names(text: str) -> bool:
    """Write text with file names as their bytes to stdout; return whether anybody still reads it."""
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # a stream that takes only text
        return _write(sys.stdout, text, end="")
    with _make_way():
        return _attempt(sys.stdout, lambda: (buffer.write(os.fsencode(text)), buffer.flush()))


def write_progress(text: str) -> None:
    """Write the text of the progress line to stderr."""
    stream = sys.stderr
    _attempt(stream, lambda: (stream.write(text), stream.flush()))


def take_lost_output() -> InternvitError | None:
    """Return the error of results that could not be written since the last call; None if all were written."""
    global _lost
    lost, _lost = _lost, None
    if lost is None:
        return None
    return InternvitError(
        f"cannot write to standard output: {lost.strerror}",
        "everything else is done; run the command again to get the result",
    )


def make_way_with(make_way: Callable[[], AbstractContextManager[None]]) -> None:
    """Write every line inside the given context, which clears the progress line; `nullcontext` ends that."""
    global _make_way  # noqa: PLW0603 - there is one terminal
    _make_way = make_way


def _write(stream: TextIO, line: str, end: str = "\n") -> bool:
    """Write a line above the progress line; return whether anybody still reads it."""
    with _make_way():
        return _attempt(stream, lambda: (stream.write(line + end), stream.flush()))


def _attempt(stream: TextIO, write: Callable[[], object]) -> bool:
    """Try to write; after a failure everything that follows is dropped too, and the work goes on."""
    global _lost  # noqa: PLW0603
    try:
        write()
    except OSError as error:
        if stream is sys.stdout and not _is_nobody_reading(stream, error):
            _lost = error
        _drop(stream)
        return False
    return True


def _is_nobody_reading(stream: TextIO, error: OSError) -> bool:
    """Return whether the pipe has no reader or the terminal is gone; a full disk is another matter."""
    if error.errno == errno.EIO:
        return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return error.errno == errno.EPIPE


def _drop(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def is_terminal(stream: TextIO) -> bool:
    """Return whether the stream is a terminal on which a line can be redrawn."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def open_missing_streams() -> None:
    """Open standard streams that the caller closed, so that no data file gets the descriptor of a stream.

    Characters that the encoding of a stream lacks are written as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable_line(text: str) -> str:
    """Escape control characters, so that the name of a file cannot control the terminal."""
    return errors.one_line(text, limit=None)


def human_bytes(count: float) -> str:
    """Return a number of bytes in decimal units, such as `1.5 GB`."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """Return a duration in words, such as `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
