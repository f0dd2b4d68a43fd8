"""Find the images that a user names by keys or patterns of keys.

In a pattern, `*` matches any characters except a slash, `?` one of them, `[a-z]` one character of the range, and
`[!a-z]` one that is not in it; `**` between slashes matches any number of folders, and at the end everything below. A
word that is a key matches that key, even if it contains such characters.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from internvit_cli.errors import UsageError, one_line
from internvit_cli.storage.read.near_keys import near_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_WILDCARD = re.compile(r"[*?[]")


class UnknownKeyError(UsageError, KeyError):
    """No image has a key or matches a pattern; the hint names what may have been meant."""

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}"


def is_pattern(word: str) -> bool:
    """Return whether a word contains a wildcard."""
    return _WILDCARD.search(word) is not None


def key_pattern(word: str) -> re.Pattern[str]:
    """Return the expression for whole keys as `os.fsdecode` returns them."""
    *folders, last = word.split("/")
    expression = "".join("(?:[^/]+/)*" if part == "**" else _name_expression(part) + "/" for part in folders)
    return re.compile(expression + (".+" if last == "**" else _name_expression(last)), re.DOTALL)


def _name_expression(part: str) -> str:
    """Return the expression for one part of a key, without slashes."""
    expression: list[str] = []
    place = 0
    while place < len(part):
        letter, place = part[place], place + 1
        if letter == "*":
            if expression[-1:] != ["[^/]*"]:
                expression.append("[^/]*")
        elif letter == "?":
            expression.append("[^/]")
        elif letter == "[" and (end := _end_of_brackets(part, place)):
            expression.append(_bracket_expression(part[place:end]))
            place = end + 1
        else:
            expression.append(re.escape(letter))
    return "".join(expression)


def _end_of_brackets(part: str, start: int) -> int:
    """Return the position of the closing bracket; 0 if there is none, so that the opening one is literal."""
    first = start + (part[start : start + 1] in ("!", "^"))
    return part.find("]", first + 1) if "]" in part[first + 1 :] else 0


def _bracket_expression(inside: str) -> str:
    """Return the expression for one character in or outside a range, and never a slash."""
    is_negated = inside[0] in "!^"
    letters = inside[1:] if is_negated else inside
    members = []
    while letters:
        if len(letters) > 2 and letters[1] == "-":
            if letters[0] <= letters[2]:  # otherwise the range is empty
                members.append(f"{re.escape(letters[0])}-{re.escape(letters[2])}")
            letters = letters[3:]
        else:
            members.append(re.escape(letters[0]))
            letters = letters[1:]
    if not members:
        return "[^/]" if is_negated else "(?!)"
    return f"(?!/)[{'^' if is_negated else ''}{''.join(members)}]"


def find_wanted(
    words: Iterable[str], keys: Sequence[bytes], find: Callable[[bytes], int | None], path: str
) -> list[int]:
    """Return the positions of the images that match words, in the order of words and keys, without duplicates.

    Args:
        words: Keys and patterns.
        keys: The keys of all images, in order.
        find: Returns the position of a key; None if no image has it.
        path: The output, for messages.

    Raises:
        UnknownKeyError: A word matches no image.
    """
    found: dict[int, None] = {}
    for word in words:
        position = find(os.fsencode(word))
        if position is not None:
            found[position] = None
        elif is_pattern(word):
            fits = key_pattern(word).fullmatch
            matches = [number for number, key in enumerate(keys) if fits(os.fsdecode(key))]
            if not matches:
                raise no_match(word, keys, path)
            found |= dict.fromkeys(matches)
        else:
            raise unknown_key(word, keys, path)
    return list(found)


def unknown_key(key: str, keys: Sequence[bytes], path: str) -> UnknownKeyError:
    """Return the error for a key that no image has; the hint names similar keys."""
    near = near_keys(key, keys)
    hint = f"internvit ls {path} lists the keys"
    folder = os.fsencode(key.rstrip("/") + "/")
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif any(other.startswith(folder) for other in keys):
        hint = f"it is a folder: {os.fsdecode(folder)}** means all that is in it"
    return UnknownKeyError(f"{path} has no image {key!r}", hint)


def no_match(pattern: str, keys: Iterable[bytes], path: str) -> UnknownKeyError:
    """Return the error for a pattern that matches no key."""
    deeper = key_pattern(f"**/{pattern}").fullmatch
    is_deeper = any(deeper(os.fsdecode(key)) for key in keys)
    hint = (
        f"* does not match a slash: did you mean '**/{pattern}'?"
        if is_deeper
        else f"internvit ls {path} lists the keys"
    )
    return UnknownKeyError(f"no key of {path} matches {one_line(pattern)!r}", hint)
