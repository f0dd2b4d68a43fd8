"""Pooled vectors laid out in a plane, so that images which are alike lie together.

Vectors are scaled to length one and their mean is taken off, as for the colors of `show`. Letters: n images.
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
from internvit_cli.viz.maps import components, spread, unit

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from numpy.typing import NDArray

    from internvit_cli.runtime.observer import Phase
    from internvit_cli.storage.read.row_index import PooledVectors

FITTED_BYTES = 32 << 20
"""Vectors that components are fitted to, in float32; of more, evenly spread ones."""
BLOCK = 4096
"""Vectors that are read at a time."""
UMAP_COMPONENTS = 50
"""Principal components that UMAP starts from: it looks at neighbors, and noise has none."""
UMAP_NEIGHBORS = 15
UMAP_LEAST = 10
"""Images below which neighborhoods mean nothing."""


@dataclass(frozen=True, slots=True)
class Plane:
    """Where images lie."""

    places: NDArray[Any]
    """[n, 2] float32, from 0 to 1, one scale for both axes."""
    explained: tuple[float, ...]
    """Shares of the variance along both axes; empty for UMAP, whose axes mean nothing."""
    fitted_on: int
    """Vectors that the axes were fitted to."""


def require(projection: Projection, observer: Observer = SILENT) -> None:
    """Refuse early what cannot be done here.

    Args:
        projection: how images are to be laid out.
        observer: told how it goes.

    Raises:
        InternvitError: umap-learn is not installed.
    """
    if projection is Projection.UMAP:
        with observer.phase("loading UMAP"):
            _umap()


def lay_out(
    vectors: PooledVectors, numbers: NDArray[Any], projection: Projection, seed: int, observer: Observer = SILENT
) -> Plane:
    """Give images places.

    Args:
        vectors: of all images.
        numbers: of those to lay out, [n].
        projection: how.
        seed: of what UMAP draws by chance.
        observer: told how it goes.

    Raises:
        UsageError: too few images for UMAP.
        OutputError: a vector that is not finite.
    """
    if projection is Projection.UMAP and len(numbers) < UMAP_LEAST:
        raise UsageError(
            f"--map umap with {counted(len(numbers), 'image')}: they have no neighborhoods to keep",
            f"it takes {UMAP_LEAST} images; leave it at --map pca",
        )
    if not len(numbers):
        return Plane(np.empty((0, 2), np.float32), (), 0)
    with observer.phase("projecting", "image", len(numbers)) as phase:
        reduced, explained, fitted_on = _project(vectors, numbers, projection, phase.at)
    if projection is Projection.UMAP:
        return Plane(_unit_square(_embed(reduced, seed, observer)), (), fitted_on)
    return Plane(_unit_square(reduced), explained, fitted_on)


def _project(
    vectors: PooledVectors, numbers: NDArray[Any], projection: Projection, on_progress: Callable[[int], None]
) -> tuple[NDArray[Any], tuple[float, ...], int]:
    """Images along principal components, [n, c] float32; their shares of the variance; vectors that they fit."""
    count = 2 if projection is Projection.PCA else min(UMAP_COMPONENTS, vectors.shape[1])
    chosen = numbers[spread(len(numbers), max(2, FITTED_BYTES // (4 * vectors.shape[1])))]
    sample = unit(vectors[chosen])
    if not np.isfinite(sample).all():
        raise OutputError("a pooled vector is not finite", "internvit verify tells which rows are damaged")
    mean = sample.mean(axis=0)
    sample -= mean
    axes, explained = components(sample, count)
    reduced = np.empty((len(numbers), count), np.float32)
    for start in range(0, len(numbers), BLOCK):
        block = vectors[numbers[start : start + BLOCK]]
        reduced[start : start + len(block)] = (unit(block) - mean) @ axes.T
        on_progress(start + len(block))
    return reduced, explained, len(chosen)


def _unit_square(places: NDArray[Any]) -> NDArray[Any]:
    """Places from 0 to 1 on the wider axis, the other one in the middle."""
    low, high = places.min(axis=0), places.max(axis=0)
    span = max(float((high - low).max()), 1e-12)
    inside: NDArray[Any] = ((places - (low + high) / 2) / span + 0.5).astype(np.float32)
    return inside


class _Epochs:
    """The file that UMAP's own progress bar writes to, which is the only one to tell of its epochs."""

    FORMAT = "{n}/{total}"

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def write(self, text: str) -> None:
        """Take what the bar draws."""
        done, slash, total = text.strip().partition("/")
        if slash and done.isdecimal() and total.isdecimal():
            self._phase.at(int(done), int(total))

    def flush(self) -> None:
        """Nothing: there is no buffer."""


def _embed(reduced: NDArray[Any], seed: int, observer: Observer) -> NDArray[Any]:
    """Places in a plane of the same neighborhoods, [n, 2]; most of the first half of the time counts no epochs yet."""
    neighbors = min(UMAP_NEIGHBORS, len(reduced) - 1)
    with warnings.catch_warnings(), observer.phase("laying out the map", "epoch") as phase:
        warnings.simplefilter("ignore")  # a seed makes it use one thread, which it warns of
        bar = {"disable": False, "file": _Epochs(phase), "bar_format": _Epochs.FORMAT, "desc": ""}
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
            "install it with: pip install 'internvit-cli[umap]', or leave it at --map pca",
        ) from error
    module: ModuleType = umap
    return module
