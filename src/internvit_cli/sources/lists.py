"""Read lists of paths, separated by newlines or NUL, as a stream."""

from __future__ import annotations

import os
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from typing import TYPE_CHECKING

from internvit_cli.errors import UsageError
from internvit_cli.sources.signatures import is_picture, kind_by_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_BLOCK = 1 << 20
_QUOTES = (b'"', b"'")


def read_list(stream: BinaryIO, null_separated: bool) -> Iterator[bytes]:
    """Yield the paths of a list in order, without empty ones and without a UTF-8 byte order mark.

    In a list of lines, a carriage return before a newline is dropped. A name that ends in a carriage return or contains
    a newline needs a NUL-separated list.

    Raises:
        UsageError: The file is not a list of names: it is in UTF-16, compressed, or has NUL bytes in its lines.
    """
    paths = _null_ended(stream) if null_separated else _lines(stream)
    yield from filter(None, (path.removeprefix(BOM_UTF8) for path in _first(paths)))
    yield from paths


def unquoted(line: bytes, root: bytes) -> bytes:
    """Return a line without its quotes, if a file below the root exists without them and none with them."""
    if len(line) < 3 or line[:1] not in _QUOTES or line[-1:] != line[:1] or os.path.lexists(os.path.join(root, line)):
        return line
    inner = line[1:-1].replace(2 * line[:1], line[:1])
    return inner if os.path.lexists(os.path.join(root, inner)) else line


def _first(paths: Iterator[bytes]) -> Iterator[bytes]:
    for path in paths:
        yield path
        return


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    is_first, is_marked = True, False
    for line in stream:
        if is_first:
            is_first, is_marked = False, line.startswith((BOM_UTF16_LE, BOM_UTF16_BE))
            kind = kind_by_bytes(line)
            if kind or is_picture(line):
                what = kind.name if kind else "a picture"
                raise UsageError(f"the list is {what}", "give the paths as plain text, one per line")
        path = line.removesuffix(b"\n").removesuffix(b"\r")
        if b"\0" in path:
            raise _holds_nul(line, is_marked=is_marked)
        if path:
            yield path


def _holds_nul(line: bytes, *, is_marked: bool) -> UsageError:
    """Return the error for a list of lines with a NUL byte."""
    if is_marked or 3 * line.count(0) > len(line):  # every other byte of Latin text in UTF-16 is NUL
        return UsageError(
            "the list is text in UTF-16", "save it as UTF-8, for example with: iconv -f UTF-16 -t UTF-8 LIST > list.txt"
        )
    return UsageError("the list holds NUL bytes", "add -0 if the names of the list end in NUL")


def _null_ended(stream: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(_BLOCK):
        *paths, rest = (rest + block).split(b"\0")
        yield from filter(None, paths)
    if rest:
        yield rest
