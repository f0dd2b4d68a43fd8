"""Fixtures that several test modules share, and those for the material beside the repository."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING

import pytest
from folders import OUTSIDE, OUTSIDE_VARIABLE, REFERENCE
from forking import PATIENCE, start_worker
from hypothesis import settings
from shortcuts import build_command_once

from internvit_cli.extract.multi_device import engine
from internvit_cli.runtime import workers

if TYPE_CHECKING:
    from collections.abc import Iterator

START_PROCESS = workers.start_process
# Some thousands in all: no interpreter is started for each, and torch is not imported for each device.
workers.start_process = start_worker  # type: ignore[assignment]
engine.start_process = functools.partial(start_worker, server="commands")  # type: ignore[assignment]

MODULES = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")}
LOADED = {"conftest", "folders", "forking", "shortcuts"}
pytest.register_assert_rewrite(*MODULES - LOADED)  # a failed assert in a helper shows its values
pytest_plugins = ["drivers", "report_helpers"]

build_command_once()
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the commands under test respect nohup, which these tests may run under

# A slow moment of the machine is no failure.
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("sweep", deadline=None, max_examples=200)
settings.load_profile("quick")


@pytest.fixture
def fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start an interpreter for each worker, as the command does."""
    monkeypatch.setattr(workers, "start_process", START_PROCESS)


NO_OUTSIDE_DATA = "the photographs and broken pictures are not here"


def _outside(name: str) -> Path:
    folder = OUTSIDE / name
    if not folder.is_dir():
        pytest.skip(NO_OUTSIDE_DATA)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    return _outside("")


@pytest.fixture(scope="session")
def photos() -> Path:
    return _outside("photos")


@pytest.fixture(scope="session")
def hostile() -> Path:
    return _outside("hostile")


@pytest.fixture(scope="session")
def cases() -> Path:
    return _outside("cases")


@pytest.fixture(scope="session")
def reference() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def made(shared: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of some 250 hostile inputs, with what to expect of each in MADE.tsv."""
    folder = tmp_path_factory.mktemp("made")
    photo = photos / "028_exif-samples_640x480.jpg"
    subprocess.run([sys.executable, shared / "tools" / "make_hostile.py", folder, photo], check=True, timeout=PATIENCE)
    return folder


STARTERS = {"subprocess", "Forked", "ProcessPoolExecutor"}
"""Names by which tests and their helpers start processes, other than those that the command itself starts."""
HERE = str(Path(__file__).parent)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark the tests that start processes, and run them last: what is wrong mostly shows in the others, and sooner.

    Each process of pytest-xdist begins with an equal share of the tests, cut from the whole list in its order.
    """
    seen: dict[CodeType, bool] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [nearest.func for *_, nearest in item._fixtureinfo.name2fixturedefs.values()]
            if any(_starts_processes(function, seen) for function in (item.function, *fixtures)):
                item.add_marker("process")
    yield  # those that are not selected go
    parts: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    for item in items:
        parts[item.get_closest_marker("process") is not None].append(item)
    shares = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    items[:] = [item for share in range(shares) for part in parts for item in _share(part, share, shares)]


def _share(items: list[pytest.Item], share: int, shares: int) -> list[pytest.Item]:
    return items[len(items) * share // shares : len(items) * (share + 1) // shares]


def _starts_processes(function: object, seen: dict[CodeType, bool]) -> bool:
    """Whether a function of the tests, or one that it refers to, names what starts processes."""
    function = inspect.unwrap(function) if callable(function) else function
    found = getattr(function, "hypothesis", None)
    function = found.inner_test if found else function
    if isinstance(function, type):
        return function.__module__ in MODULES and any(_starts_processes(one, seen) for one in vars(function).values())
    code = getattr(function, "__code__", None)
    if code is None or not code.co_filename.startswith(HERE):
        return False
    if code not in seen:
        seen[code] = False  # until it is known: functions may refer to each other
        names = _names_in(code)
        referred = (function.__globals__.get(name) for name in names)
        seen[code] = bool(names & STARTERS) or any(_starts_processes(one, seen) for one in referred)
    return seen[code]


def _names_in(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what a run without the data outside the repository did not test."""
    skipped = [
        report for report in terminalreporter.stats.get("skipped", []) if NO_OUTSIDE_DATA in str(report.longrepr)
    ]
    if skipped:
        terminalreporter.line(
            f"{len(skipped)} tests were skipped: {NO_OUTSIDE_DATA}. "
            f"Put them at {OUTSIDE}, or set {OUTSIDE_VARIABLE} to their folder (see CONTRIBUTING.md)."
        )
