"""Decide whether two pictures show the same, by aligning them with scales and shifts and comparing their details.

Vectors cannot distinguish a crop of a photograph from the next frame of the same scene: on trained weights, both are
equally far apart (docs/search.md). Pixels can. A picture that was saved again, resized or cropped matches its original
exactly once it is scaled and shifted along each axis; another frame does not, because objects at different distances
move differently.

The four numbers (two scales, two shifts) are found by least squares on gray pictures of 16, 32, then 64 x 64 pixels
(Lucas and Kanade, 1981), from five starts. Many pairs are aligned at once. In shapes, p is the number of pairs, and n
the side of a picture in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDE = 64
"""Side of the gray pictures that are compared, in pixels."""
SAME = 0.9
"""Lowest agreement of pictures that show the same. Copies reach 0.94 and more, frames of a burst 0.86."""
PAIRS_AT_ONCE = 128
STARTS = (1.0, 0.9, 1 / 0.9, 0.8, 1 / 0.8)
"""Initial scales: those of the whole picture, and of crops of either picture."""
ITERATIONS = (8, 6, 6)
"""Least-squares steps at sides of 16, 32 and 64 pixels."""
LEAST_OUTLINE = 0.5
"""Lowest correlation at a side of 16 pixels to continue; copies reach 0.9 and more, most other pairs do not."""
LARGEST_STEP, LARGEST_STRETCH, LARGEST_SHIFT = 0.08, 1.5, 0.25
BLUR = 3.0
"""Standard deviation of the blur that is subtracted to leave details, in pixels."""
LEAST_COVER = 0.95
"""Share of a pixel's neighborhood that both pictures must cover for its details to count."""
GRAIN = 0.5
"""Gray levels of detail that are ignored, so that two blank pictures agree."""
LEAST_DETAIL, NEAR_BRIGHTNESS = 1.0, 16.0
"""Pictures with less detail than this many gray levels agree only if their brightness differs by less than it."""


def agreement(ones: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
    """Return how well the details of pairs of pictures agree after alignment.

    Args:
        ones: Gray pictures resized to squares, [p, 64, 64], of any type, 0 to 255.
        others: Their partners, [p, 64, 64].

    Returns:
        Correlations of details, -1 to 1, [p]; 0 if not even the outlines match. `SAME` and more means the same picture.
    """
    parts = [
        _agreement(ones[start : start + PAIRS_AT_ONCE], others[start : start + PAIRS_AT_ONCE])
        for start in range(0, len(ones), PAIRS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _agreement(ones: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float32]:
    found = np.zeros(len(ones), np.float32)
    near, overlay = _outlines(_pyramid(ones), _pyramid(others))
    if not near.any():
        return found
    one, other = _pyramid(ones[near]), _pyramid(others[near])
    for level in (1, 2):
        _, overlay = _refine(one[level], other[level], overlay, ITERATIONS[level])
    # The finer picture is resampled, which is the crop, because it shows the same with more pixels.
    is_whole = overlay.stretch.prod(axis=1) < 1
    fine = np.where(is_whole[:, None, None], one[2], other[2])
    coarse = np.where(is_whole[:, None, None], other[2], one[2])
    _, overlay = _refine(coarse, fine, overlay.inverted(is_whole), ITERATIONS[2])
    found[near] = _details(coarse, fine, overlay)
    return found


def _outlines(ones: list[NDArray[Any]], others: list[NDArray[Any]]) -> tuple[NDArray[Any], _Alignment]:
    """Return a mask of pairs whose outlines match, and their alignments."""
    count, starts = len(ones[0]), len(STARTS)
    stretch = np.repeat(np.tile(np.array(STARTS, np.float32), count)[:, None], 2, axis=1)
    begin = _Alignment(stretch, np.zeros_like(stretch))
    many_ones, many_others = (np.repeat(pyramid[0], starts, axis=0) for pyramid in (ones, others))
    correlation, overlay = _refine(many_ones, many_others, begin, ITERATIONS[0])
    best = correlation.reshape(count, starts).argmax(axis=1) + starts * np.arange(count)
    near = correlation[best] >= LEAST_OUTLINE
    return near, overlay[best[near]]


@dataclass(frozen=True, slots=True)
class _Alignment:
    """Positions of one picture's pixels on the other, relative to its sides and from its center."""

    stretch: NDArray[Any]
    """[p, 2], horizontal and vertical."""
    shift: NDArray[Any]
    """[p, 2]."""

    def __getitem__(self, wanted: Any) -> _Alignment:
        return _Alignment(self.stretch[wanted], self.shift[wanted])

    def moved(self, step: NDArray[Any]) -> _Alignment:
        """Return the alignment after a step, [p, 4], within sensible limits."""
        step = step.clip(-LARGEST_STEP, LARGEST_STEP)
        stretch = (self.stretch + step[:, :2]).clip(1 / LARGEST_STRETCH, LARGEST_STRETCH)
        return _Alignment(stretch, (self.shift + step[:, 2:]).clip(-LARGEST_SHIFT, LARGEST_SHIFT))

    def better_of(self, other: _Alignment, is_better: NDArray[Any]) -> _Alignment:
        """Return the other alignment for pairs in the mask."""
        mask = is_better[:, None]
        return _Alignment(np.where(mask, other.stretch, self.stretch), np.where(mask, other.shift, self.shift))

    def inverted(self, which: NDArray[Any]) -> _Alignment:
        """Exchange the roles of both pictures for pairs in the mask."""
        return self.better_of(_Alignment(1 / self.stretch, -self.shift / self.stretch), which)


def _pyramid(pictures: NDArray[Any]) -> list[NDArray[np.float32]]:
    """Return pictures with sides of 16, 32 and 64 pixels, [p, n, n] each."""
    whole = pictures.astype(np.float32)
    half = _halved(whole)
    return [_halved(half), half, whole]


def _halved(pictures: NDArray[Any]) -> NDArray[np.float32]:
    count, side = pictures.shape[:2]
    halved: NDArray[np.float32] = pictures.reshape(count, side // 2, 2, side // 2, 2).mean(axis=(2, 4))
    return halved


def _refine(
    fixed: NDArray[Any], moving: NDArray[Any], overlay: _Alignment, iterations: int
) -> tuple[NDArray[Any], _Alignment]:
    """Improve an alignment by least squares, and return the best step with its correlation, [p]."""
    side = fixed.shape[1]
    from_middle = _from_middle(side)
    best, kept = np.full(len(fixed), -2.0, np.float32), overlay
    for step in range(iterations + 1):
        laid, inside = _resampled(moving, overlay)
        one, other = _centered(fixed, inside), _centered(laid, inside)
        correlation = _correlation(one, other, inside)
        is_better = correlation > best
        best, kept = np.where(is_better, correlation, best), kept.better_of(overlay, is_better)
        if step == iterations:
            break
        gain = np.sqrt(_energy(one) / np.maximum(_energy(other), 1e-6))[:, None, None]
        down, across = np.gradient(laid * gain * side, axis=(1, 2))
        down, across = down * inside, across * inside
        slopes = np.stack([across * from_middle, down * from_middle[:, None], across, down], axis=1)
        slopes = slopes.reshape(len(fixed), 4, -1)
        normal = slopes @ slopes.transpose(0, 2, 1)
        trace = np.trace(normal, axis1=1, axis2=2)[:, None, None]
        normal += (1e-4 * trace / 4 + 1e-6) * np.eye(4, dtype=np.float32)
        error = (one - other * gain).reshape(len(fixed), -1, 1)
        overlay = overlay.moved(np.linalg.solve(normal, slopes @ error)[:, :, 0])
    return best, kept


def _resampled(pictures: NDArray[Any], overlay: _Alignment) -> tuple[NDArray[Any], NDArray[Any]]:
    """Resample pictures with an alignment, and return a mask of the pixels inside them, [p, n, n] each."""
    across, inside_across = _interpolation(overlay.stretch[:, 0], overlay.shift[:, 0], pictures.shape[1])
    down, inside_down = _interpolation(overlay.stretch[:, 1], overlay.shift[:, 1], pictures.shape[1])
    laid = down @ pictures @ across.transpose(0, 2, 1)
    return laid, inside_down[:, :, None] * inside_across[:, None, :]


def _interpolation(stretch: NDArray[Any], shift: NDArray[Any], side: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return linear interpolation along one axis as matrices, [p, n, n], and a mask of the pixels inside, [p, n]."""
    places = (stretch[:, None] * _from_middle(side) + shift[:, None] + 0.5) * side - 0.5
    inside = ((places >= -0.5) & (places <= side - 0.5)).astype(np.float32)
    distance = np.abs(places.clip(0, side - 1)[:, :, None] - np.arange(side, dtype=np.float32))
    return np.maximum(1 - distance, 0).astype(np.float32), inside


def _from_middle(side: int) -> NDArray[np.float32]:
    """Return the positions of pixels relative to the side and from the center, [n]."""
    return ((np.arange(side) + 0.5) / side - 0.5).astype(np.float32)


def _details(one: NDArray[Any], other: NDArray[Any], overlay: _Alignment) -> NDArray[Any]:
    """Return the correlations of details finer than `BLUR`, [p]."""
    laid, inside = _resampled(other, overlay)
    counts = inside * (_BLURRING @ inside @ _BLURRING.T > LEAST_COVER)
    ones, others = (_centered(picture - _BLURRING @ picture @ _BLURRING.T, counts) for picture in (one, laid))
    found = _correlation(ones, others, counts)
    pixels = np.maximum(counts.sum(axis=(1, 2)), 1)
    is_blank = np.maximum(_energy(ones), _energy(others)) < LEAST_DETAIL**2 * pixels
    brightness = np.abs(((one - laid) * counts).sum(axis=(1, 2))) / pixels
    return np.where(is_blank & (brightness > NEAR_BRIGHTNESS), 0, found)


def _blurring() -> NDArray[np.float32]:
    """Return a blur along one axis as a matrix, [64, 64]."""
    distance = np.arange(SIDE)[:, None] - np.arange(SIDE)
    weights = np.exp(-0.5 * (distance / BLUR) ** 2)
    blurring: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return blurring


_BLURRING = _blurring()


def _centered(pictures: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """Subtract the mean within the mask, and set everything outside to 0, [p, n, n]."""
    pixels = np.maximum(mask.sum(axis=(1, 2), keepdims=True), 1)
    mean = (pictures * mask).sum(axis=(1, 2), keepdims=True) / pixels
    centered: NDArray[Any] = (pictures - mean) * mask
    return centered


def _energy(pictures: NDArray[Any]) -> NDArray[Any]:
    energy: NDArray[Any] = np.einsum("pij,pij->p", pictures, pictures)
    return energy


def _correlation(ones: NDArray[Any], others: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    """Return the correlations of centered pictures, [p]; differences below the grain count as equal."""
    grain = GRAIN**2 * np.maximum(mask.sum(axis=(1, 2)), 1)
    shared = np.einsum("pij,pij->p", ones, others) + grain
    found: NDArray[Any] = shared / np.sqrt((_energy(ones) + grain) * (_energy(others) + grain))
    return found
