"""Fixtures that several test modules share, and those for the material beside the repository."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from folders import OUTSIDE, OUTSIDE_VARIABLE, REFERENCE
from hypothesis import settings

MODULES = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")}
pytest.register_assert_rewrite(*MODULES - {"conftest", "folders"})  # a failed assert in a helper shows its values
pytest_plugins = ["drivers", "report_helpers"]

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the commands under test respect nohup, which these tests may run under

settings.register_profile("shared machine", deadline=None)  # A slow moment of the machine is no failure.
settings.load_profile("shared machine")


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
    from forking import PATIENCE

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
