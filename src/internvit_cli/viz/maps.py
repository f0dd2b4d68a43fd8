"""What tokens look like: their principal components, their lengths, their similarity to one of them.

Everything that sets colors is fitted over all images together, so that equal colors mean the same in all of them.
Letters: n tokens of C values; a map is [h, w] tokens over the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.viz.draw.palette import DIVERGING, Scale, unit_colors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

FITTED_BYTES = 128 << 20
"""Tokens that components are fitted to, in float32; of more, evenly spread ones."""
SMALL = 1024
"""Up to so many rows or columns, components come from an exact eigendecomposition."""
COLOR_PERCENTILES = (1.0, 99.0)
FAR_OUT = 3.0
"""Tukey's fence: a length beyond the upper quartile by so many interquartile ranges is an outlier."""


@dataclass(frozen=True, slots=True)
class TokenMap:
    """Tokens over a picture."""

    lengths: NDArray[Any]
    """L2 norms, [h, w] float32."""
    directions: NDArray[Any]
    """The tokens at length one, without what their places in the tile share where that is wanted, [h, w, C] float32."""

    @classmethod
    def of(cls, tokens: NDArray[Any], pattern: NDArray[Any] | None = None) -> TokenMap:
        """The map of tokens [h, w, C], less a pattern [s, s, C] that repeats tile by tile."""
        lengths, directions = np.linalg.norm(tokens.astype(np.float32), axis=-1), unit(tokens)
        if pattern is not None:
            side = len(pattern)
            directions -= np.tile(pattern, (tokens.shape[0] // side, tokens.shape[1] // side, 1))
        return cls(lengths, directions)


@dataclass(frozen=True, slots=True)
class MapFit:
    """What the maps of several images have in common."""

    mean: NDArray[Any]
    """Of the directions, [C] float32."""
    axes: NDArray[Any]
    """The first three principal components of the directions, [3, C]."""
    low: NDArray[Any]
    """The component values that are dark, [3]."""
    high: NDArray[Any]
    """And those that are full, [3]."""
    explained: tuple[float, ...]
    """Shares of the variance."""
    lengths: Scale
    outlier: float
    """A length above this is an outlier."""
    foreground: Foreground | None

    def colors(self, tokens: TokenMap) -> NDArray[np.uint8]:
        """The three components of every token as red, green and blue, [h, w, 3] uint8."""
        return unit_colors((tokens.directions - self.mean) @ self.axes.T, self.low, self.high)

    def mask(self, tokens: TokenMap) -> NDArray[Any] | None:
        """Which tokens are foreground, [h, w] bool; None when that was not fitted."""
        return None if self.foreground is None else self.foreground.mask(tokens.directions - self.mean)


@dataclass(frozen=True, slots=True)
class Foreground:
    """Where the first component over all tokens tells things from what is around them."""

    axis: NDArray[Any]
    """[C]; the foreground is on its positive side."""
    threshold: float

    def mask(self, centered: NDArray[Any]) -> NDArray[Any]:
        """Which directions, centered [..., C], are foreground."""
        mask: NDArray[Any] = centered @ self.axis > self.threshold
        return mask


def fit(maps: Iterable[TokenMap], count: int, *, foreground: bool = False) -> MapFit:
    """Fit components, colors and limits over several images' maps.

    Args:
        maps: gives the maps, one at a time.
        count: how many they are.
        foreground: fit the components to the foreground alone.
    """
    lengths, samples, borders = [], [], []
    for tokens in maps:
        width = tokens.directions.shape[2]
        flat = tokens.directions.reshape(-1, width)
        chosen = spread(len(flat), max(16, FITTED_BYTES // (4 * width * count)))
        lengths.append(tokens.lengths.ravel())
        samples.append(flat[chosen])
        borders.append(_is_border(tokens.lengths.shape).ravel()[chosen])
    sample = np.concatenate(samples)
    mean = sample.mean(axis=0)
    sample -= mean
    found = _foreground(sample, np.concatenate(borders)) if foreground else None
    inside = sample[found.mask(sample)] if found else sample
    axes, explained = components(inside if len(inside) > 3 else sample)
    low, high = np.percentile(inside @ axes.T, COLOR_PERCENTILES, axis=0)
    return MapFit(mean, axes, low, high, explained, *_length_limits(np.concatenate(lengths)), found)


def _length_limits(lengths: NDArray[Any]) -> tuple[Scale, float]:
    """The colors of ordinary lengths, and the length above which one is an outlier."""
    quartiles = np.percentile(lengths, [25, 75])
    outlier = float(quartiles[1] + FAR_OUT * (quartiles[1] - quartiles[0]))
    low, high = np.percentile(lengths[lengths <= outlier], COLOR_PERCENTILES)
    return Scale(float(low), float(high)), outlier


def similarity(tokens: TokenMap, one: NDArray[Any], center: NDArray[Any] | None) -> NDArray[Any]:
    """Cosine of every token with one, [h, w].

    Args:
        tokens: of a picture.
        one: a direction, [C].
        center: what is taken off every direction first, [C]; None for plain cosines.
    """
    shift = 0.0 if center is None else center
    cosines: NDArray[Any] = unit(tokens.directions - shift) @ unit(one - shift)
    return cosines


def similarity_scale(cosines: Iterable[NDArray[Any]], *, centered: bool) -> Scale:
    """The colors of similarity over all maps: around 0 when centered, else over the range that there is."""
    values = np.concatenate([cosine.ravel() for cosine in cosines])
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
    if not centered:
        return Scale(low, 1.0)
    limit = max(abs(low), abs(high), 0.05)
    return Scale(-limit, limit, DIVERGING)


def tile_pattern(tiles: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """What tokens owe to their place in the tile: the mean direction at each place less that of all, [s, s, C].

    Args:
        tiles: tokens of tiles, [T, C] each, of many pictures.
    """
    total, count = np.zeros(1), 0
    for count, tokens in enumerate(tiles, 1):  # noqa: B007 - the last one counts
        total = total + unit(tokens)
    mean = (total / max(1, count)).astype(np.float32)
    side = round(len(mean) ** 0.5)
    pattern: NDArray[Any] = (mean - mean.mean(axis=0)).reshape(side, side, -1)
    return pattern


def components(centered: NDArray[Any], count: int = 3) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Principal components, [count, C], their signs fixed, and the share of the variance of each.

    Args:
        centered: [n, C].
        count: how many.

    The sign of each is that in which its largest weight is positive.
    """
    total = float(np.einsum("nc,nc->", centered, centered, dtype=np.float64))
    rows, columns = centered.shape
    if columns <= SMALL:
        vectors = np.linalg.eigh(centered.T.astype(np.float64) @ centered)[1][:, ::-1][:, :count].T
    elif rows <= SMALL:
        gram = centered.astype(np.float64) @ centered.T
        vectors = np.linalg.eigh(gram)[1][:, ::-1][:, :count].T @ centered
    else:
        vectors = _subspace(centered, count)
    vectors = np.vstack([vectors, np.zeros((max(0, count - len(vectors)), columns))])
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    largest = np.abs(vectors).argmax(axis=1)
    vectors *= np.where(vectors[np.arange(count), largest] < 0, -1.0, 1.0)[:, None]
    variances = np.square(centered @ vectors.T.astype(np.float32), dtype=np.float64).sum(axis=0)
    shares = variances / total if total > 0 else variances * 0
    return vectors.astype(np.float32), tuple(float(share) for share in shares)


def _subspace(centered: NDArray[Any], count: int, rounds: int = 60) -> NDArray[Any]:
    """The leading right singular vectors, by iteration from a fixed start."""
    start = np.random.default_rng(0).standard_normal((centered.shape[1], count + 8), np.float32)
    basis = np.linalg.qr(start)[0]
    for _ in range(rounds):
        basis = np.linalg.qr(centered.T @ (centered @ basis))[0]
    small = centered @ basis
    turned = np.linalg.eigh(small.T.astype(np.float64) @ small)[1][:, ::-1]
    vectors: NDArray[Any] = (basis @ turned)[:, :count].T
    return vectors


def _foreground(sample: NDArray[Any], is_border: NDArray[Any]) -> Foreground:
    """Split tokens in two by their first component; what fills the pictures' borders is not the foreground."""
    axis = components(sample)[0][0]
    values = sample @ axis
    threshold = _best_split(values)
    above = values > threshold
    border_above = above[is_border].mean() if is_border.any() else 0.0
    if border_above > above.mean():
        return Foreground(-axis, -threshold)
    return Foreground(axis, threshold)


def _best_split(values: NDArray[Any]) -> float:
    """Otsu's threshold: the one that leaves the least variance within the two sides."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * centres)
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(apart)]) if np.isfinite(apart).any() else float(centres[0])


def unit(vectors: NDArray[Any]) -> NDArray[Any]:
    """Vectors of length one, float32, [..., C]; zeros stay zeros."""
    floats = vectors.astype(np.float32)
    lengths = np.linalg.norm(floats, axis=-1, keepdims=True)
    scaled: NDArray[Any] = floats / np.where(lengths > 0, lengths, 1)
    return scaled


def spread(count: int, most: int) -> NDArray[Any]:
    """At most so many of `count` numbers, evenly spread."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


def _is_border(shape: tuple[int, ...]) -> NDArray[Any]:
    border = np.ones(shape, bool)
    border[1:-1, 1:-1] = False
    return border
