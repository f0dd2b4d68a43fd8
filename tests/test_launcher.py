"""How batches are run on a card, without one: streams, events and graphs that only keep the order of calls."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from model_helpers import open_all, random_tiles, tiny_card
from PIL import Image

from internvit_cli.config import PixelRule, Pool, StoreDtype, TilingRule, TokenOrder, Tokens
from internvit_cli.decode.pictures import cut_tiles
from internvit_cli.encode import cuda as encoder_cuda
from internvit_cli.encode.batches import BatchRunner
from internvit_cli.encode.cuda import IN_FLIGHT, LARGEST_GRAPH, CudaLauncher
from internvit_cli.encode.interface import Placed
from internvit_cli.encode.tile_features import TileFeatures
from internvit_cli.model.features import FeatureModel, FeatureSpec
from internvit_cli.plan.tiling import choose_grid, views_of
from internvit_cli.storage.format.layout import decode_values

CPU = torch.device("cpu")


class Nothing:
    """A stream or an event."""

    def __init__(self, *arguments, **options):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def wait_event(self, event):
        pass

    def elapsed_time(self, end):
        return 1.0


@contextmanager
def inside(*arguments, **options):
    yield


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    for name in ("Stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, inside)
    for name in ("set_device", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(encoder_cuda, "_pinned", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(CudaLauncher, "_graph", make_graph)


class Graph(Nothing):
    """A graph: it runs the model anew, into the same buffers."""

    def __init__(self, launcher, tiles):
        self.model, self.tiles, self.features = launcher.model, tiles, launcher.model(tiles)
        self.replays = 0

    def replay(self):
        self.replays += 1
        for targets, sources in zip(self.features, self.model(self.tiles), strict=True):
            for target, source in zip(targets, sources, strict=True):
                if target is not None:
                    target.copy_(source)


def make_graph(launcher, tiles):
    graph = Graph(launcher, tiles)
    return graph, graph.features


def runner(batch, store_dtype=StoreDtype.FLOAT16, earlier_layers=(), layer=None, values_per_scale=0) -> BatchRunner:
    spec = FeatureSpec(
        Tokens.VISUAL,
        Pool.MEAN,
        56,
        TokenOrder.V2,
        store_dtype,
        earlier_layers=earlier_layers,
        values_per_scale=values_per_scale,
    )
    model = FeatureModel.load(open_all(tiny_card(), layer), spec, device=CPU, dtype=torch.float32)
    return BatchRunner(CudaLauncher(model, CPU), batch)


def tokens(runner: BatchRunner, tiles) -> np.ndarray:
    size = runner.batch_tiles
    pending = [runner.submit(tiles[i : i + size]) for i in range(0, len(tiles), size)]
    return np.concatenate([tokens_of(batch) for batch in pending])


def tokens_of(batch, layer=0) -> np.ndarray:
    return batch.result().layers[layer].tokens


def test_small_batches_run_as_one_graph_a_slot_and_large_ones_kernel_by_kernel():
    tiles = random_tiles(22)
    small, large = runner(4), runner(LARGEST_GRAPH + 1)
    assert np.array_equal(tokens(small, tiles), tokens(large, tiles))
    assert (small.note, large.note) == (", in CUDA graphs", "")
    assert [slot.graph.replays for slot in small._launcher._slots] == [2] * IN_FLIGHT
    assert all(slot.graph is None for slot in large._launcher._slots)


def test_where_no_graph_can_be_made_kernels_are_started_one_by_one(monkeypatch):
    def refuse(launcher, tiles):
        raise RuntimeError("stream is\ncapturing")

    tiles = random_tiles(9)
    expected = tokens(runner(4), tiles)
    monkeypatch.setattr(CudaLauncher, "_graph", refuse)
    eager = runner(4)
    assert np.array_equal(tokens(eager, tiles), expected)
    assert eager.note == " (no CUDA graphs: stream is capturing)"


def test_a_slots_features_are_fetched_before_its_buffers_are_used_again():
    tiles = random_tiles(5 * IN_FLIGHT)
    with_graphs = runner(1)
    pending = [with_graphs.submit([tile]) for tile in tiles]  # more than there are slots, and no result is asked for
    alone = [tokens_of(runner(1).submit([tile])) for tile in tiles]
    assert np.array_equal(np.concatenate([tokens_of(batch) for batch in pending]), np.concatenate(alone))


@pytest.mark.parametrize("batch", [2, LARGEST_GRAPH + 1], ids=["graphs", "kernels"])
@pytest.mark.parametrize(
    ("store_dtype", "values_per_scale"), [(StoreDtype.FLOAT16, 0), (StoreDtype.INT8, 0), (StoreDtype.INT8, 128)]
)
def test_every_layer_comes_back_from_every_slot(batch, store_dtype, values_per_scale):
    tiles = random_tiles(4 * IN_FLIGHT)
    several = runner(batch, store_dtype, earlier_layers=(0, 1), values_per_scale=values_per_scale)
    pending = [several.submit(tiles[i : i + batch]) for i in range(0, len(tiles), batch)]
    found = TileFeatures.join([one.result() for one in pending])
    assert len(found.layers) == 3 and len(found) == len(tiles)
    for layer, blocks in enumerate((2, 0, 1)):
        alone = runner(batch, store_dtype, layer=blocks, values_per_scale=values_per_scale)
        expected = TileFeatures.join(
            [alone.submit(tiles[i : i + batch]).result() for i in range(0, len(tiles), batch)]
        ).layers[0]
        assert np.array_equal(found.layers[layer].tokens, expected.tokens)
        assert np.array_equal(found.layers[layer].pooled, expected.pooled)
        if store_dtype is StoreDtype.INT8:
            assert np.array_equal(found.layers[layer].scales, expected.scales)


def test_a_slow_batch_is_timed_once_after_its_warm_up(monkeypatch):
    launcher = runner(1)._launcher
    times = iter([9.0, 2.0, 1.0])
    monkeypatch.setattr(launcher, "_timed", lambda tiles: next(times))
    assert launcher.seconds(2) == 2.0
    times = iter([9.0, 0.3, 0.2])
    assert launcher.seconds(2) == 0.2


@pytest.mark.parametrize("values_per_scale", [0, 128])
@pytest.mark.parametrize("batch", [1, 9])
def test_tokens_with_scales_come_back_with_them(batch, values_per_scale):
    tiles = random_tiles(9)
    launchers = runner(batch, StoreDtype.INT8, values_per_scale=values_per_scale), runner(9)
    features = [launcher.submit(tiles).result().layers[0] for launcher in launchers]
    read = decode_values(features[0].tokens, StoreDtype.INT8, features[0].scales)
    assert features[0].scales.shape == (*read.shape[:2], *([2] if values_per_scale else []))
    steps = np.abs(features[1].tokens.astype(np.float32)).max(axis=-1, keepdims=True) / 127
    assert (np.abs(read - features[1].tokens) <= steps).all()


def test_tiles_in_the_encoders_buffer_are_not_copied_and_give_the_same_features():
    tiles = np.stack(random_tiles(4))
    filled = runner(4)
    for _ in range(2 * IN_FLIGHT):  # each slot twice
        buffer = filled.buffer()
        buffer[:] = tiles
        batch = filled.submit(buffer)
        assert np.array_equal(tokens_of(batch), tokens(runner(4), tiles))
        assert any(slot.tiles is buffer for slot in filled._launcher._slots), "it is the memory that the card reads"


def test_a_buffer_that_is_not_full_ends_in_black_tiles_whatever_was_in_it():
    filled = runner(4)
    buffer = filled.buffer()
    buffer[:] = 255
    filled.submit(buffer[:1])
    assert buffer[0].all() and not buffer[1:].any()


def test_memory_of_features_is_used_again_when_the_last_array_over_it_is_gone_and_not_before():
    launched = runner(2)
    tiles = random_tiles(2)
    features = launched.submit(tiles).result()
    kept, expected = features.take(slice(1, 2)).layers[0].tokens[0], features.layers[0].tokens[1].copy()
    address = features.layers[0].tokens.ctypes.data
    others = [launched.submit(random_tiles(2)).result() for _ in range(2 * IN_FLIGHT)]
    assert address not in {other.layers[0].tokens.ctypes.data for other in others}
    del features, others
    assert np.array_equal(kept, expected), "a view of a view still holds it"
    del kept
    again = [launched.submit(tiles).result() for _ in range(3 * IN_FLIGHT)]
    assert address in {other.layers[0].tokens.ctypes.data for other in again}


def test_a_run_that_lets_features_go_allocates_no_more_memory_than_is_in_flight():
    launched = runner(2)
    addresses = set()
    for _ in range(20):
        addresses.add(launched.submit(random_tiles(2)).result().layers[0].tokens.ctypes.data)
    assert len(addresses) <= IN_FLIGHT


# --------------------------------------------------------------------------------------------------- whole pictures


def cut_on(runner: BatchRunner, sizes) -> tuple[list[torch.Tensor], np.ndarray]:
    """Tiles of pictures on the device, and the same tiles by Pillow."""
    rule, placed, expected = PixelRule(TilingRule(tile_size=56, max_tiles=4)), [], []
    for number, (width, height) in enumerate(sizes):
        picture = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        grid = choose_grid(width, height, rule.tiling)
        placed.append(runner.cut(picture, views_of(width, height, grid, rule)))
        tiles = np.empty((len(placed[-1]), 56, 56, 3), np.uint8)
        cut_tiles(Image.fromarray(picture), grid, rule, tiles)
        picture[:] = 0  # its memory is free
        expected.append(tiles)
    return placed, np.concatenate(expected)


@pytest.mark.parametrize("batch", [2, 32])
def test_tiles_that_were_cut_on_the_device_are_encoded_at_their_places_among_others(batch):
    launched, plain = runner(batch), runner(batch)
    cut, by_pillow = cut_on(launched, [(100, 60), (60, 150), (300, 310)])
    others = np.stack(random_tiles(2))
    every = np.concatenate([by_pillow[: len(cut[0])], others, by_pillow[len(cut[0]) :]])
    tiles = np.full_like(every, 99)
    tiles[len(cut[0]) : len(cut[0]) + 2] = others
    starts = np.cumsum([0, len(cut[0]) + 2, len(cut[1])])
    placed = [Placed(int(start), one) for start, one in zip(starts, cut, strict=True)]
    assert np.array_equal(tokens_of(launched.submit(tiles, placed)), tokens(plain, list(every)))


def test_a_batch_of_nothing_but_tiles_on_the_device_needs_no_copy_of_the_buffer():
    launched, plain = runner(4), runner(4)
    (cut,), by_pillow = cut_on(launched, [(50, 40)])
    buffer = launched.buffer()
    slot = launched._launcher._slots[launched._launcher._turn]
    with torch.inference_mode():
        slot.device_tiles[:] = 3
    buffer[:] = 7
    pending = launched.submit(buffer[:1], [Placed(0, cut)])
    assert int(slot.device_tiles[1:].min()) == int(slot.device_tiles[1:].max()) == 3
    assert np.array_equal(tokens_of(pending), tokens(plain, list(by_pillow)))


def test_the_way_of_a_picture_to_the_card_is_tried_and_left_if_it_is_wrong_or_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Driver(0))
    assert runner(2).resize_problem == ""
    cut = CudaLauncher.cut

    def too_late(self, picture, views):
        """As if the copy were not over when the memory is filled again."""
        tiles = cut(self, picture, views).clone()
        tiles[0, 0, 0] ^= 1
        return tiles

    def fail(self, picture, views):
        raise RuntimeError("invalid argument")

    for broken, words in ((too_late, "wrong"), (fail, "invalid argument")):
        monkeypatch.setattr(CudaLauncher, "cut", broken)
        assert words in runner(2).resize_problem


class Driver:
    """What CUDA's runtime does with memory that is registered."""

    def __init__(self, answer):
        self.answer, self.registered = answer, []

    def cudaHostRegister(self, address, nbytes, flags):
        if self.answer == 0:
            self.registered.append((address, nbytes))
        return self.answer

    def cudaHostUnregister(self, address):
        self.registered = [one for one in self.registered if one[0] != address]
        return 0


@pytest.mark.parametrize("answer", [0, 1])
def test_memory_is_registered_once_and_given_back_at_the_end_or_when_there_is_other(monkeypatch, answer):
    driver = Driver(answer)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    launched = runner(2)
    first, second = np.zeros((2, 4096), np.uint8), np.zeros((3, 4096), np.uint8)
    for memory in (first, first, second):
        launched.register(memory)
        assert driver.registered == [(memory.ctypes.data, memory.nbytes)] * (answer == 0)
    launched.close()
    assert not driver.registered
