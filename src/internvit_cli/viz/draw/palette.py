"""Map numbers to colors, and draw color bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Color = tuple[int, int, int]

SEQUENTIAL = (
    "#440154",
    "#482878",
    "#3e4a89",
    "#31688e",
    "#26828e",
    "#1f9e89",
    "#35b779",
    "#6dcd59",
    "#b4de2c",
    "#fde725",
)
"""Viridis, whose equal steps look equal, also in gray and to color-blind people."""
DIVERGING = ("#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7", "#f4a582", "#d6604d", "#b2182b")
"""A diverging scale: blue below, red above, and nearly white in the middle."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A color scale for a range of numbers; numbers outside have the color of the nearest end."""

    low: float
    high: float
    stops: tuple[str, ...] = SEQUENTIAL
    """Evenly spaced colors, `#rrggbb`."""

    def colors(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Return the RGB colors of numbers of any shape, [..., 3] uint8; NaN is gray."""
        span = self.high - self.low
        share = (values.astype(np.float64) - self.low) / span if span > 0 else np.full(values.shape, 0.5)
        place = np.clip(np.nan_to_num(share, nan=0.5), 0.0, 1.0) * (len(self.stops) - 1)
        table = np.array([_rgb(stop) for stop in self.stops], np.float64)
        channels = [np.interp(place, np.arange(len(table)), table[:, channel]) for channel in range(3)]
        colors = np.stack(channels, axis=-1)
        colors[np.isnan(share)] = 128
        rounded: NDArray[np.uint8] = np.rint(colors).astype(np.uint8)
        return rounded

    def bar(self, width: int, height: int) -> NDArray[np.uint8]:
        """Return the whole range from left to right, [height, width, 3] uint8."""
        row = self.colors(np.linspace(self.low, self.high, width))
        bar: NDArray[np.uint8] = np.broadcast_to(row, (height, width, 3)).copy()
        return bar


def unit_colors(values: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[np.uint8]:
    """Map three numbers to red, green and blue, [..., 3] uint8: dark at `low`, bright at `high`, clipped outside."""
    span = np.where(high > low, high - low, 1.0)
    colors: NDArray[np.uint8] = np.rint(np.clip((values - low) / span, 0.0, 1.0) * 255).astype(np.uint8)
    return colors


def short_number(value: float) -> str:
    """Format a number with three digits for a label."""
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.1e}"


def _rgb(color: str) -> Color:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
