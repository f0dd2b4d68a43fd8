"""Lists of paths, one a line or ended by NUL, read as a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internvit_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_BLOCK = 1 << 20


def read_list(stream: BinaryIO, null_separated: bool) -> Iterator[bytes]:
    """The paths of a list, in order; empty ones are left out.

    In a list of lines a carriage return before the line end is dropped with it, so a name that ends in one, or that
    has a line end within, needs a NUL-separated list.

    Raises:
        UsageError: a NUL in a list of lines, which no path can hold.
    """
    yield from _null_ended(stream) if null_separated else _lines(stream)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    for line in stream:
        path = line.removesuffix(b"\n").removesuffix(b"\r")
        if b"\0" in path:
            raise UsageError("the list holds NUL bytes", "give -0 for a list whose names end in NUL")
        if path:
            yield path


def _null_ended(stream: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while block := stream.read(_BLOCK):
        *paths, rest = (rest + block).split(b"\0")
        yield from filter(None, paths)
    if rest:
        yield rest
