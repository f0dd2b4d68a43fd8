"""What a command tells while it goes on: the core reports phases of its work, and only the command line draws them.

Whoever works opens a phase, which says what it counts, and tells it how far it is:

>>> observer = Observer()
>>> with observer.phase("embedding", "image", total=3) as phase:
...     for number in range(3):
...         phase.at(number + 1)

A phase is whole from its first moment, so there is no order in which a watcher could be told of it and be left without
a name, a unit or a total. Phases may lie within each other; the innermost one is what goes on at the moment.
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
    """A finer measure of a phase than the things it counts, from which its speed and the time left follow."""

    unit: str
    """In the singular, such as `tile`."""
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class PhaseState:
    """How far a phase is at one moment."""

    done: int = 0
    total: int | None = None
    """None while nobody knows; never less than what is done."""
    work: Work | None = None
    skipped: int = 0
    """Of what is done: how many could not be used."""


class Phase:
    """One part of a command's work."""

    def __init__(self, observer: Observer, name: str, unit: str, total: int | None) -> None:
        self.name = name
        """What is being done, such as `reading headers`."""
        self.unit = unit
        """What is counted, in the singular, such as `image`; BYTES; empty when there is nothing to count."""
        self.state = PhaseState(total=total)
        """Replaced as a whole at each step, so that another thread may read it at any time."""
        self.before = 0
        """Of the finer measure: what was done when this phase was first told of, and is no work of its own."""
        self._observer = observer

    def at(self, done: int, total: int | None = None, *, work: Work | None = None, skipped: int = 0) -> None:
        """Tell how far it is.

        Args:
            done: how many so far.
            total: of how many, when that has changed; a total that turns out too low grows with what is done.
            work: the finer measure.
            skipped: how many of `done` could not be used.
        """
        known = self.state.total if total is None else total
        if work is not None and self.state.work is None:
            self.before = work.done
        self.state = PhaseState(done, None if known is None else max(known, done), work, skipped)
        self._observer.moved(self)


class Observer:
    """Watches a command. This one keeps silent."""

    def note(self, text: str) -> None:
        """Take something that a user should know, one line."""

    def began(self, phase: Phase) -> None:
        """A phase has begun; the one that was going on until now waits for its end."""

    def moved(self, phase: Phase) -> None:
        """A phase has a new state; called often, and from any thread."""

    def ended(self, phase: Phase) -> None:
        """A phase has ended, with or without an error."""

    @contextmanager
    def phase(self, name: str, unit: str = "", total: int | None = None) -> Iterator[Phase]:
        """Open a phase of the work for as long as the block lasts.

        Args:
            name: what is being done.
            unit: what is counted, in the singular; BYTES; empty when there is nothing to count.
            total: of how many; None when nobody knows.
        """
        phase = Phase(self, name, unit, total)
        self.began(phase)
        try:
            yield phase
        finally:
            self.ended(phase)


SILENT = Observer()
