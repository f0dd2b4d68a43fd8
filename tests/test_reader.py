"""Reading features: keys, positions, views, maps over the picture, tiles, tensors, vectors; on both formats."""

from __future__ import annotations

import difflib
import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import storage_helpers as helpers
from hypothesis import given
from hypothesis import strategies as st

import internvit_cli
from internvit_cli import FeatureDataset, SkippedImageError, UnknownKeyError, open_features
from internvit_cli.config import Format, Skipped, Status, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import ClosedError, InternvitError, OutputError
from internvit_cli.plan.tiling import Grid
from internvit_cli.storage.format.layout import index_digest
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.image import stitch
from internvit_cli.storage.read.near_keys import near_keys

if TYPE_CHECKING:
    from pathlib import Path

GRIDS = [(1, 1, 0), (2, 1, 1), (3, 2, 1), (1, 2, 1), (2, 2, 0), (1, 1, 0)]
KEYS = [b"a/cat.jpg", b"a/dog.jpg", b"b/cat.jpg", b"b/horse.png", b"c.jpg", b"d.jpg"]
TRUNCATED = Skipped(Status.TRUNCATED, "OSError", "cut short")
KINDS = pytest.mark.parametrize("kind", ["file", "h5", "npy"])


def make(folder: Path, kind: str, skips: dict[int, Skipped] | None = None, **options: Any) -> Path:
    """Six images, in one file or in two shards of three."""
    options = {"tile_pooled": True} | options
    if kind == "file":
        path = folder / "feats.h5"
        helpers.make_output(path, helpers.make_shard(helpers.make_table(GRIDS, KEYS), **options), skips=skips)
        return path
    for part in (slice(0, 3), slice(3, 6)):
        table = helpers.make_table(GRIDS[part], KEYS[part])
        here = {row - part.start: skip for row, skip in (skips or {}).items() if part.start <= row < part.stop}
        shard = helpers.make_shard(table, **options)
        helpers.make_output(folder / "feats", shard, Format(kind), here, seed=part.start)
    return folder / "feats"


# ------------------------------------------------------------------------------------------------------ keys and views


@KINDS
def test_an_image_is_found_by_key_and_by_position(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    assert [os.fsencode(key) for key in features] == KEYS
    keys = list(features)
    for position, key in enumerate(keys):
        assert features[key].key == key and features.position(key) == position
        assert features[position].key == key and features[position - 6].key == key
    with pytest.raises(IndexError):
        features[6]


@KINDS
def test_slices_masks_and_lists_give_views_of_the_same_kind(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    mask = np.array([True, False, True, False, False, True])
    views = {
        "slice": (features[1:4], [1, 2, 3]),
        "steps": (features[::-2], [5, 3, 1]),
        "mask": (features[mask], [0, 2, 5]),
        "list of bools": (features[mask.tolist()], [0, 2, 5]),
        "positions": (features[[4, 0, -1]], [4, 0, 5]),
        "keys": (features[["b/cat.jpg", "a/cat.jpg"]], [2, 0]),
        "nothing": (features[[]], []),
        "view of a view": (features[1:5][np.array([False, True, True, False])], [2, 3]),
    }
    for name, (view, positions) in views.items():
        assert type(view) is type(features), name
        assert [os.fsencode(key) for key in view] == [KEYS[position] for position in positions], name
        assert len(view) == len(positions)
        assert view.column("width").tolist() == features.column("width")[positions].tolist()
        for key, image in view.items():
            assert np.array_equal(image.tokens, features[key].tokens)
        assert [view.position(key) for key in view] == list(range(len(view)))
        outside = next(key for key in features if key not in list(view))
        assert outside not in view and view.get(outside) is None
        with pytest.raises(KeyError):
            view[outside]


@KINDS
def test_a_mask_of_another_length_and_what_is_no_selector_are_refused(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    with pytest.raises(IndexError):
        features[np.array([True, False])]
    for nonsense in (np.zeros((2, 2), bool), [0.5, 1.5], ["a/cat.jpg", 3]):
        with pytest.raises((TypeError, ValueError)):
            features[nonsense]


@KINDS
def test_what_cannot_be_a_selector_is_told_what_can_be_one(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    wrong: tuple[Any, ...] = (None, 2.5, b"a.jpg", {"a.jpg"}, object())
    for wanted in wrong:
        with pytest.raises(TypeError, match="chosen by a key"):
            features[wanted]
    assert len(features[[]]) == len(features[np.empty(0)]) == 0


@KINDS
def test_columns_hold_one_fact_of_every_image_across_shards(tmp_path, kind):
    features = open_features(make(tmp_path, kind, {1: TRUNCATED}))
    assert features.column("columns").tolist() == [grid[0] for grid in GRIDS]
    assert features.column("status").tolist() == [1, 3, 1, 1, 1, 1]
    assert len(features.done) == 5 and "a/dog.jpg" not in features.done
    with pytest.raises(ValueError, match="no column"):
        features.column("color")


@KINDS
def test_an_unknown_key_is_a_key_error_that_names_close_ones(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    for wrong, meant in (("a/cat.jpeg", "a/cat.jpg"), ("/data/b/cat.jpg", "b/cat.jpg"), ("hrose.png", "b/horse.png")):
        with pytest.raises(KeyError) as caught:
            features[wrong]
        assert isinstance(caught.value, InternvitError) and isinstance(caught.value, UnknownKeyError)
        assert repr(meant) in caught.value.hint and meant in str(caught.value)
    with pytest.raises(UnknownKeyError) as caught:
        features["nothing like these, by far"]
    assert "did you mean" not in caught.value.hint and caught.value.hint


@given(
    st.lists(st.binary(min_size=1, max_size=12).filter(lambda key: b"\0" not in key), max_size=40), st.text(max_size=9)
)
def test_suggestions_are_keys_and_never_more_than_asked_for(keys, wanted):
    """Whatever bytes the keys are made of."""
    wanted = wanted.encode("utf-8", "ignore").decode()
    found = near_keys(wanted, keys)
    assert len(found) <= 3 and {os.fsencode(key) for key in found} <= set(keys)


@pytest.mark.parametrize("typo", ["img_0123456.jpg", "/data/Folder72/IMG_0123456.JPG", "folder72/img_012345.jpg", "x"])
def test_suggestions_among_many_keys_compare_a_bounded_number_of_them(typo, monkeypatch):
    compared = []
    real = difflib.SequenceMatcher
    monkeypatch.setattr(difflib, "SequenceMatcher", lambda *a, **k: compared.append(a) or real(*a, **k))
    keys = sorted(b"folder%02d/img_%07d.jpg" % (number % 97, number) for number in range(200_000))
    assert ("folder72/img_0123456.jpg" in near_keys(typo, keys)) is (typo != "x")
    assert len(compared) < 600


# -------------------------------------------------------------------------------------------- what cannot be answered


@KINDS
def test_a_skipped_image_answers_with_its_reason_to_everything(tmp_path, kind):
    image = open_features(make(tmp_path, kind, {2: TRUNCATED}))["b/cat.jpg"]
    assert not image.is_done and image.grid == (3, 2)
    asked = (
        lambda: image.pooled,
        lambda: image.tokens,
        lambda: image.tile_pooled,
        image.token_map,
        image.thumbnail_map,
        image.to_torch,
        lambda: image.to_torch("pooled"),
        lambda: next(image.iter_tiles()),
    )
    for ask in asked:
        with pytest.raises(SkippedImageError, match="truncated"):
            ask()


@pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)
def test_a_file_of_a_newer_format_says_so_whatever_else_is_new_in_it(tmp_path, shard_format):
    """The version is looked at before columns that a newer format may not have."""
    helpers.make_output(tmp_path / "feats", helpers.make_shard(helpers.make_table(GRIDS, KEYS)), shard_format)
    stored = Output(str(tmp_path / "feats")).finished()[0].stored
    attributes = {name: value for name, value in stored.attributes.items() if name != "index_digest"}
    attributes["format_version"] = 2
    digest = index_digest(stored.table, attributes)
    if shard_format is Format.H5:
        with h5py.File(tmp_path / "feats" / "shard-00000.h5", "r+") as file:
            file.attrs["format_version"], file.attrs["index_digest"] = 2, digest
            del file["image/width"], file["image/crc32"]
    else:
        path = tmp_path / "feats" / "shard-00000.json"
        path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
        (tmp_path / "feats" / "shard-00000.images.jsonl").write_text("of another kind")
    with pytest.raises(OutputError, match="version 2; this program reads version 1") as caught:
        open_features(tmp_path / "feats")
    assert "newer" in caught.value.hint


# ------------------------------------------------------------------------------------------------ maps over the picture


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_stitching_puts_every_token_where_it_lies_on_the_picture(columns, rows, side, channels):
    """A map that was cut as pictures are cut comes back whole."""
    whole = np.random.default_rng(0).random((rows * side, columns * side, channels))
    tiles = [
        whole[row * side : (row + 1) * side, column * side : (column + 1) * side].reshape(side * side, channels)
        for row in range(rows)
        for column in range(columns)
    ]
    assert np.array_equal(stitch(np.stack(tiles), Grid(columns, rows)), whole)


@KINDS
@pytest.mark.parametrize("order", [TokenOrder.V1, TokenOrder.V2])
@pytest.mark.parametrize("dtype", list(StoreDtype), ids=lambda d: d.value)
def test_maps_are_in_picture_order_without_the_thumbnail(tmp_path, kind, order, dtype):
    features = open_features(make(tmp_path, kind, store_dtype=dtype, token_order=order))
    for image in features.values():
        tokens, (columns, rows) = image.tokens, image.grid
        assert tokens.dtype == (np.float16 if dtype is StoreDtype.FLOAT16 else np.float32)
        stitched = image.token_map()
        assert stitched.shape == (rows * 2, columns * 2, helpers.CHANNELS) and stitched.dtype == tokens.dtype
        for tile in range(columns * rows):
            row, column = divmod(tile, columns)
            part = stitched[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert np.array_equal(part.reshape(4, -1), tokens[tile])
        if image.has_thumbnail or image.tiles == 1:
            assert np.array_equal(image.thumbnail_map().reshape(4, -1), tokens[-1])
        else:
            with pytest.raises(OutputError, match="no thumbnail"):
                image.thumbnail_map()
    assert np.array_equal(features["a/cat.jpg"].thumbnail_map(), features["a/cat.jpg"].token_map())


@KINDS
def test_tiles_come_one_after_another_with_their_place(tmp_path, kind):
    features = open_features(make(tmp_path, kind, {1: TRUNCATED}))
    tiles = list(features.done.iter_tiles())
    assert len(tiles) == sum(columns * rows + thumb for columns, rows, thumb in GRIDS) - 3
    for tile in tiles:
        assert np.array_equal(tile.tokens, tile.image.tokens[tile.number])
        assert np.array_equal(tile.pooled, tile.image.tile_pooled[tile.number])
    assert [tile.place for tile in features["b/cat.jpg"].iter_tiles()] == [
        *((column, row) for row in range(2) for column in range(3)),
        None,
    ]
    with pytest.raises(SkippedImageError):
        list(features.iter_tiles())


@KINDS
def test_tiles_of_a_file_without_tokens_have_none(tmp_path, kind):
    features = open_features(make(tmp_path, kind, tokens=Tokens.NONE))
    assert all(tile.tokens is None and tile.pooled is not None for tile in features.iter_tiles())
    with pytest.raises(OutputError, match="holds no tokens"):
        features[0].token_map()


# ------------------------------------------------------------------------------------------------------------- tensors


@KINDS
@pytest.mark.parametrize("order", [TokenOrder.V1, TokenOrder.V2])
@pytest.mark.parametrize("dtype", list(StoreDtype), ids=lambda d: d.value)
def test_tensors_hold_the_same_values_in_the_stored_type(tmp_path, kind, order, dtype):
    import torch

    features = open_features(make(tmp_path, kind, store_dtype=dtype, token_order=order))
    assert len(features) == len(GRIDS)
    for image in features.values():
        tensor = image.to_torch()
        wanted = "float32" if dtype.is_scaled else dtype.value
        assert tensor.dtype == getattr(torch, wanted) and tensor.shape == image.tokens.shape
        assert np.array_equal(tensor.float().numpy(), image.tokens.astype(np.float32))
        assert torch.equal(tensor, image.to_torch("visual_tokens"))
        assert torch.equal(image.to_torch(tile=0), tensor[0])
        assert np.array_equal(image.to_torch("pooled").numpy(), image.pooled)
        assert np.array_equal(image.to_torch("tile_pooled").numpy(), image.tile_pooled)
        tensor.zero_()  # its memory is its own
        assert image.tokens.any()
        with pytest.raises(OutputError):
            image.to_torch("patch_tokens")


# ------------------------------------------------------------------------------------------------------------- vectors


@KINDS
def test_the_matrix_of_vectors_leaves_out_skipped_images_and_spans_shards(tmp_path, kind):
    features = open_features(make(tmp_path, kind, {1: TRUNCATED, 4: TRUNCATED}))
    keys, matrix = features.pooled_matrix()
    assert keys == ["a/cat.jpg", "b/cat.jpg", "b/horse.png", "d.jpg"]
    assert matrix.shape == (4, helpers.POOLED_WIDTH) and matrix.dtype == np.float32
    for key, vector in zip(keys, matrix, strict=True):
        assert np.array_equal(vector, features[key].pooled)
    vectors = features.vectors()
    assert np.array_equal(vectors[2], matrix[2]) and np.array_equal(vectors[[3, 0]], matrix[[3, 0]])
    assert np.array_equal(np.concatenate([block for _, block in vectors.blocks(40)]), matrix)
    assert [start for start, _ in vectors.blocks(40)] == [0, 2]
    assert vectors.image(3).key == "d.jpg"
    assert np.array_equal(pickle.loads(pickle.dumps(vectors))[:], matrix)


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a mapped file."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, memoryview) or type(base).__name__ == "mmap"


@pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)
def test_the_matrix_is_the_mapped_file_where_its_rows_lie_together(tmp_path, shard_format):
    shard = helpers.make_shard(helpers.make_table(GRIDS, KEYS))
    helpers.make_output(tmp_path / "feats", shard, shard_format, {5: TRUNCATED})
    features = open_features(tmp_path / "feats")
    for matrix in (features.pooled_matrix()[1], features[1:4].pooled_matrix()[1]):
        assert is_mapped(matrix) and not matrix.flags.writeable
    assert not is_mapped(features[[0, 2]].pooled_matrix()[1])


def test_a_mapped_matrix_outlives_a_file_that_is_replaced(tmp_path):
    path = make(tmp_path, "file")
    matrix = open_features(path).pooled_matrix()[1]
    before = matrix.copy()
    os.replace(path, tmp_path / "old.h5")
    helpers.make_output(path, helpers.make_shard(helpers.make_table(GRIDS, KEYS)), seed=9)
    assert np.array_equal(matrix, before)


# ------------------------------------------------------------------------------------ where an image came from, workers


@KINDS
def test_an_image_knows_its_picture_and_the_picture_s_digest(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    image = features["b/horse.png"]
    assert os.fsencode(image.path) == b"/pictures\xff/b/horse.png"
    assert len(image.digest) == 32 and any(image.digest)
    assert image.orientation == 1


@KINDS
def test_views_can_be_pickled(tmp_path, kind):
    features = open_features(make(tmp_path, kind))
    _ = features["c.jpg"]  # what finds keys is not part of it
    view = pickle.loads(pickle.dumps(features[2:5]))
    assert list(view) == list(features[2:5])
    assert np.array_equal(view["c.jpg"].tokens, features["c.jpg"].tokens)


def test_reading_needs_no_torch(tmp_path):
    path = make(tmp_path, "file")
    code = (
        "import sys; from internvit_cli import open_features; f = open_features(sys.argv[1]);"
        "f['c.jpg'].token_map(); f[1:3].pooled_matrix(); list(f.iter_tiles()); 'x' in f;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


# ---------------------------------------------------------------------------------------------- closing, and in a line


@KINDS
def test_closed_features_say_so_and_their_keys_and_facts_stay(tmp_path, kind):
    with open_features(make(tmp_path, kind)) as features:
        image, vectors = features["c.jpg"], features.vectors()
        before, mapped = vectors[:], image.pooled
        view = features[1:3]
    for use in (
        lambda: features["c.jpg"],
        lambda: features[0],
        lambda: view[0],
        lambda: list(features.values()),
        lambda: list(features.iter_tiles()),
        features.pooled_matrix,
        lambda: features.get("c.jpg"),
        lambda: vectors[:],
        lambda: image.pooled,
        image.to_torch,
        image.token_map,
        lambda: FeatureDataset(features)[0],
    ):
        with pytest.raises(ClosedError, match="were closed") as caught:
            use()
        assert isinstance(caught.value, InternvitError) and caught.value.hint
    features.close()
    assert len(features) == 6 and "c.jpg" in features and features.column("width")[2] == 302
    assert np.array_equal(before[4], mapped), "what was read stays"
    with open_features(features.path) as again:
        assert np.array_equal(again["c.jpg"].pooled, mapped)


@KINDS
def test_features_images_tiles_and_vectors_are_described_in_a_line_without_their_values(tmp_path, kind):
    path = make(tmp_path, kind, {1: TRUNCATED}, store_dtype=StoreDtype.BFLOAT16)
    features = open_features(path)
    arrays = "pooled [5, 5] float32, visual_tokens [16, 4, 6] bfloat16, tile_pooled [16, 5] float32"
    assert repr(features) == f"<Features of '{path}': 6 images, 5 done, 16 tiles, {arrays}>"
    assert repr(features[4:5]).startswith(f"<Features of '{path}': 1 image, 4 tiles, pooled [1, 5] float32, ")
    assert repr(features[2]) == (
        "<ImageFeatures 'b/cat.jpg': done, 302 x 200 pixels, 3 x 2 tiles and a thumbnail, "
        "pooled [5] float32, visual_tokens [7, 4, 6] bfloat16, tile_pooled [7, 5] float32>"
    )
    assert repr(features[1]) == "<ImageFeatures 'a/dog.jpg': truncated>"
    *_, last = features[2].iter_tiles()
    assert repr(last) == "<Tile 6 of 'b/cat.jpg': the thumbnail, tokens [4, 6] float32, pooled [5] float32>"
    assert repr(features.vectors()) == "<PooledVectors [5, 5] float32>"
    assert repr(FeatureDataset(path, skip=True)) == (
        f"<FeatureDataset of '{path}': 5 images, each with tokens, pooled, tile_pooled>"
    )
    assert "16 tiles, each with tokens, tile_pooled>" in repr(FeatureDataset(path, by="tile", skip=True))


def test_a_status_comes_with_the_package_and_prints_as_its_word(tmp_path):
    status = open_features(make(tmp_path, "file", {1: TRUNCATED}))["a/dog.jpg"].status
    assert status is internvit_cli.Status.TRUNCATED
    assert f"{status}" == str(status) == "truncated" and f"{status:02d}" == "03" and json.dumps(status) == "3"


def test_what_is_gone_can_still_be_described(tmp_path):
    features = open_features(make(tmp_path, "file"))
    image = features["c.jpg"]
    (tmp_path / "feats.h5").unlink()
    for gone in (features, image):
        assert "cannot be read" in repr(gone) and "Traceback" not in repr(gone)


@pytest.mark.sweep
def test_a_million_keys_are_found_and_suggested_in_a_moment(tmp_path):
    keys = [b"folder%03d/img_%07d.jpg" % (number // 1000, number) for number in range(1_000_000)]
    table = helpers.make_table([(0, 0, 0)], [b"x"], {0: Status.TRUNCATED}).take(np.zeros(len(keys), np.int64))
    shard = helpers.make_shard(replace(table, keys=keys), tokens=Tokens.NONE)
    helpers.make_output(tmp_path / "feats.h5", shard)
    features = open_features(tmp_path / "feats.h5")
    started = time.perf_counter()
    assert "folder999/img_0999999.jpg" in features and "nothing" not in features
    found = time.perf_counter()
    with pytest.raises(UnknownKeyError, match=r"folder999/img_0999999\.jpg"):
        features["folder999/img_0999999.jpeg"]
    print(f"found in {found - started:.2f} s, suggested in {time.perf_counter() - found:.2f} s")
