"""Run transformers' InternVLVisionModel for comparison: eagerly, and in a CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import InternVLVisionModel

from internvit_cli.config import TokenOrder
from internvit_cli.model.native import native_config, native_state
from internvit_cli.model.pixels import IMAGENET_MEAN, IMAGENET_STD
from internvit_cli.model.vit import pixel_unshuffle

if TYPE_CHECKING:
    import numpy as np

    from internvit_cli.model.checkpoint import Checkpoint


class Transformers:
    """The usual way today: the native class, whole batches, all cores for each operation."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        with torch.device("meta"):
            self.model = InternVLVisionModel(native_config(checkpoint, attn_implementation="sdpa"))
        self.model.load_state_dict(native_state(checkpoint, device, dtype), assign=True)
        self.model.eval().requires_grad_(False)
        self.threads = threads
        self.device, self.dtype = device, dtype
        self.mean = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
        self.std = torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    @torch.inference_mode()
    def encode(self, tiles: np.ndarray) -> np.ndarray:
        """Encode uint8 [B,S,S,3] to float16 visual tokens [B,N/4,4C]."""
        torch.set_num_threads(self.threads)
        return self.tokens(torch.from_numpy(tiles).to(self.device)).cpu().numpy()

    def tokens(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return the visual tokens on the device."""
        pixels = tiles.permute(0, 3, 1, 2).float() / 255
        pixels = ((pixels - self.mean) / self.std).to(self.dtype)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            hidden = self.model(pixel_values=pixels).last_hidden_state
        return pixel_unshuffle(hidden[:, 1:], TokenOrder.V2).half()


class Graphed:
    """The same in a CUDA graph for batches of one size, which loses no time to starting kernels one by one."""

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
        """Encode uint8 [B,S,S,3], at most a batch, to float16 visual tokens [B,N/4,4C]."""
        self._tiles[: len(tiles)].copy_(torch.from_numpy(tiles))
        self._graph.replay()
        return self._tokens[: len(tiles)].cpu().numpy()
