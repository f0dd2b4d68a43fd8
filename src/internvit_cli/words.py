"""Numbers in sentences."""

from __future__ import annotations


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
