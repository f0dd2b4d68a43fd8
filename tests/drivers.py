"""Processes that have imported all of the crash driver, so that a run of it costs a fork instead of an interpreter."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import crash_driver
import crash_tracing as tracing
import pytest
from crash_driver import Behavior

from internvit_cli.cli import app

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moments import Moment

PROCESSES = 2


class Ended(NamedTuple):
    """How a run of the driver ended."""

    code: int
    """Minus the signal's number after a kill."""
    said: str
    """On both streams."""


class Driver:
    """Runs the crash driver, each time in a process of its own."""

    def __init__(self, processes: ProcessPoolExecutor, folder: Path) -> None:
        self._processes = processes
        self._logs = (folder / f"{number}.log" for number in itertools.count())

    def run(
        self, arguments: tuple[object, ...], behavior: Behavior | None = None, moment: Moment | None = None
    ) -> Ended:
        """Run a command line.

        Args:
            arguments: such as `extract PICTURES -o OUT`.
            behavior: how it differs from a plain run.
            moment: when it is killed.
        """
        plan = None if moment is None else moment.plan("SIGKILL")
        words = list(map(str, arguments))
        return self._processes.submit(run_driver, words, behavior or Behavior(), plan, next(self._logs)).result()


def run_driver(arguments: list[str], behavior: Behavior, plan: str | None, log: Path) -> Ended:
    """Run one command line in a child of this process."""

    def run() -> int:
        crash_driver.prepare(behavior)
        if plan is not None:
            import moments

            moments.arm(plan)
        return crash_driver.run(arguments)

    return Ended(tracing.run_forked(run, log), log.read_text())


def begin_process() -> None:
    """Import all that a run needs, and what `info` and `verify` need."""
    tracing.warm_up(Behavior(inline=True, shard_images=4))
    with tempfile.TemporaryDirectory() as folder:
        for name in ("info", "verify"):
            tracing.run_forked(lambda name=name: app.run([name, folder]), Path(folder, "log"))  # type: ignore[misc]


@pytest.fixture(scope="session")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Two processes whose runs are inline: their children make the same calls in the same order each time."""
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), begin_process) as pool:
        yield pool


@pytest.fixture(scope="session")
def driver(processes: ProcessPoolExecutor, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    return Driver(processes, tmp_path_factory.mktemp("driver"))
