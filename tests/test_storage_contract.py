"""What every storage format promises, held against plain h5py, numpy and json, which know nothing of our code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import storage_helpers as helpers
from damage_helpers import assert_found_or_harmless, damage, probe
from forking import PATIENCE

from internvit_cli.config import Format, Skipped, Status, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import OutputError, UsageError
from internvit_cli.plan.table import COLUMN_DTYPES
from internvit_cli.storage.format.interface import backend_of
from internvit_cli.storage.format.layout import ALIGNMENT, RUN_LOG_BYTES, ForeignFileError
from internvit_cli.storage.output import MANIFEST, Output
from internvit_cli.storage.read.reader import SkippedImageError, open_features
from internvit_cli.storage.write.commit import ShardWriter

GRIDS = [(1, 1, 0), (2, 3, 1), (1, 1, 0), (3, 1, 1), (1, 2, 1), (1, 1, 0)]
TRUNCATED = Skipped(Status.TRUNCATED, "OSError", "image file is truncated")
BOTH = pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)
KINDS = pytest.mark.parametrize("kind", ["file", "h5 folder", "npy folder"])


def place(folder: Path, kind: str) -> tuple[Path, Format | None]:
    """An output's path and format for each of the three ways to store."""
    if kind == "file":
        return folder / "feats.h5", None
    return folder / "feats", Format.H5 if kind == "h5 folder" else Format.NPY


def final_of(output: Output, number: int = 0) -> str:
    return output.final_path(number)


def mixed_shard(**options: Any) -> Any:
    """Six awkwardly named images, one of which has no readable header."""
    table = helpers.make_table(GRIDS, helpers.AWKWARD_KEYS, {2: Status.NOT_AN_IMAGE})
    return helpers.make_shard(table, **options)


# -------------------------------------------------------------------------------------------- what lies on the disk


@BOTH
@pytest.mark.parametrize("tile_pooled", [False, True], ids=["", "tile_pooled"])
@pytest.mark.parametrize(
    ("store_dtype", "values_per_scale"),
    [
        *(pytest.param(dtype, 0, id=dtype.value) for dtype in StoreDtype),
        pytest.param(StoreDtype.INT8, 3, id="int8-several-scales"),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "layers"),
    [
        *(pytest.param(tokens, (), id=tokens.value) for tokens in Tokens),
        *(
            pytest.param(tokens, helpers.EARLIER_LAYERS, id=f"layers-{tokens.value}")
            for tokens in Tokens
            if tokens is not Tokens.PROJECTED  # which is of one layer only
        ),
    ],
)
def test_every_value_is_on_disk_as_it_was_written(
    tmp_path, shard_format, tokens, store_dtype, values_per_scale, tile_pooled, layers
):
    """Rows, statuses, digests, CRCs and index, read with plain h5py or numpy, are bit for bit what was stored."""
    if tokens is Tokens.NONE:
        values_per_scale = 0
    shard = mixed_shard(
        tokens=tokens,
        store_dtype=store_dtype,
        tile_pooled=tile_pooled,
        earlier_layers=layers,
        values_per_scale=values_per_scale,
    )
    written = helpers.make_output(tmp_path / "feats", shard, shard_format, {4: TRUNCATED})
    plain = helpers.read_plainly(final_of(Output(str(tmp_path / "feats"))))
    arrays, offset = plain.arrays, plain.arrays["image/tile_offset"].tolist()

    assert plain.keys == list(helpers.AWKWARD_KEYS)
    assert plain.attributes == shard.complete_attributes
    assert set(arrays) == {
        *(f"image/{name}" for name in (*COLUMN_DTYPES, "tile_offset", "status", "digest", "crc32")),
        *(
            kind + suffix
            for suffix in ("", *(f"_layer_{layer}" for layer in layers))
            for kind in (
                "pooled",
                *([tokens.dataset] if tokens is not Tokens.NONE else []),
                *([tokens.scales_dataset] if tokens is not Tokens.NONE and store_dtype.is_scaled else []),
                *(["tile_pooled"] if tile_pooled else []),
            )
        ),
    }
    for name in (*COLUMN_DTYPES, "tile_offset"):
        assert arrays[f"image/{name}"].tolist() == getattr(shard.table, name).tolist()
    assert offset == [0, 1, 8, 8, 12, 15, 16]
    assert arrays["image/status"].tolist() == [1, 1, Status.NOT_AN_IMAGE, 1, Status.TRUNCATED, 1]

    assert arrays["pooled"].dtype == np.float32
    assert arrays["pooled"].shape == (6, helpers.POOLED_WIDTH)
    for row, image in written.items():
        tiles = slice(offset[row], offset[row + 1])
        assert arrays["image/digest"][row].tobytes() == image.digest
        assert arrays["image/crc32"][row] == helpers.expected_crc32(image)
        for name, rows in helpers.rows_of(image).items():
            place = slice(row, row + 1) if name.startswith("pooled") else tiles
            assert arrays[name][place].tobytes() == rows.tobytes()
    if tokens is not Tokens.NONE:
        assert arrays[tokens.dataset].dtype == np.dtype(store_dtype.numpy_name)
        assert arrays[tokens.dataset].shape == (16, helpers.TOKENS_PER_TILE, helpers.CHANNELS)
        if store_dtype.is_scaled:
            several = (-(-helpers.CHANNELS // values_per_scale),) if values_per_scale else ()
            assert arrays[tokens.scales_dataset].shape == (16, helpers.TOKENS_PER_TILE, *several)
            assert arrays[tokens.scales_dataset].dtype == (np.float16 if values_per_scale else np.float32)


@BOTH
def test_the_vector_of_a_skipped_image_is_nan(tmp_path, shard_format):
    """Those known at creation have it from the start, those that fail later once they are skipped; no others."""
    output = Output(str(tmp_path / "feats"), shard_format)
    output.prepare()
    shard = mixed_shard()
    helpers.create_shard(output.backend, output.partial_path(0), shard)
    pooled = output.backend.extents(output.partial_path(0))["pooled"]

    def vectors() -> np.ndarray:
        with open(pooled.path, "rb") as file:
            file.seek(pooled.offset)
            return np.frombuffer(file.read(pooled.spec.nbytes), "<f4").reshape(pooled.spec.shape)

    assert np.isnan(vectors()).all(axis=1).tolist() == [False, False, True, False, False, False]
    writer = ShardWriter(output.backend, output.partial_path(0), shard.table)
    writer.skip(4, TRUNCATED)
    writer.checkpoint()
    writer.close()
    assert np.isnan(vectors()).all(axis=1).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.NONE], ids=lambda t: t.value)
def test_every_hdf5_dataset_is_contiguous_and_aligned(tmp_path, tokens):
    """Whatever has elements lies in one piece from a multiple of 4096 on; tokens say what their bits are."""
    shard = mixed_shard(tokens=tokens, store_dtype=StoreDtype.BFLOAT16, tile_pooled=True)
    helpers.make_output(tmp_path / "feats.h5", shard)
    offsets = {}
    with h5py.File(tmp_path / "feats.h5") as file:
        names: list[str] = []
        file.visit(names.append)
        datasets = {name: file[name] for name in names if isinstance(file[name], h5py.Dataset)}
        for name, dataset in datasets.items():
            assert dataset.chunks is None and dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
            offsets[name] = dataset.id.get_offset()
        if tokens is Tokens.VISUAL:
            assert file["visual_tokens"].attrs["dtype"] == "bfloat16"
    assert len(offsets) == len(COLUMN_DTYPES) + 2 + 4 + 2 + (tokens is Tokens.VISUAL)
    assert {name: offset % ALIGNMENT for name, offset in offsets.items()} == dict.fromkeys(offsets, 0)


def test_rows_of_npy_arrays_are_aligned(tmp_path):
    helpers.make_output(tmp_path / "feats", mixed_shard(tile_pooled=True))
    for name in ("pooled", "visual_tokens", "tile_pooled"):
        array = np.load(tmp_path / "feats" / f"shard-00000.{name}.npy", mmap_mode="r")
        assert array.offset % ALIGNMENT == 0


@BOTH
@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.NONE], ids=lambda t: t.value)
def test_a_shard_of_images_without_tiles_is_readable(tmp_path, shard_format, tokens):
    """When no header can be read there are no tiles, and datasets without elements harm nobody."""
    failed = dict.fromkeys(range(3), Status.NOT_AN_IMAGE)
    shard = helpers.make_shard(helpers.make_table([(0, 0, 0)] * 3, failed=failed), tokens=tokens, tile_pooled=True)
    helpers.make_output(tmp_path / "feats", shard, shard_format)
    plain = helpers.read_plainly(final_of(Output(str(tmp_path / "feats"))))
    assert plain.arrays["tile_pooled"].shape == (0, helpers.POOLED_WIDTH)
    assert np.isnan(plain.arrays["pooled"]).all()
    features = open_features(tmp_path / "feats")
    assert [image.status for image in features.values()] == [Status.NOT_AN_IMAGE] * 3
    assert features.pooled_matrix()[0] == []


@BOTH
def test_a_model_in_a_folder_whose_name_is_not_utf8_is_named_by_its_bytes(tmp_path, shard_format):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    shard.attributes["model"] = os.fsdecode(b"/models/\xff \xc3\xa9")
    helpers.make_output(tmp_path / "feats", shard, shard_format)
    assert os.fsencode(open_features(tmp_path / "feats").attributes["model"]) == b"/models/\xff \xc3\xa9"


@BOTH
def test_a_shard_of_one_image_is_readable(tmp_path, shard_format):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    written = helpers.make_output(tmp_path / "feats", shard, shard_format)
    image = open_features(tmp_path / "feats")["0000.jpg"]
    rows = helpers.rows_of(written[0])
    assert np.array_equal(image.visual_tokens, rows["visual_tokens"])
    assert np.array_equal(image.pooled, rows["pooled"][0])


@pytest.mark.parametrize("tokens", list(Tokens), ids=lambda t: t.value)
@pytest.mark.parametrize("images", [1, 7, 300])
def test_the_planned_size_of_an_hdf5_file_is_exact(tmp_path, images, tokens):
    grids = [(1 + row % 3, 1 + row % 2, int(row % 3 + row % 2 > 0)) for row in range(images)]
    keys = [b"%s/%05d.jpg" % (b"x" * (row % 50), row) for row in range(images)]
    shard = helpers.make_shard(helpers.make_table(grids, keys, {0: Status.TRUNCATED}), tokens=tokens)
    planned = backend_of(Format.H5).planned_bytes(shard)
    helpers.make_output(tmp_path / "feats.h5", shard)
    assert os.path.getsize(tmp_path / "feats.h5") == planned


@pytest.mark.parametrize("tokens", list(Tokens), ids=lambda t: t.value)
def test_the_planned_size_of_npy_files_is_exact_but_for_the_run_log(tmp_path, tokens):
    shard = mixed_shard(tokens=tokens, tile_pooled=tokens is Tokens.NONE)
    planned = backend_of(Format.NPY).planned_bytes(shard)
    output = Output(str(tmp_path / "feats"))
    helpers.make_output(tmp_path / "feats", shard, skips={4: TRUNCATED})
    files = output.backend.final_paths(final_of(output))
    assert sum(os.path.getsize(path) for path in files) == planned
    on_disk = {entry.path for entry in os.scandir(tmp_path / "feats")} - {str(tmp_path / "feats" / MANIFEST)}
    assert set(files) == on_disk


@BOTH
def test_the_run_log_keeps_the_newest_starts(tmp_path, shard_format):
    """Entries come back in order; when there is no room the oldest go, and the log never outgrows its place."""
    output = Output(str(tmp_path / "feats"), shard_format)
    output.prepare()
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    helpers.fill_partial(output, shard)
    writer = ShardWriter(output.backend, output.partial_path(0), output.partial().stored.table)
    writer.append_run_log({"start": 0})
    writer.append_run_log({"start": 1})
    assert output.backend.run_log(output.partial_path(0)) == [{"start": 0}, {"start": 1}]
    for start in range(2, 40):
        writer.append_run_log({"start": start, "padding": "x" * 3000})
    writer.close()
    helpers.publish(output, shard)
    log = helpers.read_plainly(final_of(output)).run_log
    assert log == output.backend.run_log(final_of(output))
    starts = [entry["start"] for entry in log]
    assert starts == list(range(starts[0], 40))
    assert 10 < len(starts) <= RUN_LOG_BYTES // 3000


# --------------------------------------------------------------------------------------------------- the reader


@KINDS
def test_the_reader_gives_back_what_was_written(tmp_path, kind):
    path, shard_format = place(tmp_path, kind)
    shard = mixed_shard(tile_pooled=True)
    written = helpers.make_output(path, shard, shard_format, {4: TRUNCATED})
    features = open_features(path)
    assert [os.fsencode(key) for key in features] == list(helpers.AWKWARD_KEYS)
    assert len(features) == 6
    for row, (key, image) in enumerate(features.items()):
        assert image.grid == (shard.table.columns[row], shard.table.rows[row])
        assert image.tiles == shard.table.tile_counts[row]
        assert image.key == key
        if row in written:
            assert image.status is Status.DONE
            rows = helpers.rows_of(written[row])
            assert np.array_equal(image.pooled, rows["pooled"][0])
            assert np.array_equal(image.visual_tokens, rows["visual_tokens"])
            assert np.array_equal(image.tokens, image.visual_tokens)
            assert np.array_equal(image.tile_pooled, rows["tile_pooled"])
    keys, matrix = features.pooled_matrix()
    assert [os.fsencode(key) for key in keys] == [helpers.AWKWARD_KEYS[row] for row in written]
    assert np.array_equal(matrix, np.stack([helpers.rows_of(image)["pooled"][0] for image in written.values()]))
    assert features.attributes["model"] == "tiny-random"


@KINDS
def test_the_reader_says_what_is_not_there(tmp_path, kind):
    """An unknown key is a KeyError; a skipped image names its reason; a dataset that is not stored is named."""
    path, shard_format = place(tmp_path, kind)
    helpers.make_output(path, mixed_shard(), shard_format, {4: TRUNCATED})
    features = open_features(path)
    images = list(features.values())
    with pytest.raises(KeyError):
        features["no such picture.jpg"]
    for row, reason in ((2, "not_an_image"), (4, "truncated")):
        for name in ("pooled", "visual_tokens", "tokens"):
            with pytest.raises(SkippedImageError, match=reason):
                getattr(images[row], name)
    for name in ("tile_pooled", "patch_tokens", "projected_tokens"):
        with pytest.raises(OutputError, match=f"holds no {name}"):
            getattr(images[0], name)


@KINDS
def test_an_unfinished_image_has_no_features(tmp_path, kind):
    path, shard_format = place(tmp_path, kind)
    output = Output(str(path), shard_format)
    output.prepare()
    shard = mixed_shard()
    helpers.create_shard(output.backend, output.partial_path(0), shard)
    if kind == "file":
        with pytest.raises(OutputError, match="is not there"):
            open_features(path)
    # In a folder without a finished shard the unfinished one is what there is to look at.
    for opened in (output.partial_path(0), *([] if kind == "file" else [path])):
        with pytest.raises(SkippedImageError, match="pending"):
            _ = open_features(opened)["a.jpg"].pooled


@BOTH
@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.PROJECTED, Tokens.PATCH], ids=lambda t: t.value)
def test_the_reader_undoes_the_older_token_order(tmp_path, shard_format, tokens):
    """Older checkpoints unshuffle column by column; a reader sees rows of tokens, and patch tokens as they are."""
    shard = helpers.make_shard(helpers.make_table([(2, 2, 1)]), tokens=tokens, token_order=TokenOrder.V1)
    written = helpers.make_output(tmp_path / "feats", shard, shard_format)
    stored = helpers.rows_of(written[0])[tokens.dataset]  # four tokens: (0,0) (1,0) (0,1) (1,1) as (row, column)
    expected = stored if tokens is Tokens.PATCH else stored[:, [0, 2, 1, 3]]
    assert np.array_equal(open_features(tmp_path / "feats")["0000.jpg"].tokens, expected)


@BOTH
def test_bfloat16_is_widened_exactly(tmp_path, shard_format):
    shard = helpers.make_shard(helpers.make_table(GRIDS), store_dtype=StoreDtype.BFLOAT16)
    written = helpers.make_output(tmp_path / "feats", shard, shard_format)
    features = open_features(tmp_path / "feats")
    assert len(features) == len(GRIDS)
    for row, image in enumerate(features.values()):
        values, bits = image.visual_tokens, helpers.rows_of(written[row])["visual_tokens"]
        assert values.dtype == np.float32
        assert np.array_equal(values.view("<u2").reshape(*bits.shape, 2)[..., 1], bits)
        assert not values.view("<u2").reshape(*bits.shape, 2)[..., 0].any()


def test_what_is_no_feature_file_is_an_error_with_a_hint(tmp_path):
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "empty.h5").touch()
    (tmp_path / "some.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = [1]
    for name in ("text.h5", "empty.h5", "some.txt", "folder", "foreign.h5", "missing.h5", "missing"):
        with pytest.raises(OutputError) as caught:
            open_features(tmp_path / name)
        assert caught.value.hint


@BOTH
def test_a_newer_format_version_is_refused(tmp_path, shard_format):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    shard.attributes["format_version"] = 2
    with pytest.raises(OutputError, match="version 2"):
        helpers.make_output(tmp_path / "feats", shard, shard_format)
        open_features(tmp_path / "feats")


# ------------------------------------------------------------------------------------------- outputs and manifests


def test_names_and_formats_that_contradict_are_usage_errors(tmp_path):
    for path, wanted in (("feats.h5", Format.NPY), ("feats.H5", Format.NPY), ("feats.hdf5", Format.NPY)):
        with pytest.raises(UsageError):
            Output(str(tmp_path / path), wanted)


def test_places_that_are_not_ours_are_refused(tmp_path):
    """A folder of other files, a file where a folder is meant, a folder where a file is, a missing parent."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    (tmp_path / "plain").touch()
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "webdataset").mkdir()
    for number in range(3):
        (tmp_path / "webdataset" / f"shard-{number:05d}.tar").touch()
    for name in ("notes", "webdataset", "plain", "folder.h5", "missing/feats.h5", "missing/feats"):
        with pytest.raises(OutputError) as caught:
            Output(str(tmp_path / name)).prepare()
        assert caught.value.hint
    assert names_of(tmp_path / "notes") == ["todo.txt"]
    assert len(names_of(tmp_path / "webdataset")) == 3


def test_a_store_whose_first_run_got_no_further_than_its_skipped_list_is_ours(tmp_path):
    """The list is written before the first shard; a crash in between must not lock the user out."""
    output = Output(str(tmp_path / "feats"))
    output.prepare()
    Path(output.skipped_path).write_text('{"key": "a.jpg"}\n')
    Output(str(tmp_path / "feats")).prepare()


@pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)
def test_shards_are_added_and_later_rows_replace_earlier_ones(tmp_path, shard_format):
    shards = [helpers.make_shard(helpers.make_table([(1, 1, 0)] * 2, keys)) for keys in ((b"a", b"b"), (b"b", b"c"))]
    output = Output(str(tmp_path / "feats"), shard_format)
    output.prepare()
    helpers.fill_partial(output, shards[0], seed=1)
    helpers.publish(output, shards[0])
    newer = helpers.fill_partial(output, shards[1], seed=2)
    helpers.publish(output, shards[1], {"shard-00000": ["b"]})
    features = open_features(tmp_path / "feats")
    assert sorted(features) == ["a", "b", "c"]
    assert np.array_equal(features["b"].pooled, helpers.rows_of(newer[0])["pooled"][0])
    manifest = json.loads((tmp_path / "feats" / MANIFEST).read_text())
    assert [(s["name"], s["images"], s["tiles"], s["superseded"]) for s in manifest["shards"]] == [
        ("shard-00000", 2, 2, ["b"]),
        ("shard-00001", 2, 2, []),
    ]
    assert [shard.superseded for shard in Output(str(tmp_path / "feats")).finished()] == [("b",), ()]


def test_only_what_the_manifest_names_exists(tmp_path):
    """Leftovers of a crash are swept at the next start; the shard at hand, its reasons and other files stay."""
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    helpers.make_output(tmp_path / "feats", shard)
    helpers.make_output(tmp_path / "other", shard, seed=9)
    before = set(os.listdir(tmp_path / "feats"))
    for name in os.listdir(tmp_path / "other"):
        if name != MANIFEST:
            shutil.copy(tmp_path / "other" / name, tmp_path / "feats" / name.replace("00000", "00007"))
    (tmp_path / "feats" / "shard-00001.partial.tmp").mkdir()
    (tmp_path / "feats" / "manifest.json.tmp").touch()
    (tmp_path / "feats" / "skipped.jsonl").touch()
    theirs = {"notes.txt", "notes.tmp", "shard-00003.tar"}
    for name in theirs:
        (tmp_path / "feats" / name).touch()
    assert len(open_features(tmp_path / "feats")) == 1
    output = Output(str(tmp_path / "feats"))
    output.prepare()
    assert set(os.listdir(tmp_path / "feats")) == before | theirs | {"skipped.jsonl"}
    helpers.fill_partial(output, shard)
    Output(str(tmp_path / "feats")).prepare()
    assert os.path.isdir(output.partial_path(1))


class Crash(BaseException):
    """Stands for the end of the process: nothing of ours catches it."""


@pytest.fixture
def crash_at_rename(monkeypatch):
    """A function of n: n more names may change, and the process ends, so to speak, at the next."""
    real = {"rename": os.rename, "replace": os.replace}
    left = [10**9]

    def step(name: str, *paths: Any) -> None:
        if left[0] == 0:
            raise Crash
        left[0] -= 1
        real[name](*paths)

    for name in real:
        monkeypatch.setattr(os, name, lambda *paths, name=name: step(name, *paths))

    def crash(after: int) -> None:
        left[0] = after

    return crash


def names_of(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.is_dir() else [path.name]


def resume_publishing(path: Path, shard_format: Format | None, shard: Any) -> None:
    """What the next process does: sweep, take the unfinished shard up, and publish it."""
    output = Output(str(path), shard_format)
    output.prepare()
    if (partial := output.partial()) is not None:
        writer = ShardWriter(partial.backend, partial.path, partial.stored.table)
        writer.rewrite_commit_records()
        assert (writer.status != Status.PENDING).all()
        writer.close()
        helpers.publish(output, shard)


@KINDS
def test_publishing_that_is_cut_short_anywhere_can_be_repeated(tmp_path, kind, crash_at_rename):
    """Wherever it ends, a reader sees nothing or all, and the next start makes the very same output."""
    shard = mixed_shard(tile_pooled=True)
    whole, shard_format = place(tmp_path, kind)
    helpers.make_output(whole, shard, shard_format, {4: TRUNCATED})
    expected = helpers.read_plainly(final_of(Output(str(whole))))
    crashes = 0
    while True:
        folder = tmp_path / f"cut{crashes}"
        folder.mkdir()
        path, _ = place(folder, kind)
        output = Output(str(path), shard_format)
        output.prepare()
        helpers.fill_partial(output, shard, {4: TRUNCATED})
        crash_at_rename(crashes)
        try:
            helpers.publish(output, shard)
            crash_at_rename(10**9)
            break
        except Crash:
            crash_at_rename(10**9)
        crashes += 1
        try:
            assert len(open_features(path)) == 6
        except OutputError:
            assert not os.path.exists(path / MANIFEST if path.is_dir() else path)
        resume_publishing(path, shard_format, shard)
        Output(str(path)).prepare()
        assert names_of(path) == names_of(whole)
        helpers.assert_same_shard(helpers.read_plainly(final_of(Output(str(path)))), expected)
    assert crashes == {"file": 1, "h5 folder": 2, "npy folder": 7}[kind]


@KINDS
def test_a_replacement_takes_the_old_outputs_place_at_the_very_end(tmp_path, kind, crash_at_rename):
    """Whatever instant an overwriting run ends at, a reader has the old features or the new, never a mixture."""
    old_shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3, [b"a", b"b", b"c"]))
    new_shard = helpers.make_shard(helpers.make_table([(2, 1, 1)] * 2, [b"a", b"d"]), tile_pooled=True)

    def replace(path: Path) -> None:
        output = Output(str(path), shard_format)
        output.prepare()
        output.replace_all()
        is_published = not output.is_file and bool(output.finished())
        if not output.partial_exists and not is_published:
            helpers.fill_partial(output, new_shard, seed=2)
        if output.partial_exists:
            helpers.publish(output, new_shard)
        output.complete()

    crashes = 0
    while True:
        folder = tmp_path / f"cut{crashes}"
        folder.mkdir()
        path, shard_format = place(folder, kind)
        helpers.make_output(path, old_shard, shard_format, seed=1)
        crash_at_rename(crashes)
        try:
            replace(path)
            crash_at_rename(10**9)
            break
        except Crash:
            crash_at_rename(10**9)
        assert list(open_features(path)) in (["a", "b", "c"], ["a", "d"])
        crashes += 1
        if list(open_features(path)) == ["a", "b", "c"]:
            replace(path)
        Output(str(path)).prepare()
        assert list(open_features(path)) == ["a", "d"]
        assert open_features(path)["d"].tile_pooled.shape == (3, helpers.POOLED_WIDTH)
        assert not any("shard-00000" in name or "next" in name or "partial" in name for name in names_of(path))
    assert crashes >= 2
    assert list(open_features(path)) == ["a", "d"]


@KINDS
def test_an_unfinished_shard_can_be_discarded(tmp_path, kind):
    path, shard_format = place(tmp_path, kind)
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    output = Output(str(path), shard_format)
    output.prepare()
    helpers.fill_partial(output, shard)
    assert output.partial_exists
    output.discard_partial()
    assert not output.partial_exists
    assert output.partial() is None
    assert not os.path.exists(output.partial_path(0))


def test_a_foreign_manifest_is_never_overwritten(tmp_path):
    """Other programs call their files manifest.json too."""
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"name": "an app"}')
    with pytest.raises(ForeignFileError):
        Output(str(tmp_path / "web")).prepare()
    assert (tmp_path / "web" / MANIFEST).read_text() == '{"name": "an app"}'


def test_a_discarded_shard_leaves_nothing_to_its_successor(tmp_path):
    """Arrays that a cut-short publication had moved already do not show up in the next shard of that name."""
    path = tmp_path / "feats"
    output = Output(str(path))
    output.prepare()
    helpers.fill_partial(output, helpers.make_shard(helpers.make_table([(1, 1, 0)])))
    output.backend.publish(output.partial_path(0), output.final_path(0))  # and the manifest never written
    assert (path / "shard-00000.visual_tokens.npy").exists()
    output = Output(str(path))
    output.prepare()
    output.discard_partial()
    helpers.make_output(path, helpers.make_shard(helpers.make_table([(1, 1, 0)]), tokens=Tokens.NONE))
    with pytest.raises(OutputError, match="holds no visual_tokens"):
        _ = open_features(path)["0000.jpg"].visual_tokens


def test_discarding_a_replacement_keeps_the_old_output(tmp_path):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    written = helpers.make_output(tmp_path / "feats", shard)
    output = Output(str(tmp_path / "feats"))
    output.prepare()
    output.replace_all()
    helpers.fill_partial(output, shard, seed=5)
    helpers.publish(output, shard)
    helpers.fill_partial(output, shard, seed=6)
    output.discard_partial()
    assert output.finished() == []
    assert output.partial() is None
    assert np.array_equal(
        open_features(tmp_path / "feats")["0000.jpg"].pooled, helpers.rows_of(written[0])["pooled"][0]
    )


# ------------------------------------------------------------------------------------------------------- damage


@BOTH
@pytest.mark.parametrize("name", [*COLUMN_DTYPES])
def test_a_changed_column_is_noticed(tmp_path, shard_format, name):
    """The index digest covers every column that is fixed at creation."""
    helpers.make_output(tmp_path / "feats", mixed_shard(), shard_format)
    if shard_format is Format.H5:
        with h5py.File(tmp_path / "feats" / "shard-00000.h5", "r+") as file:
            file[f"image/{name}"][1] += 1
    else:
        index = tmp_path / "feats" / "shard-00000.images.jsonl"
        lines = index.read_text().splitlines(keepends=True)
        entry = json.loads(lines[1])
        lines[1] = lines[1].replace(f'"{name}": {entry[name]}', f'"{name}": {entry[name] + 1}')
        index.write_text("".join(lines))
    with pytest.raises(OutputError, match=r"digest|tile offsets|tiles") as caught:
        open_features(tmp_path / "feats")
    assert caught.value.hint


def test_a_changed_tile_offset_or_key_of_an_hdf5_file_is_noticed(tmp_path):
    for name, value in (("image/tile_offset", 9), ("image/key", "other.jpg")):
        path = tmp_path / f"{name[6:]}.h5"
        helpers.make_output(path, mixed_shard())
        with h5py.File(path, "r+") as file:
            file[name][1] = value
        with pytest.raises(OutputError):
            open_features(path)


@BOTH
def test_a_changed_attribute_is_noticed(tmp_path, shard_format):
    helpers.make_output(tmp_path / "feats", mixed_shard(), shard_format)
    if shard_format is Format.H5:
        with h5py.File(tmp_path / "feats" / "shard-00000.h5", "r+") as file:
            file.attrs["model"] = "another"
    else:
        path = tmp_path / "feats" / "shard-00000.json"
        path.write_text(path.read_text().replace("tiny-random", "tiny-rendom"))
    with pytest.raises(OutputError, match="digest"):
        open_features(tmp_path / "feats")


@pytest.mark.parametrize(
    "name", [MANIFEST, "shard-00000.json", "shard-00000.images.jsonl", "shard-00000.pooled.npy"], ids=lambda n: n
)
def test_damage_to_a_folder_of_npy_shards_is_an_error_with_a_hint(tmp_path, name):
    """Hundreds of flips and truncations of every file that is parsed: an OutputError or no harm, nothing else."""
    path = tmp_path / "feats"
    helpers.make_output(path, mixed_shard())
    before = probe(path)
    file = path / name
    whole = file.read_bytes()
    positions = np.flatnonzero(np.frombuffer(whole, np.uint8) != ord(" "))
    if name.endswith(".npy"):
        positions = positions[positions < ALIGNMENT]
    found = 0
    for seed in range(200):
        file.write_bytes(damage(np.random.default_rng(seed), bytearray(whole), positions))
        found += assert_found_or_harmless(before, path)
    assert found > 60
    file.write_bytes(whole)
    assert probe(path) == before


def test_damage_to_an_unfinished_npy_shard_is_an_error_with_a_hint(tmp_path):
    output = Output(str(tmp_path / "feats"))
    output.prepare()
    shard = mixed_shard()
    helpers.fill_partial(output, shard)
    folder = Path(output.partial_path(0))
    for name in ("attributes.json", "images.jsonl", "status.npy", "digest.npy", "crc32.npy", "pooled.npy"):
        file = folder / name
        whole = file.read_bytes()
        positions = np.flatnonzero(np.frombuffer(whole, np.uint8) != ord(" "))
        positions = positions[positions < ALIGNMENT]
        for seed in range(60):
            file.write_bytes(damage(np.random.default_rng(seed), bytearray(whole), positions))
            try:
                partial = output.partial()
                writer = ShardWriter(partial.backend, partial.path, partial.stored.table)
                writer.close()
                assert len(writer.status) == 6
            except OutputError as error:
                assert error.hint
        file.write_bytes(whole)
    assert output.partial().stored.table.status.tolist() == [1, 1, 2, 1, 1, 1]


def test_a_damaged_manifest_never_costs_a_shard(tmp_path):
    """Sweeping trusts a manifest that is whole, and no other: no flipped bit removes what was finished."""
    path = tmp_path / "feats"
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    for seed in range(3):
        helpers.make_output(path, shard, seed=seed)
    names = names_of(path)
    manifest = path / MANIFEST
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        if whole[position : position + 1].isspace():
            continue
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        manifest.write_bytes(flipped)
        try:
            Output(str(path)).prepare()
        except OutputError as error:
            assert error.hint
        assert names_of(path) == names
    manifest.write_bytes(whole)
    assert len(open_features(path)) == 1


@pytest.mark.parametrize("kind", ["h5 folder", "npy folder"])
@pytest.mark.parametrize("damaged", [MANIFEST, "shard-00000.*", "manifest.next.json"])
def test_an_output_that_is_damaged_can_be_replaced(tmp_path, kind, damaged):
    """Every hint says so: --overwrite goes on where nothing else can."""
    from internvit_cli.extract.resume import load_existing, shards_to_continue

    path, shard_format = place(tmp_path, kind)
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    helpers.make_output(path, shard, shard_format)
    for file in [*path.glob(damaged)] or [path / damaged]:
        file.write_bytes(b"\x89HDF\r\n\x1a\n{ damaged")
    output = Output(str(path), shard_format)
    with pytest.raises(OutputError) as caught:
        output.prepare()
        load_existing(output, overwrite=False)
    assert caught.value.hint

    output = Output(str(path), shard_format)
    output.prepare()
    existing = shards_to_continue(output, load_existing(output, overwrite=True), helpers.RECIPE, overwrite=True)
    if not existing.finished:
        helpers.fill_partial(output, shard, seed=3)
        helpers.publish(output, shard)
    output.complete()
    Output(str(path)).prepare()
    assert open_features(path)["0000.jpg"].status is Status.DONE
    assert load_existing(Output(str(path)), overwrite=False).partial is None


def lose_first_bytes(file: Path) -> None:
    with file.open("r+b") as data:
        data.write(bytes(min(4096, file.stat().st_size)))


def lose_all_bytes(file: Path) -> None:
    os.truncate(file, 0)


def become_noise(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(10_000))


@KINDS
@pytest.mark.parametrize("damage", [lose_first_bytes, lose_all_bytes, become_noise], ids=lambda f: f.__name__)
def test_an_unfinished_shard_that_cannot_be_read_is_dropped_on_request_and_what_is_finished_stays(
    tmp_path, kind, damage
):
    """It is ours by its name beside the output; --overwrite, and nothing less, begins it anew."""
    from internvit_cli.extract.resume import load_existing, shards_to_continue

    path, shard_format = place(tmp_path, kind)
    first = helpers.make_shard(helpers.make_table([(1, 1, 0)], [b"a.jpg"]))
    helpers.make_output(path, first, shard_format)
    output = Output(str(path), shard_format)
    output.prepare()
    helpers.fill_partial(output, helpers.make_shard(helpers.make_table([(1, 1, 0)], [b"b.jpg"])))
    partial = Path(output.partial_path(output.next_number()))
    for file in partial.iterdir() if partial.is_dir() else [partial]:
        damage(file)
    for attempt in range(2):
        output = Output(str(path), shard_format)
        output.prepare()
        assert output.partial_exists, "a run without --overwrite leaves it"
        with pytest.raises(OutputError, match=re.escape(str(partial))) as caught:
            load_existing(output, overwrite=False)
        assert "--overwrite" in caught.value.hint, attempt
    existing = shards_to_continue(output, load_existing(output, overwrite=True), helpers.RECIPE, overwrite=True)
    assert len(existing.finished) == 1 and existing.partial is None and not output.partial_exists
    output.complete()
    assert list(open_features(path)) == ["a.jpg"]


@pytest.mark.parametrize("kind", ["file", "h5 folder"])
def test_another_programs_file_by_the_name_of_an_unfinished_shard_is_never_dropped(tmp_path, kind):
    from internvit_cli.extract.resume import load_existing

    path, shard_format = place(tmp_path, kind)
    helpers.make_output(path, helpers.make_shard(helpers.make_table([(1, 1, 0)])), shard_format)
    output = Output(str(path), shard_format)
    with h5py.File(output.partial_path(output.next_number()), "w") as file:
        file["precious"] = np.arange(5)
    output.prepare()
    with pytest.raises(ForeignFileError):
        load_existing(output, overwrite=True)
    assert output.partial_exists


HDF5_DAMAGE = """
import os, sys, faulthandler
import numpy as np
import damage_helpers
path, seeds = sys.argv[1], int(sys.argv[2])
whole = open(path, "rb").read()
before = damage_helpers.probe(path)
positions = np.flatnonzero(np.frombuffer(whole, np.uint8))
for seed in range(seeds):
    child = os.fork()
    if child == 0:
        try:
            damaged = f"{path}.{seed}.h5"
            with open(damaged, "wb") as file:
                file.write(damage_helpers.damage(np.random.default_rng(seed), bytearray(whole), positions))
            said = damage_helpers.assert_found_or_harmless(before, damaged)
            os.unlink(damaged)
            os._exit(10 + said)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    print(seed, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("cases", [50, pytest.param(250, marks=pytest.mark.sweep)])
def test_damage_to_an_hdf5_file_is_an_error_with_a_hint(tmp_path, cases):
    """The same for HDF5, each in a process of its own: its library may fall over what no program should."""
    helpers.make_output(tmp_path / "feats.h5", mixed_shard())
    run = subprocess.run(
        [sys.executable, "-c", HDF5_DAMAGE, tmp_path / "feats.h5", str(cases)],
        env=os.environ | {"PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr
    outcomes = [int(line.split()[1]) for line in run.stdout.splitlines()]
    assert len(outcomes) == cases
    assert set(outcomes) <= {10, 11}, re.sub(r"(?s).*(.{3000})$", r"\1", run.stderr) + str(outcomes)
    assert outcomes.count(11) > cases // 5


def test_a_foreign_hdf5_file_is_never_overwritten(tmp_path):
    from internvit_cli.extract.resume import load_existing

    with h5py.File(tmp_path / "feats.h5", "w") as file:
        file["precious"] = np.arange(5)
    with pytest.raises(ForeignFileError):
        load_existing(Output(str(tmp_path / "feats.h5")), overwrite=True)


@pytest.mark.parametrize("content", [b"a picture, maybe", b"\x89PNG\r\n\x1a\n" + bytes(5000), bytes(5000)])
def test_a_file_that_merely_has_the_outputs_name_is_never_overwritten(tmp_path, content):
    from internvit_cli.extract.resume import load_existing

    (tmp_path / "feats.h5").write_bytes(content)
    with pytest.raises(ForeignFileError):
        load_existing(Output(str(tmp_path / "feats.h5")), overwrite=True)
