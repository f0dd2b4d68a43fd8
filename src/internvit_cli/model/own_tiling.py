"""Compare the tiling of a run with that of the checkpoint's own code."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.config import Preprocess

if TYPE_CHECKING:
    from collections.abc import Iterator

    from internvit_cli.model.pixels import OwnTiling
    from internvit_cli.options import PictureOptions


class TilingDifference(NamedTuple):
    """One difference between the checkpoint's own code and the run."""

    theirs: str
    ours: str


def tiling_note(own: OwnTiling, ours: PictureOptions) -> str:
    """Return one line that names both sides of each difference; empty if there are none."""
    differences = [*_of_tiles(own, ours), *_of_pixels(own)]
    if not differences:
        return ""
    theirs, used = (", ".join(side) for side in zip(*differences, strict=True))
    return f"the checkpoint's own code has {theirs}; this run has {used}"


def _of_tiles(own: OwnTiling, ours: PictureOptions) -> Iterator[TilingDifference]:
    is_tiled = ours.preprocess is Preprocess.TILES
    if own.dynamic is False:
        if is_tiled and ours.max_tiles > 1:
            yield TilingDifference(
                "one tile for each picture (dynamic_image_size false)", f"--max-tiles {ours.max_tiles}"
            )
        return
    if not is_tiled:
        if own.dynamic:
            yield TilingDifference("several tiles (dynamic_image_size true)", f"--preprocess {ours.preprocess.value}")
        return
    if own.min_tiles is not None and own.min_tiles != ours.min_tiles:
        yield TilingDifference(f"min_dynamic_patch {own.min_tiles}", f"--min-tiles {ours.min_tiles}")
    if own.max_tiles is not None and own.max_tiles != ours.max_tiles:
        yield TilingDifference(f"max_dynamic_patch {own.max_tiles}", f"--max-tiles {ours.max_tiles}")
    if own.thumbnail is not None and own.thumbnail != ours.thumbnail:
        used = "--thumbnail" if ours.thumbnail else "--no-thumbnail"
        yield TilingDifference(f"use_thumbnail {str(own.thumbnail).lower()}", used)


def _of_pixels(own: OwnTiling) -> Iterator[TilingDifference]:
    if own.pad_to_square:
        yield TilingDifference("padding to a square (pad2square)", "none")
    if not own.bicubic:
        yield TilingDifference("another filter than bicubic (resample)", "bicubic")
