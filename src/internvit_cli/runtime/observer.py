"""Report the progress of a command: all packages report phases of their work, and only the command line draws them.

Code that works opens a phase, which says what it counts, and reports how far it is:

>>> observer = Observer()
>>> with observer.phase("embedding", "image", total=3) as phase:
...     for number in range(3):
...         phase.at(number + 1)

A phase is complete when it begins, so an observer always has its name, unit and total. Phases may be nested, or run
beside each other in several threads; of those that have not ended, the last that began is the current work.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BYTES = "B"
"""The unit of a phase that counts bytes."""


@dataclass(frozen=True, slots=True)
class Work:
    """A finer measure of a phase than what it counts, which gives its speed and the time left."""

    unit: str
    """The unit in the singular, such as `tile`."""
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class PhaseState:
    """How far a phase is at one moment."""

    done: int = 0
    total: int | None = None
    """The total, never less than what is done; None if unknown."""
    work: Work | None = None
    skipped: int = 0
    """How many of those done could not be used."""


class Phase:
    """One part of a command's work."""

    def __init__(self, observer: Observer, name: str, unit: str, total: int | None) -> None:
        self.name = name
        """The work of the phase, such as `reading headers`."""
        self.unit = unit
        """The unit in the singular, such as `image`; BYTES; empty if nothing is counted."""
        self.state = PhaseState(total=total)
        """The current state, replaced as a whole at each step, so that another thread may read it at any time."""
        self.before = 0
        """The finer measure at the first report, which is not work of this phase."""
        self._observer = observer

    def at(self, done: int, total: int | None = None, *, work: Work | None = None, skipped: int = 0) -> None:
        """Report how far the phase is.

        Args:
            done: The number done so far.
            total: The new total, if it has changed; a total that is too low grows with `done`.
            work: The finer measure.
            skipped: How many of `done` could not be used.
        """
        known = self.state.total if total is None else total
        if work is not None and self.state.work is None:
            self.before = work.done
        self.state = PhaseState(done, None if known is None else max(known, done), work, skipped)
        self._observer.moved(self)


class Observer:
    """Receives notes and phases of a command; this base class ignores them."""

    def note(self, text: str) -> None:
        """Receive a note for the user, as one line."""

    def began(self, phase: Phase) -> None:
        """Receive the beginning of a phase, which becomes the current one; called from any thread."""

    def moved(self, phase: Phase) -> None:
        """Receive a new state of a phase; called often, and from any thread."""

    def ended(self, phase: Phase) -> None:
        """Receive the end of a phase, with or without an error; called from any thread."""

    @contextmanager
    def phase(self, name: str, unit: str = "", total: int | None = None) -> Iterator[Phase]:
        """Open a phase for the duration of a block.

        Args:
            name: The work of the phase.
            unit: The unit in the singular; BYTES; empty if nothing is counted.
            total: The total; None if unknown.
        """
        phase = Phase(self, name, unit, total)
        self.began(phase)
        try:
            yield phase
        finally:
            self.ended(phase)


SILENT = Observer()
