"""Fixtures for the material beside the repository: photographs, damaged pictures, reference values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("INTERNVIT_SHARED") or Path(__file__).resolve().parents[1].parent / "shared")


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
def reference() -> Path:
    return _folder("reference")
