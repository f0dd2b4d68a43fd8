"""Warn about features that may mean little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.model.catalog import RANDOM_WEIGHTS, TINY_RANDOM

if TYPE_CHECKING:
    from internvit_cli.storage.read.reader import Features


def caveats(features: Features) -> tuple[str, ...]:
    """Return one sentence per reason to distrust results based on these features."""
    return (RANDOM_WEIGHTS,) if features.attributes.get("model") == TINY_RANDOM else ()
