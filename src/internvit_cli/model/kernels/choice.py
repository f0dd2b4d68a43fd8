"""Choose the operations for a device and dtype once, by comparing Triton's on that card with plain PyTorch.

A kernel that does not compile, or gives a different result, is replaced by its version in plain PyTorch, and the name
of the table says so.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from internvit_cli.errors import DeviceError
from internvit_cli.model.kernels.fp8 import (
    FP8,
    Fp8Linear,
    emulated_linear,
    plain_fp8_kernels,
    scaled_linear,
)
from internvit_cli.model.kernels.plain import best_attention, plain_kernels
from internvit_cli.model.kernels.probes import LARGEST_DIFFERENCE, Probe, ProbeSizes, difference, probes
from internvit_cli.model.kernels.stamps import is_stamped, stamp, stamp_path

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from internvit_cli.model.kernels.interface import Kernels

TRITON_CAPABILITY = (8, 0)
"""Ampere, the first generation with bfloat16."""
FP8_CAPABILITY = (9, 0)
"""Hopper, whose matrix units support a scale per row."""


def kernels_for(device: torch.device, dtype: torch.dtype, case: ProbeSizes | None = None) -> Kernels:
    """Return the fastest operations that work on a device.

    Args:
        device: The device.
        dtype: The compute dtype; float8_e4m3fn means fp8 in linear layers and bfloat16 elsewhere.
        case: The sizes with which to try Triton's kernels; without them, the kernels are not used.

    Raises:
        DeviceError: The CUDA card does not support fp8, or its results are wrong.
    """
    if device.type != "cuda":
        return plain_for(device, dtype)
    with as_current_device(device), torch.inference_mode():
        if dtype is FP8:
            check_fp8_products(device)
        if case is None:
            return plain_for(device, dtype)
        if torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
            return plain_for(device, dtype, "plain PyTorch (triton: needs compute capability 8.0)")
        try:
            from internvit_cli.model.kernels.triton_kernels import triton_kernels
        except ImportError as error:
            return plain_for(device, dtype, f"plain PyTorch (triton: {error})")
        candidates = triton_kernels(dtype, best_attention(device, base_dtype(dtype)))
        return passing(candidates, plain_for(device, dtype), case, device, dtype)


def as_current_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a card the current one of this thread, on which Triton starts kernels whatever their arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plain_for(device: torch.device, dtype: torch.dtype, name: str = "plain PyTorch") -> Kernels:
    """Return the operations in plain PyTorch, for any device."""
    build = plain_fp8_kernels if dtype is FP8 else plain_kernels
    return build(best_attention(device, base_dtype(dtype)), name)


def base_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of everything except the inputs of linear layers."""
    return torch.bfloat16 if dtype is FP8 else dtype


def check_fp8_products(device: torch.device) -> None:
    """Compare the card's fp8 matrix products with float32.

    Raises:
        DeviceError: The card has none, this PyTorch does not support them, or their results are wrong.
    """
    check_fp8_card(device)
    hint = "use --dtype bfloat16"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(33, 64, generator=generator).to(device, torch.bfloat16)
    layer = nn.Linear(64, 48, device="cpu")
    nn.init.normal_(layer.weight, generator=generator)
    fp8 = Fp8Linear(layer.to(device, torch.bfloat16).requires_grad_(False))
    try:
        actual = scaled_linear(rows, fp8)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise DeviceError(
            f"--dtype fp8: this PyTorch ({torch.__version__}) does not support it: {_line(error)}", hint
        ) from error
    if not difference([actual], [emulated_linear(rows, fp8)]) < LARGEST_DIFFERENCE[torch.bfloat16]:
        raise DeviceError("--dtype fp8: the card's fp8 products are wrong", hint)


def check_fp8_card(device: torch.device) -> None:
    """Refuse a card without fp8 matrix products.

    Raises:
        DeviceError: The card has none.
    """
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise DeviceError(
            f"--dtype fp8: {torch.cuda.get_device_name(device)} does not support fp8 with a scale per row",
            "use --dtype bfloat16",
        )


def passing(kernels: Kernels, twin: Kernels, case: ProbeSizes, device: torch.device, dtype: torch.dtype) -> Kernels:
    """Return `kernels` if they passed their probes before on this very setup, or else what `replace_failing` returns.

    Args:
        kernels: The candidates.
        twin: The operations with the right results.
        case: The sizes with which to try them.
        device: The CUDA card.
        dtype: The compute dtype.
    """
    path = stamp_path(device, dtype, case)
    if is_stamped(path):
        return kernels
    checked = replace_failing(kernels, twin, probes(case, device, dtype))
    if checked is kernels:
        stamp(path)
    return checked


def replace_failing(kernels: Kernels, twin: Kernels, tries: dict[str, tuple[Probe, float]]) -> Kernels:
    """Return `kernels` with operations that fail or give other results replaced by those of `twin`.

    Args:
        kernels: The candidates.
        twin: The operations with the right results.
        tries: By field of `Kernels`, how to run the operation, and the largest allowed difference.
    """
    reasons = {}
    for field, (probe, allowed) in tries.items():
        reason = _failure(probe, kernels, twin, allowed)
        if reason:
            reasons[field] = reason
    if not reasons:
        return kernels
    words = "; ".join(f"{field}: {reason}" for field, reason in reasons.items())
    if len(reasons) == len(tries):
        return replace(twin, name=f"plain PyTorch (triton: {next(iter(reasons.values()))})")
    twins = {field: getattr(twin, field) for field in reasons}
    return replace(kernels, name=f"{kernels.name}, in part plain PyTorch ({words})", **twins)


def _failure(probe: Probe, kernels: Kernels, twin: Kernels, allowed: float) -> str:
    """Return why an operation cannot be used; empty if it can."""
    expected = probe(twin)
    try:
        error = difference(probe(kernels), expected)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:  # noqa: BLE001  (compilers, drivers and linkers fail with classes of their own)
        return _line(failure)
    return "" if error < allowed else f"differs by {error:.2g} of the largest value"


def _line(error: BaseException) -> str:
    """Format an exception in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
