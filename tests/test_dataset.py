"""Stored features in DataLoaders: samples, workers of both kinds, batches."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import storage_helpers as helpers
import torch
from torch.utils.data import DataLoader

from internvit_cli import FeatureDataset, SkippedImageError, collate_nested, collate_padded, open_features
from internvit_cli.config import Format, Skipped, Status, StoreDtype, Tokens
from internvit_cli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

GRIDS = [(1, 1, 0), (2, 1, 1), (3, 2, 1), (1, 2, 1), (2, 2, 0)]
KEYS = [b"a.jpg", b"b.jpg", b"c.jpg", b"d.jpg", b"e.jpg"]
TILES = [1, 3, 7, 3, 4]
TRUNCATED = Skipped(Status.TRUNCATED, "OSError", "cut short")


def make(folder: Path, skips: dict[int, Skipped] | None = None, seed: int = 0, **options: Any) -> Path:
    """Five images in two shards."""
    folder.mkdir(exist_ok=True)
    for part in (slice(0, 2), slice(2, 5)):
        here = {row - part.start: skip for row, skip in (skips or {}).items() if part.start <= row < part.stop}
        shard = helpers.make_shard(helpers.make_table(GRIDS[part], KEYS[part]), **options)
        helpers.make_output(folder / "feats", shard, Format.NPY, here, seed=seed + part.start)
    return folder / "feats"


def test_a_sample_by_image_is_all_that_is_stored_of_it(tmp_path):
    path = make(tmp_path, tile_pooled=True)
    dataset, features = FeatureDataset(path), open_features(path)
    assert len(dataset) == 5
    for number, image in enumerate(features.values()):
        sample = dataset[number]
        assert (sample["key"], sample["grid"], sample["has_thumbnail"]) == (image.key, image.grid, image.has_thumbnail)
        for name in ("tokens", "pooled", "tile_pooled"):
            assert np.array_equal(sample[name].numpy(), getattr(image, name))
    assert dataset[-1]["key"] == "e.jpg"
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            dataset[beyond]


def test_a_sample_by_tile_is_one_tile(tmp_path):
    path = make(tmp_path, tile_pooled=True)
    dataset, features = FeatureDataset(path, by="tile"), open_features(path)
    assert len(dataset) == sum(TILES)
    expected = list(features.iter_tiles())
    for number, tile in enumerate(expected):
        sample = dataset[number]
        assert (sample["key"], sample["tile"]) == (tile.image.key, tile.number)
        assert sample["is_thumbnail"] == tile.is_thumbnail
        assert np.array_equal(sample["tokens"].numpy(), tile.tokens)
        assert np.array_equal(sample["tile_pooled"].numpy(), tile.pooled)
        assert "pooled" not in sample


@pytest.mark.parametrize("by", ["image", "tile"])
def test_images_without_features_raise_or_are_left_out(tmp_path, by):
    path = make(tmp_path, {1: TRUNCATED, 2: TRUNCATED})
    strict, lenient = FeatureDataset(path, by=by), FeatureDataset(path, by=by, skip=True)
    with pytest.raises(SkippedImageError, match="truncated"):
        list(strict)  # type: ignore[call-overload]
    samples = list(lenient)  # type: ignore[call-overload]
    assert len(samples) == len(lenient) == (3 if by == "image" else 1 + 3 + 4)
    assert [sample["key"] for sample in samples] == sorted(sample["key"] for sample in samples)
    assert {sample["key"] for sample in samples} == {"a.jpg", "d.jpg", "e.jpg"}


def test_a_view_is_a_dataset_of_its_images(tmp_path):
    features = open_features(make(tmp_path))
    assert [sample["key"] for sample in FeatureDataset(features[1:3])] == ["b.jpg", "c.jpg"]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.sweep)])
@pytest.mark.parametrize("by", ["image", "tile"])
def test_workers_of_either_kind_read_the_same_samples(tmp_path, method, by):
    path = make(tmp_path, store_dtype=StoreDtype.BFLOAT16)
    dataset = FeatureDataset(open_features(path)[1:], by=by)
    # Read here first: what is open in this process must not matter.
    list(dataset)  # type: ignore[call-overload]
    alone = list(dataset)  # type: ignore[call-overload]
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=False
    )
    together = list(loader)
    assert [sample["key"] for sample in together] == [sample["key"] for sample in alone]
    for one, other in zip(together, alone, strict=True):
        assert one["tokens"].dtype == torch.bfloat16 and torch.equal(one["tokens"], other["tokens"])


def test_a_pickled_dataset_is_small_and_refuses_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "feats.h5"
    keys = [b"%0200d.jpg" % row for row in range(2000)]
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 2000, keys), tokens=Tokens.NONE)
    helpers.make_output(path, shard)
    dataset = FeatureDataset(path)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 100_000  # the keys alone are four times that
    assert torch.equal(pickle.loads(pickled)[7]["pooled"], dataset[7]["pooled"])
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 2001), tokens=Tokens.NONE)
    path.unlink()
    helpers.make_output(path, shard)
    for stale in (dataset, pickle.loads(pickled)):
        with pytest.raises(OutputError, match="was replaced"):
            _ = stale[7]


def test_a_dataset_survives_a_change_of_the_working_directory(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(FeatureDataset("feats"))
    monkeypatch.chdir("/")
    assert pickle.loads(pickled)[0]["key"] == "a.jpg"


def test_what_is_not_stored_cannot_be_asked_for(tmp_path):
    path = make(tmp_path, tokens=Tokens.NONE)
    assert set(FeatureDataset(path)[0]) == {"key", "grid", "has_thumbnail", "pooled"}
    for wrong in ({"arrays": ["tokens"]}, {"by": "tile"}, {"by": "word"}):
        with pytest.raises(UsageError) as caught:
            FeatureDataset(path, **wrong)
        assert caught.value.hint
    assert set(FeatureDataset(make(tmp_path / "b"), arrays=["pooled"])[0]) == {"key", "grid", "has_thumbnail", "pooled"}


# ------------------------------------------------------------------------------------------------------------- batches


def test_padded_batches_have_a_mask_and_zeros_where_there_is_no_tile(tmp_path):
    dataset = FeatureDataset(make(tmp_path, tile_pooled=True))
    batch = collate_padded([dataset[number] for number in range(5)])
    assert batch["tokens"].shape == (5, 7, 4, 6) and batch["tokens"].dtype == torch.float16
    assert batch["tile_pooled"].shape == (5, 7, 5) and batch["pooled"].shape == (5, 5)
    assert batch["mask"].dtype == torch.bool and batch["mask"].sum(1).tolist() == TILES
    assert batch["key"] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"] and batch["grid"][2] == (3, 2)
    for number, tiles in enumerate(TILES):
        assert torch.equal(batch["tokens"][number, :tiles], dataset[number]["tokens"])
        assert not batch["tokens"][number, tiles:].any() and not batch["mask"][number, tiles:].any()
    sequence, mask = batch["tokens"].flatten(1, 2), batch["mask"].repeat_interleave(4, 1)
    assert sequence.shape == (5, 28, 6) and mask.shape == (5, 28)
    assert torch.equal(sequence[1][mask[1]], dataset[1]["tokens"].flatten(0, 1))


def test_nested_batches_hold_every_image_whole(tmp_path):
    dataset = FeatureDataset(make(tmp_path, tile_pooled=True))
    samples = [dataset[number] for number in range(5)]
    nested, listed = collate_nested(samples), collate_nested(samples, as_list=True)
    assert nested["tokens"].is_nested and nested["tokens"].layout is torch.jagged
    for name in ("tokens", "tile_pooled"):
        for sample, one, other in zip(samples, nested[name].unbind(), listed[name], strict=True):
            assert torch.equal(one, sample[name]) and torch.equal(other, sample[name])
    assert nested["pooled"].shape == (5, 5)


@pytest.mark.parametrize("collate", [collate_padded, collate_nested])
def test_samples_of_tiles_and_of_vectors_alone_are_stacked(tmp_path, collate):
    tiles = FeatureDataset(make(tmp_path, tile_pooled=True), by="tile")
    batch = collate([tiles[0], tiles[5]])
    assert batch["tokens"].shape == (2, 4, 6) and batch["tile"] == [0, 1] and "mask" not in batch
    vectors = FeatureDataset(make(tmp_path / "b", tokens=Tokens.NONE))
    batch = collate([vectors[0], vectors[4]])
    assert batch["pooled"].shape == (2, 5) and "mask" not in batch


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_makes_padded_and_nested_batches(tmp_path, workers):
    dataset = FeatureDataset(make(tmp_path, {0: TRUNCATED}), skip=True)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate_padded)
    assert [batch["mask"].sum(1).tolist() for batch in loader] == [[3, 7], [3, 4]]
    nested = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate_nested)
    assert [[len(tokens) for tokens in batch["tokens"].unbind()] for batch in nested] == [[3, 7], [3, 4]]
