"""Find connected groups of images from pairs: a union-find that takes many pairs at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Links:
    """Groups of numbers that are connected by pairs."""

    def __init__(self, count: int) -> None:
        self._root = np.arange(count)
        """For each number a number of the same group; following them leads to the lowest one."""

    def add(self, first: NDArray[Any], second: NDArray[Any]) -> None:
        """Link pairs of numbers."""
        new = self.are_apart(first, second)
        for one, other in zip(first[new].tolist(), second[new].tolist(), strict=True):
            root, other_root = self._find(one), self._find(other)
            self._root[max(root, other_root)] = min(root, other_root)

    def are_apart(self, first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
        """Return a mask of pairs that are not connected yet."""
        self._flatten()
        apart: NDArray[Any] = self._root[first] != self._root[second]
        return apart

    def groups(self) -> list[NDArray[Any]]:
        """Return groups of at least two connected numbers, in order."""
        self._flatten()
        order = np.argsort(self._root, kind="stable")
        bounds = np.flatnonzero(np.diff(self._root[order], prepend=-1))
        return [group for group in np.split(order, bounds[1:]) if len(group) > 1]

    def _flatten(self) -> None:
        """Make every number point directly to the root of its group."""
        while (self._root[self._root] != self._root).any():
            self._root = self._root[self._root]

    def _find(self, number: int) -> int:
        while self._root[number] != number:
            number = int(self._root[number])
        return number
