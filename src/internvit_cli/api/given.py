"""Convert every accepted form of a picture into tiles, and refuse everything else with a clear error."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvit_cli.api.in_memory import ImageName, absolute
from internvit_cli.decode.direct import TiledPicture, tile_bytes, tile_file, tile_picture
from internvit_cli.errors import UsageError, one_line
from internvit_cli.runtime.words import described
from internvit_cli.sources.files import system_failure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from internvit_cli.config import PixelRule, Skipped

Picture: TypeAlias = (
    str | os.PathLike[Any] | bytes | bytearray | memoryview | BinaryIO | Mapping[str, Any] | Image.Image | NDArray[Any]
)
"""A picture in any of the forms that `ACCEPTED` lists."""

ACCEPTED = (
    "a picture is a path (str or os.PathLike), the bytes of a file (bytes, bytearray, memoryview), a file opened in "
    'binary mode, a dict with "bytes" or "path", a Pillow image, or a uint8 array [height, width] or '
    "[height, width, 1 to 4 channels]"
)

_ENCODED = (bytes, bytearray, memoryview)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_MOST_CHANNELS = 4


def is_picture(given: Picture | Iterable[Picture]) -> bool:
    """Return whether an argument is a single picture; something that is neither one nor many counts as one."""
    if isinstance(given, (str, os.PathLike, *_ENCODED, Mapping, Image.Image)) or hasattr(given, "read"):
        return True
    dimensions = getattr(given, "ndim", None)
    if isinstance(given, np.ndarray) and given.dtype.kind in "biufc":
        return given.ndim < 4
    # Arrays and tensors of other libraries, whose rows are not pictures.
    return dimensions in {0, 2, 3} or not hasattr(given, "__iter__")


def tile_given(number: int, given: Any, rule: PixelRule) -> tuple[ImageName, TiledPicture | Skipped]:
    """Cut a picture into tiles, or return why that fails; only one thread of a process may do so at a time.

    Args:
        number: The index of the picture among those given, which is its key if it has no name.
        given: The picture, see `ACCEPTED`. A seekable file is read from its beginning, and stays open.
        rule: Everything that decides the pixels.

    Raises:
        UsageError: The argument is not a picture.
    """
    if isinstance(given, (str, os.PathLike)):
        return _of_path(number, given, rule)
    if isinstance(given, _ENCODED):
        return ImageName(str(number), None), tile_bytes(given, rule)
    if isinstance(given, Image.Image):
        return _of_image(number, given, rule)
    if isinstance(given, np.ndarray):
        return ImageName(str(number), None), tile_picture(_as_image(number, given), rule)
    if isinstance(given, Mapping):
        return _of_mapping(number, given, rule)
    if callable(getattr(given, "read", None)):
        return _of_file(number, given, rule)
    raise _refused(number, described(given))


def _of_path(number: int, path: str | os.PathLike[Any], rule: PixelRule) -> tuple[ImageName, TiledPicture | Skipped]:
    name = str(os.fsdecode(path))  # numpy's strings are str too
    if "\0" in name:
        raise _refused(number, "a path with a NUL character", "give the bytes of a file as bytes, not as str")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise _refused(
            number, "a path with a character that file names cannot have", "give the result of os.fsdecode"
        ) from None
    if _URL.match(name) and not os.path.exists(name):
        hint = "decode it with base64.b64decode" if name.startswith("data:") else "download it"
        raise _refused(number, f"a URL ({one_line(name, 60)})", f"{hint}, and give the bytes")
    where = absolute(path)
    return ImageName(name, where), tile_file(where, rule)


def _of_mapping(number: int, given: Mapping[Any, Any], rule: PixelRule) -> tuple[ImageName, TiledPicture | Skipped]:
    """Tile a picture from a dataset: the bytes of a file and its name, or the path of a file."""
    data, path = given.get("bytes"), given.get("path")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise _refused(number, f'a dict whose "path" is {described(path)}')
    if isinstance(data, _ENCODED):
        return ImageName(str(number) if path is None else os.fsdecode(path), None), tile_bytes(data, rule)
    if data is not None:
        raise _refused(number, f'a dict whose "bytes" is {described(data)}')
    if path is None:
        keys = one_line(", ".join(map(str, islice(given, 5))) or "none", 80)
        raise _refused(number, f'a {type(given).__name__} that has neither "bytes" nor "path" (its keys: {keys})')
    return _of_path(number, path, rule)


def _of_file(number: int, file: Any, rule: PixelRule) -> tuple[ImageName, TiledPicture | Skipped]:
    if getattr(file, "closed", False) is True:
        raise _refused(number, "a file that was closed", "encode it while it is open")
    if isinstance(file, io.TextIOBase):
        raise _refused(number, "a file opened as text", 'open it with mode "rb"')
    named = _named_as_file(number, file)
    try:
        if getattr(file, "seekable", bool)():
            file.seek(0)
        data = file.read()
    except io.UnsupportedOperation as error:
        raise _refused(number, f"a file that cannot be read ({error})", 'open it with mode "rb"') from None
    except Exception as error:  # noqa: BLE001 -- files of archives and of networks raise nearly anything.
        return named, system_failure(error)
    if not isinstance(data, _ENCODED):
        raise _refused(number, f"a file whose read() returns {described(data)}", 'open it with mode "rb"')
    return named, tile_bytes(data, rule)


def _named_as_file(number: int, file: Any) -> ImageName:
    """Return the name by which a file was opened, and its path if the file is still there."""
    name = getattr(file, "name", None)
    if not isinstance(name, (str, bytes)) or not name:
        return ImageName(str(number), None)
    try:
        is_there = os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except (AttributeError, OSError, ValueError):  # a member of an archive, a file that is gone
        is_there = False
    return ImageName(os.fsdecode(name), absolute(name) if is_there else None)


def _of_image(number: int, image: Image.Image, rule: PixelRule) -> tuple[ImageName, TiledPicture | Skipped]:
    if _is_closed(image):
        raise _refused(number, "a Pillow image that was closed", "encode it while it is open")
    name = getattr(image, "filename", "")
    named = ImageName(os.fsdecode(name), absolute(name)) if name else ImageName(str(number), None)
    return named, tile_picture(image, rule)


def _is_closed(image: Image.Image) -> bool:
    try:
        image.im  # noqa: B018
    except ValueError:
        return True
    except AssertionError:  # it is open, but not loaded
        pass
    return False


def _as_image(number: int, array: NDArray[Any]) -> Image.Image:
    is_flat = array.ndim == 2
    if array.dtype != np.uint8 or not (is_flat or (array.ndim == 3 and 1 <= array.shape[2] <= _MOST_CHANNELS)):
        raise _refused(number, described(array), _how_to_give(array))
    if not is_flat and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _how_to_give(array: NDArray[Any]) -> str:
    layout = "arrays are uint8 [height, width] or [height, width, 1 to 4 channels]"
    if array.dtype.kind == "f":
        return f"{layout}: values of 0 to 1 become (array * 255).round().astype(np.uint8)"
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[0] <= _MOST_CHANNELS:
        return f"{layout}: channels come last, so array.transpose(1, 2, 0)"
    return layout


def _refused(number: int, what: str, hint: str = ACCEPTED) -> UsageError:
    return UsageError(f"image {number} is {what}", hint)
