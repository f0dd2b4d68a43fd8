"""Read the masks of images: PNG files whose pixel values are class numbers.

Masks are files from others, so they are opened and decoded with the same limits as pictures. A mask that cannot be used
is a text that says why, never an exception.
"""

from __future__ import annotations

import os
import posixpath
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from internvit_cli.config import DEFAULT_MAX_PIXELS, PixelRule, Skipped
from internvit_cli.decode.pictures import upright
from internvit_cli.errors import UsageError, one_line, system_words
from internvit_cli.plan.png_chunks import SIGNATURE, despite_texts
from internvit_cli.runtime.untrusted import read_bounded
from internvit_cli.runtime.words import counted
from internvit_cli.sources.files import open_picture, pillow_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.sources.files import OpenPicture
    from internvit_cli.storage.read.image import ImageFeatures
    from internvit_cli.storage.read.reader import Features

SUFFIX = ".png"
CLASSES = "classes.txt"
IGNORED, IGNORED_WIDE = 255, 65535
"""Pixels of no class; the second value in masks of 16 bits, beside the first."""
MOST_CLASSES = 4096
"""More numbers than this are not classes, but depths or instances."""
_LARGEST_NAMES = 16 << 20
_GRAY, _PALETTE = 0, 3
"""Color types of a PNG."""
_STEPS = {2: 85, 4: 17}
"""By how much Pillow multiplies gray values of fewer than 8 bits, by their number of bits."""
_COLORS = {2: "RGB colors", 4: "gray with transparency", 6: "RGB colors with transparency"}


@dataclass(frozen=True, slots=True)
class MaskFolder:
    """A folder of masks, in which each has the key of its image as its name."""

    path: str
    names: tuple[str, ...] | None
    """The names of classes 0, 1, ... in classes.txt; None if there is no such file."""

    def find(self, key: str) -> str | None:
        """Return the path of the mask of an image; None if it has none.

        That of `a/b.jpg` is `a/b.jpg.png`, or else `a/b.png`.
        """
        if key.startswith("/") or ".." in key.split("/"):  # no key leads out of the folder
            return None
        names = (key + SUFFIX, posixpath.splitext(key)[0] + SUFFIX)
        return next((path for name in names if os.path.lexists(path := os.path.join(self.path, name))), None)

    def name_of(self, number: int) -> str:
        """Return the name of a class."""
        return str(number) if self.names is None else self.names[number]


def open_masks(path: str) -> MaskFolder:
    """Return a folder of masks.

    Raises:
        UsageError: There is no such folder, or its classes.txt cannot be used.
    """
    if not os.path.isdir(path):
        what = "not a folder" if os.path.lexists(path) else "there is no such folder"
        raise UsageError(f"--masks {path}: {what}", "name the folder that holds a PNG per image")
    file = os.path.join(path, CLASSES)
    if not os.path.lexists(file):
        return MaskFolder(path, None)
    try:
        lines = read_bounded(file, _LARGEST_NAMES).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        why = system_words(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{file}: {why}", "write the name of class 0 in line 1, and so on") from error
    while lines and not lines[-1].strip():
        lines.pop()
    names = tuple(line.strip() or str(number) for number, line in enumerate(lines))
    if double := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise UsageError(f"{file}: two classes are named {one_line(double)}", "give each class a name of its own")
    return MaskFolder(path, names)


def find_masks(folder: MaskFolder, outputs: Sequence[Features]) -> list[list[str | None]]:
    """Return the paths of the masks of all images, per output in the order of its images; None for those without.

    Raises:
        UsageError: No image has a mask, or one mask fits two pictures.
    """
    owners: dict[str, ImageFeatures] = {}
    found = []
    for features in outputs:
        paths = [folder.find(key) for key in features]
        for number, path in enumerate(paths):
            if path is None:
                continue
            image = features[number]
            owner = owners.setdefault(path, image)
            if owner.key != image.key or owner.digest != image.digest:
                raise UsageError(*_two_owners(path, owner, image))
        found.append(paths)
    if not owners:
        keys = [key for features in outputs for key in features]
        example = f": the mask of {one_line(keys[0])} would be {one_line(os.path.splitext(keys[0])[0])}{SUFFIX}"
        raise UsageError(
            f"--masks {folder.path}: no mask has the name of an image{example if keys else ''}",
            "name each mask as the key of its image, in the same folders",
        )
    return found


def _two_owners(path: str, one: ImageFeatures, other: ImageFeatures) -> tuple[str, str]:
    if one.key == other.key:
        return (
            f"{one_line(one.key)} is in both outputs as different pictures, but has one mask",
            "extract both parts from the folder that holds them both, so that keys differ",
        )
    return (
        f"{one_line(path)} would be the mask of both {one_line(one.key)} and {one_line(other.key)}",
        f"name masks with the whole key, such as {one_line(one.key)}{SUFFIX}",
    )


# ------------------------------------------------------------------------------------------------------------- pixels


def read_mask(path: str, image: ImageFeatures) -> NDArray[Any] | str:
    """Return the class numbers of the part of an image that its tokens cover, or why they cannot be used.

    Args:
        path: The PNG file.
        image: The image, whose proportions the mask must have. Its orientation is applied to the mask if the mask fits
            only then.

    Returns:
        Class numbers [h, w], uint8 or uint16, at the resolution of the mask.
    """
    rule = PixelRule(max_pixels=max(DEFAULT_MAX_PIXELS, image.width * image.height))
    picture = open_picture(os.fsencode(path))
    if isinstance(picture, Skipped):
        return picture.message
    with picture:
        try:
            turn = _turn_of(picture, image, rule)
            if isinstance(turn, str):
                return turn
            with pillow_settings(rule):
                values = despite_texts(lambda stream: _values(stream, turn), picture.stream())
        except Exception as error:  # noqa: BLE001 -- damaged pictures make Pillow raise nearly anything.
            return picture.failure(error, rule.max_pixels).message
        bits = picture.at(24, 2)
    if bits[1] == _GRAY and bits[0] in _STEPS:
        values = values // _STEPS[bits[0]]
    return _covered(values, image)


def _turn_of(picture: OpenPicture, image: ImageFeatures, rule: PixelRule) -> int | str:
    """Return the orientation to apply to a mask, 1 for none, or why it cannot be the mask of an image."""
    head = picture.at(0, 33)
    if len(head) < 33 or not head.startswith(SIGNATURE + b"\0\0\0\x0dIHDR"):
        return "it is not a PNG file"
    width, height, _, color = struct.unpack_from(">LLBB", head, 16)
    if color not in (_GRAY, _PALETTE):
        return f"it has {_COLORS.get(color, 'an unknown kind of pixels')} instead of class numbers"
    if not 0 < width * height <= rule.max_pixels:
        return f"it has {width * height:,} pixels, which is not from 1 to {rule.max_pixels:,}"
    size = image.width, image.height
    turns = [1, image.orientation] if image.orientation >= 5 else [1]
    fitting = (
        turn
        for fits in (_is_same, _is_in_proportion)
        for turn in turns
        if fits((width, height) if turn == 1 else (height, width), size)
    )
    problem = f"it has {width} x {height} pixels, but the picture has {image.width} x {image.height}"
    return next(fitting, problem)


def _is_same(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    return mask == picture


def _is_in_proportion(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    """Return whether a mask is the picture made larger or smaller, and rounded to whole pixels up or down."""
    (width, height), (across, down) = mask, picture
    # Some factor must give both sides within one pixel.
    return max((width - 1) * down, (height - 1) * across) < min((width + 1) * down, (height + 1) * across)


def _values(stream: BinaryIO, orientation: int) -> NDArray[Any]:
    with Image.open(stream, formats=("PNG",)) as opened:
        opened.load()
        values = np.asarray(upright(opened, orientation))
        return values.astype(np.uint8 if values.dtype.itemsize == 1 else np.uint16)


def _covered(values: NDArray[Any], image: ImageFeatures) -> NDArray[Any]:
    height, width = values.shape
    left, top, right, bottom = image.covered
    return values[_span(top, bottom, height, image.height), _span(left, right, width, image.width)]


def _span(start: float, stop: float, size: int, full: int) -> slice:
    """Return the pixels, at least one of `size`, that lie between two places on a side of `full` pixels."""
    first = min(size - 1, round(start * size / full))
    return slice(first, max(first + 1, round(stop * size / full)))


def is_of_class(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which pixels have a class, of the same shape."""
    has_class: NDArray[np.bool_] = values != IGNORED
    return has_class if values.dtype == np.uint8 else has_class & (values != IGNORED_WIDE)


# ------------------------------------------------------------------------------------------------------------- survey


@dataclass(frozen=True, slots=True)
class PixelSample:
    """Some pixels of a mask that have a class."""

    places: NDArray[np.float32]
    """Their places as shares of the width and the height, 0 to 1, [n, 2]."""
    numbers: NDArray[np.int32]
    """Their class numbers, [n]."""


def sample_pixels(values: NDArray[Any], most: int, random: np.random.Generator) -> PixelSample:
    """Return up to `most` pixels that have a class, drawn evenly; all of them if there are not more."""
    flat = np.flatnonzero(is_of_class(values))
    if len(flat) > most:
        flat = flat[random.integers(0, len(flat), most)]
    rows, columns = np.divmod(flat, values.shape[1])
    places = np.stack([(columns + 0.5) / values.shape[1], (rows + 0.5) / values.shape[0]], axis=1)
    return PixelSample(places.astype(np.float32), values.ravel()[flat].astype(np.int32))


def numbers_in(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return the class numbers that occur in a mask, ascending."""
    counts = np.bincount(values.ravel())
    counts[[number for number in (IGNORED, *[IGNORED_WIDE] * (values.dtype != np.uint8)) if number < len(counts)]] = 0
    return np.flatnonzero(counts)


def check_classes(folder: MaskFolder, numbers: Sequence[NDArray[np.int64]], paths: Sequence[str]) -> tuple[int, ...]:
    """Return the class numbers that occur in masks, ascending.

    Args:
        folder: The folder, whose classes.txt must name them all.
        numbers: The numbers in each mask.
        paths: The paths of the masks.

    Raises:
        UsageError: There are too few of them or too many, or one has no name.
    """
    classes = sorted(set().union(*(own.tolist() for own in numbers)))
    if folder.names is not None and classes and classes[-1] >= len(folder.names):
        strange = next(path for path, own in zip(paths, numbers, strict=True) if len(own) and own[-1] == classes[-1])
        raise UsageError(
            f"{one_line(strange)} holds class {classes[-1]}, but {CLASSES} names "
            f"{counted(len(folder.names), 'class', 'classes')}, from 0",
            f"name all classes in {CLASSES}; {IGNORED} is for pixels of no class",
        )
    if len(classes) < 2:
        only = f": all pixels of the masks are {folder.name_of(classes[0])}" if classes else ""
        raise UsageError(
            f"a probe needs at least two classes{only}",
            f"write class numbers such as 0 and 1; pixels of {IGNORED} are ignored",
        )
    if len(classes) > MOST_CLASSES:
        raise UsageError(
            f"--masks {folder.path}: the masks hold {len(classes):,} classes, more than {MOST_CLASSES:,}",
            "pixel values must be classes, rather than instances or depths",
        )
    return tuple(classes)


def refuse_unusable(problems: Iterable[tuple[str, str]]) -> None:
    """Refuse masks that cannot be used.

    Args:
        problems: The paths and why they cannot be used.

    Raises:
        UsageError: Names the first of them, and says how many there are.
    """
    found = list(problems)
    if found:
        path, why = found[0]
        others = f"; {counted(len(found) - 1, 'other mask')} cannot be used either" if len(found) > 1 else ""
        raise UsageError(
            f"{one_line(path)}: {why}{others}",
            "a mask is a gray or palette PNG of class numbers, in the size or the proportions of its picture",
        )
