"""Random damage to a file, and what a reader may make of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from internvit_cli import open_features
from internvit_cli.config import Status
from internvit_cli.errors import InternvitError
from internvit_cli.storage.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np


def probe(path: Path | str) -> list[Any]:
    """Everything that can be read of an output."""
    features = open_features(path)
    seen: list[Any] = [features.attributes, list(features)]
    for image in features.values():
        seen.append((image.key, image.width, image.height, image.grid, image.has_thumbnail))
        if image.status is Status.DONE:
            seen.append((image.key, image.pooled.shape, image.visual_tokens.shape))
    features.pooled_matrix()
    for shard in Output(str(path)).finished():
        digests, checksums = shard.backend.commit_records(shard.path)
        assert (len(digests), len(checksums)) == (len(shard.stored.table),) * 2
        shard.backend.run_log(shard.path)
    return seen


def damage(rng: np.random.Generator, data: bytearray, positions: np.ndarray) -> bytes:
    """One flipped bit, one other byte, or a file that is too short."""
    at = int(rng.choice(positions))
    match int(rng.integers(0, 4)):
        case 0:
            return bytes(data[:at])
        case 1:
            data[at] = int(rng.integers(0, 256))
        case _:
            data[at] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)


def assert_found_or_harmless(before: list[Any], path: Path) -> bool:
    """Reading a damaged output says so, with a hint, or gives the same index; returns whether it said so."""
    try:
        seen = probe(path)
    except InternvitError as error:
        assert error.hint
        return True
    # Statuses, digests and CRCs are for `verify` to check: an image may have become a skipped one.
    kept = [item for item in before if item in seen]
    assert seen == kept
    assert seen[:2] == before[:2]
    return False
