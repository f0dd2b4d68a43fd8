"""Fixtures that several test modules share, and those for the material beside the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from shared_folder import SHARED

MODULES = {path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("test_")}
pytest.register_assert_rewrite(*MODULES - {"conftest", "shared_folder"})  # a failed assert in a helper shows its values
pytest_plugins = ["drivers", "report_helpers"]

settings.register_profile("shared machine", deadline=None)  # A slow moment of the machine is no failure.
settings.load_profile("shared machine")


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; INTERNVIT_SHARED names another place")
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    return _folder("")


@pytest.fixture(scope="session")
def photos() -> Path:
    return _folder("photos")


@pytest.fixture(scope="session")
def hostile() -> Path:
    return _folder("hostile")


@pytest.fixture(scope="session")
def cases() -> Path:
    return _folder("cases")


@pytest.fixture(scope="session")
def reference() -> Path:
    return _folder("reference")


@pytest.fixture(scope="session")
def made(shared: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of some 250 hostile inputs, with what to expect of each in MADE.tsv."""
    folder = tmp_path_factory.mktemp("made")
    photo = photos / "028_exif-samples_640x480.jpg"
    from forking import PATIENCE

    subprocess.run([sys.executable, shared / "tools" / "make_hostile.py", folder, photo], check=True, timeout=PATIENCE)
    return folder
