"""Fit multinomial logistic regression on pooled vectors with L-BFGS, and choose its strength on held-out images.

The objective is that of scikit-learn's LogisticRegression: C times the sum of cross-entropies, plus half the squared
length of the weights, without the biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from torch import Tensor

STRENGTHS = tuple(float(strength) for strength in 10.0 ** np.linspace(-6, 5, 45))
"""The values of C that are tried, as in the evaluations of CLIP and DINOv2."""
FEW_SHOT_STRENGTH = 1.0
"""The value of C where there are too few images to choose one."""
MOST_EXACT = 50_000_000
"""Numbers in the training vectors up to which a fit is computed in float64; above that, in float32."""
MOST_ITERATIONS = 500
TOLERANCE = 1e-8
"""The largest component of the gradient of the mean objective at which a fit ends."""
_PATIENCE = 8
"""Strengths that are tried without a better result before the search ends."""
_SMALLEST_SCALE = 1e-6


@dataclass(frozen=True, eq=False)
class LinearHead:
    """A linear classifier of standardized vectors."""

    mean: Tensor
    """[d]."""
    scale: Tensor
    """[d]: standard deviations."""
    weight: Tensor
    """[classes, d]."""
    bias: Tensor
    """[classes]."""

    def probabilities(self, vectors: NDArray[Any]) -> NDArray[np.float32]:
        """Return the probability of each class, [n, classes], for vectors [n, d]."""
        x = (torch.from_numpy(np.array(vectors, np.float32)) - self.mean) / self.scale
        return F.linear(x, self.weight, self.bias).softmax(dim=1).numpy()


@dataclass(frozen=True, eq=False)
class _Standardized:
    """Training vectors in the form in which they are fitted."""

    x: Tensor
    y: Tensor
    classes: int
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, vectors: NDArray[Any], labels: NDArray[Any], classes: int) -> _Standardized:
        mean = vectors.mean(axis=0, dtype=np.float64)
        scale = np.maximum(vectors.std(axis=0, dtype=np.float64), _SMALLEST_SCALE)
        dtype = np.float64 if vectors.size <= MOST_EXACT else np.float32
        x = torch.from_numpy(((vectors - mean) / scale).astype(dtype))
        return cls(
            x,
            torch.from_numpy(np.asarray(labels, np.int64)),
            classes,
            torch.from_numpy(mean.astype(np.float32)),
            torch.from_numpy(scale.astype(np.float32)),
        )

    def head(self, parameters: Tensor) -> LinearHead:
        parameters = parameters.float()
        return LinearHead(self.mean, self.scale, parameters[:, :-1].clone(), parameters[:, -1].clone())

    @property
    def start(self) -> Tensor:
        """Weights and biases of zero, [classes, d + 1]."""
        return self.x.new_zeros(self.classes, self.x.shape[1] + 1)


def fit_linear(vectors: NDArray[Any], labels: NDArray[Any], classes: int, strength: float) -> LinearHead:
    """Fit one classifier.

    Args:
        vectors: Training vectors, [n, d] float32.
        labels: Class numbers, [n].
        classes: The number of classes; some may have no training image.
        strength: C, by which cross-entropies are multiplied.
    """
    data = _Standardized.of(vectors, labels, classes)
    return data.head(_fit(data, strength, data.start))


def choose_strength(
    vectors: NDArray[Any],
    labels: NDArray[Any],
    classes: int,
    held_out: NDArray[np.bool_],
    on_try: Callable[[int], None] = lambda _: None,
    strengths: Iterable[float] = STRENGTHS,
) -> float:
    """Return the value of C whose classifier of the other images classifies the held-out ones best.

    Of equal accuracies, the one with the lower cross-entropy counts. The search goes from weak to strong fits, each of
    which begins at the previous one, and ends when several in a row are no better than the best.

    Args:
        vectors: Training vectors, [n, d] float32.
        labels: Class numbers, [n].
        classes: The number of classes.
        held_out: Which of them to classify, [n] bool; at least one and not all.
        on_try: Called with the number of strengths that were tried.
        strengths: The values to try, ascending.
    """
    data = _Standardized.of(vectors[~held_out], labels[~held_out], classes)
    parameters = data.start
    best, chosen, since = (-1.0, 0.0), FEW_SHOT_STRENGTH, 0
    expected = labels[held_out]
    for number, strength in enumerate(strengths, 1):
        parameters = _fit(data, strength, parameters)
        found = data.head(parameters).probabilities(vectors[held_out])
        share = float((found.argmax(axis=1) == expected).mean())
        loss = -float(np.log(np.maximum(found[np.arange(len(found)), expected], 1e-30)).mean())
        if (share, -loss) > best:
            best, chosen, since = (share, -loss), strength, 0
        else:
            since += 1
        on_try(number)
        if since >= _PATIENCE:
            break
    return chosen


def _fit(data: _Standardized, strength: float, start: Tensor) -> Tensor:
    """Minimize the objective from a start, and return weights and biases, [classes, d + 1]."""
    parameters = start.clone().requires_grad_(True)
    decay = 0.5 / (strength * len(data.x))
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=MOST_ITERATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = F.cross_entropy(F.linear(data.x, weight, bias), data.y) + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return parameters.detach()
