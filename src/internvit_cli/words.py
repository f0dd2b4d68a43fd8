"""Numbers and foreign things in sentences."""

from __future__ import annotations

from typing import Any


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun, such as `1 image` or `12,345 images`.

    Args:
        count: how many.
        noun: what is counted, in the singular; several words end in the noun (`pending image`).
        plural: the noun's plural, where that is not the noun with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def counted_of(done: int, total: int, noun: str, plural: str = "") -> str:
    """Return a part of a count with its noun, such as `0 of 1 image` or `3 of 12,345 images`."""
    return f"{done:,} of {counted(total, noun, plural)}"


def described(thing: Any) -> str:
    """Return what something is by its type and size, without its values: for messages about what cannot be used.

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
