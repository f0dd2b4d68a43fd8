"""Load the weights of a checkpoint into modules, tensor by tensor, directly onto their device and in their type."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from internvit_cli.model.kernels.choice import base_dtype, plain_for
from internvit_cli.model.kernels.fp8 import FP8, quantize_linears
from internvit_cli.model.vit import InternViT, Projector

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from internvit_cli.model.checkpoint import Checkpoint, TensorSet
    from internvit_cli.model.kernels.interface import Kernels

_TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

Module = TypeVar("Module", bound="nn.Module")


def load_vit(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels | None = None,
    earlier_layers: tuple[int, ...] = (),
) -> InternViT:
    """Return the vision tower with the blocks that run, ready for inference; its embeddings stay in float32.

    Loading takes the memory of one tensor in addition to the model: nothing is mapped or initialized needlessly.

    Args:
        checkpoint: The checkpoint, opened for these blocks.
        device: The device of the weights.
        dtype: The compute dtype; float8_e4m3fn means fp8 in linear layers and bfloat16 elsewhere.
        kernels: The operations for that dtype; None means plain PyTorch.
        earlier_layers: Layers whose hidden states are returned in addition to the last.

    Raises:
        ModelError: A file of weights cannot be read.
    """
    with torch.device("meta"):
        kernels = kernels or plain_for(device, dtype)
        model = InternViT(
            checkpoint.card.vision, blocks=checkpoint.blocks, kernels=kernels, earlier_layers=earlier_layers
        )
    state = {
        name: read_tensor(checkpoint, name, device, _type_of(name, dtype))
        for name in checkpoint.weights
        if not name.startswith("mlp1.")
    }
    model = _assign(model, state)
    if dtype is FP8:
        quantize_linears(model.encoder)
    return model


def _type_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.startswith("embeddings.") else base_dtype(dtype)


def load_projector(checkpoint: TensorSet, *, device: torch.device, dtype: torch.dtype) -> Projector:
    """Return the projector among some tensors.

    Raises:
        ModelError: A file of weights cannot be read.
    """
    size, token_size = checkpoint.weights["mlp1.1.weight"].shape
    with torch.device("meta"):
        projector = Projector(token_size // 4, size)
    state = {
        name.removeprefix("mlp1."): read_tensor(checkpoint, name, device, dtype)
        for name in checkpoint.weights
        if name.startswith("mlp1.")
    }
    return _assign(projector, state)


def read_tensor(checkpoint: TensorSet, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a tensor on a device and in a type; it shares no memory with the file."""
    weight = checkpoint.weights[name]
    tensor = torch.from_numpy(checkpoint.read(name)).view(_TORCH_DTYPES[weight.dtype]).reshape(weight.shape)
    return tensor.to(device=device, dtype=dtype)


def _assign(module: Module, state: Mapping[str, Tensor]) -> Module:
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False).eval()
