"""What a reader of features should know before looking at anything that was made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.model.catalog import RANDOM_WEIGHTS, TINY_RANDOM

if TYPE_CHECKING:
    from internvit_cli.storage.read.reader import Features


def caveats(features: Features) -> tuple[str, ...]:
    """Return one sentence for each reason to distrust what the features seem to say."""
    return (RANDOM_WEIGHTS,) if features.attributes.get("model") == TINY_RANDOM else ()
