"""Patterns as .gitignore files have them, for names that are bytes.

As git has it: a pattern with a slash at its start or within is anchored to the folder that is walked, any other fits
a name at any depth; one that ends in a slash fits folders only; `**` stands for any number of folders; `!` takes back
what an earlier pattern says, and the last one that fits decides. A pattern is a word of the command line, not a line
of a file: `#` starts no comment, and spaces at its end count.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.errors import UsageError, one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

_CLASSES = {
    b"alnum": rb"0-9A-Za-z",
    b"alpha": rb"A-Za-z",
    b"blank": rb" \t",
    b"digit": rb"0-9",
    b"lower": rb"a-z",
    b"space": rb"\s",
    b"upper": rb"A-Z",
    b"xdigit": rb"0-9A-Fa-f",
}
_NAMED_CLASS = re.compile(rb"\[:(\w+):\]")
_MAGIC = re.compile(rb"[*?[\\]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern, translated."""

    text: str
    """As it was given."""
    expression: bytes
    """A regular expression, without capturing groups, of whole paths relative to the walked folder."""
    takes_back: bool
    """It began with `!`."""
    folders_only: bool
    is_literal: bool
    """It has no wildcard: whoever wrote it meant just this name."""


class Patterns:
    """An ordered list of patterns, the last of which that fits decides."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        # The first alternative that fits is the one that matches, so the last pattern stands first.
        self._of_folders = tuple(reversed(patterns))
        self._of_files = tuple(pattern for pattern in self._of_folders if not pattern.folders_only)
        self._folder = _alternatives(self._of_folders)
        self._file = _alternatives(self._of_files)

    def __bool__(self) -> bool:
        return bool(self._of_folders)

    def folder(self, path: bytes) -> Pattern | None:
        """Return the pattern that decides on a folder; None when none fits."""
        return _first(self._folder, self._of_folders, path)

    def file(self, path: bytes) -> Pattern | None:
        """Return the pattern that decides on a file; None when none fits."""
        return _first(self._file, self._of_files, path)


def parse_pattern(text: str, option: str, *, ignore_case: bool = False) -> Pattern:
    """Translate one pattern.

    Args:
        text: the pattern.
        option: where it stood, for the message.
        ignore_case: letters fit in either case.

    Raises:
        UsageError: it can fit nothing, such as an open bracket.
    """
    path = os.fsencode(text)
    takes_back = path.startswith(b"!")
    path = path.removeprefix(b"!")
    folders_only = path.endswith(b"/")
    parts = path.removesuffix(b"/").split(b"/")
    is_anchored = len(parts) > 1
    if is_anchored and not parts[0]:
        parts = parts[1:]
    if not all(parts) or any(part in {b".", b".."} for part in parts):
        raise UsageError(
            f"{option} {one_line(text)!r}: a pattern that fits nothing", "give one such as thumbs/ or '*.png' or /a/b"
        )
    try:
        expression = _path_expression(parts if is_anchored else [b"**", *parts])
        re.compile(expression)
    except (ValueError, re.error) as error:
        raise UsageError(
            f"{option} {one_line(text)!r}: {error}", "write a backslash before a bracket that means itself"
        ) from error
    expression = b"(?i:" + expression + b")" if ignore_case else expression
    return Pattern(text, expression, takes_back, folders_only, is_literal=_MAGIC.search(path) is None)


def _alternatives(patterns: Sequence[Pattern]) -> re.Pattern[bytes] | None:
    if not patterns:
        return None
    return re.compile(b"|".join(b"(" + pattern.expression + b")" for pattern in patterns), re.DOTALL)


def _first(expression: re.Pattern[bytes] | None, patterns: Sequence[Pattern], path: bytes) -> Pattern | None:
    match = expression.fullmatch(path) if expression else None
    return patterns[match.lastindex - 1] if match and match.lastindex else None


def _path_expression(parts: Sequence[bytes]) -> bytes:
    """The expression of whole paths; a `**` that ends it stands for what is below, not for the folder itself."""
    expression, last = b"", len(parts) - 1
    for number, part in enumerate(parts):
        if part != b"**":
            expression += _name_expression(part) + (b"/" if number < last else b"")
        else:
            expression += b"(?:.*/)?" if number < last else b".+"
    return expression


def _name_expression(part: bytes) -> bytes:
    expression, position = b"", 0
    while position < len(part):
        letter = part[position : position + 1]
        position += 1
        if letter == b"*":
            expression += b"[^/]*"
            while part[position : position + 1] == b"*":
                position += 1
        elif letter == b"?":
            expression += b"[^/]"
        elif letter == b"[":
            end = _end_of_bracket(part, position)
            expression += _bracket(part[position:end])
            position = end + 1
        else:
            if letter == b"\\":
                letter = part[position : position + 1]
                position += 1
                if not letter:
                    raise ValueError("a backslash at its end")
            expression += re.escape(letter)
    return expression


def _end_of_bracket(part: bytes, start: int) -> int:
    """Where a bracket's `]` is: not the first letter, not in a named class, and not behind a backslash."""
    position = start + (part[start : start + 1] in {b"!", b"^"})
    first = position
    while position < len(part):
        if part[position : position + 1] == b"]" and position > first:
            return position
        if named := _NAMED_CLASS.match(part, position):
            position = named.end()
        else:
            position += 2 if part[position : position + 1] == b"\\" else 1
    raise ValueError("a bracket that is not closed")


def _bracket(inside: bytes) -> bytes:
    """The expression of one letter, which is never a slash."""
    is_negated = inside[:1] in {b"!", b"^"}
    letters, position, inside = b"", 0, inside[is_negated:]
    while position < len(inside):
        if named := _NAMED_CLASS.match(inside, position):
            if named[1] not in _CLASSES:
                raise ValueError(f"no class of letters is called {one_line(named[1])}")
            letters += _CLASSES[named[1]]
            position = named.end()
            continue
        letter = inside[position : position + 1]
        position += 1
        if letter == b"\\":
            letter = inside[position : position + 1]
            position += 1
        is_range = letter == b"-" and letters and position < len(inside)
        letters += letter if is_range else re.escape(letter)
    return b"(?!/)[" + (b"^" if is_negated else b"") + letters + b"]"
