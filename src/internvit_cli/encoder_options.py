"""How a model is run and what is kept of it: what an encoder is asked for, before PyTorch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from internvit_cli.config import ComputeDtype, OnOverflow, Pool, StoreDtype, TokenOrder, Tokens


@dataclass(frozen=True)
class EncoderOptions:
    """How to run a model, and what to keep."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: ComputeDtype = ComputeDtype.AUTO
    batch_tiles: int | None = None
    """Tiles in a batch; None measures (accelerators) or takes a few a thread (CPU)."""
    recorded_batch_tiles: int | None = None
    """The output's batch, taken for want of `batch_tiles` where a row's last bits depend on it: not on a CPU."""
    tokens: Tokens = Tokens.VISUAL
    pool: Pool = Pool.MEAN
    tile_size: int = 448
    """Side of a tile, pixels."""
    layer: int | None = None
    """How many blocks run, from `ModelCard.resolve_layer`; None is what the checkpoint was opened for."""
    token_order: TokenOrder = TokenOrder.V2
    store_dtype: StoreDtype = StoreDtype.FLOAT16
    on_overflow: OnOverflow = OnOverflow.SKIP
    threads: int | None = None
    """CPU only: tiles encoded at the same time, one thread each; None is one for every core this process may use."""
    compile: bool = False
    """CUDA only: torch.compile over plain PyTorch instead of our kernels; half a minute before the first batch."""
    fused: bool = True
    """CUDA only: whether Triton's kernels are used where they work; without them plain PyTorch is."""
