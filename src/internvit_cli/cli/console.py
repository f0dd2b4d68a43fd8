"""Lines for people and programs: messages on stderr, results on stdout."""

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
"""What clears the line that is drawn at the bottom of a terminal while a line is written above it."""
_lost: OSError | None = None
"""Why a result did not reach standard output though somebody waits for it."""


def fail(error: InternvitError, *, as_json: bool = False) -> int:
    """Print an error and what to do about it; returns its exit code."""
    say(f"error: {error.message}")
    if error.hint:
        say(f"hint: {error.hint}")
    if as_json:
        print_json({"exit_code": int(error.exit_code), "error": error.message, "hint": error.hint})
    return int(error.exit_code)


def say(line: str) -> None:
    """One line for a person, on stderr."""
    _write(sys.stderr, one_line(line))


def print_line(line: str = "") -> None:
    """One line of a result, on stdout."""
    _write(sys.stdout, one_line(line))


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line, ASCII only, on stdout."""
    _write(sys.stdout, json.dumps(value, ensure_ascii=True))


def print_text(text: str) -> None:
    """Lines that are laid out already, on stdout."""
    _write(sys.stdout, text.rstrip("\n"))


def write_raw(text: str) -> None:
    """Text of our own making, escapes and all, on stdout."""
    _write(sys.stdout, text, end="")


def write_names(text: str) -> bool:
    """Text with names of files, on stdout as the bytes that they are; returns whether anybody still reads."""
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # a stream of text alone
        return _write(sys.stdout, text, end="")
    with _make_way():
        return _attempt(sys.stdout, lambda: (buffer.write(os.fsencode(text)), buffer.flush()))


def write_progress(text: str) -> None:
    """Text that is the line which makes way for others, on stderr."""
    stream = sys.stderr
    _attempt(stream, lambda: (stream.write(text), stream.flush()))


def take_lost_output() -> InternvitError | None:
    """Return the error of results that could not be written since the last call; None when all reached its reader."""
    global _lost
    lost, _lost = _lost, None
    if lost is None:
        return None
    return InternvitError(
        f"cannot write to standard output: {lost.strerror}", "all else is done: run the command again for it"
    )


def make_way_with(make_way: Callable[[], AbstractContextManager[None]]) -> None:
    """Have every line be written inside such a block; `nullcontext` when nothing is in the way any more."""
    global _make_way  # noqa: PLW0603 - there is one terminal
    _make_way = make_way


def _write(stream: TextIO, line: str, end: str = "\n") -> bool:
    """Write a line above the one that is drawn; returns whether anybody still reads."""
    with _make_way():
        return _attempt(stream, lambda: (stream.write(line + end), stream.flush()))


def _attempt(stream: TextIO, write: Callable[[], object]) -> bool:
    """Write; what cannot be written is dropped, like all that follows, and the work goes on."""
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
    """Whether the reader of a pipe has ended, or the terminal is gone; an I/O error of a file is neither."""
    if error.errno == errno.EIO:
        return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return error.errno == errno.EPIPE


def _drop(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def is_terminal(stream: TextIO) -> bool:
    """Whether lines can be drawn over each other there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def open_missing_streams() -> None:
    """Open what the caller closed: a data file must not get the descriptor of a stream that something prints to.

    What a stream's encoding lacks is written as escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(text: str) -> str:
    """The text with control characters written out, so that a file's name cannot steer a terminal."""
    return errors.one_line(text, limit=None)


def human_bytes(count: float) -> str:
    """A byte count in decimal units, such as `1.5 GB`."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """A duration, such as `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
