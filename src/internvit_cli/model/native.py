"""Compute the same features with transformers' InternVLVisionModel in float32, which shares only the weights.

Shapes use the letters of vit.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from internvit_cli.config import Pool, TokenOrder, Tokens
from internvit_cli.model.loading import read_tensor
from internvit_cli.runtime.workers import usable_cpus

if TYPE_CHECKING:
    import numpy as np

    from internvit_cli.model.checkpoint import Checkpoint
    from internvit_cli.model.features import FeatureSpec

NATIVE_NAMES = {
    "class_embedding": "cls_token",
    "position_embedding": "position_embeddings",
    "patch_embedding.": "patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".ls": ".lambda_",
    ".attn.proj.": ".attention.projection_layer.",
    ".attn.": ".attention.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
}
"""Replacements from standalone names to those of transformers' layout, applied in this order."""


class NativeFeatures(NamedTuple):
    """Features of B tiles from one layer, as float32 arrays on the host."""

    tokens: np.ndarray | None
    """[B,T,C]; None if no tokens are stored."""
    pooled: np.ndarray
    """[B,d]."""


class NativeModel:
    """InternVLVisionModel with the weights of a checkpoint, followed by the official steps, in float32."""

    def __init__(self, checkpoint: Checkpoint, spec: FeatureSpec, device: torch.device) -> None:
        """Load the weights onto a device. On a CPU, all cores share each operation from now on.

        Raises:
            ModelError: A file of weights cannot be read.
        """
        card = checkpoint.card
        self._spec = spec
        self.device = device
        if device.type == "cpu":
            torch.set_num_threads(usable_cpus())  # internvit's encoder sets one thread
        self._levels = 1 / card.normalization.rescale_factor  # exactly 255 for 1/255
        self._mean = torch.tensor(card.mean, device=device)[:, None, None]
        self._std = torch.tensor(card.std, device=device)[:, None, None]
        self._model = native_model(checkpoint, device)
        self._projector = native_projector(checkpoint, device) if spec.tokens is Tokens.PROJECTED else None

    @torch.inference_mode()
    def features(self, tiles: np.ndarray) -> tuple[NativeFeatures, ...]:
        """Return the features of uint8 RGB tiles [B,S,S,3]: of the last block, then of earlier layers, ascending."""
        pixels = torch.from_numpy(tiles).to(self.device).permute(0, 3, 1, 2).float() / self._levels
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = self._model((pixels - self._mean) / self._std, output_hidden_states=bool(self._spec.earlier_layers))
        states = [found.last_hidden_state, *(found.hidden_states[layer] for layer in self._spec.earlier_layers)]
        return tuple(NativeFeatures(self._tokens(x[:, 1:]), self._pooled(x).cpu().numpy()) for x in states)

    def _pooled(self, hidden: Tensor) -> Tensor:
        """Pool [B,1+N,C] to [B,d]."""
        parts = {Pool.CLS: [hidden[:, 0]], Pool.MEAN: [hidden[:, 1:].mean(1)]}
        return torch.cat(parts.get(self._spec.pool) or [*parts[Pool.CLS], *parts[Pool.MEAN]], dim=1)

    def _tokens(self, patches: Tensor) -> np.ndarray | None:
        """Turn patches [B,N,C] into stored tokens [B,T,C'] on the host."""
        if self._spec.tokens is Tokens.NONE:
            return None
        if self._spec.tokens is Tokens.PATCH:
            return patches.cpu().numpy()
        tokens = pixel_shuffle(patches, self._spec.token_order)
        return (tokens if self._projector is None else self._projector(tokens)).cpu().numpy()


def native_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """Return the tower of transformers with the blocks that run, in float32.

    Raises:
        ModelError: A file of weights cannot be read.
    """
    from transformers import InternVLVisionModel

    model: nn.Module = InternVLVisionModel(native_config(checkpoint))
    model = model.to(device)
    # A missing bias means no parameter, so strict loading leaves nothing at its random initialization.
    model.load_state_dict(native_state(checkpoint, device), strict=True)
    return model.eval().requires_grad_(False)


def native_config(checkpoint: Checkpoint, **changes: Any) -> Any:
    """Return transformers' InternVLVisionConfig for the tower of a checkpoint, with the given changes."""
    from transformers import InternVLVisionConfig

    vision = checkpoint.card.vision
    return InternVLVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=checkpoint.blocks,
        num_attention_heads=vision.num_heads,
        intermediate_size=vision.mlp_size,
        image_size=[vision.image_size] * 2,
        attention_bias=vision.qkv_bias,
        use_qk_norm=vision.qk_norm,
        norm_type=vision.norm,
        layer_norm_eps=vision.eps,
        **changes,
    )


def native_projector(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """Return the chat model's mlp1 in float32."""
    weights = {
        name.removeprefix("mlp1."): read_tensor(checkpoint, name, device, torch.float32)
        for name in checkpoint.weights
        if name.startswith("mlp1.")
    }
    size, width = weights["1.weight"].shape
    projector = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size), nn.GELU(), nn.Linear(size, size)).to(device)
    projector.load_state_dict(weights)
    return projector.eval().requires_grad_(False)


def pixel_shuffle(patches: Tensor, order: TokenOrder) -> Tensor:
    """Turn patch tokens [B,N,C] into visual tokens [B,N/4,4C], as OpenGVLab's modeling_internvl_chat.py does."""
    B, N, C = patches.shape  # noqa: N806 - as in vit.py
    side = math.isqrt(N)
    x = patches.reshape(B, side, side // 2, 2 * C).permute(0, 2, 1, 3).contiguous()
    x = x.view(B, side // 2, side // 2, 4 * C)
    if order is TokenOrder.V2:
        x = x.permute(0, 2, 1, 3).contiguous()
    return x.reshape(B, N // 4, 4 * C)


def native_state(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the weights of the tower under transformers' names, with q, k and v as separate tensors.

    Raises:
        ModelError: A file of weights cannot be read.
    """
    state: dict[str, Tensor] = {}
    for name in checkpoint.weights:
        if name.startswith("mlp1."):
            continue
        tensor = read_tensor(checkpoint, name, device, dtype)
        native = name
        for ours, theirs in NATIVE_NAMES.items():
            native = native.replace(ours, theirs)
        if ".qkv." in native:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[native.replace(".qkv.", f".{letter}_proj.")] = part
        else:
            state[native] = tensor
    return state
