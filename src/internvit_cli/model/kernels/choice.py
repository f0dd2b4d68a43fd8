"""Which operations run: decided once for a device and dtype, by trying Triton's on that very card against their twins.

A kernel that does not compile there, or gives something else, is replaced by its twin in plain PyTorch, and the name
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
from internvit_cli.model.kernels.probes import LARGEST_DIFFERENCE, Case, Probe, difference, probes

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from internvit_cli.model.kernels.interface import Kernels

TRITON_CAPABILITY = (8, 0)
"""Ampere: what came before has no bfloat16."""
FP8_CAPABILITY = (9, 0)
"""Hopper: scales of single rows need its matrix units."""


def kernels_for(device: torch.device, dtype: torch.dtype, case: Case | None = None) -> Kernels:
    """The fastest operations that work here.

    Args:
        device: where they run.
        dtype: the compute dtype; float8_e4m3fn is fp8 in linear layers and bfloat16 elsewhere.
        case: what to try Triton's kernels with; without one they are not used.

    Raises:
        DeviceError: fp8 on a CUDA card that can't, or that computes something else.
    """
    if device.type != "cuda":
        return plain_for(device, dtype)
    with current(device), torch.inference_mode():
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
        return tried(candidates, plain_for(device, dtype), probes(case, device, dtype))


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a card the current one of this thread: Triton starts kernels there, whatever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plain_for(device: torch.device, dtype: torch.dtype, name: str = "plain PyTorch") -> Kernels:
    """The operations in plain PyTorch, on any device."""
    build = plain_fp8_kernels if dtype is FP8 else plain_kernels
    return build(best_attention(device, base_dtype(dtype)), name)


def base_dtype(dtype: torch.dtype) -> torch.dtype:
    """What everything but the inputs of linear layers is computed in."""
    return torch.bfloat16 if dtype is FP8 else dtype


def check_fp8_products(device: torch.device) -> None:
    """Try the card's fp8 matrix products against the same in float32.

    Raises:
        DeviceError: the card has none, this PyTorch can't use them, or they give something else.
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
        raise DeviceError(f"--dtype fp8: this PyTorch ({torch.__version__}) can't: {_line(error)}", hint) from error
    if not difference([actual], [emulated_linear(rows, fp8)]) < LARGEST_DIFFERENCE[torch.bfloat16]:
        raise DeviceError("--dtype fp8: the card's fp8 products are wrong", hint)


def check_fp8_card(device: torch.device) -> None:
    """Refuse a card without fp8 matrix products.

    Raises:
        DeviceError: it has none.
    """
    if torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise DeviceError(
            f"--dtype fp8: {torch.cuda.get_device_name(device)} has no fp8 with scales of rows",
            "use --dtype bfloat16",
        )


def tried(kernels: Kernels, twin: Kernels, tries: dict[str, tuple[Probe, float]]) -> Kernels:
    """`kernels`, with those operations replaced by the twin's that fail or give something else.

    Args:
        kernels: the candidates.
        twin: what they should give.
        tries: by field of `Kernels`: how to run it, and the largest difference allowed.
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
    """Why an operation cannot be used; empty when it can."""
    expected = probe(twin)
    try:
        error = difference(probe(kernels), expected)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as failure:  # noqa: BLE001  (compilers, drivers and linkers fail with classes of their own)
        return _line(failure)
    return "" if error < allowed else f"differs by {error:.2g} of the largest value"


def _line(error: BaseException) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
