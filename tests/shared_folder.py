"""Where the material beside the repository lies. Settings of whoever runs the tests are forgotten."""

from __future__ import annotations

import os
from pathlib import Path

SHARED = Path(os.environ.pop("INTERNVIT_SHARED", "") or Path(__file__).resolve().parents[1].parent / "shared")

for _name in [name for name in os.environ if name.startswith("INTERNVIT_")]:
    del os.environ[_name]
