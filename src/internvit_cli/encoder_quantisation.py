"""How far hidden states in a coarse type, and tokens stored in one, are from wider ones, on the user's own tiles.

Letters in shapes as in model/vit.py; n tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the name that everyone gives it)

from internvit_cli.accuracy import ComputeError, StoreError
from internvit_cli.config import Pool, Tokens
from internvit_cli.errors import DeviceError
from internvit_cli.model.features import FeatureModel, FeatureSpec
from internvit_cli.model.kernels import plain
from internvit_cli.model.kernels.choice import current

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from internvit_cli.model.checkpoint import Checkpoint

TILES_AT_ONCE = 4


def measure_computing(checkpoint: Checkpoint, model: FeatureModel, tiles: Sequence[np.ndarray]) -> ComputeError:
    """Encode tiles with a model and with its references, which are loaded one after the other and freed.

    Args:
        checkpoint: the model's weights.
        model: what is measured.
        tiles: uint8 [S,S,3] each, at least one.

    Raises:
        DeviceError: a reference does not fit the device's memory.
        ModelError: the weights can't be read again.
    """
    with current(model.device):
        measured = _hidden(model, tiles)
        bfloat16 = _compare(measured, _reference(checkpoint, model, torch.bfloat16, tiles))
        float32 = _compare(measured, _reference(checkpoint, model, torch.float32, tiles))
    return ComputeError(
        tiles=len(tiles),
        lowest_cosine_bfloat16=bfloat16.lowest,
        mean_cosine_bfloat16=bfloat16.mean,
        lowest_cosine_float32=float32.lowest,
        mean_cosine_float32=float32.mean,
        relative_error_float32=float32.relative,
    )


def measure_storing(model: FeatureModel, tiles: Sequence[np.ndarray]) -> StoreError | None:
    """Compare tokens as they are read back with what the encoder gave; None for a model that stores none.

    Args:
        model: what stores them, in a type with scales.
        tiles: uint8 [S,S,3] each, at least one.
    """
    if model.plan is None:
        return None
    unscaled = replace(model.plan, dtype=torch.float32)
    read_back, given = [], []
    with current(model.device), torch.inference_mode():
        for batch in _batches(model, tiles):
            values = model.token_values(model.hidden(batch))
            stored = model.kernels.store(values, model.plan)
            assert stored.scales is not None
            numbers = stored.tokens
            if numbers.dtype is torch.uint8:
                numbers = numbers.view(torch.float8_e4m3fn)
            read_back.append((numbers.float() * stored.scales[..., None]).cpu())
            given.append(plain.store(values, unscaled).tokens.cpu())
    found = _compare(read_back, given)
    return StoreError(len(tiles), found.lowest, found.mean, found.relative)


@dataclass(frozen=True)
class _Comparison:
    lowest: float
    mean: float
    relative: float


def _reference(
    checkpoint: Checkpoint, model: FeatureModel, dtype: torch.dtype, tiles: Sequence[np.ndarray]
) -> list[Tensor]:
    """Hidden states by plain PyTorch in another type; the model that gave them is gone afterwards."""
    try:
        return _hidden(FeatureModel.load(checkpoint, model.spec, device=model.device, dtype=dtype, fused=False), tiles)
    except torch.cuda.OutOfMemoryError as error:
        raise DeviceError(
            f"{model.device}: no memory for the model in {str(dtype).removeprefix('torch.')}, to measure fp8 against",
            "use --dtype bfloat16, or a smaller --batch-size",
        ) from error
    finally:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()


def _hidden(model: FeatureModel, tiles: Sequence[np.ndarray]) -> list[Tensor]:
    """Hidden states on the host, a few tiles each [b,T,C]; neither they nor the tiles are all on the device."""
    kept = _kept_tokens(model.spec)
    with torch.inference_mode():
        return [model.hidden(batch)[:, kept].cpu() for batch in _batches(model, tiles)]


def _batches(model: FeatureModel, tiles: Sequence[np.ndarray]) -> Iterator[Tensor]:
    """Tiles on the device, a few at a time: uint8 [b,S,S,3]."""
    for start in range(0, len(tiles), TILES_AT_ONCE):
        yield torch.from_numpy(np.stack(tiles[start : start + TILES_AT_ONCE])).to(model.device)


def _kept_tokens(spec: FeatureSpec) -> slice:
    """Which of the 1 + N tokens leave a trace in what is stored."""
    if spec.pool is Pool.MEAN:
        return slice(1, None)
    return slice(0, 1) if spec.tokens is Tokens.NONE and spec.pool is Pool.CLS else slice(0, None)


def _compare(measured: list[Tensor], reference: list[Tensor]) -> _Comparison:
    """Cosines of tokens, and the relative L2 error of all."""
    cosines, difference, norm = [], 0.0, 0.0
    for one, other in zip(measured, reference, strict=True):
        one, other = one.double(), other.double()  # noqa: PLW2901
        cosines.append(F.cosine_similarity(one, other, dim=-1).flatten())
        difference += float((one - other).square().sum())
        norm += float(other.square().sum())
    cosine = torch.cat(cosines)
    return _Comparison(float(cosine.amin()), float(cosine.mean()), (difference / norm) ** 0.5)
