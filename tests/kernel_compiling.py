"""Triton's kernels compiled for a card that need not be there: registers, spills, and which instructions they got."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from internvit_cli.model.kernels import triton_attention, triton_norms, triton_tiles

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16 = "*bf16"


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a kernel."""

    registers: int
    stack: int
    """Bytes a thread; above 0 registers were spilled."""
    shared: int
    """Bytes a program."""
    code: str
    """Disassembly."""

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.code))


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Every kernel at the sizes of the real models: function, types of arguments, constants, options."""
    found = {}
    for model, block, centred, heads in (("300m", 1024, True, 64), ("6b", 4096, False, 128)):
        warps = {"num_warps": min(block // 256, 16)}
        cut = triton_attention.BLOCKS[heads]
        for in_fp8 in (False, True):
            rows = {"out": "*fp8e4nv", "out_scales": "*fp32"} if in_fp8 else {"out": BF16, "out_scales": BF16}
            types = dict.fromkeys(("x", "y", "scale", "weight", "bias"), BF16) | rows | {"width": "i32", "eps": "fp32"}
            constants = {"ADD": True, "CENTRED": centred, "IN_FP8": in_fp8, "BLOCK": block}
            found[f"residual_norm-{model}-{in_fp8}"] = (triton_norms._residual_norm, types, constants, warps)
            types = dict.fromkeys(("patches", "table", "weight", "bias", "x"), BF16) | rows
            types |= {"tokens": "i32", "width": "i32", "eps": "fp32"}
            constants = {"NORM": True, "CENTRED": centred, "IN_FP8": in_fp8, "BLOCK": block}
            found[f"embed-{model}-{in_fp8}"] = (triton_norms._embed, types, constants, warps)
        types = {"qkv": BF16, "out": BF16, "heads": "i32", "scale": "fp32"}
        constants = {"PATCHES": 1024, "D": heads, "QUERIES": cut.queries, "KEYS": cut.keys}
        constants |= {"CLASS_KEYS": cut.class_keys}
        options = {"num_warps": cut.warps, "num_stages": cut.stages}
        found[f"attention-{model}"] = (triton_attention._attention, types, constants, options)
        types = {"x": BF16, "out": "*fp8e4nv", "out_scales": "*fp32", "width": "i32"}
        wide = 4 * block
        constants, options = {"GELU": True, "BLOCK": wide}, {"num_warps": min(wide // 256, 16)}
        found[f"quantise-{model}"] = (triton_norms._quantise, types, constants, options)
    types = dict.fromkeys(("qkv", "q_weight", "k_weight"), BF16) | {"width": "i32", "eps": "fp32"}
    found["qk_norm-6b"] = (triton_norms._qk_norm, types, {"BLOCK": 4096}, {"num_warps": 16})
    types = {"tiles": "*u8", "out": BF16, "side": "i32"}
    found["patches"] = (triton_tiles._patches, types, {"COLUMNS": 592}, {"num_warps": 4})
    types = {"rows": BF16, "tokens": "*fp16", "sums": "*fp32", "extremes": "*fp32", "clamped": "*i32"}
    types |= dict.fromkeys(("count", "tile_stride", "width", "side"), "i32")
    types |= {"largest": "fp32", "infinite_from": "fp32"}
    constants = {"ORDER": 2, "CLAMP": True, "MEAN": True, "ROWS": 32, "STEP": 4, "BLOCK": 512}
    found["store"] = (triton_tiles._store, types, constants, {"num_warps": 4})
    return found


def compiled(name: str, capability: int = 90) -> Compiled:
    """One of `kernels` for a compute capability, with pointers and sizes divisible by 16 as they are in reality."""
    function, types, constants, options = kernels()[name]
    divisible = {
        (number,): [["tt.divisibility", 16]]
        for number, (argument, kind) in enumerate(types.items())
        if kind != "fp32" and argument not in {"heads", "tokens"}
    }
    source = ASTSource(
        function,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=divisible,
    )
    kernel = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=options | {"enable_fp_fusion": True}
    )
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
