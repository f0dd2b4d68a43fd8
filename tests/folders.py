"""Where the data of the tests lie: in the repository, or in a folder outside it."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples" / "images"
"""Four photographs of the repository."""
DATA = ROOT / "tests" / "data"
REFERENCE = DATA / "reference"
"""Small checkpoints in every layout, and what the official code makes of them."""

OUTSIDE_VARIABLE = "OUTSIDE_TEST_DATA"  # no INTERNVIT_ variable: the command tells of those that it does not know
OUTSIDE = Path(os.environ.get(OUTSIDE_VARIABLE) or ROOT.parent / "shared")
"""Photographs and broken pictures of other projects, which are no part of the repository."""
