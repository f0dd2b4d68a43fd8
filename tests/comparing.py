"""Comparisons of what may be large: pytest computes for minutes how megabytes of bytes differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def same_bytes(one: NDArray[Any] | bytes | Path, other: NDArray[Any] | bytes | Path) -> bool:
    """Whether two arrays, or the contents of two files, are equal bit for bit."""
    left, right = (_bytes_of(value) for value in (one, other))
    return left == right


def _bytes_of(value: NDArray[Any] | bytes | Path) -> bytes:
    if isinstance(value, Path):
        return value.read_bytes()
    return value if isinstance(value, bytes) else value.tobytes()
