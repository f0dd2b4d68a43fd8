"""Match patterns like those of .gitignore against names that are bytes.

As in git, a pattern with a slash at its start or within is anchored to the walked folder; any other matches a name at
any depth. A pattern that ends in a slash matches only folders; `**` matches any number of folders; `!` takes back what
an earlier pattern excludes, and the last pattern that matches decides. Patterns come from the command line, not from
the lines of a file, so `#` starts no comment, and trailing spaces count.
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
    """The pattern as given."""
    expression: bytes
    """A regular expression without capturing groups for whole paths relative to the walked folder."""
    takes_back: bool
    """Whether the pattern begins with `!`."""
    folders_only: bool
    is_literal: bool
    """Whether the pattern has no wildcard, and so names exactly one thing."""


class Patterns:
    """An ordered list of patterns, of which the last that matches decides."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        # A regular expression takes the first alternative that matches, so the last pattern comes first.
        self._of_folders = tuple(reversed(patterns))
        self._of_files = tuple(pattern for pattern in self._of_folders if not pattern.folders_only)
        self._folder = _alternatives(self._of_folders)
        self._file = _alternatives(self._of_files)

    def __bool__(self) -> bool:
        return bool(self._of_folders)

    def folder(self, path: bytes) -> Pattern | None:
        """Return the pattern that decides on a folder; None if none matches."""
        return _first(self._folder, self._of_folders, path)

    def file(self, path: bytes) -> Pattern | None:
        """Return the pattern that decides on a file; None if none matches."""
        return _first(self._file, self._of_files, path)


def parse_pattern(text: str, option: str, *, ignore_case: bool = False) -> Pattern:
    """Translate one pattern.

    Args:
        text: The pattern.
        option: The option that gave it, for messages.
        ignore_case: Whether upper and lower case are the same.

    Raises:
        UsageError: The pattern cannot match anything, for example because a bracket is not closed.
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
            f"{option} {one_line(text)!r}: the pattern matches nothing",
            "give a pattern such as thumbs/ or '*.png' or /a/b",
        )
    try:
        expression = _path_expression(parts if is_anchored else [b"**", *parts])
        re.compile(expression)
    except (ValueError, re.error) as error:
        raise UsageError(
            f"{option} {one_line(text)!r}: {error}", "write a backslash before a literal bracket"
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
    """Return the expression for whole paths; a final `**` matches what is below, not the folder itself."""
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
                    raise ValueError("it ends in a backslash")
            expression += re.escape(letter)
    return expression


def _end_of_bracket(part: bytes, start: int) -> int:
    """Return the position of a bracket's `]`, which is not its first character, in a class, or after a backslash."""
    position = start + (part[start : start + 1] in {b"!", b"^"})
    first = position
    while position < len(part):
        if part[position : position + 1] == b"]" and position > first:
            return position
        if named := _NAMED_CLASS.match(part, position):
            position = named.end()
        else:
            position += 2 if part[position : position + 1] == b"\\" else 1
    raise ValueError("a bracket is not closed")


def _bracket(inside: bytes) -> bytes:
    """Return the expression for one character, which is never a slash."""
    is_negated = inside[:1] in {b"!", b"^"}
    letters, position, inside = b"", 0, inside[is_negated:]
    while position < len(inside):
        if named := _NAMED_CLASS.match(inside, position):
            if named[1] not in _CLASSES:
                raise ValueError(f"there is no character class {one_line(named[1])}")
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
