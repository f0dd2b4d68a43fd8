"""Triton's kernels against their twins in plain PyTorch, as cases that run on a card or in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernel_cases.py     one JSON object: by case that ran, what went wrong or ""

The interpreter needs a process of its own, because Triton asks for it once, when its functions are made. Its bfloat16
is not IEEE's, so that there everything is float32; and its rounding to fp8 loses a carry now and then.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from model_helpers import open_all, random_tiles, tiny_card
from torch import Tensor, nn
from torch.nn import functional as F

from internvit_cli.config import OnOverflow, Pool, StoreDtype, TokenOrder, Tokens
from internvit_cli.model.features import FeatureModel, FeatureSpec
from internvit_cli.model.kernels import fp8, plain
from internvit_cli.model.kernels.choice import plain_for, replace_failing
from internvit_cli.model.kernels.interface import QuantizedRows, StorePlan
from internvit_cli.model.kernels.probes import ProbeSizes, difference, probes
from internvit_cli.model.loading import load_vit

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Setting:
    """Where a case runs, and how close is close enough."""

    device: torch.device
    dtype: torch.dtype
    bound: float
    """Largest difference as a share of the largest magnitude."""
    interpreted: bool
    large: bool = False
    """Also at the sizes of the real models."""

    @property
    def capability(self) -> tuple[int, int]:
        return (9, 0) if self.interpreted else torch.cuda.get_device_capability(self.device)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return (torch.randn(shape, generator=generator) * scale).to(self.device, self.dtype)


INTERPRETER = Setting(torch.device("cpu"), torch.float32, 5e-6, interpreted=True)
SMALL_ATTENTION = ((1, 1, 2, 16), (2, 16, 2, 32), (1, 49, 3, 64), (2, 130, 1, 64), (1, 100, 2, 128))  # B, N, H, D
REAL_ATTENTION = ((3, 1024, 16, 64), (2, 1024, 25, 128), (2, 256, 25, 128), (1, 576, 16, 64))
WIDTHS = (16, 64, 1000, 3200)


def close(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype is expected.dtype
    error = difference([actual], [expected])
    assert error <= bound, f"{tuple(expected.shape)}: {error:.3g} is more than {bound:.3g}"


def close_rows(actual: QuantizedRows, expected: QuantizedRows, setting: Setting) -> None:
    """Nearly all values equal, and none further off than a step of fp8 (in the interpreter, a power of two)."""
    close(actual.scale, expected.scale, max(setting.bound, 1e-5))
    differ = (actual.values.float() != expected.values.float()).float().mean()
    assert differ < (0.05 if setting.interpreted else 0.01), f"{float(differ):.3g} of the values differ"
    close(fp8.dequantize(actual), fp8.dequantize(expected), 0.15 if setting.interpreted else 0.08)


def norms(setting: Setting, width: int, kind: type) -> nn.Module:
    norm = kind(width, eps=1e-6).to(setting.device, setting.dtype).requires_grad_(False)
    for number, parameter in enumerate(norm.parameters()):
        parameter.copy_(setting.random(width + number)[:width])
    return norm


def attention(setting: Setting) -> None:
    """Every head size and number of patches, whole blocks or not, cut in several ways."""
    from internvit_cli.model.kernels import triton_attention
    from internvit_cli.model.kernels.triton_attention import AttentionBlocks, blocks_for

    exact = plain.plain_attention(plain.attend_fused)
    for B, N, H, D in SMALL_ATTENTION + REAL_ATTENTION * setting.large:
        qkv = setting.random(B, 1 + N, 3 * H * D, scale=1.5)
        expected = exact(qkv.float(), H, None).to(setting.dtype)
        others = (AttentionBlocks(16, 32, 16, 4, 2, ahead=True), AttentionBlocks(64, 16, 32, 4, 2, ahead=False))
        for cut in (blocks_for(D, setting.capability), *others):
            close(triton_attention.attention(qkv, H, cut), expected, setting.bound)


def attention_of_sharp_scores(setting: Setting) -> None:
    """One key far above all others, the class token's among them, and scores that would overflow without a maximum."""
    from internvit_cli.model.kernels import triton_attention

    for winner in (0, 1, 40):
        qkv = setting.random(1, 50, 3 * 64, scale=0.1)
        qkv[:, :, :64] = 4.0
        qkv[:, winner, 64:128] = 30.0
        out = triton_attention.attention(qkv, 1, triton_attention.blocks_for(64, setting.capability))
        close(out, qkv[:, winner : winner + 1, 128:].expand_as(out), setting.bound)


def residual_norm(setting: Setting) -> None:
    """LayerNorm and RMSNorm of any width; x is overwritten by the sum."""
    from internvit_cli.model.kernels import triton_norms

    for width in WIDTHS:
        for kind in (nn.LayerNorm, nn.RMSNorm):
            norm = norms(setting, width, kind)
            x, y, scale = setting.random(2, 5, width), setting.random(2, 5, width), setting.random(width)
            expected, rows = plain.residual_norm(x, y, scale, norm)
            actual, actual_rows = triton_norms.residual_norm(x, y, scale, norm, in_fp8=False)
            assert actual.data_ptr() == x.data_ptr()
            close(actual, expected, setting.bound)
            close(actual_rows, rows, setting.bound)
            close(triton_norms.norm_rows(expected, norm, in_fp8=False), rows, setting.bound)
            x = setting.random(2, 5, width)
            expected, rows = fp8.residual_norm(x, y, scale, norm)  # type: ignore[assignment]
            _, actual_rows = triton_norms.residual_norm(x, y, scale, norm, in_fp8=True)
            close_rows(actual_rows, rows, setting)


def embed(setting: Setting) -> None:
    """Patches, class token and table; with the first norm, or without where no block runs."""
    from internvit_cli.model.kernels import triton_norms

    for width in WIDTHS:
        for kind in (nn.LayerNorm, nn.RMSNorm):
            norm = norms(setting, width, kind)
            patches, table = setting.random(3, 4, width), setting.random(5, width)
            expected, rows = plain.embed(patches, table, norm)
            actual, actual_rows = triton_norms.embed(patches, table, norm, in_fp8=False)
            close(actual, expected, setting.bound)
            close(actual_rows, rows, setting.bound)
            close_rows(
                triton_norms.embed(patches, table, norm, in_fp8=True)[1], fp8.embed(patches, table, norm)[1], setting
            )
            alone, nothing = triton_norms.embed(patches, table, None, in_fp8=False)
            close(alone, expected, setting.bound)
            assert nothing is None


def qk_norm(setting: Setting) -> None:
    """Queries and keys are normed in place over all heads; values stay what they are."""
    from internvit_cli.model.kernels import triton_norms

    for width in WIDTHS:
        q_norm, k_norm = norms(setting, width, nn.RMSNorm), norms(setting, width, nn.RMSNorm)
        k_norm.weight.mul_(2)  # type: ignore[operator]
        qkv = setting.random(2, 5, 3 * width)
        q, k, v = qkv.chunk(3, dim=-1)
        expected = torch.cat((q_norm(q), k_norm(k), v), dim=-1)
        actual = triton_norms.qk_norm(qkv, q_norm, k_norm)
        close(actual, expected, setting.bound)
        assert torch.equal(actual[..., 2 * width :], expected[..., 2 * width :])


def quantize(setting: Setting) -> None:
    """Rows in fp8, as they are or after GELU; a row of zeros stays one."""
    from internvit_cli.model.kernels import triton_norms

    for width in (16, 1000, 12800):
        x = setting.random(3, 2, width, scale=2.0)
        x[0, 0] = 0
        close_rows(triton_norms.quantize(x), fp8.quantize(x), setting)
        close_rows(triton_norms.quantize(x, gelu=True), fp8.quantize(F.gelu(x.float())), setting)


def gelu(setting: Setting) -> None:
    """Every number in bfloat16, which is what a product gives: as close to the exact GELU as erf in float32.

    Far from zero the result is the number itself, or nothing; infinities and NaN are not hidden.
    """
    from gelu_kernel import gelu

    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    x = bits.view(torch.bfloat16).float()
    x = x[x.isfinite()]
    exact = F.gelu(x.double())
    error = (gelu(x.to(setting.device)).cpu().double() - exact).abs()
    assert bool((error <= 4e-7 + 2.0**-21 * exact.abs()).all()), f"off by {float(error.max()):.3g}"
    tail = (x > -3) & (x < 0)  # where fp8 still has digits beside the largest values of a row
    assert bool((error[tail] <= 3e-5 * exact[tail].abs()).all())
    odd = gelu(torch.tensor([float("nan"), float("inf"), float("-inf")], device=setting.device)).tolist()
    assert odd[0] != odd[0]
    assert odd[1] == float("inf")
    assert odd[2] != odd[2]


def patches(setting: Setting) -> None:
    """Bytes of tiles to numbers, exactly; columns beyond the patch are zero."""
    from internvit_cli.model.kernels import triton_tiles

    for side in (1, 2, 5):
        shape = (3, 14 * side, 14 * side, 3)
        tiles = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(side), dtype=torch.uint8)
        for columns in (588, 592):
            actual = triton_tiles.patches(tiles.to(setting.device), columns, setting.dtype)
            assert torch.equal(actual.cpu(), plain.patches(tiles, columns, setting.dtype))


def store(setting: Setting) -> None:
    """Every order, stored type and overflow rule: tokens, extremes and counts equal, means up to the order of sums."""
    from internvit_cli.model.kernels import triton_tiles

    infinite_from = {torch.float16: 65520.0, torch.bfloat16: 3.3953e38, torch.float32: float("inf")}
    for (n, width), order in (
        ((36, 96), TokenOrder.V1),
        ((36, 96), TokenOrder.V2),
        ((35, 16), None),
        ((4, 1040), TokenOrder.V2),
    ):
        hidden = setting.random(3, 1 + n, width, scale=100.0)
        hidden[1, 2, 3], hidden[2, 3, 4], hidden[2, 1, 1] = float("nan"), 70000.0, float("-inf")
        if setting.dtype is torch.float16:
            hidden[2, 3, 4] = float("inf")
        for dtype, limit in infinite_from.items():
            for clamp in (False, True):
                shape = (n, width) if order is None else (n // 4, 4 * width)
                plan = StorePlan(*shape, dtype, order, clamp, limit, mean=True)
                check_store(triton_tiles.store(hidden[:, 1:], plan), plain.store(hidden[:, 1:], plan), setting)


def store_scaled(setting: Setting) -> None:
    """Scaled types on a device and on the host: the same scales and numbers, read back as close as their steps are."""
    from internvit_cli.model.kernels import triton_kernels

    hidden = setting.random(3, 37, 96, scale=100.0)
    for dtype, values in ((torch.int8, 0), (torch.int8, 128), (torch.int8, 100), (torch.uint8, 0)):
        plan = StorePlan(9, 384, dtype, TokenOrder.V2, False, float("inf"), mean=True, values_per_scale=values)
        actual, expected = triton_kernels.store(hidden[:, 1:], plan), plain.store(hidden[:, 1:].cpu(), plan)
        assert actual.scales is not None and expected.scales is not None
        assert torch.equal(actual.scales.cpu(), expected.scales) and torch.equal(actual.tokens.cpu(), expected.tokens)
        read_back = plain.dequantize_tokens(actual.tokens, actual.scales).cpu()
        exact = plain.store(hidden[:, 1:].cpu(), replace(plan, dtype=torch.float32)).tokens
        assert float((read_back - exact).norm() / exact.norm()) < (0.01 if values else 0.04)


def check_store(actual, expected, setting: Setting) -> None:
    assert torch.equal(actual.extremes.nan_to_num(7), expected.extremes.nan_to_num(7))
    assert torch.equal(actual.extremes.isnan(), expected.extremes.isnan())
    assert actual.clamped.tolist() == expected.clamped.tolist()
    torch.testing.assert_close(actual.mean, expected.mean, rtol=1e-5, atol=1e-3, equal_nan=True)
    exact = not (setting.interpreted and actual.tokens.dtype is torch.bfloat16)
    rounding = {"rtol": 0, "atol": 0} if exact else {"rtol": 2.0**-7, "atol": 0}
    torch.testing.assert_close(actual.tokens, expected.tokens, equal_nan=True, **rounding)


def resize(setting: Setting) -> None:
    """Bit for bit, up and down, lines and columns, one pixel and many."""
    from internvit_cli.encode.resizing.passes import PROBES, difference, plain_pass, table_on
    from internvit_cli.encode.resizing.triton_pass import triton_pass

    assert not difference(triton_pass, setting.device)
    more = ((400, 3000, 448), (448, 2000, 1344), (1, 5000, 448)) * setting.large
    for lines, size, target in (*PROBES, (2, 448, 448), (1, 1, 1), (7, 2, 1), *more):
        generator = torch.Generator().manual_seed(size)
        pixels = torch.randint(0, 256, (lines, size, 3), generator=generator, dtype=torch.uint8).to(setting.device)
        table = table_on(setting.device, size, target)
        assert torch.equal(triton_pass(pixels, table), plain_pass(pixels, table)), (lines, size, target)


def nan_is_never_lost(setting: Setting) -> None:
    """A row with a NaN or an infinity has NaN in fp8 too, so that it is found in the end."""
    from internvit_cli.model.kernels import triton_norms

    for value in (float("nan"), float("inf")):
        x = setting.random(2, 64)
        x[1, 7] = value
        rows = triton_norms.quantize(x)
        if not setting.interpreted:  # whose fp8 has no NaN
            assert rows.values[1].float().isnan().any()
        assert not rows.values[0].float().isnan().any()
        normed = triton_norms.norm_rows(x, norms(setting, 64, nn.LayerNorm), in_fp8=False)
        assert normed[1].isnan().any()
        assert not normed[0].isnan().any()


def every_probe_passes(setting: Setting) -> None:
    """The check at load finds nothing wrong with sound kernels, of either family."""
    from internvit_cli.model.kernels.triton_kernels import triton_kernels

    vision = tiny_card().vision
    families: tuple[dict[str, Any], ...] = ({}, {"norm": "rms_norm", "qk_norm": True})
    for changes in families:
        case = ProbeSizes(
            replace(vision, **changes), 4, StorePlan(4, 256, torch.float16, TokenOrder.V2, False, 65520.0, mean=True)
        )
        table = triton_kernels(setting.dtype, plain.attend_fused)
        tries = probes(case, setting.device, setting.dtype)
        assert replace_failing(table, plain_for(setting.device, setting.dtype), tries).name == "triton"


def whole_encoder(setting: Setting) -> None:
    """Tiles to features by Triton's kernels alone, and by their twins: visual and patch tokens, and the class token.

    Of earlier layers too, whose hidden states the blocks that follow must not overwrite.
    """
    from internvit_cli.model.kernels import triton_kernels

    table = triton_kernels.triton_kernels(setting.dtype, plain.attend_fused)
    if setting.interpreted:  # on a card, attention in float32 is PyTorch's
        table = replace(table, attention=partial(triton_kernels.attention, attend=plain.attend_fused))
    tiles = torch.stack([torch.from_numpy(tile) for tile in random_tiles(3)]).to(setting.device)
    for tokens, pool in ((Tokens.VISUAL, Pool.CLS_MEAN), (Tokens.PATCH, Pool.MEAN), (Tokens.NONE, Pool.CLS)):
        spec = FeatureSpec(tokens, pool, 56, TokenOrder.V1, StoreDtype.FLOAT32, OnOverflow.SKIP, earlier_layers=(0, 1))
        results = [
            [part for layer in feature_model(spec, setting, kernels)(tiles) for part in layer]
            for kernels in (table, plain_for(setting.device, setting.dtype))
        ]
        for actual, expected in zip(*results, strict=True):
            if expected is not None:
                close(actual.float(), expected.float(), 20 * setting.bound)


def feature_model(spec: FeatureSpec, setting: Setting, kernels) -> FeatureModel:
    checkpoint = open_all(tiny_card())
    vit = load_vit(
        checkpoint, device=setting.device, dtype=setting.dtype, kernels=kernels, earlier_layers=spec.earlier_layers
    )
    return FeatureModel(checkpoint.card, vit, None, spec, setting.dtype)


CASES: dict[str, Callable[[Setting], None]] = {
    case.__name__: case
    for case in (
        attention,
        attention_of_sharp_scores,
        residual_norm,
        embed,
        qk_norm,
        quantize,
        gelu,
        patches,
        store,
        store_scaled,
        resize,
        nan_is_never_lost,
        every_probe_passes,
        whole_encoder,
    )
}


def main() -> None:
    torch.set_num_threads(1)
    failures = {name: failure(case) for name, case in CASES.items()}
    json.dump(failures, sys.stdout)


def failure(case: Callable[[Setting], None]) -> str:
    """What goes wrong in the interpreter, or nothing."""
    try:
        with torch.inference_mode():
            case(INTERPRETER)
    except Exception as error:  # noqa: BLE001  (told to the test that asked)
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    main()
