"""Show progress on stderr: one line that is redrawn on a terminal, or a plain line every 30 seconds elsewhere.

The other packages report phases (`observer`). A thread here reads the innermost phase at intervals, so that work
without a callback shows a sign of life too, and reporting costs next to nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from typing_extensions import Self

from internvit_cli.cli.console import human_bytes, human_seconds, is_terminal, make_way_with, say, write_progress
from internvit_cli.runtime.observer import BYTES, SILENT, Observer, Phase, PhaseState
from internvit_cli.runtime.words import counted, counted_of

PLAIN_SECONDS = 30.0
"""Seconds between two lines if there is no terminal."""
DRAWN_SECONDS = 0.2
"""Seconds between two redraws on a terminal."""
GOOD_BAR = 15
"""Columns of the bar below which other figures are left out."""
LEAST_BAR = 10
"""Smallest useful bar, in columns; a narrower one is left out."""
UNKNOWN_WIDTH = 80
"""Columns assumed for a terminal that does not report its size."""
LEAST_SECONDS = 1.0
"""Seconds after which a speed means something."""


@contextmanager
def progress(*, quiet: bool) -> Iterator[Observer]:
    """Show the phases of a command while the block runs; show nothing if `quiet`."""
    if quiet:
        yield SILENT
        return
    with TerminalDisplay() if is_terminal(sys.stderr) else PlainDisplay() as display:
        yield display


# ------------------------------------------------------------------------------------------------------ formatting


@dataclass(frozen=True, slots=True)
class PhaseSnapshot:
    """A snapshot of a phase."""

    name: str
    unit: str
    state: PhaseState
    seconds: float
    """Seconds since the phase began."""
    before: int = 0
    """Work of the finer measure that was done before the phase began."""

    @property
    def percent(self) -> int | None:
        """The percentage done, 100 only when everything is done; None if the total is unknown."""
        state = self.state
        if state.total is None:
            return None
        return 100 * state.done // state.total if state.total else 100

    @property
    def rate(self) -> float | None:
        """Units of the finer measure, or bytes, per second; None if there is none, or if it is too early to tell."""
        work = self.state.work
        done = work.done - self.before if work is not None else self.state.done if self.unit == BYTES else 0
        return done / self.seconds if done > 0 and self.seconds >= LEAST_SECONDS else None

    @property
    def seconds_left(self) -> float | None:
        """The seconds left at the current average speed; None if unknown."""
        state = self.state
        done, total = (state.work.done, state.work.total) if state.work is not None else (state.done, state.total)
        if total is None or not self.before < done <= total or self.seconds < LEAST_SECONDS:
            return None
        return self.seconds * (total - done) / (done - self.before)


def plain_line(view: PhaseSnapshot) -> str:
    """Format a phase as a line of a log, such as `encoding: 3 of 9 images (33 %), 1.5 tiles/s, 12.0 s left`."""
    state, rate, left = view.state, view.rate, view.seconds_left
    parts = []
    if view.unit:
        parts.append(_amount(view) + ("" if view.percent is None else f" ({view.percent} %)"))
    if rate is not None:
        parts.append(_speed(view, rate))
    parts.append(f"{human_seconds(view.seconds)} so far" if left is None else f"{human_seconds(left)} left")
    if state.skipped:
        parts.append(f"{state.skipped:,} skipped")
    return f"{view.name}: " + ", ".join(parts)


def _amount(view: PhaseSnapshot) -> str:
    done, total = view.state.done, view.state.total
    if view.unit == BYTES:
        return human_bytes(done) if total is None else f"{human_bytes(done)} of {human_bytes(total)}"
    return counted(done, view.unit) if total is None else counted_of(done, total, view.unit)


def _speed(view: PhaseSnapshot, rate: float) -> str:
    return f"{human_bytes(rate)}/s" if view.state.work is None else f"{rate:4,.1f} {view.state.work.unit}s/s"


@dataclass(frozen=True, slots=True)
class ProgressLine:
    """A line for a terminal, with a bar between its two parts if there is room."""

    left: str
    right: str
    bar: int
    """Columns of the bar; 0 for no bar."""


def fit_line(view: PhaseSnapshot, width: int) -> ProgressLine:
    """Format a phase as a line of at most `width` columns.

    On a narrow terminal these parts are left out, in this order, until the bar is wide enough: the unit, skipped
    images, the speed, the time left, then the bar, and the name. Without a total there is no bar, and the elapsed time
    replaces the time left.
    """
    unit, short = _fraction(view, with_unit=True), _fraction(view, with_unit=False)
    speed = "" if view.rate is None else _speed(view, view.rate)
    skipped = f"{view.state.skipped:,} skipped" if view.state.skipped else ""
    if view.percent is None:
        so_far = clock(view.seconds)
        return _first_that_fits(
            width,
            (view.name, unit, speed, so_far, skipped),
            (view.name, unit, speed, so_far),
            (view.name, short, so_far),
            (view.name, so_far),
            (view.name,),
        )
    percent = f"{view.percent:3d}%"
    left = "" if view.seconds_left is None else f"ETA {clock(view.seconds_left)}"
    rights = (
        (percent, unit, speed, left, skipped),
        (percent, short, speed, left, skipped),
        (percent, unit, speed, left),
        (percent, short, speed, left),
        (percent, short, left),
        (percent, short),
    )
    for wanted, columns in [(GOOD_BAR, columns) for columns in rights] + [(LEAST_BAR, rights[-1])]:
        right = "  ".join(filter(None, columns))
        bar = width - len(view.name) - len(right) - len(" || ")
        if bar >= wanted:
            return ProgressLine(f"{view.name} ", f" {right}", bar)
    return _first_that_fits(
        width, (view.name, percent.strip(), short), (view.name, percent.strip()), (percent.strip(),)
    )


def _first_that_fits(width: int, *candidates: tuple[str, ...]) -> ProgressLine:
    """Return the first candidate that is not too wide, or as much of the last one as fits."""
    texts = ["  ".join(filter(None, columns)) for columns in candidates]
    return ProgressLine(next((text for text in texts if len(text) <= width), texts[-1][:width]), "", 0)


def _fraction(view: PhaseSnapshot, *, with_unit: bool) -> str:
    """Format what is done and the total, such as `1,234/2,900 images` or `1.2/3.4 GB`."""
    done, total = view.state.done, view.state.total
    if not view.unit:
        return ""
    if view.unit == BYTES:
        return human_bytes(done) if total is None else f"{human_bytes(done)}/{human_bytes(total)}"
    if total is None:
        return counted(done, view.unit) if with_unit else f"{done:,}"
    of = f"{total:,}"
    return (
        f"{done:>{len(of)},}/{counted(total, view.unit) if with_unit else of}"  # padded, so that the bar does not move
    )


def clock(seconds: float) -> str:
    """Format a duration like a clock, such as `0:07` or `2:05:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------------------------------------------------- displays


class Display(Observer):
    """An observer whose thread shows the innermost phase at intervals; a context manager that ends the thread."""

    def __init__(self, every: float, now: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._now = now
        self._open: list[tuple[Phase, float]] = []
        """The running phases with their start times, the innermost one last."""
        self._lock = threading.RLock()
        self._is_closed = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    @abstractmethod
    def look(self, view: PhaseSnapshot) -> None:
        """Show a snapshot of a phase."""

    def began(self, phase: Phase) -> None:
        """Make the phase the innermost one."""
        with self._lock:
            self._open.append((phase, self._now()))

    def ended(self, phase: Phase) -> None:
        """Return to the enclosing phase, if there is one."""
        with self._lock:
            self._open = [(one, since) for one, since in self._open if one is not phase]

    def look_now(self) -> None:
        """Show the innermost phase that has work to do, if there is one."""
        with self._lock:
            for phase, since in reversed(self._open):
                if phase.state.total != 0:
                    self.look(PhaseSnapshot(phase.name, phase.unit, phase.state, self._now() - since, phase.before))
                    return

    def _tick(self) -> None:
        while not self._is_closed.wait(self._every):
            self.look_now()

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._ticker.join()


class PlainDisplay(Display):
    """Prints a line every 30 seconds, for logs and cron mails."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(PLAIN_SECONDS, now)

    def note(self, text: str) -> None:
        """Print a note."""
        say(text)

    def look(self, view: PhaseSnapshot) -> None:
        """Print a line about the phase."""
        say(plain_line(view))


class TerminalDisplay(Display):
    """Draws one line at the bottom of a terminal, at least when a phase begins and ends, and removes it at the end."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__(DRAWN_SECONDS, now)
        self._bar: Any = None

    def note(self, text: str) -> None:
        """Print a note above the line."""
        say(text)

    def began(self, phase: Phase) -> None:
        """Draw the new phase."""
        super().began(phase)
        self.look_now()

    def ended(self, phase: Phase) -> None:
        """Draw the end of the phase, then the enclosing phase or nothing."""
        self.look_now()
        super().ended(phase)
        self._clear()
        self.look_now()

    def look(self, view: PhaseSnapshot) -> None:
        """Draw the phase over the current line."""
        width = terminal_width()
        line = fit_line(view, width)
        drawn = f"{_escaped(line.left)}|{{bar}}|{_escaped(line.right)}" if line.bar else _escaped(line.left)
        if self._bar is None:
            self._bar = _line_of_tqdm()
        bar = self._bar
        # A phase without a total is drawn as text only, because tqdm draws a bar of 0 as an empty bar.
        bar.n, bar.total, bar.ncols, bar.bar_format = view.state.done, view.state.total or None, width, drawn
        bar.refresh()

    def __enter__(self) -> Self:
        make_way_with(self._above)
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        make_way_with(nullcontext)
        if self._bar is not None:
            self._bar.close()

    @contextmanager
    def _above(self) -> Iterator[None]:
        """Clear the line so that another one can be printed in its place, and redraw it below."""
        with self._lock:
            self._clear()
            yield
            self.look_now()

    def _clear(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.clear()


def terminal_width() -> int:
    """Return the columns of the terminal behind stderr, or a default if it does not report them."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or UNKNOWN_WIDTH
    except (OSError, ValueError):  # the terminal is gone
        return UNKNOWN_WIDTH


def _escaped(text: str) -> str:
    """Escape a text for str.format."""
    return text.replace("{", "{{").replace("}", "}}")


def _line_of_tqdm() -> Any:
    """Return a tqdm bar that redraws a line, without tqdm's threads and its locks between processes."""
    from tqdm import tqdm

    class Line(tqdm):  # type: ignore[misc, type-arg, unused-ignore]
        monitor_interval = 0

    Line.set_lock(threading.RLock())
    return Line(file=_Stderr(), ncols=UNKNOWN_WIDTH, nrows=24, bar_format=" ", leave=False, disable=False)


class _Stderr:
    """Stderr for tqdm, which ignores write errors so that the work goes on."""

    @property
    def encoding(self) -> str:
        """The encoding, from which tqdm chooses the characters of the bar."""
        return getattr(sys.stderr, "encoding", None) or "ascii"

    def write(self, text: str) -> None:
        write_progress(text)

    def flush(self) -> None:
        """Do nothing, because each write is flushed."""
