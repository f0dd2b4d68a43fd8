"""Measure how much two encodings of the same pictures differ, and define how much they may differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from internvit_cli.config import ComputeDtype, StoreDtype
from internvit_cli.storage.format.layout import decode_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internvit_cli.config import Recipe


class Tolerance(NamedTuple):
    """The allowed difference from stored values."""

    relative: float
    """The largest difference, relative to the largest stored magnitude of the image in a dataset."""
    cosine: float
    """The lowest cosine of two tokens, or of two vectors."""


COMPUTE_TOLERANCE = {
    ComputeDtype.FLOAT32: Tolerance(1e-4, 1 - 1e-6),
    ComputeDtype.FLOAT16: Tolerance(0.02, 0.9995),
    ComputeDtype.BFLOAT16: Tolerance(0.1, 0.99),
    ComputeDtype.FP8: Tolerance(0.2, 0.98),
}
"""Allowed difference of the arithmetic in a type, between devices and versions or from float32."""
STORE_TOLERANCE = {
    StoreDtype.FLOAT32: Tolerance(0.0, 1.0),
    StoreDtype.FLOAT16: Tolerance(2.0**-10, 1 - 1e-6),
    StoreDtype.BFLOAT16: Tolerance(2.0**-7, 1 - 2e-5),
    StoreDtype.INT8: Tolerance(1 / 127, 0.96),
    StoreDtype.FP8: Tolerance(2.0**-3, 0.99),
}
"""Additional difference from rounding to the stored type: one unit in the last place. In int8, that unit is relative to
the largest value of a token; the cosine is that of a token with ten thousand values of which one dominates."""


def tolerance(recipe: Recipe) -> Tolerance:
    """Return the allowed difference of a new encoding from rows of a recipe."""
    compute = COMPUTE_TOLERANCE[recipe.compute_dtype]
    store = STORE_TOLERANCE[recipe.store_dtype]
    return Tolerance(compute.relative + store.relative, compute.cosine + store.cosine - 1)


@dataclass(frozen=True, slots=True)
class Differences:
    """How two sets of values differ; for several pairs, the worst of each figure."""

    bit_equal: int = 0
    """The number of values that are equal bit for bit."""
    largest: float = 0.0
    """Absolute difference."""
    relative: float = 0.0
    """The largest difference, relative to the largest stored magnitude."""
    cosine: float = 1.0
    """The lowest cosine of two tokens, or of two vectors."""

    def worst(self, other: Differences) -> Differences:
        """Return the worst of both in each figure."""
        return Differences(
            self.bit_equal + other.bit_equal,
            max(self.largest, other.largest),
            max(self.relative, other.relative),
            min(self.cosine, other.cosine),
        )

    def is_within(self, limit: Tolerance) -> bool:
        """Return whether both figures are within the limit."""
        return self.relative <= limit.relative and self.cosine >= limit.cosine

    def words(self, limit: Tolerance) -> str:
        """Return the figures and their limits in words."""
        return (
            f"largest difference {self.largest:.3g}, which is {self.relative:.2g} of the largest value "
            f"(limit {limit.relative:.2g}); lowest cosine {self.cosine:.6f} (limit {limit.cosine:.6f})"
        )


def compare_values(stored: NDArray[Any], anew: NDArray[Any], dtype: StoreDtype) -> Differences:
    """Compare two versions of a dataset of an image, tile by tile.

    Args:
        stored: The stored values, [n,...,C].
        anew: The new values of the same shape, in the stored type or in float32.
        dtype: The stored type.
    """
    same = stored.dtype == anew.dtype and stored.tobytes() == anew.tobytes()
    largest, cosine, scale = 0.0, 1.0, 0.0
    for one, other in zip(stored, anew, strict=True):
        x = _as_float(one, dtype)
        y = _as_float(other, dtype if other.dtype == stored.dtype else StoreDtype.FLOAT32)
        # A NaN differs infinitely.
        largest = max(largest, float(np.nan_to_num(np.abs(x - y), nan=np.inf, posinf=np.inf).max()))
        scale = max(scale, float(np.abs(x, where=np.isfinite(x), out=np.zeros_like(x)).max()))
        cosine = min(cosine, float(_cosines(x, y).min()))
    relative = largest / scale if scale > 0 else (float("inf") if largest else 0.0)
    return Differences(int(same), largest, relative, cosine)


def _as_float(values: NDArray[Any], dtype: StoreDtype) -> NDArray[Any]:
    """Return stored or new values as vectors [k,C] float64."""
    floats: NDArray[Any] = decode_values(values, dtype).astype(np.float64)
    return floats.reshape(-1, values.shape[-1])


def _cosines(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return the cosine of each pair of rows, [k]; 1 for two rows of zeros."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    dots = np.einsum("kc,kc->k", x, y)
    cosines: NDArray[Any] = np.where(norms > 0, dots / np.where(norms > 0, norms, 1), (x == y).all(axis=1))
    return np.where(np.isnan(cosines), -1.0, cosines)
