"""Convert stored numpy arrays to PyTorch tensors."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from internvit_cli.config import StoreDtype

if TYPE_CHECKING:
    from numpy.typing import NDArray


def as_tensor(stored: NDArray[Any], dtype: StoreDtype) -> torch.Tensor:
    """Return the values as a tensor that shares the array's memory; bfloat16 bits become torch.bfloat16.

    Args:
        stored: The array as stored on the disk, writable.
        dtype: The stored type.
    """
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if dtype is StoreDtype.BFLOAT16 else tensor


def saved_tensor(stored: NDArray[Any], dtype: StoreDtype) -> bytes:
    """Return the values as the content of a .pt file, which `torch.load` reads with `weights_only=True`.

    Args:
        stored: The array as stored on the disk.
        dtype: The stored type, as for `as_tensor`.
    """
    data = io.BytesIO()
    torch.save(as_tensor(np.array(stored), dtype), data)
    return data.getvalue()
