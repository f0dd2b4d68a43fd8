"""Streams of stored features for training: their order, its shares, its state, and the size of the index."""

from __future__ import annotations

import itertools
import os
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import storage_helpers as helpers
import torch
from torch.utils.data import DataLoader

from internvit_cli import FeatureDataset, FeatureStream, collate_padded, open_features
from internvit_cli.api import stream as stream_module
from internvit_cli.config import Format, Skipped, Status, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import OutputError, UsageError
from internvit_cli.storage import durable
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.compact import CompactShard
from internvit_cli.storage.read.places import find_places

if TYPE_CHECKING:
    from pathlib import Path

TRUNCATED = Skipped(Status.TRUNCATED, "OSError", "cut short")
SHARDS, IN_SHARD = 5, 7
SKIPPED = 1
"""Images of every shard that are skipped."""
IMAGES = SHARDS * (IN_SHARD - SKIPPED)


def make(folder: Path, shards: int = SHARDS, **options: Any) -> Path:
    """Shards of some images, of which one is skipped in each."""
    folder.mkdir(exist_ok=True)
    for number in range(shards):
        keys = [b"%d/%02d.jpg" % (number, row) for row in range(IN_SHARD)]
        shard = helpers.make_shard(helpers.make_table([(1 + row % 3, 1, row % 3 > 0) for row in range(IN_SHARD)], keys),
                                   **options)  # fmt: skip
        helpers.make_output(folder / "feats", shard, Format.NPY, {3: TRUNCATED}, seed=number)
    return folder / "feats"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("stream"), tile_pooled=True)


def keys_of(samples: Any) -> list[str]:
    return [sample["key"] for sample in samples]


# ------------------------------------------------------------------------------------------------------ samples


def test_a_sample_is_that_of_the_dataset(path: Path) -> None:
    expected = {sample["key"]: sample for sample in FeatureDataset(path, skip=True)}
    found = list(FeatureStream(path))
    assert len(found) == IMAGES == len(expected)
    for sample in found:
        same = expected[sample["key"]]
        assert set(sample) == set(same)
        for name, value in sample.items():
            assert torch.equal(value, same[name]) if isinstance(value, torch.Tensor) else value == same[name]


def test_chosen_arrays_and_layers_are_those_of_the_dataset(tmp_path: Path) -> None:
    path = make(tmp_path, 2, earlier_layers=helpers.EARLIER_LAYERS)
    layer = helpers.EARLIER_LAYERS[0]
    expected = {one["key"]: one["pooled"] for one in FeatureDataset(path, skip=True, layer=layer, arrays=["pooled"])}
    for sample in FeatureStream(path, layer=layer, arrays=["pooled"]):
        assert set(sample) == {"key", "grid", "has_thumbnail", "pooled"}
        assert torch.equal(sample["pooled"], expected[sample["key"]])
    with pytest.raises(UsageError, match="tile_pooled"):
        FeatureStream(path, arrays=["tile_pooled"])
    with pytest.raises(UsageError):
        FeatureStream(path, layer=5)


@pytest.mark.parametrize("dtype", [StoreDtype.BFLOAT16, StoreDtype.INT8])
def test_types_are_those_of_the_dataset(tmp_path: Path, dtype: StoreDtype) -> None:
    path = make(tmp_path, 1, store_dtype=dtype)
    expected = {sample["key"]: sample["tokens"] for sample in FeatureDataset(path, skip=True)}
    for sample in FeatureStream(path):
        assert sample["tokens"].dtype is expected[sample["key"]].dtype
        assert torch.equal(sample["tokens"], expected[sample["key"]])


def test_tokens_are_in_the_order_of_their_chat_model(tmp_path: Path) -> None:
    path = make(tmp_path, 1, tokens=Tokens.PROJECTED, token_order=TokenOrder.V1)
    features = open_features(path)
    for sample in FeatureStream(path):
        assert torch.equal(sample["tokens"], features[sample["key"]].chat_tokens())


def test_skipped_and_superseded_images_are_left_out(tmp_path: Path) -> None:
    path = make(tmp_path, 2)
    output = Output(str(path))
    output.drop_rows({output.finished()[0].name: ["0/01.jpg"]})
    assert set(keys_of(FeatureStream(path))) == set(open_features(path).done)


# -------------------------------------------------------------------------------------------------------- order


def test_without_shuffling_the_order_is_the_stored_one(path: Path) -> None:
    assert keys_of(FeatureStream(path, shuffle=False)) == list(open_features(path).done)


def test_every_epoch_has_every_image_once_in_an_order_of_its_own_that_the_seed_repeats(path: Path) -> None:
    stream = FeatureStream(path, seed=1)
    orders = []
    for epoch in range(3):
        stream.set_epoch(epoch)
        orders.append(keys_of(stream))
        assert sorted(orders[-1]) == sorted(open_features(path).done)
        again = FeatureStream(path, seed=1, prefetch=0)
        again.set_epoch(epoch)
        assert keys_of(again) == orders[-1]
    assert len(set(map(tuple, orders))) == 3
    assert keys_of(FeatureStream(path, seed=2)) != orders[0]
    assert keys_of(stream) == orders[2]  # an epoch can be repeated


@pytest.mark.parametrize(("mixed", "together"), [(1, 1), (2, 2), (99, SHARDS)])
def test_only_as_many_shards_are_mixed_as_asked_for(path: Path, mixed: int, together: int) -> None:
    shards = [key.partition("/")[0] for key in keys_of(FeatureStream(path, mixed_shards=mixed))]
    size = together * (IN_SHARD - SKIPPED)
    parts = [set(shards[start : start + size]) for start in range(0, len(shards), size)]
    assert all(len(part) == together for part in parts[: SHARDS // together])
    if together > 1:
        assert shards[:IN_SHARD] != sorted(shards[:IN_SHARD], key=shards.index)


@pytest.mark.parametrize("ranks", [2, 4, IMAGES])
def test_ranks_take_equal_shares_without_a_common_image(path: Path, ranks: int) -> None:
    shares = [keys_of(FeatureStream(path, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {len(share) for share in shares} == {IMAGES // ranks}
    together = [key for share in shares for key in share]
    assert len(set(together)) == len(together) == IMAGES // ranks * ranks
    whole = keys_of(FeatureStream(path))
    assert together == whole[: len(together)]


def test_the_share_is_that_of_torch_distributed_if_it_is_initialized(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert keys_of(FeatureStream(path)) == keys_of(FeatureStream(path, rank=1, ranks=3))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_the_order_of_batches_does_not_depend_on_the_number_of_workers(path: Path, workers: int) -> None:
    stream = FeatureStream(path, batch_size=4)
    loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=collate_padded)
    batches = [batch["key"] for batch in loader]
    whole = keys_of(FeatureStream(path))
    assert batches == [whole[start : start + 4] for start in range(0, IMAGES, 4)]


# -------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("taken", [0, 1, 13, IMAGES - 1, IMAGES])
def test_a_state_goes_on_with_the_next_sample(path: Path, taken: int) -> None:
    stream = FeatureStream(path, seed=3)
    stream.set_epoch(5)
    whole = keys_of(stream)
    samples = iter(stream)
    first = [next(samples)["key"] for _ in range(taken)]
    state = pickle.loads(pickle.dumps(stream.state_dict()))
    fresh = FeatureStream(path, seed=3, prefetch=2)
    fresh.load_state_dict(state)
    assert first + keys_of(fresh) == whole


def test_a_stream_can_be_continued_again_and_again(path: Path) -> None:
    whole, state = keys_of(FeatureStream(path)), None
    found: list[str] = []
    while len(found) < IMAGES:
        stream = FeatureStream(path)
        if state is not None:
            stream.load_state_dict(state)
        found += keys_of(itertools.islice(stream, 4))
        state = stream.state_dict()
    assert found == whole


@pytest.mark.parametrize(("workers", "later"), [(2, 2), (2, 3), (3, 0)])
def test_the_loop_says_how_much_it_has_consumed_when_workers_read_ahead(path: Path, workers: int, later: int) -> None:
    stream = FeatureStream(path, batch_size=2)
    whole = keys_of(FeatureStream(path))
    batches = iter(DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=collate_padded))
    found = [key for _ in range(5) for key in next(batches)["key"]]
    state = stream.state_dict(consumed=len(found))
    again = FeatureStream(path, batch_size=2)
    again.load_state_dict(state)
    for batch in DataLoader(again, batch_size=2, num_workers=later, collate_fn=collate_padded):
        found += batch["key"]
    assert found == whole
    assert again.state_dict(consumed=2)["start"] == 12  # counted from where it went on


def test_the_state_of_a_worker_is_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchdata's StatefulDataLoader keeps it: one state per worker."""

    class Worker:
        id, num_workers = 1, 2

    monkeypatch.setattr(stream_module, "get_worker_info", lambda: Worker)
    stream = FeatureStream(path, batch_size=3)
    own = keys_of(stream)
    assert len(own) == IMAGES // 2
    samples = iter(stream)
    first = [next(samples)["key"] for _ in range(4)]
    state = stream.state_dict()
    again = FeatureStream(path, batch_size=3)
    again.load_state_dict(state)
    assert first + keys_of(again) == own
    assert keys_of(again) == own  # the next iteration is whole


def test_a_new_epoch_begins_at_its_beginning(path: Path) -> None:
    stream = FeatureStream(path)
    stream.load_state_dict(stream.state_dict(consumed=7))
    assert len(keys_of(stream)) == IMAGES - 7
    stream.set_epoch(1)
    assert len(keys_of(stream)) == IMAGES


@pytest.mark.parametrize(
    ("options", "said"),
    [({"seed": 9}, "seed=0"), ({"shuffle": False}, "shuffle=True"), ({"mixed_shards": 2}, "mixed_shards=8"),
     ({"rank": 0, "ranks": 2}, "ranks=1")],
)  # fmt: skip
def test_a_state_of_another_order_is_refused(path: Path, options: dict[str, Any], said: str) -> None:
    state = FeatureStream(path).state_dict()
    with pytest.raises(UsageError, match=said):
        FeatureStream(path, **options).load_state_dict(state)


def test_a_state_of_another_output_is_refused(path: Path, tmp_path: Path) -> None:
    state = FeatureStream(path).state_dict()
    with pytest.raises(UsageError, match=f"images={IMAGES}"):
        FeatureStream(make(tmp_path, 1)).load_state_dict(state)


# --------------------------------------------------------------------------------------------- reading and memory


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")
@pytest.mark.parametrize("prefetch", [0, 1, 3, 99])
def test_the_system_is_asked_to_read_each_coming_sample_ahead_once(
    path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(durable, "is_cached", lambda *_: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: asked.append(size))
    stream = FeatureStream(path, prefetch=prefetch, arrays=["tokens", "pooled"])
    taken = []
    for number, sample in enumerate(stream):
        taken.append(sample["tokens"].nbytes)
        assert len(asked) == (min(number + 1 + prefetch, IMAGES) if prefetch else 0)
    assert asked == (taken if prefetch else [])


def test_a_large_sample_is_read_ahead_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[tuple[int, int]] = []
    monkeypatch.setattr(durable, "is_cached", lambda *_: False)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: pieces.append((start, size)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    durable.read_ahead(0, 1_200_000, 100)
    assert pieces == [(100, 524_288), (524_388, 524_288), (1_048_676, 151_424)]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")
def test_what_is_in_the_cache_is_not_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(FeatureStream(path))
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: pytest.fail("asked for what was just read"))
    (file, *_) = path.glob("*tokens.npy")
    with file.open("rb") as opened:
        if not durable.is_cached(opened.fileno(), 4096):
            pytest.skip("the filesystem does not say what is in its cache")
    assert len(list(FeatureStream(path, prefetch=3))) == IMAGES


def test_an_error_of_a_sample_reaches_the_loop(path: Path, tmp_path: Path) -> None:
    mine = make(tmp_path, 1)
    stream = FeatureStream(mine)
    for file in mine.glob("*tokens.npy"):
        os.truncate(file, 5000)
    with pytest.raises(OutputError):
        list(stream)


def test_the_index_takes_less_than_100_bytes_an_image(tmp_path: Path) -> None:
    """Keys of 40 bytes; what numpy and Python need for the whole is small and does not grow."""
    keys = [b"%032d/%03d.jpg" % (row, row % 999) for row in range(3000)]
    assert len(keys[0]) == 40
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3000, keys), tokens=Tokens.NONE)
    helpers.make_output(tmp_path / "feats.h5", shard)
    stream = FeatureStream(tmp_path / "feats.h5")
    assert stream.index_bytes < 100 * len(stream)
    assert len(pickle.dumps(stream)) < 100 * len(stream)  # what a spawned worker receives, too
    (place,) = find_places(str(tmp_path / "feats.h5"))
    compact = CompactShard(place.load())
    assert [compact.image(number, None).key.encode() for number in range(len(compact))] == keys


def test_a_stream_says_what_it_is(path: Path) -> None:
    stream = FeatureStream(path, rank=1, ranks=2)
    assert repr(stream) == (
        f"<FeatureStream of {str(path)!r}: 15 images of rank 1 of 2, each with tokens, pooled, tile_pooled>"
    )
    assert len(stream) == 15


@pytest.mark.parametrize(
    "options",
    [{"rank": 2, "ranks": 2}, {"rank": 0}, {"rank": 0, "ranks": IMAGES + 1}, {"batch_size": 0}, {"prefetch": -1},
     {"mixed_shards": 0}],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        FeatureStream(path, **options)


def test_the_order_of_a_seed_does_not_change(path: Path) -> None:
    """A state of today has to fit tomorrow."""
    random = np.random.default_rng([7, 2])
    size = IN_SHARD - SKIPPED
    expected = [np.arange(shard * size, (shard + 1) * size) for shard in random.permutation(SHARDS)]
    halves = np.concatenate(expected[:3]), np.concatenate(expected[3:])
    for half in halves:
        random.shuffle(half)
    stream = FeatureStream(path, seed=7, mixed_shards=3)
    stream.set_epoch(2)
    assert stream.order().tolist() == np.concatenate(halves).tolist()
