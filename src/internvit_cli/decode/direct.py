"""Pictures that are at hand, one after another, decoded in this process: for those who hold pictures, not folders.

The pixels are those of `decode/pictures`. What it does for a folder's sake is left out: no process of its own that a
hostile picture could take along.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from internvit_cli.config import PixelRule, Skipped
from internvit_cli.decode.pictures import DecodedPicture, _fill, decode_tiles, upright_rgb
from internvit_cli.plan.headers import loaded_size, read_header, unusable_size, upright_size
from internvit_cli.plan.tiling import Grid, choose_grid, decoded_tile_count, has_thumbnail
from internvit_cli.sources.files import any_size, classify, pillow_failure, pillow_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

NO_DIGEST = bytes(32)


@dataclass(frozen=True, slots=True)
class TiledPicture:
    """A picture as tiles, with what a feature file says of it."""

    width: int
    """After orientation, pixels."""
    height: int
    orientation: int
    """EXIF's number of the turn that was applied."""
    grid: Grid
    has_thumbnail: bool
    tiles: NDArray[Any]
    """uint8 [n, S, S, 3], row by row, the thumbnail last."""
    digest: bytes
    """SHA-256 of the file, 32 bytes; zeros for a picture that never was one."""
    file_size: int = 0
    """Bytes of the file."""


def tile_file(path: bytes, rule: PixelRule) -> TiledPicture | Skipped:
    """Decode a file into tiles, or say why there are none; one thread of a process at a time."""
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
    """Decode the bytes of a file into tiles, or say why there are none; one thread of a process at a time.

    They are decoded as a file, so neither limits nor orientation, pixels or digest can differ from those of a file on
    disk that holds them.
    """
    try:
        file, path = _empty_file()
        with file:
            file.write(data.tobytes() if isinstance(data, memoryview) else data)
            file.flush()
            return tile_file(path, rule)
    except OSError as error:  # no room for a copy
        return classify(error)


def _empty_file() -> tuple[IO[bytes], bytes]:
    """A file that vanishes when it is closed, in memory where the system has such files; and its path."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("picture")
        path = b"/proc/self/fd/%d" % descriptor
        if os.path.exists(path):
            return os.fdopen(descriptor, "wb"), path
        os.close(descriptor)
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115 -- the caller closes it
    return cast("IO[bytes]", file), os.fsencode(file.name)


def tile_picture(image: Image.Image, rule: PixelRule) -> TiledPicture | Skipped:
    """Cut a picture in memory into tiles, or say why that can't be done; one thread of a process at a time.

    Args:
        image: in any mode; what its EXIF says counts as in a file. Of several frames the one at hand is taken.
        rule: all that decides the pixels.
    """
    if unusable := unusable_size(*upright_size(image, rule)[:2], rule):
        return unusable
    try:
        with pillow_settings(rule):
            image.load()
            # Again, for a PNG may hold an orientation behind its pixels.
            size = loaded_size(image, rule)
            if unusable := unusable_size(*size[:2], rule):
                return unusable
            grid = choose_grid(*size[:2], rule.tiling)
            tiles = _room(grid, rule)
            with any_size():
                _fill(upright_rgb(image, size[2], rule), grid, rule, tiles)
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
