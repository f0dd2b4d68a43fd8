"""Read the sizes and orientations of pictures from the first bytes of their files, without decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from internvit_cli.config import DEFAULT_MAX_PIXELS, DRAWN_BY, PixelRule, Skipped, Status
from internvit_cli.plan.orientation import UPRIGHT, XMP, metadata_orientation, valid_orientation, xmp_orientation
from internvit_cli.plan.png_chunks import despite_texts, png_orientation
from internvit_cli.plan.quick_headers import quick_header
from internvit_cli.plan.table import modified_ns
from internvit_cli.plan.tiling import largest_resized
from internvit_cli.sources.files import open_picture, pillow_settings, readable_formats, too_many_pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import BinaryIO

    from internvit_cli.sources.files import OpenPicture

_MARK = b"tEXt" + "\0".join(DRAWN_BY).encode()
_MARK_AT = 8 + 25 + 4
"""Position of internvit's mark in a PNG: after the signature, the first chunk and the length of the second."""
_ORIENTATION_TAG = 0x0112


class Header(NamedTuple):
    """What is known about a picture before it is decoded."""

    width: int
    """The width in pixels, after orientation."""
    height: int
    """The height in pixels, after orientation."""
    orientation: int
    """The EXIF orientation that decoding applies, 1 to 8; 1 for none."""
    file_size: int
    """Bytes."""
    file_mtime_ns: int


class OwnDrawing(NamedTuple):
    """A picture that internvit itself drew, and that happens to lie in a source."""

    outcome: Header | Skipped
    """The result of reading it like any other picture."""


def read_header(path: bytes, rule: PixelRule) -> Header | Skipped:
    """Read the header of one file, even if internvit drew it; see `read_headers`."""
    found = read_headers((path,), rule)[0]
    return found.outcome if isinstance(found, OwnDrawing) else found


def read_headers(paths: Iterable[bytes], rule: PixelRule) -> list[Header | OwnDrawing | Skipped]:
    """Read the headers of files; only one thread of a process may do so at a time.

    Args:
        paths: The files; links are followed.
        rule: Whether EXIF is applied, and the pixel limit.

    Returns:
        For each path, in order, its header or the reason why it cannot be used.
    """
    with pillow_settings(rule):
        return [_read(path, rule) for path in paths]


def header_reader(rule: PixelRule) -> Callable[[list[bytes]], list[Header | OwnDrawing | Skipped]]:
    """Return the function that a planning worker runs: `read_headers` with one rule."""
    return lambda paths: read_headers(paths, rule)


def _read(path: bytes, rule: PixelRule) -> Header | OwnDrawing | Skipped:
    picture = open_picture(path)
    if isinstance(picture, Skipped):
        return picture
    with picture:
        if not picture.size:
            return Skipped(Status.NOT_AN_IMAGE, "", "the file is empty")
        try:
            return _inspect(picture, rule)
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            return _marked(picture, picture.failure(error, rule.max_pixels))


def _inspect(picture: OpenPicture, rule: PixelRule) -> Header | OwnDrawing | Skipped:
    quick = quick_header(picture)
    if quick is None:
        upright = despite_texts(lambda stream: _opened(stream, picture, rule), picture.stream())
    else:
        upright = _upright(quick.width, quick.height, quick.orientation if rule.exif else UPRIGHT)
    return _marked(picture, _usable(upright, picture, rule))


def _opened(stream: BinaryIO, picture: OpenPicture, rule: PixelRule) -> tuple[int, int, int]:
    """Return the upright width, height and orientation of a picture that Pillow opens."""
    image = Image.open(stream, formats=readable_formats())
    if image.format == "PNG":  # Pillow sees all of its metadata only after decoding
        return _upright(*image.size, png_orientation(picture) if rule.exif else UPRIGHT)
    return upright_size(image, rule)


def _usable(upright: tuple[int, int, int], picture: OpenPicture, rule: PixelRule) -> Header | Skipped:
    width, height, orientation = upright
    time = modified_ns(picture.status)
    return size_problem(width, height, rule) or Header(width, height, orientation, picture.size, time)


def _marked(picture: OpenPicture, outcome: Header | Skipped) -> Header | OwnDrawing | Skipped:
    """Return the outcome, marked as `OwnDrawing` if the file has internvit's mark."""
    try:
        return OwnDrawing(outcome) if picture.at(_MARK_AT, len(_MARK)) == _MARK else outcome
    except OSError:  # the outcome has the same reason
        return outcome


def upright_size(image: Image.Image, rule: PixelRule) -> tuple[int, int, int]:
    """Return the width and height in pixels after a picture is turned upright, and the orientation to apply.

    Args:
        image: A picture that is not loaded yet.
        rule: Whether its orientation is applied.
    """
    if image.format == "TIFF":
        # Pillow turns a TIFF while it loads it. Its size is already turned, unless only XMP has the orientation.
        by_xmp = valid_orientation(xmp_orientation(None, image.info.get(XMP)))
        is_said = _ORIENTATION_TAG in getattr(image, "tag_v2", ())
        return (*_upright(*image.size, UPRIGHT if is_said else by_xmp)[:2], UPRIGHT)
    return _upright(*image.size, metadata_orientation(image.info) if rule.exif else UPRIGHT)


def loaded_size(image: Image.Image, rule: PixelRule) -> tuple[int, int, int]:
    """Return the result of `upright_size` for a loaded picture: its metadata is complete, and a TIFF is upright."""
    counts = rule.exif and image.format != "TIFF"
    return _upright(*image.size, metadata_orientation(image.info) if counts else UPRIGHT)


def _upright(width: int, height: int, orientation: int) -> tuple[int, int, int]:
    return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def size_problem(width: int, height: int, rule: PixelRule) -> Skipped | None:
    """Return why a picture of this size in pixels is not decoded; None if it is."""
    if min(width, height) < 1:
        return Skipped(Status.TRUNCATED, "", f"a size of {width} x {height} pixels")
    if width * height > rule.max_pixels:
        return too_many_pixels(width * height, f"{width} x {height} are", rule.max_pixels)
    # A low limit applies to pictures, and must not forbid the tiles that small pictures are resized to.
    limit = max(rule.max_pixels, DEFAULT_MAX_PIXELS)
    resized = largest_resized(width, height, rule)
    if resized > limit:
        return too_many_pixels(resized, f"{width} x {height} would be resized through", limit)
    return None
