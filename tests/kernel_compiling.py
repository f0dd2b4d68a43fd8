"""Triton's kernels compiled for a card that need not be there: registers, spills, and which instructions they got.

Our own functions are called as on a card, with tensors on the host; what they would start is compiled and recorded.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
from model_helpers import tiny_card
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from internvit_cli.config import TokenOrder
from internvit_cli.encode.resizing.passes import table_on
from internvit_cli.encode.resizing.triton_pass import triton_pass
from internvit_cli.model.catalog import KNOWN_MODELS
from internvit_cli.model.kernels import fp8, triton_attention, triton_norms, triton_tiles
from internvit_cli.model.kernels.interface import StorePlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MODELS = {"300m": KNOWN_MODELS[0].vision, "6b": KNOWN_MODELS[2].vision, "tiny": tiny_card().vision}


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a kernel."""

    registers: int
    """A thread."""
    stack: int
    """Bytes a thread; above 0 registers were spilled."""
    shared: int
    """Bytes a program."""
    code: str
    """Disassembly."""

    @property
    def instructions(self) -> int:
        """All of them, without jumps back: the kernels that only move memory have no loops."""
        return len(re.findall(r"/\*[0-9a-f]{4}\*/\s+(?!NOP)\S", self.code))

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.code))


class AbsentCard:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability  # its number, so that no kernel of another is taken for its own
        self.get_current_stream = lambda device: 0


@contextmanager
def recording(capability: int) -> Iterator[list[Any]]:
    """Kernels that are started inside are compiled only, and end up in the list."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self, *arguments, **options):
        kernels.append(run(self, *arguments, **{**options, "warmup": True}))

    before = vars(driver).get("_active", vars(driver).get("active"))  # the second name is that of triton 3.4
    driver.set_active(AbsentCard(capability))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = before


def calls(model: str, dtype: torch.dtype, capability: int = 90) -> dict[str, Callable[[], object]]:
    """Every kernel as it is called for a model, on one or two tiles; `dtype` is float8_e4m3fn for rows in fp8."""
    vision = MODELS[model]
    base = torch.bfloat16 if dtype is fp8.FP8 else dtype
    N, C, M = vision.grid**2, vision.hidden_size, vision.mlp_size
    norm = (torch.nn.RMSNorm if vision.norm == "rms_norm" else torch.nn.LayerNorm)(C, vision.eps).to(base)
    in_fp8 = dtype is fp8.FP8
    plan = StorePlan(N // 4, 4 * C, torch.float16, TokenOrder.V2, clamp=False, infinite_from=65520.0, mean=True)

    def some(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=base)

    found: dict[str, Callable[[], object]] = {
        "residual_norm": lambda: triton_norms.residual_norm(
            some(1, 1 + N, C), some(1, 1 + N, C), some(C), norm, in_fp8=in_fp8
        ),
        "norm": lambda: triton_norms.norm_rows(some(1, 1 + N, C), norm, in_fp8=in_fp8),
        "embed": lambda: triton_norms.embed(some(1, N, C), some(1 + N, C), norm, in_fp8=in_fp8),
        "embed_alone": lambda: triton_norms.embed(some(1, N, C), some(1 + N, C), None, in_fp8=in_fp8),
        "qk_norm": lambda: triton_norms.qk_norm(some(1, 1 + N, 3 * C), norm, norm),
        "patches": lambda: triton_tiles.patches(
            torch.zeros(1, 14 * vision.grid, 14 * vision.grid, 3, dtype=torch.uint8), 592, base
        ),
        "store": lambda: triton_tiles.store(some(2, 1 + N, C)[:, 1:], plan),
        "store_clamped": lambda: triton_tiles.store(
            some(2, 1 + N, C)[:, 1:], replace(plan, clamp=True, order=TokenOrder.V1)
        ),
    }
    pixels, table = torch.zeros(vision.grid, 1000, 3, dtype=torch.uint8), table_on(torch.device("cpu"), 1000, 448)
    found["resize"] = lambda: triton_pass(pixels, table)
    if in_fp8:
        found["quantize"] = lambda: triton_norms.quantize(some(1, 1 + N, C))
        found["quantize_gelu"] = lambda: triton_norms.quantize(some(1, 1 + N, M), gelu=True)
    if base is not torch.float32:
        cut = triton_attention.blocks_for(vision.head_dim, divmod(capability, 10))
        found["attention"] = lambda: triton_attention.attention(some(1, 1 + N, 3 * C), vision.num_heads, cut)
    return found


def compiled(model: str, name: str, dtype: torch.dtype = torch.bfloat16, capability: int = 90) -> Compiled:
    """One of `calls` for a compute capability."""
    with torch.inference_mode(), recording(capability) as kernels:
        calls(model, dtype, capability)[name]()
    (kernel,) = kernels
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Compiled(registers, stack, kernel.metadata.shared, code)


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return result.stdout + result.stderr
