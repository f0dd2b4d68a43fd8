"""Tiles in, features out: the same whatever is encoded beside them, in the asked type, never silently elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from model_helpers import (
    open_all,
    random_checkpoint,
    random_tiles,
    reference_card,
    relative_error,
    tiny_card,
)

from internvit_cli.config import DEFAULT_LOWEST_COSINE, ComputeDtype, OnOverflow, Pool, StoreDtype, TokenOrder, Tokens
from internvit_cli.encode import devices as encoder_devices
from internvit_cli.encode.accelerators import first_that_fits, given_batch, measure_batch, sizes_below
from internvit_cli.encode.batches import BatchRunner, Launcher
from internvit_cli.encode.devices import fastest_dtype, find_device
from internvit_cli.encode.encoder import TORCH_DTYPE, Encoder
from internvit_cli.encode.options import EncoderOptions
from internvit_cli.encode.quantization import measure_computing
from internvit_cli.encode.tile_features import LayerFeatures
from internvit_cli.errors import DeviceError, UsageError
from internvit_cli.model.accuracy import Accuracy, AccuracyError
from internvit_cli.model.catalog import TINY_RANDOM, describe_model
from internvit_cli.model.checkpoint import Checkpoint, Weight
from internvit_cli.model.features import FeatureModel, FeatureSpec
from internvit_cli.model.loading import load_vit
from internvit_cli.model.vit import pixel_unshuffle
from internvit_cli.storage.format.layout import decode_values

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def options(**changes) -> EncoderOptions:
    defaults = EncoderOptions(device="cpu", dtype=ComputeDtype.FLOAT32, tile_size=56, threads=2)
    return replace(defaults, **changes)


def tiny_checkpoint() -> Checkpoint:
    return open_all(tiny_card())


@dataclass(frozen=True)
class Result(LayerFeatures):
    """Features of the only layer, with the verdicts."""

    fits: np.ndarray = None
    clamped: int = 0


def only(pending) -> Result:
    """What comes of a batch of one layer."""
    features = pending.result()
    (layer,) = features.layers
    return Result(layer.tokens, layer.pooled, layer.scales, features.fits, features.clamped)


def encode(tiles, checkpoint=None, **changes) -> Result:
    with Encoder.load(checkpoint or tiny_checkpoint(), options(**changes)) as encoder:
        return only(encoder.submit(tiles))


def scaled(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """The same model with position table times `factor`: hidden states of about that size."""
    name = "embeddings.position_embedding"
    weight = checkpoint.weights[name]
    larger = Weight("F32", weight.shape, (checkpoint.read(name).view(np.float32).reshape(weight.shape) * factor,))
    return Checkpoint(checkpoint.card, checkpoint.blocks, {**checkpoint.weights, name: larger})


def normalized(tiles) -> torch.Tensor:
    card = tiny_card()
    pixels = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(card.mean)[:, None, None]) / torch.tensor(card.std)[:, None, None]


@pytest.fixture(scope="module")
def hidden():
    """Tiles and their hidden states by the plain float path."""
    tiles = random_tiles(5)
    with torch.inference_mode():
        return tiles, load_vit(tiny_checkpoint(), device=CPU, dtype=torch.float32)(normalized(tiles))


@pytest.mark.parametrize("dtype", [ComputeDtype.FLOAT32, ComputeDtype.BFLOAT16])
def test_on_a_cpu_features_are_bit_equal_however_tiles_are_batched(dtype):
    tiles = random_tiles(7)
    with Encoder.load(tiny_checkpoint(), options(dtype=dtype, batch_tiles=7)) as encoder:
        whole = only(encoder.submit(tiles))
        for cut in ([1] * 7, [3, 4], [6, 1]):
            ends = np.cumsum(cut)
            pending = [encoder.submit(tiles[end - size : end]) for end, size in zip(ends, cut, strict=True)]
            parts = [only(batch) for batch in pending]
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
            assert np.array_equal(np.concatenate([part.pooled for part in parts]), whole.pooled)


def test_on_a_cpu_features_do_not_depend_on_the_number_of_threads():
    tiles = random_tiles(4)
    one, three = encode(tiles, threads=1), encode(tiles, threads=3)
    assert np.array_equal(one.tokens, three.tokens)
    assert np.array_equal(one.pooled, three.pooled)


@pytest.mark.parametrize("order", [TokenOrder.V1, TokenOrder.V2])
def test_visual_tokens_are_the_unshuffled_hidden_state(hidden, order):
    tiles, states = hidden
    features = encode(tiles, store_dtype=StoreDtype.FLOAT32, token_order=order)
    assert relative_error(features.tokens, pixel_unshuffle(states[:, 1:], order)) < 2e-6
    assert features.fits.tolist() == [0] * 5


def test_patch_tokens_are_the_hidden_state_without_cls(hidden):
    tiles, states = hidden
    features = encode(tiles, store_dtype=StoreDtype.FLOAT32, tokens=Tokens.PATCH)
    assert relative_error(features.tokens, states[:, 1:]) < 2e-6


@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.NONE])
def test_pooled_is_the_mean_of_patches_the_cls_or_both_in_that_order(hidden, tokens):
    tiles, states = hidden
    mean, cls = states[:, 1:].mean(1), states[:, 0]
    for pool, vector in ((Pool.MEAN, mean), (Pool.CLS, cls), (Pool.CLS_MEAN, torch.cat((cls, mean), 1))):
        features = encode(tiles, pool=pool, tokens=tokens)
        assert features.pooled.dtype == np.float32
        assert relative_error(features.pooled, vector) < 2e-6
        assert (features.tokens is None) is (tokens is Tokens.NONE)


@pytest.mark.parametrize("store", [StoreDtype.INT8, StoreDtype.FP8])
def test_tokens_with_a_scale_are_multiples_of_it(hidden, store):
    tiles, _ = hidden
    exact = encode(tiles, store_dtype=StoreDtype.FLOAT32).tokens
    features = encode(tiles, store_dtype=store)
    assert features.tokens.dtype == np.dtype(store.numpy_name) and features.scales.shape == exact.shape[:2]
    steps = 127 if store is StoreDtype.INT8 else 448
    np.testing.assert_allclose(features.scales, np.abs(exact).max(axis=-1) / steps, rtol=1e-6)
    read_back = decode_values(features.tokens, store, features.scales)
    assert relative_error(read_back, exact) < 0.04


@pytest.mark.parametrize("values", [128, 100, 64])
def test_tokens_with_several_scales_are_closer_and_multiples_of_them(hidden, values):
    tiles, _ = hidden
    exact = encode(tiles, store_dtype=StoreDtype.FLOAT32).tokens
    one, several = (encode(tiles, store_dtype=StoreDtype.INT8, values_per_scale=count) for count in (0, values))
    count = -(-exact.shape[-1] // values)
    assert several.scales.dtype == np.float16 and several.scales.shape == (*exact.shape[:2], count)
    for scale in range(count):  # value i has scale i % count
        largest = np.abs(exact[..., scale::count]).max(axis=-1)
        assert (several.scales[..., scale].astype(np.float32) * 127 >= largest * (1 - 1e-6)).all()
        np.testing.assert_allclose(several.scales[..., scale], largest / 127, rtol=2.0**-9)
    read_back = decode_values(several.tokens, StoreDtype.INT8, several.scales)
    assert relative_error(read_back, exact) < relative_error(
        decode_values(one.tokens, StoreDtype.INT8, one.scales), exact
    )


def test_values_beyond_the_largest_float16_scale_do_not_fit_or_are_clamped():
    checkpoint = scaled(tiny_checkpoint(), 1e8)
    several = {"store_dtype": StoreDtype.INT8, "values_per_scale": 128}
    assert encode(random_tiles(2), checkpoint, store_dtype=StoreDtype.INT8).fits.tolist() == [0, 0]
    assert encode(random_tiles(2), checkpoint, **several).fits.tolist() == [1, 1]
    clamped = encode(random_tiles(2), checkpoint, **several, on_overflow=OnOverflow.CLAMP)
    read_back = decode_values(clamped.tokens, StoreDtype.INT8, clamped.scales)
    assert clamped.fits.tolist() == [0, 0] and clamped.clamped > 0
    assert np.abs(read_back).max() == 65504 * 127


@pytest.mark.parametrize("store", [dtype for dtype in StoreDtype if not dtype.is_scaled])
def test_tokens_are_stored_in_the_asked_type_rounded_once(hidden, store):
    tiles, _ = hidden
    exact = encode(tiles, store_dtype=StoreDtype.FLOAT32).tokens
    stored = encode(tiles, store_dtype=store).tokens
    assert stored.dtype == np.dtype(store.numpy_name)
    torch_type = getattr(torch, store.value)
    assert np.array_equal(stored, torch.from_numpy(exact).to(torch_type).view(torch.from_numpy(stored).dtype))


@pytest.mark.parametrize("layout", ["chat", "hf"])
def test_projected_tokens_come_from_any_layout_with_a_projector(layout):
    card = reference_card("300m", layout)
    features = encode(random_tiles(2, 112), open_all(card, projector=True), tokens=Tokens.PROJECTED, tile_size=112)
    assert features.tokens.shape == (2, 16, 48)
    assert features.fits.tolist() == [0, 0]


def test_projected_tokens_without_a_projector_are_a_usage_error():
    with pytest.raises(UsageError, match="no projector"):
        encode(random_tiles(1), tokens=Tokens.PROJECTED)


@pytest.mark.parametrize("size", [28, 84])
def test_another_tile_size_resizes_the_position_table(size):
    assert encode(random_tiles(1, size), tile_size=size).tokens.shape == (1, (size // 28) ** 2, 256)


def test_values_too_large_for_the_stored_type_are_told_apart_tile_by_tile():
    checkpoint = scaled(tiny_checkpoint(), 1e5)
    assert encode(random_tiles(2), checkpoint, store_dtype=StoreDtype.FLOAT16).fits.tolist() == [1, 1]
    assert encode(random_tiles(2), checkpoint, store_dtype=StoreDtype.BFLOAT16).fits.tolist() == [0, 0]
    assert encode(random_tiles(2), checkpoint, store_dtype=StoreDtype.FLOAT32).fits.tolist() == [0, 0]


def test_clamping_keeps_the_tile_and_counts_the_values():
    checkpoint = scaled(tiny_checkpoint(), 1e5)
    features = encode(random_tiles(2), checkpoint, on_overflow=OnOverflow.CLAMP)
    exact = encode(random_tiles(2), checkpoint, store_dtype=StoreDtype.FLOAT32).tokens
    assert features.fits.tolist() == [0, 0]
    assert features.clamped == int((np.abs(exact) >= 65520).sum()) > 0
    assert float(np.abs(features.tokens).max()) == 65504.0


@pytest.mark.parametrize("on_overflow", OnOverflow)
@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.PATCH, Tokens.NONE])
def test_not_a_number_is_never_stored(tokens, on_overflow):
    features = encode(random_tiles(1), scaled(tiny_checkpoint(), np.nan), tokens=tokens, on_overflow=on_overflow)
    assert features.fits.tolist() == [2]


def test_float16_computation_that_overflows_is_not_stored_either():
    checkpoint = scaled(tiny_checkpoint(), 1e6)
    features = encode(random_tiles(1), checkpoint, dtype=ComputeDtype.FLOAT16, store_dtype=StoreDtype.FLOAT32)
    assert features.fits.tolist() != [0]


def test_tiny_random_gives_finite_tokens_of_order_one_that_differ_between_pictures():
    tiles = [np.full((448, 448, 3), 40, np.uint8), random_tiles(1, 448)[0]]
    card = describe_model(TINY_RANDOM)
    first, second = encode(tiles, open_all(card), tile_size=448).tokens.astype(np.float32)
    assert 0.3 < np.abs(first).mean() < 3
    assert 0.3 < np.abs(second).mean() < 3
    assert np.abs(first - second).mean() > 0.1


def test_wrong_tiles_are_refused_before_any_work():
    with Encoder.load(tiny_checkpoint(), options()) as encoder:
        with pytest.raises(ValueError, match="not uint8"):
            encoder.submit([np.zeros((56, 56, 3), np.float32)])
        with pytest.raises(ValueError, match=r"\(56, 28, 3\)"):
            encoder.submit([np.zeros((56, 28, 3), np.uint8)])


def test_the_batch_and_the_time_are_reported():
    with Encoder.load(tiny_checkpoint(), options(threads=3)) as encoder:
        assert encoder.info.batch_tiles == 12
        assert (encoder.info.device_name, encoder.info.dtype, encoder.info.halved) == (
            "cpu",
            ComputeDtype.FLOAT32,
            False,
        )
        only(encoder.submit(random_tiles(3)))
        assert encoder.device_seconds > 0


@pytest.mark.parametrize("changes", [{"batch_tiles": 0}, {"threads": 0}])
def test_nonsensical_counts_are_usage_errors(changes):
    with pytest.raises(UsageError, match="at least 1"):
        encode(random_tiles(1), **changes)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:-1", "", "mps:1", "cuda:0:0"])
def test_a_word_that_is_no_device_is_a_usage_error(name):
    with pytest.raises(UsageError, match="not a device"):
        find_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_cuda_that_is_not_there_is_an_error_never_a_silent_change(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"--device {name}"):
        find_device(name)


def test_auto_takes_cuda_then_apples_gpu_then_the_cpu(monkeypatch):
    for cuda, mps, device in ((True, True, "cuda:0"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert str(find_device("auto")) == device


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"), [(1, 0.5, "bfloat16"), (1, 0.9, "float32"), (1, 2, "float32")]
)
def test_on_a_cpu_auto_is_bfloat16_only_where_it_is_clearly_faster(monkeypatch, float32, bfloat16, dtype):
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(encoder_devices, "_block_seconds", lambda vision, tokens, dtypes: [seconds[d] for d in dtypes])
    assert fastest_dtype(CPU, tiny_card().vision, 448) is ComputeDtype(dtype)


def test_auto_dtype_is_resolved_to_one_that_is_not_float16():
    with Encoder.load(tiny_checkpoint(), options(dtype=ComputeDtype.AUTO)) as encoder:
        assert encoder.info.dtype in {ComputeDtype.FLOAT32, ComputeDtype.BFLOAT16}


class ForgetfulLauncher(Launcher):
    """Stands for a device whose memory holds only so many tiles."""

    def __init__(self, model, holds):
        super().__init__(model, CPU)
        self.holds = holds
        self.sizes = []

    def launch(self, tiles, size, placed=()):
        self.sizes.append(size)
        if size > self.holds:
            raise torch.cuda.OutOfMemoryError
        return super().launch(tiles, size, placed)


def batch_runner(holds, batch_tiles) -> BatchRunner:
    spec = FeatureSpec(Tokens.VISUAL, Pool.MEAN, 56, TokenOrder.V2, StoreDtype.FLOAT16)
    model = FeatureModel.load(tiny_checkpoint(), spec, device=CPU, dtype=torch.float32)
    return BatchRunner(ForgetfulLauncher(model, holds), batch_tiles)


@pytest.mark.parametrize(("holds", "taken", "tried"), [(99, 32, 1), (20, 16, 2), (1, 1, 6)])
def test_the_batch_is_decided_by_what_the_memory_holds_and_not_by_speed(holds, taken, tried):
    launcher = batch_runner(holds, 1)._launcher
    assert first_that_fits(launcher).batch_tiles == taken
    assert len(launcher.sizes) == tried


def test_a_measured_batch_that_leaves_no_room_for_buffers_is_made_smaller_without_a_halving():
    runner = first_that_fits(batch_runner(100, 1)._launcher, sizes_below(256))
    assert (runner.batch_tiles, runner.halved) == (64, False)
    assert sizes_below(48) == [48, 24, 12, 6, 3, 1]


def test_memory_that_holds_no_tile_is_a_device_error():
    with pytest.raises(DeviceError, match="one tile does not fit"):
        first_that_fits(batch_runner(0, 1)._launcher)


@pytest.mark.parametrize(("holds", "taken"), [(99, 24), (12, 12)])
def test_a_given_batch_is_tried_and_halved_once(holds, taken):
    assert given_batch(batch_runner(holds, 1)._launcher, 24).batch_tiles == taken
    with pytest.raises(DeviceError, match="out of memory with batches of"):
        given_batch(batch_runner(5, 1)._launcher, 24)


def test_a_short_batch_is_padded_and_gives_only_its_own_tiles():
    tiles = random_tiles(3)
    features = only(batch_runner(8, 8).submit(tiles))
    assert relative_error(features.tokens, encode(tiles).tokens) < 1e-3
    assert len(features.tokens) == len(features.pooled) == len(features.fits) == 3


def test_out_of_memory_halves_the_batch_once_and_loses_no_tile():
    tiles = random_tiles(8)
    runner = batch_runner(4, 8)
    features = only(runner.submit(tiles))
    assert (runner.halved, runner.batch_tiles) == (True, 4)
    assert relative_error(features.tokens, encode(tiles).tokens) < 1e-3
    assert len(only(runner.submit(tiles)).tokens) == 8
    assert runner._launcher.sizes == [8, 4, 4, 4, 4]


def test_a_second_out_of_memory_is_a_device_error_with_the_way_out():
    with pytest.raises(DeviceError, match="batches of 4 tiles") as caught:
        batch_runner(2, 8).submit(random_tiles(8))
    assert "--batch-size" in caught.value.hint


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({8: 1, 16: 1, 32: 1, 64: 1, 128: 1, 256: 1}, 256),
        ({8: 1.0, 16: 1.5, 32: 2.95, 64: 5.9}, 16),
        ({8: 1.0, 16: 1.0}, 16),
    ],
)
def test_the_measured_batch_is_where_doubling_stops_paying_or_memory_ends(seconds, chosen):
    def measure(size):
        if size not in seconds:
            raise torch.cuda.OutOfMemoryError
        return seconds[size]

    assert measure_batch(measure) == chosen


def test_a_device_that_holds_no_batch_at_all_is_a_device_error():
    def measure(size):
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(DeviceError, match="does not fit"):
        measure_batch(measure)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [ComputeDtype.FLOAT32, ComputeDtype.BFLOAT16])
def test_cuda_gives_what_the_cpu_gives(dtype):
    tiles, checkpoint = random_tiles(13), tiny_checkpoint()
    on_cpu = encode(tiles, checkpoint, store_dtype=StoreDtype.FLOAT32)
    on_cuda = encode(tiles, checkpoint, device="cuda", dtype=dtype, batch_tiles=8, store_dtype=StoreDtype.FLOAT32)
    bound = 1e-4 if dtype is ComputeDtype.FLOAT32 else 0.05
    assert relative_error(on_cuda.tokens, on_cpu.tokens) < bound
    assert relative_error(on_cuda.pooled, on_cpu.pooled) < bound


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_a_row_does_not_depend_on_its_neighbors_or_on_what_is_in_flight():
    tiles = random_tiles(40)
    with Encoder.load(tiny_checkpoint(), options(device="cuda", batch_tiles=8)) as encoder:
        whole = [encoder.submit(tiles[i : i + 8]) for i in range(0, 40, 8)]
        alone = [only(encoder.submit([tile])).tokens[0] for tile in tiles]
        together = np.concatenate([only(batch).tokens for batch in whole])
    assert np.array_equal(together, np.stack(alone))


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_the_batch_is_measured_and_the_device_named():
    with Encoder.load(tiny_checkpoint(), options(device="cuda", dtype=ComputeDtype.AUTO)) as encoder:
        assert encoder.info.batch_tiles >= 8
        assert encoder.info.device_name.startswith("cuda:0 (")


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_a_batch_larger_than_memory_ends_in_a_device_error():
    checkpoint = random_checkpoint(tiny_card(), 2)
    with pytest.raises(DeviceError) as caught:
        encode(random_tiles(1), checkpoint, device="cuda", batch_tiles=1 << 26)
    assert "--batch-size" in caught.value.hint


def six_b_checkpoint() -> Checkpoint:
    """A small model of the 6B family: RMSNorm, q and k normed, no biases on them."""
    return random_checkpoint(tiny_card(norm="rms_norm", qk_norm=True, qkv_bias=False), 2)


@pytest.mark.parametrize(("dtype", "bound"), [(ComputeDtype.FLOAT32, 2e-6), (ComputeDtype.BFLOAT16, 0.02)])
@pytest.mark.parametrize("make", [tiny_checkpoint, six_b_checkpoint], ids=["300m", "6b"])
def test_the_class_token_alone_is_what_the_whole_last_block_gives_within_rounding(make, dtype, bound):
    tiles, checkpoint = random_tiles(3), make()
    alone = encode(tiles, checkpoint, tokens=Tokens.NONE, pool=Pool.CLS, dtype=dtype).pooled
    whole = encode(tiles, checkpoint, tokens=Tokens.NONE, pool=Pool.CLS_MEAN, dtype=dtype).pooled
    assert relative_error(alone, whole[:, :64]) < bound


@pytest.mark.parametrize("dtype", [ComputeDtype.FLOAT32, ComputeDtype.BFLOAT16])
def test_on_a_cpu_the_class_token_alone_is_bit_equal_however_tiles_are_batched(dtype):
    tiles = random_tiles(5)
    with Encoder.load(tiny_checkpoint(), options(dtype=dtype, tokens=Tokens.NONE, pool=Pool.CLS)) as encoder:
        whole = only(encoder.submit(tiles)).pooled
        assert np.array_equal(np.concatenate([only(encoder.submit([tile])).pooled for tile in tiles]), whole)


def test_the_class_token_of_the_embeddings_is_the_tables_first_row():
    checkpoint = open_all(tiny_card(), 0)
    pooled = encode(random_tiles(2), checkpoint, tokens=Tokens.NONE, pool=Pool.CLS).pooled
    assert np.array_equal(pooled[0], pooled[1])
    assert relative_error(pooled, encode(random_tiles(2), checkpoint, pool=Pool.CLS_MEAN).pooled[:, :64]) == 0


def test_what_computes_is_told():
    with Encoder.load(tiny_checkpoint(), options()) as encoder:
        assert encoder.info.kernels == "plain PyTorch"


def test_fp8_where_there_is_none_is_a_device_error_never_a_silent_change():
    with pytest.raises(DeviceError, match="--dtype fp8 on cpu") as caught:
        encode(random_tiles(1), dtype=ComputeDtype.FP8)
    assert "--dtype bfloat16" in caught.value.hint


def test_compiling_for_a_cpu_is_a_usage_error():
    with pytest.raises(UsageError, match="--compile on cpu"):
        encode(random_tiles(1), compile=True)


def test_the_error_of_a_type_is_measured_against_bfloat16_and_float32():
    checkpoint = tiny_checkpoint()
    spec = FeatureSpec(Tokens.VISUAL, Pool.MEAN, 56, TokenOrder.V2, StoreDtype.FLOAT16)
    model = FeatureModel.load(checkpoint, spec, device=CPU, dtype=torch.bfloat16)
    error = measure_computing(checkpoint, model, random_tiles(5))
    assert error.tiles == 5
    assert error.lowest_cosine_bfloat16 == pytest.approx(1, abs=1e-12)
    assert 0.999 < error.lowest_cosine_float32 <= error.mean_cosine_float32 < 1
    assert 0 < error.relative_error_float32 < 0.02
    Accuracy(error).check(DEFAULT_LOWEST_COSINE)


@pytest.mark.parametrize("pool", Pool)
def test_the_error_of_fp8_is_larger_and_its_verdict_is_the_lowest_token(pool):
    checkpoint = tiny_checkpoint()
    spec = FeatureSpec(Tokens.NONE, pool, 56, TokenOrder.V2, StoreDtype.FLOAT16)
    model = FeatureModel.load(checkpoint, spec, device=CPU, dtype=TORCH_DTYPE[ComputeDtype.FP8])
    error = measure_computing(checkpoint, model, random_tiles(5))
    assert 0.99 < error.lowest_cosine_bfloat16 < error.mean_cosine_bfloat16 < 1 - 1e-6
    Accuracy(error).check(error.lowest_cosine_bfloat16)
    for lower in (error.lowest_cosine_bfloat16 - 1e-6, float("nan")):
        with pytest.raises(AccuracyError, match="--dtype fp8"):
            Accuracy(replace(error, lowest_cosine_bfloat16=lower)).check(error.lowest_cosine_bfloat16)


def test_tiles_of_a_wrong_size_are_not_measured():
    with Encoder.load(tiny_checkpoint(), options()) as encoder, pytest.raises(ValueError, match="not uint8"):
        encoder.accuracy(random_tiles(1, 28))


def cuda_options(**changes) -> EncoderOptions:
    return options(**{"device": "cuda", "batch_tiles": 8, "dtype": ComputeDtype.BFLOAT16, **changes})


def on_cuda(tiles, checkpoint=None, **changes) -> Result:
    with Encoder.load(checkpoint or tiny_checkpoint(), cuda_options(**changes)) as encoder:
        parts = [encoder.submit(tiles[i : i + 8]) for i in range(0, len(tiles), 8)]
        results = [only(part) for part in parts]
    tokens = None if results[0].tokens is None else np.concatenate([result.tokens for result in results])
    return replace(results[0], tokens=tokens, pooled=np.concatenate([result.pooled for result in results]))


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [ComputeDtype.FLOAT32, ComputeDtype.FLOAT16, ComputeDtype.BFLOAT16])
@pytest.mark.parametrize("make", [tiny_checkpoint, six_b_checkpoint], ids=["300m", "6b"])
@pytest.mark.parametrize(
    ("tokens", "pool"), [(Tokens.VISUAL, Pool.CLS_MEAN), (Tokens.PATCH, Pool.MEAN), (Tokens.NONE, Pool.CLS)]
)
def test_on_cuda_fused_kernels_give_what_plain_pytorch_gives(tokens, pool, make, dtype):
    tiles, checkpoint = random_tiles(20), make()
    changes = {"tokens": tokens, "pool": pool, "dtype": dtype, "store_dtype": StoreDtype.FLOAT32}
    fused, plain = (on_cuda(tiles, checkpoint, fused=fused, **changes) for fused in (True, False))
    bound = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}[dtype.value]
    assert relative_error(fused.pooled, plain.pooled) < bound
    if tokens is not Tokens.NONE:
        assert relative_error(fused.tokens, plain.tokens) < bound


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_every_kernel_works_and_small_batches_are_graphs():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no Triton below compute capability 8.0")
    pytest.importorskip("triton")
    for batch, note in ((8, ", in CUDA graphs"), (32, "")):
        with Encoder.load(tiny_checkpoint(), cuda_options(batch_tiles=batch)) as encoder:
            assert encoder.info.kernels == "triton" + note


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_a_graph_that_cannot_be_captured_changes_nothing_but_the_report(monkeypatch):
    from internvit_cli.encode.cuda import CudaLauncher

    def refuse(self, tiles):
        raise RuntimeError("operation not permitted when stream is capturing")

    tiles = random_tiles(20)
    expected = on_cuda(tiles)
    monkeypatch.setattr(CudaLauncher, "_graph", refuse)
    with Encoder.load(tiny_checkpoint(), cuda_options()) as encoder:
        assert "(no CUDA graphs: operation not permitted" in encoder.info.kernels
    assert np.array_equal(on_cuda(tiles).tokens, expected.tokens)


@needs_cuda
@pytest.mark.cuda
@pytest.mark.parametrize("batch", [4, 32])
def test_on_cuda_the_same_tiles_give_the_same_bits_again_and_again(batch):
    tiles = random_tiles(3 * batch)
    with Encoder.load(tiny_checkpoint(), cuda_options(batch_tiles=batch)) as encoder:
        first, second = (
            np.concatenate([only(part).tokens for part in [encoder.submit(tiles[i::3]) for i in range(3)]])
            for _ in range(2)
        )
    assert np.array_equal(first, second)


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_fp8_is_close_to_bfloat16_and_says_how_close():
    if torch.cuda.get_device_capability() < (9, 0):
        with pytest.raises(DeviceError, match="--dtype fp8"):
            on_cuda(random_tiles(1), dtype=ComputeDtype.FP8)
        return
    tiles = random_tiles(8)
    with Encoder.load(tiny_checkpoint(), cuda_options(dtype=ComputeDtype.FP8)) as encoder:
        error = encoder.accuracy(tiles).compute
        assert only(encoder.submit(tiles)).fits.tolist() == [0] * 8
    assert 0.99 < error.lowest_cosine_bfloat16 < 1
    spec = FeatureSpec(Tokens.VISUAL, Pool.MEAN, 56, TokenOrder.V2, StoreDtype.FLOAT16)
    checkpoint = tiny_checkpoint()
    model = FeatureModel.load(checkpoint, spec, device=CPU, dtype=TORCH_DTYPE[ComputeDtype.FP8])
    emulated = measure_computing(checkpoint, model, tiles)
    assert error.mean_cosine_bfloat16 == pytest.approx(emulated.mean_cosine_bfloat16, abs=1e-4)


@needs_cuda
@pytest.mark.cuda
def test_on_cuda_torch_compile_gives_the_same_within_rounding():
    tiles = random_tiles(8)
    with Encoder.load(tiny_checkpoint(), cuda_options(compile=True)) as encoder:
        assert encoder.info.kernels.startswith("torch.compile over plain PyTorch")
        compiled = only(encoder.submit(tiles))
    assert relative_error(compiled.pooled, on_cuda(tiles, fused=False).pooled) < 0.05
