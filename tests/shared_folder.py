"""Where the material beside the repository lies."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.pop("INTERNVIT_SHARED", "") or Path(__file__).resolve().parents[1].parent / "shared")
"""The variable is taken away, because `internvit` tells of each one that begins like its own and sets nothing."""
