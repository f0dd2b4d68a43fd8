"""Describe the accuracy of low-precision types, measured on the first pictures of an output and stored in it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import ComputeDtype, Tokens
from internvit_cli.errors import InternvitError
from internvit_cli.runtime.untrusted import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.config import Recipe

COMPUTE_ERROR = "compute_error"
STORE_ERROR = "store_error"
ATTRIBUTE_CHARACTERS = 320
"""Characters of an attribute, which are reserved before the figures are known, because file sizes are planned."""


class AccuracyError(InternvitError):
    """A type is too inaccurate for these weights and pictures."""


@dataclass(frozen=True, slots=True)
class ComputeError:
    """The error of hidden states of some tiles, compared with wider types.

    It covers the tokens whose values are stored in some form: patches, and the class token if it is pooled.
    """

    tiles: int
    """The number of measured tiles."""
    lowest_cosine_bfloat16: float
    """The lowest cosine of a token with the same token computed in bfloat16."""
    mean_cosine_bfloat16: float
    lowest_cosine_float32: float
    mean_cosine_float32: float
    relative_error_float32: float
    """The L2 norm of the difference to float32, divided by that of the hidden states in float32."""


@dataclass(frozen=True, slots=True)
class StoreError:
    """The error of stored tokens of some tiles, compared with the output of the encoder."""

    tiles: int
    """The number of measured tiles."""
    lowest_cosine: float
    """The lowest cosine of a token with its stored form."""
    mean_cosine: float
    relative_error: float
    """The L2 norm of the difference, divided by that of the original tokens."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The measured errors; None for types that need no measurement, or if no tile could be decoded."""

    compute: ComputeError | None = None
    store: StoreError | None = None

    def check(self, lowest_cosine: float) -> None:
        """Refuse types that are too inaccurate.

        Args:
            lowest_cosine: The lowest accepted cosine of a token in fp8 arithmetic to the same token in bfloat16.

        Raises:
            AccuracyError: A cosine is lower, or not a number.
        """
        if self.compute is not None:
            check_cosine(self.compute.lowest_cosine_bfloat16, lowest_cosine)

    @property
    def words(self) -> str:
        """The figures in words; empty if there are none."""
        parts = []
        if (compute := self.compute) is not None:
            parts.append(
                f"fp8 arithmetic: lowest cosine {compute.lowest_cosine_bfloat16:.5f} to bfloat16, relative error "
                f"{compute.relative_error_float32:.2%} of float32"
            )
        if (store := self.store) is not None:
            parts.append(
                f"stored tokens: lowest cosine {store.lowest_cosine:.5f}, mean {store.mean_cosine:.5f}, relative error "
                f"{store.relative_error:.2%}"
            )
        return "; ".join(parts)


def check_cosine(found: float, lowest: float) -> None:
    """Refuse fp8 arithmetic if the cosine of a token to its bfloat16 form is below `lowest`, or is NaN.

    Raises:
        AccuracyError: It is.
    """
    if found >= lowest:
        return
    shown = math.floor(found * 1e5) / 1e5 if math.isfinite(found) else found  # rounded down: never "0.99 is below 0.99"
    accept = f", or accept it with --max-error {shown}" if shown >= 0 else ""
    raise AccuracyError(
        f"--dtype fp8: a token of the first pictures has a cosine of {shown} to its bfloat16 form, below {lowest}",
        f"use --dtype bfloat16{accept}",
    )


def check_recorded(attributes: Mapping[str, Any], lowest_cosine: float) -> None:
    """Refuse to continue an output whose recorded accuracy of fp8 arithmetic is lower than what is accepted now.

    Raises:
        AccuracyError: It is.
        ValueError: The record is damaged.
    """
    found = from_attributes(attributes).get(COMPUTE_ERROR, {}).get("lowest_cosine_bfloat16")
    if found is not None:
        check_cosine(found, lowest_cosine)


def measured_attributes(recipe: Recipe) -> list[str]:
    """Return the names of the accuracy attributes that an output of a recipe has."""
    computes_coarsely = recipe.compute_dtype is ComputeDtype.FP8
    stores_coarsely = recipe.tokens is not Tokens.NONE and recipe.store_dtype.is_scaled
    return [name for name, is_due in ((COMPUTE_ERROR, computes_coarsely), (STORE_ERROR, stores_coarsely)) if is_due]


def to_attributes(recipe: Recipe, accuracy: Accuracy) -> dict[str, str]:
    """Return the attributes of an output as JSON objects, `{"tiles": 0}` if nothing could be measured."""
    found = {COMPUTE_ERROR: accuracy.compute, STORE_ERROR: accuracy.store}
    return {name: _text(found[name]) for name in measured_attributes(recipe)}


def from_attributes(attributes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of an output, by attribute.

    Raises:
        ValueError: An attribute holds something else.
    """
    return {name: _figures(attributes[name]) for name in (COMPUTE_ERROR, STORE_ERROR) if name in attributes}


def is_measured(attribute: str) -> bool:
    """Return whether an attribute has figures, which needs a tile to measure."""
    return bool(_figures(attribute).get("tiles"))


def _figures(attribute: Any) -> dict[str, Any]:
    figures = parse_json(attribute) if isinstance(attribute, str) else None
    if not isinstance(figures, dict):
        raise ValueError("it is no object of figures")  # noqa: TRY004 - damage, not a mistake of the caller
    if any(value is not None and not isinstance(value, int | float) for value in figures.values()):
        raise ValueError("a figure is no number")
    return figures


def _text(error: ComputeError | StoreError | None) -> str:
    figures = asdict(error) if error is not None else {"tiles": 0}
    # JSON has no NaN.
    finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return json.dumps(finite).ljust(ATTRIBUTE_CHARACTERS)
