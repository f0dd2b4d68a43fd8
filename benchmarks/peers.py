"""transformers' InternVLVisionModel as people run it today, for comparison: eager, and in a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvit_cli.model.card import IMAGENET_MEAN, IMAGENET_STD
from internvit_cli.model.loading import read_tensor
from internvit_cli.model.native import NATIVE_NAMES
from internvit_cli.model.vit import pixel_unshuffle

if TYPE_CHECKING:
    import numpy as np

    from internvit_cli.model.checkpoint import Checkpoint


class Transformers:
    """What people run today: the native class, whole batches, all cores for each operation."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        vision = checkpoint.card.vision
        config = InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=checkpoint.blocks,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.mlp_size,
            image_size=[vision.image_size] * 2,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
            norm_type=vision.norm,
            layer_norm_eps=vision.eps,
            attn_implementation="sdpa",
        )
        with torch.device("meta"):
            self.model = InternVLVisionModel(config)
        self.model.load_state_dict(native_state(checkpoint, device, dtype), assign=True)
        self.model.eval().requires_grad_(False)
        self.threads = threads
        self.device, self.dtype = device, dtype
        self.mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 [B,S,S,3] -> float16 visual tokens [B,N/4,4C]."""
        torch.set_num_threads(self.threads)
        return self.tokens(torch.from_numpy(tiles).to(self.device)).cpu().numpy()

    def tokens(self, tiles: torch.Tensor) -> torch.Tensor:
        """The same on the device."""
        pixels = tiles.permute(0, 3, 1, 2).float() / 255
        pixels = ((pixels - self.mean) / self.std).to(self.dtype)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            hidden = self.model(pixel_values=pixels).last_hidden_state
        return pixel_unshuffle(hidden[:, 1:], "v2").half()


class Graphed:
    """The same in a CUDA graph for batches of one size: no time is lost to starting kernels one by one."""

    def __init__(self, peer: Transformers, batch: int, side: int) -> None:
        self._tiles = torch.zeros((batch, side, side, 3), dtype=torch.uint8, device=peer.device)
        stream = torch.cuda.Stream(peer.device)
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                for _ in range(2):
                    peer.tokens(self._tiles)
            stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._tokens = peer.tokens(self._tiles)

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """uint8 [B,S,S,3], at most a batch, -> float16 visual tokens [B,N/4,4C]."""
        self._tiles[: len(tiles)].copy_(torch.from_numpy(tiles))
        self._graph.replay()
        return self._tokens[: len(tiles)].cpu().numpy()


def native_state(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under transformers' names."""
    state = {}
    for name in checkpoint.weights:
        tensor = read_tensor(checkpoint, name, device, dtype)
        for ours, theirs in NATIVE_NAMES.items():
            name = name.replace(ours, theirs)  # noqa: PLW2901
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{letter}_proj.")] = part.clone()
        else:
            state[name] = tensor
    return state
