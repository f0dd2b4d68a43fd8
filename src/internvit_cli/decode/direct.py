"""Decode single pictures in this process, for callers that hold pictures instead of folders.

The pixels are those of `decode/pictures`. There are no worker processes, so a hostile picture can crash the caller.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from internvit_cli.config import PixelRule, Skipped
from internvit_cli.decode.pictures import DecodedPicture, cut_tiles, decode_tiles, upright_rgb
from internvit_cli.plan.headers import loaded_size, read_header, size_problem, upright_size
from internvit_cli.plan.tiling import Grid, choose_grid, decoded_tile_count, has_thumbnail
from internvit_cli.sources.files import pillow_failure, pillow_settings, system_failure, without_pixel_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

NO_DIGEST = bytes(32)


@dataclass(frozen=True, slots=True)
class TiledPicture:
    """A picture as tiles, with the facts that a feature file stores."""

    width: int
    """The width in pixels, after orientation."""
    height: int
    orientation: int
    """The EXIF orientation that was applied."""
    grid: Grid
    has_thumbnail: bool
    tiles: NDArray[Any]
    """The tiles, uint8 [n, S, S, 3], row by row, with the thumbnail last."""
    digest: bytes
    """The SHA-256 of the file, 32 bytes; zeros for a picture without a file."""
    file_size: int = 0
    """The size of the file in bytes."""


def tile_file(path: bytes, rule: PixelRule) -> TiledPicture | Skipped:
    """Decode a file into tiles, or return why that fails; only one thread of a process may do so at a time."""
    header = read_header(path, rule)
    if isinstance(header, Skipped):
        return header
    grid = choose_grid(header.width, header.height, rule.tiling)
    tiles = _room(grid, rule)
    decoded = decode_tiles(path, header, grid, rule, tiles)
    if not isinstance(decoded, DecodedPicture):
        return decoded
    size = header.width, header.height, header.orientation
    return _tiled(size, rule, tiles, decoded.digest, header.file_size)


def tile_bytes(data: bytes | bytearray | memoryview, rule: PixelRule) -> TiledPicture | Skipped:
    """Decode the bytes of a file into tiles, or return why that fails; only one thread at a time may do so.

    The bytes are decoded as a file, so limits, orientation, pixels and digest are those of a file on disk.
    """
    try:
        file, path = _empty_file()
        with file:
            file.write(data.tobytes() if isinstance(data, memoryview) else data)
            file.flush()
            return tile_file(path, rule)
    except OSError as error:  # no room for a copy
        return system_failure(error)


def _empty_file() -> tuple[IO[bytes], bytes]:
    """Return a file that vanishes when it is closed, in memory if the system supports that, and its path."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("picture")
        path = b"/proc/self/fd/%d" % descriptor
        if os.path.exists(path):
            return os.fdopen(descriptor, "wb"), path
        os.close(descriptor)
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - the caller closes it
    return cast("IO[bytes]", file), os.fsencode(file.name)


def tile_picture(image: Image.Image, rule: PixelRule) -> TiledPicture | Skipped:
    """Cut a picture in memory into tiles, or return why that fails; only one thread at a time may do so.

    Args:
        image: A picture in any mode, with EXIF as in a file. Of several frames, the current one is used.
        rule: Everything that decides the pixels.
    """
    if problem := size_problem(*upright_size(image, rule)[:2], rule):
        return problem
    try:
        with pillow_settings(rule):
            image.load()
            # Read again, because a PNG may have an orientation after its pixels.
            size = loaded_size(image, rule)
            if problem := size_problem(*size[:2], rule):
                return problem
            grid = choose_grid(*size[:2], rule.tiling)
            tiles = _room(grid, rule)
            with without_pixel_limit():
                cut_tiles(upright_rgb(image, size[2], rule), grid, rule, tiles)
    except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
        return pillow_failure(error, rule.max_pixels)
    return _tiled(size, rule, tiles, NO_DIGEST)


def _room(grid: Grid, rule: PixelRule) -> NDArray[Any]:
    side = rule.tiling.tile_size
    return np.empty((decoded_tile_count(grid, rule), side, side, 3), np.uint8)


def _tiled(
    size: tuple[int, int, int], rule: PixelRule, tiles: NDArray[Any], digest: bytes, file_size: int = 0
) -> TiledPicture:
    width, height, orientation = size
    grid = choose_grid(width, height, rule.tiling)
    thumbnail = has_thumbnail(grid, rule.tiling.thumbnail)
    return TiledPicture(width, height, orientation, grid, thumbnail, tiles, digest, file_size)
