"""Format counts and values for messages, and suggest similar words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, such as `1 image` or `12,345 images`.

    Args:
        count: The number.
        noun: What is counted, in the singular; the last word is the noun (`pending image`).
        plural: The plural, if it is not the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def counted_of(done: int, total: int, noun: str, plural: str = "") -> str:
    """Return a part of a total with its noun, such as `0 of 1 image` or `3 of 12,345 images`."""
    return f"{done:,} of {counted(total, noun, plural)}"


def listed(things: Iterable[object]) -> str:
    """Return a list in words, such as `1, 2 and 3`.

    >>> listed([21, 24])
    '21 and 24'
    """
    *rest, last = map(str, things)
    return f"{', '.join(rest)} and {last}" if rest else last


def described(thing: Any) -> str:
    """Describe an object by its type and size, without its values, for messages about invalid arguments.

    >>> described("a.png"), described(None)
    ('an object of type str', 'None')
    """
    if thing is None:
        return "None"
    kind = type(thing)
    name = kind.__name__ if kind.__module__ in {"builtins", "numpy"} else f"{kind.__module__}.{kind.__qualname__}"
    shape = getattr(thing, "shape", None)
    if not isinstance(shape, tuple):
        return f"an object of type {name}"
    return f"a {thing.dtype} array {list(shape)}" if name == "ndarray" else f"an object of type {name} {list(shape)}"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return a hint that names the most similar word, such as `did you mean visual?`; empty if none is similar.

    >>> did_you_mean("visal", ["visual", "patch"])
    'did you mean visual?'
    """
    import difflib

    by_lower = {one.lower(): one for one in words}
    near = difflib.get_close_matches(word.lower(), by_lower, 1)
    return f"did you mean {by_lower[near[0]]}?" if near else ""
