"""Lines for people and programs: messages on stderr, results on stdout."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from internvit_cli import errors
from internvit_cli.errors import InternvitError
from internvit_cli.observer import Observer, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Self

PLAIN_SECONDS = 30.0
"""Between two lines of progress where there is no terminal."""
NOBODY_READS = (errno.EPIPE, errno.EIO)
"""The reader of a pipe has ended; the terminal is gone."""
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


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
    return _attempt(sys.stdout, lambda: (buffer.write(os.fsencode(text)), buffer.flush()))


def _write(stream: TextIO, line: str, end: str = "\n") -> bool:
    """Write a line; returns whether anybody still reads."""
    return _attempt(stream, lambda: (stream.write(line + end), stream.flush()))


def _attempt(stream: TextIO, write: Callable[[], object]) -> bool:
    """Write; what cannot be written is dropped, like all that follows, and the work goes on.

    Raises:
        InternvitError: a result is lost though somebody waits for it, such as on a full disk.
    """
    try:
        write()
    except OSError as error:
        _drop(stream)
        if stream is sys.stdout and error.errno not in NOBODY_READS:
            raise InternvitError(
                f"cannot write to standard output: {error.strerror}", "all else is done: run the command again for it"
            ) from error
        return False
    return True


def _drop(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def knows_its_size(stream: TextIO) -> bool:
    """Whether a terminal tells its size: one that says 0 makes tqdm draw nothing, and one that is gone says nothing."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


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


def observer(*, quiet: bool) -> Observer:
    """A bar on a terminal, a line now and then elsewhere, nothing when quiet."""
    if quiet:
        return Observer()
    return BarObserver() if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else PlainObserver()


class PlainObserver(Observer):
    """A line every 30 seconds, as logs and cron mails want it."""

    def __init__(self) -> None:
        self._images = self._tiles = 0
        self._started = self._printed = time.monotonic()

    def note(self, text: str) -> None:
        """Print it."""
        say(text)

    def headers(self, done: int, total: int) -> None:
        """Say how many headers are read."""
        if self._is_time() and done < total:
            say(f"planning: {done:,} of {total:,} images")

    def encoding(self, images: int, tiles: int) -> None:
        """Say what there is to do."""
        self._images, self._tiles = images, tiles
        say(f"{images:,} images to encode, {tiles:,} tiles")

    def ready(self, encoder: str) -> None:
        """Say what encodes, and start the clock."""
        say(f"encoding with {encoder}")
        self._started = self._printed = time.monotonic()

    def progress(self, progress: Progress) -> None:
        """Say how far it is."""
        if self._is_time():
            seconds = time.monotonic() - self._started
            done = progress.images + progress.skipped
            rate = progress.tiles / seconds
            left = human_seconds((self._tiles - progress.tiles) / rate) if rate else "unknown"
            say(
                f"{done:,} of {self._images:,} images, {rate:.1f} tiles/s, {left} left"
                + (f", {progress.skipped:,} skipped" if progress.skipped else "")
            )

    def _is_time(self) -> bool:
        now = time.monotonic()
        due = now - self._printed >= PLAIN_SECONDS
        if due:
            self._printed = now
        return due


class BarObserver(Observer):
    """A bar that shows images, tiles a second, what is left and what was skipped."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._started = 0.0

    def note(self, text: str) -> None:
        """Print it above the bar."""
        if self._bar is not None:
            self._bar.clear()
        say(text)

    def headers(self, done: int, total: int) -> None:
        """Draw how many headers are read."""
        self._draw("planning", "images", done, total)

    def encoding(self, images: int, tiles: int) -> None:
        """Begin anew for the encoding."""
        self._close()
        say(f"{images:,} images to encode, {tiles:,} tiles")
        self._images = images

    def ready(self, encoder: str) -> None:
        """Say what encodes, and start the clock."""
        say(f"encoding with {encoder}")
        self._started = time.monotonic()

    def progress(self, progress: Progress) -> None:
        """Draw how far it is."""
        rate = progress.tiles / max(1e-3, time.monotonic() - self._started)
        self._draw("encoding", "images", progress.images + progress.skipped, self._images)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate:.1f} tiles/s, {progress.skipped} skipped", refresh=False)

    def _draw(self, what: str, unit: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            known = knows_its_size(sys.stderr)
            self._bar = tqdm(
                desc=what,
                unit=f" {unit}",
                total=total,
                file=sys.stderr,
                ncols=None if known else 80,
                nrows=None if known else 24,
                dynamic_ncols=known,
                leave=False,
            )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Bar:
    """How far a job of known length is: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._is_terminal = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._name = ""
        self._bar: Any = None
        self._printed = time.monotonic()

    def progress(self, name: str, done: int, total: int) -> None:
        """So much of a stage is done; another name begins another stage."""
        if self._quiet or total == 0:
            return
        if name != self._name:
            self._close()
            self._name = name
        if self._is_terminal:
            if self._bar is None and done < total:
                self._bar = _tqdm(name, total)
            if self._bar is not None:
                self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._printed = time.monotonic()
            say(f"{name}: {100 * done / total:.0f} %")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _tqdm(name: str, total: int) -> Any:
    from tqdm import tqdm

    # A terminal that does not tell its size says 0, and tqdm would then draw nothing.
    known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
    size = {"ncols": None if known else 80, "nrows": None if known else 24, "dynamic_ncols": known}
    return tqdm(desc=name, total=total, file=sys.stderr, leave=False, **size)
