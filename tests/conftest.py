"""Fixtures that several test modules share, and those for the material beside the repository."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from folders import OUTSIDE, OUTSIDE_VARIABLE, REFERENCE
from forking import PATIENCE, start_worker
from hypothesis import settings
from shortcuts import build_command_once

from internvit_cli.runtime import workers

if TYPE_CHECKING:
    from collections.abc import Iterator

START_PROCESS = workers.start_process

MODULES = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")}
pytest.register_assert_rewrite(
    *MODULES - {"conftest", "folders", "forking", "shortcuts"}
)  # a failed assert in a helper shows its values
pytest_plugins = ["drivers", "report_helpers"]

build_command_once()
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the commands under test respect nohup, which these tests may run under

settings.register_profile("shared machine", deadline=None)  # A slow moment of the machine is no failure.
settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def _forked_workers() -> Iterator[None]:
    """Fork the workers that read pictures, some thousands in all, instead of starting an interpreter for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "start_process", start_worker)
        yield


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
