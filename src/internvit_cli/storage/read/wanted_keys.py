"""Which keys a user means: a key as it is, or a pattern of keys.

In a pattern `*` stands for any characters but a slash, `?` for one of them, `[a-z]` for one of those in brackets and
`[!a-z]` for one that is not; `**` as a whole part stands for any number of folders, at the end for all that is below.
A word that is a key means that key, whatever it has of these.
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
    """A key that no image has, or a pattern that fits none; the hint names what may have been meant."""

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}"


def is_pattern(word: str) -> bool:
    """Whether a word has a wildcard."""
    return _WILDCARD.search(word) is not None


def key_pattern(word: str) -> re.Pattern[str]:
    """The expression that whole keys have to match, as `os.fsdecode` gives them."""
    *folders, last = word.split("/")
    expression = "".join("(?:[^/]+/)*" if part == "**" else _name_expression(part) + "/" for part in folders)
    return re.compile(expression + (".+" if last == "**" else _name_expression(last)), re.DOTALL)


def _name_expression(part: str) -> str:
    """The expression of one part of a key, without slashes."""
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
    """Where the closing bracket is; 0 where there is none, and the opening one stands for itself."""
    first = start + (part[start : start + 1] in ("!", "^"))
    return part.find("]", first + 1) if "]" in part[first + 1 :] else 0


def _bracket_expression(inside: str) -> str:
    """One character out of some, or out of all others, and never a slash."""
    is_negated = inside[0] in "!^"
    letters = inside[1:] if is_negated else inside
    members = []
    while letters:
        if len(letters) > 2 and letters[1] == "-":
            if letters[0] <= letters[2]:  # else there is nothing between them
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
    """Positions of the images that words mean, in the order of the words and then of the keys, each once.

    Args:
        words: keys and patterns.
        keys: of all images, in order.
        find: the position of a key; None when no image has it.
        path: the output, for messages.

    Raises:
        UnknownKeyError: a word that means none.
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
    """The error for a key that no image has; the hint names keys that are like it."""
    near = near_keys(key, keys)
    hint = f"internvit ls {path} lists the keys"
    folder = os.fsencode(key.rstrip("/") + "/")
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif any(other.startswith(folder) for other in keys):
        hint = f"it is a folder: {os.fsdecode(folder)}** means all that is in it"
    return UnknownKeyError(f"{path} has no image {key!r}", hint)


def no_match(pattern: str, keys: Iterable[bytes], path: str) -> UnknownKeyError:
    """The error for a pattern that fits no key."""
    deeper = key_pattern(f"**/{pattern}").fullmatch
    is_deeper = any(deeper(os.fsdecode(key)) for key in keys)
    hint = (
        f"* does not match a slash: did you mean '**/{pattern}'?"
        if is_deeper
        else f"internvit ls {path} lists the keys"
    )
    return UnknownKeyError(f"no key of {path} matches {one_line(pattern)!r}", hint)
