"""Parse the values of options. An error says what was expected; `settings` adds where the value came from."""

from __future__ import annotations

import math
import re
from enum import Enum
from typing import TYPE_CHECKING, Any

from internvit_cli.config import AnyEnum, member_named, names_of
from internvit_cli.runtime.words import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.cli.declarations import Parameter

TRUE, FALSE = ("1", "true", "t", "yes", "y", "on"), ("0", "false", "f", "no", "n", "off")
BINARY_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
MOST_BYTES = 1 << 63
AUTO = "auto"
LONGEST_NUMBER = 40
"""Longest number that is parsed, in characters; Python is slow on thousands of digits."""


class UnusableWordError(ValueError):
    """A text is not a value of its option."""

    def __init__(self, expected: str, hint: str = "") -> None:
        """Describe what was expected.

        Args:
            expected: Completes "X is 'abc', not ...", such as "a whole number from 1 to 12".
            hint: What to give instead, if `expected` does not say it.
        """
        super().__init__(expected)
        self.expected = expected
        self.hint = hint


def value_of(parameter: Parameter, word: str) -> Any:
    """Parse the value of a parameter.

    Raises:
        UnusableWordError: The text is not a value of the parameter.
    """
    if parameter.parser is not None:
        return parameter.parser(word)
    if parameter.is_flag:
        return flag(word)
    if issubclass(parameter.kind, Enum):
        return member(parameter.kind, word)
    if parameter.kind is int:
        return number(word, int, "a whole number", parameter.least, parameter.most)
    if parameter.kind is float:
        return number(word, float, "a number", parameter.least, parameter.most)
    return word


def flag(word: str) -> bool:
    """Parse the value of a flag's variable."""
    if word.lower() in TRUE + FALSE:
        return word.lower() in TRUE
    raise UnusableWordError("true or false")


def member(kind: type[AnyEnum], word: str) -> AnyEnum:
    """Parse a member of an Enum by its name."""
    found = member_named(kind, word)
    if found is None:
        words = [str(one.value) for one in kind]
        raise UnusableWordError(f"one of {', '.join(words)}", did_you_mean(word, names_of(kind)))
    return found


def number(word: str, kind: type, name: str, least: float | None = None, most: float | None = None) -> Any:
    """Parse a number between `least` and `most`."""
    try:
        value = kind(word) if len(word) <= LONGEST_NUMBER and word.isascii() else math.nan
    except ValueError:
        value = math.nan
    if (math.isinf(value) or not value >= (-math.inf if least is None else least)) or (
        most is not None and value > most
    ):
        raise UnusableWordError(name + limits(least, most))
    return value


def limits(least: float | None, most: float | None) -> str:
    """Return the limits of a number in words, after a space; empty if there are none."""
    if most is not None:
        return f" from {least:,} to {most:,}"
    return f" of at least {least:,}" if least is not None else ""


def layers(word: str, expected: str = "a whole number, or several separated by commas") -> tuple[int, ...]:
    """Parse indices into hidden_states, such as `-4,-1`."""
    return tuple(number(part.strip(), int, expected) for part in word.split(","))


def layers_or_auto(word: str) -> tuple[int, ...] | None:
    """Parse indices into hidden_states; return None for `auto`."""
    return None if word == AUTO else layers(word, "auto, a whole number, or several separated by commas")


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser that accepts one of the given words."""

    def parse(word: str) -> str:
        if word not in words:
            raise UnusableWordError(f"one of {', '.join(words)}", did_you_mean(word, words))
        return word

    return parse


def size(least: int) -> Callable[[str], int]:
    """Return a parser of sizes in bytes, such as `4GiB`, `500M` or `1000000`; units are powers of 1024."""

    def parse(word: str) -> int:
        match = SIZE.fullmatch(word.strip()) if len(word) <= LONGEST_NUMBER else None
        bytes_ = float(match[1]) * BINARY_UNITS[match[2].lower()] if match else 0
        if not least <= bytes_ < MOST_BYTES:
            raise UnusableWordError(
                "a size" if least == 1 else f"a size of at least {least >> 20:,}MiB", "give a size such as 4GiB or 800M"
            )
        return int(bytes_)

    return parse
