"""How a model is run and what is kept of it: what an encoder is asked for, before PyTorch is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from internvit_cli.config import ComputeDtype, OnOverflow, Pool, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import DeviceError, UsageError

AUTO_DEVICE = "auto"
_KINDS = ("cpu", "cuda", "mps")
_MEANT = {"gpu": "cuda", "nvidia": "cuda", "metal": "mps", "apple": "mps"}


@dataclass(frozen=True)
class EncoderOptions:
    """How to run a model, and what to keep."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: ComputeDtype = ComputeDtype.AUTO
    batch_tiles: int | None = None
    """Tiles per batch; None takes 32, or what the memory holds (accelerators), or a few per thread (CPU)."""
    measure_batch: bool = False
    """Where `batch_tiles` is None, take what is fastest on CUDA: it may differ from run to run."""
    recorded_batch_tiles: int | None = None
    """The output's batch, taken for want of `batch_tiles` where a row's last bits depend on it: not on a CPU."""
    tokens: Tokens = Tokens.VISUAL
    pool: Pool = Pool.MEAN
    tile_size: int = 448
    """Side of a tile, pixels."""
    layer: int | None = None
    """How many blocks run; None is what the checkpoint was opened for."""
    earlier_layers: tuple[int, ...] = ()
    """Layers before it whose features are kept too, ascending."""
    token_order: TokenOrder = TokenOrder.V2
    store_dtype: StoreDtype = StoreDtype.FLOAT16
    on_overflow: OnOverflow = OnOverflow.SKIP
    threads: int | None = None
    """CPU only: tiles encoded at the same time, one thread each; None is one for every core this process may use."""
    compile: bool = False
    """CUDA only: torch.compile over plain PyTorch instead of our kernels; half a minute before the first batch."""
    fused: bool = True
    """CUDA only: whether Triton's kernels are used where they work; without them plain PyTorch is."""


class DeviceWord(NamedTuple):
    """What a --device says, whether or not this machine has one."""

    kind: str
    """auto, cpu, cuda or mps."""
    number: int
    """Of a card."""


def parse_device(name: str) -> DeviceWord:
    """Read a device's name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: no machine has a device by that name.
    """
    kind, colon, number = name.partition(":")
    is_numbered = kind == "cuda" and number.isdecimal() and number.isascii() and len(number) < 4
    if kind in (*_KINDS, AUTO_DEVICE) and (is_numbered if colon else True):
        return DeviceWord(kind, int(number or 0))
    meant = f"did you mean {_MEANT[kind.casefold()]}? " if kind.casefold() in _MEANT else ""
    raise UsageError(f"--device {name}: not a device", f"{meant}use auto, cpu, cuda, cuda:N or mps")


def check_kind(device: str, kind: str, dtype: ComputeDtype, *, compile: bool) -> None:  # noqa: A002 - its option's name
    """Refuse what no device of a kind can do.

    Args:
        device: as messages name it.
        kind: cpu, cuda or mps; `auto` is not decided yet, and refused nothing.
        dtype: what to compute in.
        compile: whether torch.compile is asked for.

    Raises:
        DeviceError: fp8 anywhere but on NVIDIA cards.
        UsageError: torch.compile anywhere but on CUDA.
    """
    if kind in (AUTO_DEVICE, "cuda"):
        return
    if dtype is ComputeDtype.FP8:
        raise DeviceError(
            f"--dtype fp8 on {device}: only NVIDIA cards of compute capability 9.0 and above compute in fp8",
            "use --dtype bfloat16",
        )
    if compile:
        raise UsageError(f"--compile on {device}: it is for CUDA", "leave it out")
