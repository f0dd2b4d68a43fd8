"""Define and check the options of an encoder without loading PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from internvit_cli.config import ComputeDtype, OnOverflow, Pool, Resize, StoreDtype, TokenOrder, Tokens
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
    """Tiles per batch; None selects 32, or what the memory holds (accelerators), or a few per thread (CPU)."""
    measure_batch: bool = False
    """If `batch_tiles` is None, select the fastest size on CUDA, which may differ between runs."""
    recorded_batch_tiles: int | None = None
    """The output's batch size, used if `batch_tiles` is None and a row's last bits depend on it (not on a CPU)."""
    tokens: Tokens = Tokens.VISUAL
    pool: Pool = Pool.MEAN
    tile_size: int = 448
    """Side of a tile, pixels."""
    layer: int | None = None
    """Number of blocks that run; None means what the checkpoint was opened for."""
    earlier_layers: tuple[int, ...] = ()
    """Earlier layers whose features are kept as well, ascending."""
    token_order: TokenOrder = TokenOrder.V2
    store_dtype: StoreDtype = StoreDtype.FLOAT16
    values_per_scale: int = 0
    """Values of a token that share a float16 scale, in scaled types; 0 for one float32 scale per token."""
    on_overflow: OnOverflow = OnOverflow.SKIP
    threads: int | None = None
    """CPU only: tiles encoded at the same time, one thread each; None means one per core that this process may use."""
    compile: bool = False
    """CUDA only: torch.compile over plain PyTorch instead of our kernels; half a minute before the first batch."""
    resize: Resize = Resize.AUTO
    """Where pictures are resized, if the caller has whole ones."""
    fused: bool = True
    """CUDA only: whether Triton kernels are used if they work; otherwise plain PyTorch is used."""


class DeviceWord(NamedTuple):
    """A parsed `--device`, whether or not this machine has it."""

    kind: str
    """auto, cpu, cuda or mps."""
    number: int
    """The number of a card."""


def parse_device(name: str) -> DeviceWord:
    """Parse a device's name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UsageError: No machine has a device with that name.
    """
    kind, colon, number = name.partition(":")
    is_numbered = kind == "cuda" and number.isdecimal() and number.isascii() and len(number) < 4
    if kind in (*_KINDS, AUTO_DEVICE) and (is_numbered if colon else True):
        return DeviceWord(kind, int(number or 0))
    meant = f"did you mean {_MEANT[kind.casefold()]}? " if kind.casefold() in _MEANT else ""
    raise UsageError(f"--device {name}: not a device", f"{meant}use auto, cpu, cuda, cuda:N or mps")


def check_kind(device: str, kind: str, dtype: ComputeDtype, *, compile: bool) -> None:  # noqa: A002 - its option's name
    """Refuse options that no device of a kind supports.

    Args:
        device: The name of the device in messages.
        kind: One of cpu, cuda and mps; `auto` is not decided yet and passes every check.
        dtype: The compute type.
        compile: Whether torch.compile is requested.

    Raises:
        DeviceError: fp8 is requested elsewhere than on NVIDIA cards.
        UsageError: torch.compile is requested elsewhere than on CUDA.
    """
    if kind in (AUTO_DEVICE, "cuda"):
        return
    if dtype is ComputeDtype.FP8:
        raise DeviceError(
            f"--dtype fp8 on {device}: only NVIDIA cards of compute capability 9.0 and above compute in fp8",
            "use --dtype bfloat16",
        )
    if compile:
        raise UsageError(f"--compile on {device}: it works only on CUDA", "leave it out")
