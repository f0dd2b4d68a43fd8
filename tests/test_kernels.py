"""Kernels give what their twins in plain PyTorch give, and where one does not, the twin runs and the report says so."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forking import PATIENCE
from kernel_cases import CASES, Setting, close, feature_model
from model_helpers import random_tiles, relative_error, tiny_card
from torch import nn
from torch.nn import functional as F

from internvit_cli.config import OnOverflow, Pool, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import DeviceError
from internvit_cli.model.catalog import KNOWN_MODELS
from internvit_cli.model.features import FeatureSpec
from internvit_cli.model.kernels import choice, fp8, stamps
from internvit_cli.model.kernels.choice import check_fp8_products, kernels_for, passing, plain_for, replace_failing
from internvit_cli.model.kernels.interface import QuantizedRows, StorePlan, linear_part
from internvit_cli.model.kernels.plain import attend_fused, plain_kernels
from internvit_cli.model.kernels.probes import ProbeSizes, probes

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
PLAN = StorePlan(4, 256, torch.float16, TokenOrder.V2, clamp=False, infinite_from=65520.0, mean=True)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_CUDA = {
    torch.bfloat16: Setting(CUDA, torch.bfloat16, 2.0**-7, interpreted=False, large=True),
    torch.float16: Setting(CUDA, torch.float16, 2.0**-10, interpreted=False, large=True),
    torch.float32: Setting(CUDA, torch.float32, 1e-5, interpreted=False),
}
"""Bounds: one unit in the last place of the largest value in 16 bits; in float32 the order of sums."""


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """By case that ran, what went wrong in Triton's interpreter: a process of its own, asked for it in time."""
    script = Path(__file__).with_name("kernel_cases.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_triton
@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
def test_in_tritons_interpreter_a_kernel_gives_what_its_twin_gives(case, interpreted):
    assert interpreted[case] == ""


@needs_triton
@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ON_CUDA, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_on_cuda_a_kernel_gives_what_its_twin_gives(case, dtype):
    if "attention" in case and dtype is torch.float32:
        pytest.skip("attention in float32 is PyTorch's")
    with_fp8 = case in {"residual_norm", "embed", "quantize", "nan_is_never_lost"}
    if with_fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 below compute capability 8.9")
    CASES[case](ON_CUDA[dtype])


@needs_triton
@needs_cuda
@pytest.mark.cuda
def test_on_cuda_rows_beyond_two_to_the_31_values_are_where_they_belong():
    from internvit_cli.model.kernels import triton_attention, triton_norms

    tiles, width = 720, 1024  # 720 * 1025 * 3072 is above 2**31
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free memory")
    qkv = torch.randn(tiles, 1025, 3 * width, device=CUDA, dtype=torch.bfloat16)
    last = qkv[-1:].clone()
    cut = triton_attention.blocks_for(64, torch.cuda.get_device_capability())
    assert torch.equal(triton_attention.attention(qkv, 16, cut)[-1:], triton_attention.attention(last, 16, cut))
    norm = nn.LayerNorm(3 * width, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    assert torch.equal(
        triton_norms.norm_rows(qkv, norm, in_fp8=False)[-1:], triton_norms.norm_rows(last, norm, in_fp8=False)
    )


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_gelu_in_the_matrix_product_is_the_tanh_form():
    from internvit_cli.model.kernels.triton_kernels import epilogue_linear_gelu

    layer = nn.Linear(64, 256, device=CUDA, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 5, 64, device=CUDA, dtype=torch.bfloat16)
    exact = F.linear(x.float(), layer.weight.float(), layer.bias.float())
    close(epilogue_linear_gelu(x, layer), F.gelu(exact, approximate="tanh").bfloat16(), 2.0**-7)
    assert float((F.gelu(exact, approximate="tanh") - F.gelu(exact)).abs().max()) < 5e-4


@needs_triton
@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, fp8.FP8], ids=str)
@pytest.mark.parametrize(
    "model", (KNOWN_MODELS[0], KNOWN_MODELS[2], KNOWN_MODELS[6]), ids=lambda model: model.repo.rpartition("/")[2]
)
def test_on_cuda_every_kernel_passes_its_check_at_the_sizes_of_the_real_models(model, dtype):
    if dtype is fp8.FP8 and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no fp8 below compute capability 9.0")
    vision = model.vision
    plan = replace(PLAN, tokens=vision.grid**2 // 4, token_size=4 * vision.hidden_size)
    assert kernels_for(CUDA, dtype, ProbeSizes(vision, vision.grid, plan)).name == "triton"


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_fp8_products_are_those_of_their_emulation():
    if torch.cuda.get_device_capability() < (9, 0):
        with pytest.raises(DeviceError, match="--dtype fp8"):
            check_fp8_products(CUDA)
        return
    check_fp8_products(CUDA)
    layer = fp8.Fp8Linear(nn.Linear(1024, 3072, device=CUDA, dtype=torch.bfloat16).requires_grad_(False))
    rows = fp8.quantize(torch.randn(2, 1025, 1024, device=CUDA))
    close(fp8.scaled_linear(rows, layer), fp8.emulated_linear(rows, layer), 2.0**-6)


def case_of(**changes) -> ProbeSizes:
    return ProbeSizes(replace(tiny_card().vision, **changes), 4, PLAN)


def test_on_a_cpu_all_is_plain_pytorch_and_nothing_is_tried():
    for dtype in (torch.float32, torch.bfloat16, fp8.FP8):
        assert kernels_for(CPU, dtype, case_of()).name == "plain PyTorch"


def test_a_kernel_that_fails_or_gives_something_else_is_replaced_by_its_twin_and_the_name_says_why():
    twin = plain_for(CPU, torch.float32)
    tries = probes(case_of(), CPU, torch.float32)

    def broken(*arguments):
        raise RuntimeError("no\ncompiler")

    wrong = replace(twin, name="triton", norm=broken, store=lambda values, plan: twin.store(values * 1.01, plan))
    checked = replace_failing(wrong, twin, tries)
    assert (checked.norm, checked.store) == (twin.norm, twin.store)
    assert checked.attention is wrong.attention
    assert checked.name.startswith(
        "triton, in part plain PyTorch (norm: RuntimeError: no compiler; store: differs by 0.0"
    )


def test_when_every_kernel_fails_the_whole_table_is_plain():
    def broken(*arguments):
        raise OSError("no linker")

    twin = plain_for(CPU, torch.float32)
    tries = probes(case_of(), CPU, torch.float32)
    wrong = replace(twin, name="triton", **dict.fromkeys(tries, broken))
    assert replace_failing(wrong, twin, tries) == replace(twin, name="plain PyTorch (triton: OSError: no linker)")


def test_a_kernel_that_gives_not_a_number_is_wrong():
    twin = plain_for(CPU, torch.float32)
    wrong = replace(twin, norm=lambda x, norm: twin.norm(x, norm) * float("nan"))  # type: ignore[operator]
    assert "norm: differs by inf" in replace_failing(wrong, twin, probes(case_of(), CPU, torch.float32)).name


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card that only has a name, and a cache folder of its own."""
    card = SimpleNamespace(name="card", total_memory=1, capability=(9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card.capability)
    return card


def times_probed(monkeypatch, kernels, twin, case=None, dtype=torch.float32) -> int:
    tries = []
    monkeypatch.setattr(choice, "probes", lambda *arguments: tries.append(arguments) or probes(*arguments))
    passing(kernels, twin, case or case_of(), CPU, dtype)
    return len(tries)


def test_kernels_that_passed_are_not_probed_again_until_something_they_depend_on_changes(card, monkeypatch):
    twin = plain_for(CPU, torch.float32)
    assert [times_probed(monkeypatch, twin, twin) for _ in range(3)] == [1, 0, 0]
    assert times_probed(monkeypatch, twin, twin, case_of(norm="rms_norm")) == 1
    assert times_probed(monkeypatch, twin, twin, dtype=torch.bfloat16) == 1
    for name, value in (("name", "another"), ("total_memory", 2), ("capability", (9, 1))):
        monkeypatch.setattr(card, name, value)
        assert [times_probed(monkeypatch, twin, twin) for _ in range(2)] == [1, 0]
    for changed in ("_driver", "_source_digest", "_system"):
        monkeypatch.setattr(stamps, changed, lambda: "newer")
        assert [times_probed(monkeypatch, twin, twin) for _ in range(2)] == [1, 0]


def test_kernels_that_failed_are_probed_at_every_start(card, monkeypatch):
    twin = plain_for(CPU, torch.float32)
    wrong = replace(twin, norm=lambda x, norm: twin.norm(x, norm) * 1.01)  # type: ignore[operator]
    assert [times_probed(monkeypatch, wrong, twin) for _ in range(2)] == [1, 1]


def test_a_cache_folder_that_cannot_be_written_costs_the_probes_and_nothing_else(card, monkeypatch, tmp_path):
    (tmp_path / "internvit").write_text("a file in its way")
    twin = plain_for(CPU, torch.float32)
    assert [times_probed(monkeypatch, twin, twin) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("variables", [{"HOME": "~", "XDG_CACHE_HOME": ""}, {"HOME": "~", "XDG_CACHE_HOME": "here"}])
def test_without_a_home_nothing_is_written_anywhere(card, monkeypatch, tmp_path, variables):
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    twin = plain_for(CPU, torch.float32)
    assert [times_probed(monkeypatch, twin, twin) for _ in range(2)] == [1, 1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, fp8.FP8], ids=str)
@pytest.mark.parametrize("changes", [{}, {"norm": "rms_norm", "qk_norm": True}], ids=["300m", "6b"])
def test_every_operation_is_tried_and_gives_itself(dtype, changes):
    twin = plain_for(CPU, dtype)
    tries = probes(case_of(**changes), CPU, dtype)
    assert set(tries) == {name for name in twin.__dataclass_fields__ if callable(getattr(twin, name))}
    assert replace_failing(twin, twin, tries) is twin


def test_rows_in_fp8_are_within_a_sixteenth_and_zeros_stay_zeros():
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 3
    x[3] = 0
    rows = fp8.quantize(x)
    assert rows.values.dtype is torch.float8_e4m3fn
    error = (fp8.dequantize(rows) - x).abs()
    assert bool((error <= x.abs() / 16 + x.abs().amax(1, keepdim=True) * 2.0**-17).all())
    assert float(rows.values.float().abs().max()) == 448


def test_the_largest_and_the_smallest_rows_are_scaled_alike():
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    for factor in (1e-6, 1.0, 1e30):
        assert relative_error(fp8.dequantize(fp8.quantize(x * factor)) / factor, fp8.dequantize(fp8.quantize(x))) < 1e-6


def test_a_linear_layer_in_fp8_is_close_to_the_exact_one_and_a_part_of_it_is_a_part_of_it():
    layer = nn.Linear(128, 96).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    scaled = fp8.Fp8Linear(layer)
    whole = fp8.scaled_linear(x, scaled)
    assert whole.dtype is torch.bfloat16
    exact = layer(x).float()
    assert float((whole.float() - exact).norm() / exact.norm()) < 0.04
    part = fp8.scaled_linear(fp8.quantize(x), linear_part(scaled, slice(16, 48)))
    assert torch.equal(part, whole[..., 16:48])


def test_every_linear_layer_of_a_model_is_replaced_and_nothing_else():
    model = nn.Sequential(nn.LayerNorm(16), nn.Sequential(nn.Linear(16, 16), nn.GELU()), nn.Linear(16, 16))
    fp8.quantize_linears(model.requires_grad_(False))
    kinds = [type(module) for module in model.modules() if not list(module.children())]
    assert kinds == [nn.LayerNorm, fp8.Fp8Linear, nn.GELU, fp8.Fp8Linear]


def test_the_operations_in_fp8_are_the_plain_ones_rounded_once():
    plain, coarse = plain_kernels(attend_fused), plain_for(CPU, fp8.FP8)
    norm = nn.LayerNorm(64, eps=1e-6).requires_grad_(False)
    x, y = torch.randn(2, 2, 4, 64, generator=torch.Generator().manual_seed(0))
    scale = torch.linspace(-1, 1, 64)
    expected = plain.residual_norm(x, y, scale, norm)
    actual = coarse.residual_norm(x, y, scale, norm)
    assert torch.equal(actual[0], expected[0])
    assert isinstance(actual[1], QuantizedRows)
    assert relative_error(fp8.dequantize(actual[1]), expected[1]) < 0.05
    assert torch.equal(coarse.norm(expected[0], norm).values, actual[1].values)


@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.NONE])
def test_the_network_in_fp8_is_close_to_the_same_in_bfloat16(tokens):
    spec = FeatureSpec(tokens, Pool.CLS, 56, TokenOrder.V2, StoreDtype.FLOAT32, OnOverflow.SKIP)
    tiles = torch.stack([torch.from_numpy(tile) for tile in random_tiles(4)])
    results = []
    for dtype in (torch.bfloat16, fp8.FP8):
        setting = Setting(CPU, dtype, 0, interpreted=False)
        results += feature_model(spec, setting, plain_for(CPU, dtype))(tiles)
    exact, coarse = results
    for one, other in ((exact.pooled, coarse.pooled), (exact.tokens, coarse.tokens)):
        if one is not None:
            assert float(F.cosine_similarity(one, other, dim=-1).min()) > 0.995
            assert 0.0 < relative_error(other, one) < 0.15


@pytest.fixture(scope="module")
def compiling():
    """Compiles kernels for a card that need not be there."""
    pytest.importorskip("triton", reason="triton is not installed")
    compiling = pytest.importorskip(
        "kernel_compiling", reason="this triton is compiled otherwise", exc_type=ImportError
    )
    if not (compiling.TOOLS / "nvdisasm").is_file():
        pytest.skip("this triton has no disassembler")
    return compiling


@pytest.mark.parametrize(("model", "programs"), [("300m", 2), ("6b", 1)])
def test_attention_for_hopper_overlaps_copies_and_asynchronous_products_and_spills_nothing(compiling, model, programs):
    kernel = compiling.compiled(model, "attention")
    assert kernel.stack == 0
    assert 256 * (-(-kernel.registers // 8) * 8) * programs <= 65536, "registers of a multiprocessor"
    assert (kernel.shared + 1024) * programs <= 228 << 10
    assert kernel.count("LDGSTS") > 0
    loop = max(re.split(r"\.L_x_\d+:", kernel.code), key=lambda part: part.count("HGMMA"))
    assert loop.count("HGMMA") >= 8
    assert 3 * loop.count("WARPGROUP.DEPBAR") < loop.count("HGMMA"), "products wait for each other"


@pytest.mark.parametrize(
    ("model", "name", "dtype"),
    [
        ("300m", "residual_norm", torch.bfloat16),
        ("6b", "residual_norm", fp8.FP8),
        ("300m", "embed", fp8.FP8),
        ("6b", "qk_norm", torch.bfloat16),
        ("300m", "store", torch.bfloat16),
    ],
    ids=str,
)
def test_what_only_moves_memory_does_so_in_accesses_of_16_bytes_and_spills_nothing(compiling, model, name, dtype):
    kernel = compiling.compiled(model, name, dtype)
    assert kernel.stack == 0
    assert re.search(r"\bSTG\.E\.128\b", kernel.code)
    assert re.search(r"\bLDG\.E\.128\b", kernel.code)


@pytest.mark.parametrize(("model", "values", "most"), [("300m", 16, 26), ("6b", 32, 24)])
def test_gelu_and_quantization_for_hopper_issue_few_instructions_per_value(compiling, model, values, most):
    """At three bytes per value, the memory of an H200 allows about 21 instructions; with erf, there would be 47."""
    kernel = compiling.compiled(model, "quantize_gelu", fp8.FP8)
    assert kernel.stack == 0
    assert 8 * values < kernel.instructions <= most * values
    assert kernel.count("MUFU") <= 2 * values + 1


@pytest.mark.sweep
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, fp8.FP8], ids=str)
def test_every_kernel_compiles_for_every_generation_and_spills_nothing(compiling, dtype, capability):
    if dtype is fp8.FP8 and capability < 90:
        pytest.skip("fp8 is for compute capability 9.0")
    for model in compiling.MODELS:
        for name in compiling.calls(model, dtype):
            kernel = compiling.compiled(model, name, dtype, capability)
            assert kernel.stack == 0, (model, name)
            assert kernel.shared <= 99 << 10 or capability == 90, (model, name)
