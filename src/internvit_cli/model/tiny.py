"""Create the weights of tiny-random in memory; they are the same on every machine and in every version."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

SEED = 448


def tiny_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return float32 weights by standalone name for the given shapes.

    Only the raw 64-bit output of the generator and exact arithmetic are used, because numpy guarantees that output,
    while its distributions may change. The scales keep tokens of order one, and different for different pictures.
    """
    generator = np.random.PCG64(SEED)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        raw = generator.random_raw(math.prod(shape)) >> np.uint64(11)  # 53 bits, exact in float64
        unit = raw.astype(np.float64) * 2.0**-52 - 1.0  # uniform in [-1, 1)
        weights[name] = _scaled(name, unit.reshape(shape)).astype("<f4")
    return weights


def _scaled(name: str, unit: np.ndarray) -> np.ndarray:
    kind, parameter = name.split(".")[-2:]
    if parameter in {"ls1", "ls2"}:
        return 0.55 + 0.45 * unit  # LayerScale, 0.1 to 1
    if kind.startswith("norm"):
        return 0.1 * unit + (1.0 if parameter == "weight" else 0.0)
    if parameter == "bias":
        return 0.1 * unit
    if parameter == "weight":
        fan_in = math.prod(unit.shape[1:])
        return unit * math.sqrt(3.0 / fan_in)  # standard deviation 1 / sqrt(fan_in)
    return unit  # class token and position table
