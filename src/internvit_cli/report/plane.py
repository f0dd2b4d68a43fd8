"""Lay out pooled vectors in a plane, so that similar images are close to each other.

Vectors are scaled to length one and their mean is subtracted, as for the colors of `show`. In shapes, n is the number
of images.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import Projection
from internvit_cli.errors import InternvitError, OutputError, UsageError
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.words import counted
from internvit_cli.viz.maps import components, evenly_spread, unit_vectors

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from numpy.typing import NDArray

    from internvit_cli.runtime.observer import Phase
    from internvit_cli.storage.read.row_index import PooledVectors

FITTED_BYTES = 32 << 20
"""Bytes of float32 vectors to which components are fitted; of more, evenly spread ones are used."""
BLOCK = 4096
"""Vectors that are read at once."""
UMAP_COMPONENTS = 50
"""Principal components from which UMAP starts, because further ones are mostly noise."""
UMAP_NEIGHBORS = 15
UMAP_LEAST = 10
"""Smallest number of images for which neighborhoods mean something."""


@dataclass(frozen=True, slots=True)
class PlaneLayout:
    """The positions of images."""

    places: NDArray[Any]
    """[n, 2] float32, from 0 to 1, with the same scale on both axes."""
    explained: tuple[float, ...]
    """The shares of the variance of both axes; empty for UMAP, whose axes mean nothing."""
    fitted_on: int
    """The number of vectors to which the axes were fitted."""


def require_projection(projection: Projection, observer: Observer = SILENT) -> None:
    """Check early that a projection can be computed.

    Args:
        projection: How images are laid out.
        observer: Receives progress.

    Raises:
        InternvitError: umap-learn is not installed.
    """
    if projection is Projection.UMAP:
        with observer.phase("loading UMAP"):
            _umap()


def lay_out(
    vectors: PooledVectors, numbers: NDArray[Any], projection: Projection, seed: int, observer: Observer = SILENT
) -> PlaneLayout:
    """Lay out images in a plane.

    Args:
        vectors: The vectors of all images.
        numbers: The indices of the images to lay out, [n].
        projection: How images are laid out.
        seed: The seed of UMAP's random numbers.
        observer: Receives progress.

    Raises:
        UsageError: There are too few images for UMAP.
        OutputError: A vector is not finite.
    """
    if projection is Projection.UMAP and len(numbers) < UMAP_LEAST:
        raise UsageError(
            f"--map umap: {counted(len(numbers), 'image')} are too few to have neighborhoods",
            f"it needs {UMAP_LEAST} images; use --map pca",
        )
    if not len(numbers):
        return PlaneLayout(np.empty((0, 2), np.float32), (), 0)
    with observer.phase("projecting", "image", len(numbers)) as phase:
        reduced, explained, fitted_on = _project(vectors, numbers, projection, phase.at)
    if projection is Projection.UMAP:
        return PlaneLayout(_unit_square(_embed(reduced, seed, observer)), (), fitted_on)
    return PlaneLayout(_unit_square(reduced), explained, fitted_on)


def _project(
    vectors: PooledVectors, numbers: NDArray[Any], projection: Projection, on_progress: Callable[[int], None]
) -> tuple[NDArray[Any], tuple[float, ...], int]:
    """Return images along principal components, [n, c] float32, the shares of the variance, and the vectors fitted."""
    count = 2 if projection is Projection.PCA else min(UMAP_COMPONENTS, vectors.shape[1])
    chosen = numbers[evenly_spread(len(numbers), max(2, FITTED_BYTES // (4 * vectors.shape[1])))]
    sample = unit_vectors(vectors[chosen])
    if not np.isfinite(sample).all():
        raise OutputError("a pooled vector is not finite", "internvit verify lists the damaged rows")
    mean = sample.mean(axis=0)
    sample -= mean
    axes, explained = components(sample, count)
    reduced = np.empty((len(numbers), count), np.float32)
    for start in range(0, len(numbers), BLOCK):
        block = vectors[numbers[start : start + BLOCK]]
        reduced[start : start + len(block)] = (unit_vectors(block) - mean) @ axes.T
        on_progress(start + len(block))
    return reduced, explained, len(chosen)


def _unit_square(places: NDArray[Any]) -> NDArray[Any]:
    """Scale positions to 0 to 1 on the wider axis, and center the other one."""
    low, high = places.min(axis=0), places.max(axis=0)
    span = max(float((high - low).max()), 1e-12)
    inside: NDArray[Any] = ((places - (low + high) / 2) / span + 0.5).astype(np.float32)
    return inside


class _EpochStream:
    """The file for UMAP's own progress bar, which is the only source of its epochs."""

    FORMAT = "{n}/{total}"

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def write(self, text: str) -> None:
        """Parse the output of the bar."""
        done, slash, total = text.strip().partition("/")
        if slash and done.isdecimal() and total.isdecimal():
            self._phase.at(int(done), int(total))

    def flush(self) -> None:
        """Do nothing, because there is no buffer."""


def _embed(reduced: NDArray[Any], seed: int, observer: Observer) -> NDArray[Any]:
    """Return positions with the same neighborhoods, [n, 2]; epochs are counted only in the second half of the time."""
    neighbors = min(UMAP_NEIGHBORS, len(reduced) - 1)
    with warnings.catch_warnings(), observer.phase("laying out the map", "epoch") as phase:
        warnings.simplefilter("ignore")  # UMAP warns that a seed makes it use one thread
        bar = {"disable": False, "file": _EpochStream(phase), "bar_format": _EpochStream.FORMAT, "desc": ""}
        umap = _umap().UMAP(n_neighbors=neighbors, random_state=seed, tqdm_kwds=bar)
        places: NDArray[Any] = umap.fit_transform(reduced)
    finite: NDArray[Any] = np.nan_to_num(places)
    return finite


def _umap() -> ModuleType:
    try:
        import umap
    except ImportError as error:
        raise InternvitError(
            "--map umap needs umap-learn, which is not installed",
            "install it with: pip install 'internvit-cli[umap]', or use --map pca",
        ) from error
    module: ModuleType = umap
    return module
