"""Decode a file into uint8 tiles with the pixels that InternViT was trained on, on every version of Pillow.

Source: `load_image` and `dynamic_preprocess` in OpenGVLab/InternVL, README and internvl_chat/internvl/train/dataset.py.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from internvit_cli.config import MOST_GREY, GreyRange, PixelRule, Skipped, Status
from internvit_cli.plan.png_chunks import despite_texts
from internvit_cli.plan.table import modified_ns
from internvit_cli.plan.tiling import views_of
from internvit_cli.sources.files import open_picture, pillow_settings, readable_formats, without_pixel_limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from internvit_cli.plan.headers import Header
    from internvit_cli.plan.tiling import Grid, View
    from internvit_cli.sources.files import OpenPicture
    from internvit_cli.sources.members import FileStatus

_IN_MEMORY = 64 << 20
"""Files of up to this many bytes are read at once; larger ones are hashed in blocks, then decoded from the file."""
_BLOCK = 1 << 20
_BLOCK_PIXELS = 64 << 10
"""Pixels of a whole picture that are copied at once."""
_BLOCK_ROWS = 256
"""Rows of pixels that are scaled at once, to limit the memory of intermediate values."""

_GREY_RANGES = tuple((1 << bits) - 1 for bits in (8, 10, 12, 14, 16))
"""The largest values of the bit depths that cameras and scanners store in 16 bits."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns a picture upright, by EXIF orientation."""


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """The result of decoding a picture, whose tiles or pixels are in the output array."""

    tiles: int
    """The number of tiles that were written; 0 if the picture was written whole."""
    digest: bytes
    """The SHA-256 of the file, 32 bytes."""


def decode_tiles(
    path: bytes, header: Header, grid: Grid, rule: PixelRule, out: NDArray[np.uint8]
) -> DecodedPicture | Skipped:
    """Decode a file into tiles, row by row, with the thumbnail last; only one thread of a process may do so at a time.

    Args:
        path: The file; links are followed.
        header: The header from planning; a file that differs now is skipped.
        grid: The result of `choose_grid` for the size in the header.
        rule: Everything that decides the pixels.
        out: uint8 [n, side, side, 3], n at least `decoded_tile_count(grid, rule)`; its first tiles are filled.

    Returns:
        The number of tiles, and the digest of exactly the bytes that they come from; or the reason why the picture
        cannot be decoded, after which `out` may hold part of it.
    """
    return _decode_file(path, header, rule, lambda picture: cut_tiles(picture, grid, rule, out))


def decode_picture(path: bytes, header: Header, rule: PixelRule, out: NDArray[np.uint8]) -> DecodedPicture | Skipped:
    """Decode a file into RGB, turned upright; only one thread of a process may do so at a time.

    Args:
        path: The file; links are followed.
        header: The header from planning; a file that differs now is skipped.
        rule: Everything that decides the pixels.
        out: uint8 [height, width, 3] for the size in the header, which is filled.

    Returns:
        The digest of exactly the bytes that the pixels come from, with 0 tiles; or the reason why the picture cannot be
        decoded, after which `out` may hold part of it.
    """
    return _decode_file(path, header, rule, lambda picture: _copy(picture, out))


def _decode_file(
    path: bytes, header: Header, rule: PixelRule, write: Callable[[Image.Image], int]
) -> DecodedPicture | Skipped:
    """Decode a file, and let `write` store the upright RGB picture and return the number of tiles."""
    picture = open_picture(path)
    if isinstance(picture, Skipped):
        return picture
    with picture, pillow_settings(rule):
        if _differs(picture.status, header):
            return _changed()
        try:
            outcome = _decode(picture, header, rule, write)
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            outcome = picture.failure(error, rule.max_pixels)
        # Checked after a failure too: a file that was being written is changed, not damaged.
        return _changed() if _differs(picture.status_now(), header) else outcome


def _copy(picture: Image.Image, out: NDArray[np.uint8]) -> int:
    width, height = picture.size
    rows = max(1, _BLOCK_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        # In parts, because Pillow exports small pictures several times as fast as a large one.
        out[top:bottom] = np.asarray(picture.crop((0, top, width, bottom)))
    return 0


def _differs(status: FileStatus, header: Header) -> bool:
    return (status.st_size, modified_ns(status)) != (header.file_size, header.file_mtime_ns)


def _changed() -> Skipped:
    return Skipped(Status.CHANGED, "", "the file changed after it was planned")


def _decode(
    file: OpenPicture, header: Header, rule: PixelRule, write: Callable[[Image.Image], int]
) -> DecodedPicture | Skipped:
    digest, stream = digested(file.stream(), header.file_size)

    def tiles_of(stream: BinaryIO) -> int | Skipped:
        with Image.open(stream, formats=readable_formats()) as image:
            if not _may_be_planned_size(image, header):
                return _size_mismatch(image, header)
            image.load()
            if not _is_planned_size(image, header):  # some formats know their size only after decoding
                return _size_mismatch(image, header)
            with without_pixel_limit():
                return write(upright_rgb(image, header.orientation, rule))

    outcome = despite_texts(tiles_of, stream)
    return outcome if isinstance(outcome, Skipped) else DecodedPicture(outcome, digest)


def digested(file: BinaryIO, size: int) -> tuple[bytes, BinaryIO]:
    """Return the SHA-256 of an open file of `size` bytes, and a stream of the same bytes from the start."""
    if size <= _IN_MEMORY:
        data = file.read(size + 1)  # one more, so that a file that grew has another digest
        return hashlib.sha256(data).digest(), io.BytesIO(data)
    hashed = hashlib.sha256()
    while block := file.read(_BLOCK):
        hashed.update(block)
    file.seek(0)
    return hashed.digest(), file


def _may_be_planned_size(image: Image.Image, header: Header) -> bool:
    """Return whether a picture may have the planned size once it is loaded; Pillow may turn a TIFF then."""
    return _is_planned_size(image, header) or (image.format == "TIFF" and image.size == header[1::-1])


def _is_planned_size(image: Image.Image, header: Header) -> bool:
    width, height = image.size
    return (height, width) == header[:2] if header.orientation >= 5 else (width, height) == header[:2]


def _size_mismatch(image: Image.Image, header: Header) -> Skipped:
    width, height = image.size
    return Skipped(
        Status.SIZE_MISMATCH, "", f"{width} x {height} pixels instead of {header.width} x {header.height} before a turn"
    )


def upright_rgb(image: Image.Image, orientation: int, rule: PixelRule) -> Image.Image:
    """Return a loaded picture in RGB and turned upright, from which tiles are cut.

    Args:
        image: A picture in any mode.
        orientation: The EXIF orientation to apply.
        rule: How transparency and gray pictures of more than 8 bits are converted.
    """
    return upright(_rgb(image, rule), orientation)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture of any mode turned upright, for its EXIF orientation."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _rgb(image: Image.Image, rule: PixelRule) -> Image.Image:
    """Convert the current frame to RGB, scale wide gray values, and compose transparency over a given background."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _wide_gray(image, rule.grey_range)
    if rule.background is not None and image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, rule.background)
        canvas.paste(rgba, mask=rgba)
        return canvas
    return image if image.mode == "RGB" else image.convert("RGB")


def _wide_gray(image: Image.Image, grey_range: GreyRange | int) -> Image.Image:
    """Convert 16-bit, 32-bit and float gray pictures to RGB; Pillow's own conversion would clip them at 255."""
    values = np.asarray(image)
    scale = _float_scale(values) if values.dtype.kind == "f" else _integer_scale(values, grey_range)
    grey = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _BLOCK_ROWS):
        grey[top : top + _BLOCK_ROWS] = scale(values[top : top + _BLOCK_ROWS])
    return Image.fromarray(grey).convert("RGB")


def _integer_scale(values: NDArray[Any], grey_range: GreyRange | int) -> Callable[[NDArray[Any]], NDArray[Any]]:
    low, high = int(values.min()), int(values.max())
    if isinstance(grey_range, GreyRange):
        if low < 0 or high > MOST_GREY:
            span = max(high - low, 1)
            return lambda block: ((block.astype(np.int64) - low) * 255 + span // 2) // span
        white = MOST_GREY if grey_range is GreyRange.FULL else next(most for most in _GREY_RANGES if high <= most)
    else:
        white = grey_range
    table = ((np.arange(white + 1, dtype=np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if low >= 0 and high <= white:
        return lambda block: table[block]
    return lambda block: table[np.clip(block, 0, white)]


def _float_scale(values: NDArray[Any]) -> Callable[[NDArray[Any]], NDArray[Any]]:
    finite = np.isfinite(values)
    low = float(np.min(values, where=finite, initial=np.inf))
    high = float(np.max(values, where=finite, initial=-np.inf))
    if not finite.any() or (low >= 0 and high <= 1):
        low, high = 0.0, 1.0
    factor = 255 / (high - low) if high > low else 1.0

    def scale(block: NDArray[Any]) -> NDArray[Any]:
        grey = np.clip((block.astype(np.float64) - low) * factor + 0.5, 0, 255)
        return np.nan_to_num(grey, copy=False, nan=0).astype(np.uint8)

    return scale


def cut_tiles(picture: Image.Image, grid: Grid, rule: PixelRule, out: NDArray[np.uint8]) -> int:
    """Write the tiles of an RGB picture, and return their number.

    Args:
        picture: The result of `upright_rgb`.
        grid: The result of `choose_grid` for its size.
        rule: Everything that decides the pixels.
        out: uint8 [n, side, side, 3], n at least `decoded_tile_count(grid, rule)`; its first tiles are filled.
    """
    side = rule.tiling.tile_size
    count = 0
    for view in views_of(*picture.size, grid, rule):
        resized = _resize(picture, view, side)
        for top in range(0, view.rows * side, side):
            for left in range(0, view.columns * side, side):
                # Tile by tile, because Pillow exports small pictures several times as fast as a large one.
                out[count] = np.asarray(resized.crop((left, top, left + side, top + side)))
                count += 1
    return count


def _resize(picture: Image.Image, view: View, side: int) -> Image.Image:
    """Return the part of a resized picture that a view's tiles cover.

    The filter is bicubic, and the horizontal pass comes first, as in training; Pillow 13 may change the order.
    """
    width, height = view.columns * side, view.rows * side
    if picture.width != view.width:
        picture = picture.resize((view.width, picture.height), Image.Resampling.BICUBIC)
    if view.width != width:
        # The vertical pass does not mix columns, so it can leave out those outside the tiles.
        picture = picture.crop((view.left, 0, view.left + width, picture.height))
    if picture.height != view.height:
        picture = picture.resize((width, view.height), Image.Resampling.BICUBIC)
    if view.height != height:
        picture = picture.crop((0, view.top, width, view.top + height))
    return picture
