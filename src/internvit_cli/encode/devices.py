"""Find the device to encode on, and the fastest type there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from internvit_cli.config import ComputeDtype
from internvit_cli.encode.options import AUTO_DEVICE, check_kind, parse_device
from internvit_cli.errors import DeviceError
from internvit_cli.model.kernels.choice import check_fp8_card, plain_for
from internvit_cli.model.vit import Block

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.model.card import VisionConfig

BFLOAT16_GAIN = 1.2
"""On a CPU, bfloat16 must be faster than float32 by this factor to be worth its loss of accuracy."""
TRIAL_SECONDS = 0.2
TRIAL_ROUNDS = 5
LONGEST_TRIAL_SECONDS = 2.0
"""Each type is measured for at least this long and this many times, unless that takes too long."""


def find_device(name: str) -> torch.device:
    """Return the device with a name; auto means CUDA, else Apple's GPU, else the CPU.

    Raises:
        DeviceError: It does not exist; another one is never used silently.
        UsageError: It is not the name of a device.
    """
    kind, number = parse_device(name)
    if kind == AUTO_DEVICE:
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if kind == "cuda":
        return _find_cuda(name, number)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(
            "--device mps: this machine has no Apple GPU", "use --device auto to select an available device"
        )
    return torch.device(kind)


def find_fit_device(name: str, dtype: ComputeDtype, *, compile: bool) -> torch.device:  # noqa: A002 - as its option
    """Return the device with a name if it supports what is asked for.

    Raises:
        DeviceError: It does not exist, or cannot compute in that type.
        UsageError: It is not the name of a device, or torch.compile is used elsewhere than on CUDA.
    """
    device = find_device(name)
    check_kind(str(device), device.type, dtype, compile=compile)
    if dtype is ComputeDtype.FP8 and device.type == "cuda":
        check_fp8_card(device)
    return device


def _find_cuda(name: str, number: int) -> torch.device:
    count = count_cuda_devices()
    if number < count:
        return torch.device("cuda", number)
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(
            f"--device {name}: this PyTorch ({torch.__version__}) was built without CUDA",
            "install a CUDA build of torch, or use --device auto to select an available device",
        )
    raise DeviceError(
        f"--device {name}: PyTorch sees {count} CUDA device{'' if count == 1 else 's'}",
        "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device auto to select an available device",
    )


def count_cuda_devices() -> int:
    """Return the number of CUDA devices that PyTorch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def device_name(device: torch.device) -> str:
    """Return a description such as `cpu` or `cuda:0 (NVIDIA H100 80GB HBM3)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def fastest_dtype(device: torch.device, vision: VisionConfig, tile_size: int) -> ComputeDtype:
    """Return bfloat16 if it is native and clearly faster, else float32; if unknown, this is measured on one block.

    It is never float16, which can overflow and which CPUs emulate.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return ComputeDtype.BFLOAT16 if native else ComputeDtype.FLOAT32
    if device.type == "mps":
        return ComputeDtype.FLOAT32
    tokens = 1 + (tile_size // vision.patch_size) ** 2
    float32, bfloat16 = _block_seconds(vision, tokens, (torch.float32, torch.bfloat16))
    return ComputeDtype.BFLOAT16 if bfloat16 * BFLOAT16_GAIN < float32 else ComputeDtype.FLOAT32


def _block_seconds(vision: VisionConfig, tokens: int, dtypes: Sequence[torch.dtype]) -> list[float]:
    """Return the best time of one block on one tile in each of some types, which take turns.

    Processor time is measured and not wall time, because other processes such as our decode workers must not influence
    the choice.
    """
    blocks = [_block(vision, dtype) for dtype in dtypes]
    tiles = [torch.full((1, tokens, vision.hidden_size), 0.5, dtype=dtype) for dtype in dtypes]
    best, begin, rounds = [float("inf")] * len(dtypes), time.perf_counter(), 0
    with torch.inference_mode():
        while (spent := time.perf_counter() - begin) < TRIAL_SECONDS or (
            rounds < TRIAL_ROUNDS and spent < LONGEST_TRIAL_SECONDS
        ):
            for number, (block, tile) in enumerate(zip(blocks, tiles, strict=True)):
                start = time.thread_time()
                block(tile, tile)
                best[number] = min(best[number], time.thread_time() - start)
            rounds += 1
    return best


def _block(vision: VisionConfig, dtype: torch.dtype) -> Block:
    """Return a block of the model's sizes with ordinary numbers, because denormals would be slow."""
    block = Block(vision, plain_for(torch.device("cpu"), dtype)).to(dtype).requires_grad_(False)
    for parameter in block.parameters():
        parameter.fill_(0.01)
    return block
