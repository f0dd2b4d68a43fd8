"""Sample tiles of the first pictures of a run, before anything is encoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.decode.decoder import DecodedImage

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from internvit_cli.decode.decoder import DecodeJob, Decoder
    from internvit_cli.runtime.signals import Stop

SAMPLE_IMAGES = 8
"""Tiles per picture: the first and the last one, which is the thumbnail if there is one."""


def sample_tiles(decoder: Decoder, jobs: Sequence[DecodeJob], stop: Stop) -> list[np.ndarray]:
    """Return copies of two tiles per readable picture, uint8 [S,S,3] each, in the order of the jobs."""
    found: dict[int, list[np.ndarray]] = {}
    for item in decoder.run(jobs, lambda: bool(stop.signal)):
        if isinstance(item, DecodedImage):
            found[item.row] = [item.tiles[index].copy() for index in sorted({0, len(item.tiles) - 1})]
            item.release()
    return [tile for row in sorted(found) for tile in found[row]]
