"""Measure the error of hidden states and stored tokens in low-precision types on the user's own tiles.

Letters in shapes as in model/vit.py; n tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the usual name)

from internvit_cli.config import Pool, Tokens
from internvit_cli.errors import DeviceError
from internvit_cli.model.accuracy import ComputeError, StoreError
from internvit_cli.model.features import FeatureModel, FeatureSpec
from internvit_cli.model.kernels import plain
from internvit_cli.model.kernels.choice import as_current_device

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.model.kernels.interface import StorePlan

TILES_AT_ONCE = 4


def measure_computing(checkpoint: Checkpoint, model: FeatureModel, tiles: Sequence[np.ndarray]) -> ComputeError:
    """Compare a model on some tiles with its references, which are loaded one after the other and freed.

    Args:
        checkpoint: The model's weights.
        model: The model to measure.
        tiles: uint8 [S,S,3] each, at least one.

    Raises:
        DeviceError: A reference does not fit into the device's memory.
        ModelError: The weights cannot be read again.
    """
    with as_current_device(model.device):
        measured = _hidden(model, tiles)
        bfloat16 = _worst(measured, _reference(checkpoint, model, torch.bfloat16, tiles))
        float32 = _worst(measured, _reference(checkpoint, model, torch.float32, tiles))
    return ComputeError(
        tiles=len(tiles),
        lowest_cosine_bfloat16=bfloat16.lowest,
        mean_cosine_bfloat16=bfloat16.mean,
        lowest_cosine_float32=float32.lowest,
        mean_cosine_float32=float32.mean,
        relative_error_float32=float32.relative,
    )


def measure_storing(model: FeatureModel, tiles: Sequence[np.ndarray]) -> StoreError | None:
    """Compare tokens as they are read back with the encoder's; return None if the model stores no tokens.

    Args:
        model: The model that stores them in a type with scales.
        tiles: uint8 [S,S,3] each, at least one.
    """
    if model.plan is None:
        return None
    with as_current_device(model.device), torch.inference_mode():
        batches = [
            [_stored_and_given(model, model.plan, hidden) for hidden in model.hidden(batch)]
            for batch in _batches(model, tiles)
        ]
    layers = list(zip(*batches, strict=True))
    read_back, given = ([[pair[side] for pair in layer] for layer in layers] for side in (0, 1))
    found = _worst(read_back, given)
    return StoreError(len(tiles), found.lowest, found.mean, found.relative)


def _stored_and_given(model: FeatureModel, plan: StorePlan, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens of hidden states [b,1+N,C] as they are read back and as they were before storing, on the host."""
    values = model.token_values(hidden)
    stored = model.kernels.store(values, plan)
    assert stored.scales is not None
    read_back = plain.dequantize_tokens(stored.tokens, stored.scales)
    unscaled = plain.store(values, replace(plan, dtype=torch.float32)).tokens
    return read_back.cpu(), unscaled.cpu()


@dataclass(frozen=True)
class _Comparison:
    lowest: float
    mean: float
    relative: float


def _reference(
    checkpoint: Checkpoint, model: FeatureModel, dtype: torch.dtype, tiles: Sequence[np.ndarray]
) -> list[list[Tensor]]:
    """Return hidden states by plain PyTorch in another type; its model is freed afterwards."""
    try:
        return _hidden(FeatureModel.load(checkpoint, model.spec, device=model.device, dtype=dtype, fused=False), tiles)
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{model.device}: no memory for the model in {str(dtype).removeprefix('torch.')}, to compare fp8 with",
            "use --dtype bfloat16, or a smaller --batch-size",
        ) from error
    finally:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _hidden(model: FeatureModel, tiles: Sequence[np.ndarray]) -> list[list[Tensor]]:
    """Return each layer's hidden states on the host, [b,T,C] each for a few tiles, to limit the device's memory."""
    kept = _kept_tokens(model.spec)
    with torch.inference_mode():
        batches = [[hidden[:, kept].cpu() for hidden in model.hidden(batch)] for batch in _batches(model, tiles)]
    return [list(layer) for layer in zip(*batches, strict=True)]


def _batches(model: FeatureModel, tiles: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Yield tiles on the device, a few at a time: uint8 [b,S,S,3]."""
    for start in range(0, len(tiles), TILES_AT_ONCE):
        yield torch.from_numpy(np.stack(tiles[start : start + TILES_AT_ONCE])).to(model.device)


def _kept_tokens(spec: FeatureSpec) -> slice:
    """Return which of the 1 + N tokens affect what is stored."""
    if spec.pool is Pool.MEAN:
        return slice(1, None)
    return slice(0, 1) if spec.tokens is Tokens.NONE and spec.pool is Pool.CLS else slice(0, None)


def _worst(measured: list[list[Tensor]], reference: list[list[Tensor]]) -> _Comparison:
    """Return each figure of the layer where it is worst."""
    found = [_compare(one, other) for one, other in zip(measured, reference, strict=True)]
    return _Comparison(
        min(layer.lowest for layer in found),
        min(layer.mean for layer in found),
        max(layer.relative for layer in found),
    )


def _compare(measured: list[Tensor], reference: list[Tensor]) -> _Comparison:
    """Return cosines of tokens, and the relative L2 error of all."""
    cosines, difference, norm = [], 0.0, 0.0
    for one, other in zip(measured, reference, strict=True):
        one, other = one.double(), other.double()  # noqa: PLW2901
        cosines.append(F.cosine_similarity(one, other, dim=-1).flatten())
        difference += float((one - other).square().sum())
        norm += float(other.square().sum())
    cosine = torch.cat(cosines)
    return _Comparison(float(cosine.amin()), float(cosine.mean()), (difference / norm) ** 0.5)
