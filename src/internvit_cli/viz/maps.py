"""Compute maps of tokens: their principal components, their lengths, and their similarity to one token.

Everything that decides colors is fitted to all images together, so that equal colors mean the same in all of them.
In shapes, n is the number of tokens, C that of their values, and a map has [h, w] tokens over the picture.
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
"""Bytes of float32 tokens to which components are fitted; of more, evenly spread ones are used."""
SMALL = 1024
"""Up to this many rows or columns, components come from an exact eigendecomposition."""
COLOR_PERCENTILES = (1.0, 99.0)
FAR_OUT = 3.0
"""Tukey's fence: lengths this many interquartile ranges above the upper quartile are outliers."""


@dataclass(frozen=True, slots=True)
class TokenMap:
    """The tokens of a picture as a map."""

    lengths: NDArray[Any]
    """L2 norms of the tokens, [h, w] float32."""
    directions: NDArray[Any]
    """The tokens scaled to length one, optionally without the part that depends on the position, [h, w, C] float32."""

    @classmethod
    def of(cls, tokens: NDArray[Any], pattern: NDArray[Any] | None = None) -> TokenMap:
        """Build the map of tokens [h, w, C], minus a pattern [s, s, C] that repeats in each tile."""
        lengths, directions = np.linalg.norm(tokens.astype(np.float32), axis=-1), unit_vectors(tokens)
        if pattern is not None:
            side = len(pattern)
            directions -= np.tile(pattern, (tokens.shape[0] // side, tokens.shape[1] // side, 1))
        return cls(lengths, directions)


@dataclass(frozen=True, slots=True)
class MapFit:
    """What is fitted to the maps of several images together."""

    mean: NDArray[Any]
    """The mean of the directions, [C] float32."""
    axes: NDArray[Any]
    """The first three principal components of the directions, [3, C]."""
    low: NDArray[Any]
    """The component values that are drawn dark, [3]."""
    high: NDArray[Any]
    """The component values that are drawn bright, [3]."""
    explained: tuple[float, ...]
    """The shares of the variance of the components."""
    lengths: Scale
    outlier: float
    """A length above this is an outlier."""
    foreground: Foreground | None

    def colors(self, tokens: TokenMap) -> NDArray[np.uint8]:
        """Return the three components of every token as red, green and blue, [h, w, 3] uint8."""
        return unit_colors((tokens.directions - self.mean) @ self.axes.T, self.low, self.high)

    def mask(self, tokens: TokenMap) -> NDArray[Any] | None:
        """Return a mask of the foreground, [h, w] bool; None if it was not fitted."""
        return None if self.foreground is None else self.foreground.mask(tokens.directions - self.mean)


@dataclass(frozen=True, slots=True)
class Foreground:
    """A split of all tokens by their first component into foreground and background."""

    axis: NDArray[Any]
    """The direction, [C]; the foreground is on its positive side."""
    threshold: float

    def mask(self, centered: NDArray[Any]) -> NDArray[Any]:
        """Return a mask of the foreground among centered directions [..., C]."""
        mask: NDArray[Any] = centered @ self.axis > self.threshold
        return mask


def fit_maps(maps: Iterable[TokenMap], count: int, *, foreground: bool = False) -> MapFit:
    """Fit components, colors and limits to the maps of several images.

    Args:
        maps: The maps, which are read one at a time.
        count: The number of maps.
        foreground: Whether to fit the components only to the foreground.
    """
    lengths, samples, borders = [], [], []
    for tokens in maps:
        width = tokens.directions.shape[2]
        flat = tokens.directions.reshape(-1, width)
        chosen = evenly_spread(len(flat), max(16, FITTED_BYTES // (4 * width * count)))
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
    """Return the color scale of ordinary lengths, and the length above which a token is an outlier."""
    quartiles = np.percentile(lengths, [25, 75])
    outlier = float(quartiles[1] + FAR_OUT * (quartiles[1] - quartiles[0]))
    low, high = np.percentile(lengths[lengths <= outlier], COLOR_PERCENTILES)
    return Scale(float(low), float(high)), outlier


def similarity_map(tokens: TokenMap, one: NDArray[Any], center: NDArray[Any] | None) -> NDArray[Any]:
    """Return the cosine of every token with one direction, [h, w].

    Args:
        tokens: The tokens of a picture.
        one: The direction, [C].
        center: The mean to subtract from every direction first, [C]; None for plain cosines.
    """
    shift = 0.0 if center is None else center
    cosines: NDArray[Any] = unit_vectors(tokens.directions - shift) @ unit_vectors(one - shift)
    return cosines


def similarity_scale(cosines: Iterable[NDArray[Any]], *, centered: bool) -> Scale:
    """Return the color scale of similarity over all maps: around 0 if centered, otherwise over their range."""
    values = np.concatenate([cosine.ravel() for cosine in cosines])
    low, high = (float(value) for value in np.percentile(values, (0.5, 99.5)))
    if not centered:
        return Scale(low, 1.0)
    limit = max(abs(low), abs(high), 0.05)
    return Scale(-limit, limit, DIVERGING)


def tile_pattern(tiles: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """Return the part of tokens that depends on their position in the tile, [s, s, C].

    It is the mean direction at each position minus the mean over all positions.

    Args:
        tiles: Tokens of tiles from many pictures, [T, C] each.
    """
    total, count = np.zeros(1), 0
    for count, tokens in enumerate(tiles, 1):  # noqa: B007 - the last value is used
        total = total + unit_vectors(tokens)
    mean = (total / max(1, count)).astype(np.float32)
    side = round(len(mean) ** 0.5)
    pattern: NDArray[Any] = (mean - mean.mean(axis=0)).reshape(side, side, -1)
    return pattern


def components(centered: NDArray[Any], count: int = 3) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Return principal components, [count, C], and the share of the variance of each.

    The sign of each makes its largest weight positive.

    Args:
        centered: Centered directions, [n, C].
        count: The number of components.
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
    """Return the leading right singular vectors, by iteration from a fixed start."""
    start = np.random.default_rng(0).standard_normal((centered.shape[1], count + 8), np.float32)
    basis = np.linalg.qr(start)[0]
    for _ in range(rounds):
        basis = np.linalg.qr(centered.T @ (centered @ basis))[0]
    small = centered @ basis
    turned = np.linalg.eigh(small.T.astype(np.float64) @ small)[1][:, ::-1]
    vectors: NDArray[Any] = (basis @ turned)[:, :count].T
    return vectors


def _foreground(sample: NDArray[Any], is_border: NDArray[Any]) -> Foreground:
    """Split tokens by their first component; the side that fills the borders of the pictures is the background."""
    axis = components(sample)[0][0]
    values = sample @ axis
    threshold = _best_split(values)
    above = values > threshold
    border_above = above[is_border].mean() if is_border.any() else 0.0
    if border_above > above.mean():
        return Foreground(-axis, -threshold)
    return Foreground(axis, threshold)


def _best_split(values: NDArray[Any]) -> float:
    """Return Otsu's threshold, which leaves the least variance within the two sides."""
    counts, edges = np.histogram(values, 256)
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * centers)
    above = below[-1] - below
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.nanargmax(apart)]) if np.isfinite(apart).any() else float(centers[0])


def unit_vectors(vectors: NDArray[Any]) -> NDArray[Any]:
    """Scale vectors to length one, float32 [..., C]; zeros stay zeros."""
    floats = vectors.astype(np.float32)
    lengths = np.linalg.norm(floats, axis=-1, keepdims=True)
    scaled: NDArray[Any] = floats / np.where(lengths > 0, lengths, 1)
    return scaled


def evenly_spread(count: int, most: int) -> NDArray[Any]:
    """Return at most `most` evenly spread indices below `count`."""
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(np.int64)


def _is_border(shape: tuple[int, ...]) -> NDArray[Any]:
    border = np.ones(shape, bool)
    border[1:-1, 1:-1] = False
    return border
