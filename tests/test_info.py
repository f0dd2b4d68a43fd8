"""`internvit info`: it says what the index says, without reading it whole, and refuses what is damaged."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import storage_helpers as helpers
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import internvit

from internvit_cli.commands.info import describe_output
from internvit_cli.config import Format, Skipped, Status
from internvit_cli.errors import OutputError
from internvit_cli.storage.format import hdf5_strings, npy
from internvit_cli.storage.output import MANIFEST, Output
from internvit_cli.storage.read.places import find_places
from internvit_cli.storage.read.reader import find_shards

if TYPE_CHECKING:
    from pathlib import Path

GRIDS = [(1, 1, 0), (2, 1, 1), (3, 2, 1), (1, 2, 1), (2, 2, 0), (1, 1, 0)]
SKIPS = {1: Skipped(Status.TRUNCATED, "OSError", "cut short"), 4: Skipped(Status.OVERFLOW, "", "too large")}
BOTH = pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)


def make_folder(folder: Path, shard_format: Format) -> Path:
    """Six awkwardly named images, two of them skipped, in a folder of one shard."""
    shard = helpers.make_shard(helpers.make_table(GRIDS, helpers.AWKWARD_KEYS))
    helpers.make_output(folder / "feats", shard, shard_format, SKIPS)
    return folder / "feats"


def make_file(folder: Path) -> Path:
    helpers.make_output(folder / "feats.h5", helpers.make_shard(helpers.make_table(GRIDS)), skips=SKIPS)
    return folder / "feats.h5"


def forbid_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("keys were read")

    monkeypatch.setattr(hdf5_strings.StringReader, "strings", fail)
    monkeypatch.setattr(npy, "_read_lines", fail)


@BOTH
def test_an_outline_says_what_the_whole_index_says(tmp_path: Path, shard_format: Format) -> None:
    path = str(make_folder(tmp_path, shard_format))
    (place,), (found,) = find_places(path), find_shards(path)
    outline, table = place.backend.outline(place.path), found.stored.table
    assert outline.attributes == found.stored.attributes and outline.images == len(table)
    np.testing.assert_array_equal(outline.status, table.status)
    assert outline.tiles in (table.tiles, None)


@BOTH
def test_statuses_and_tiles_are_told_without_reading_a_key(
    tmp_path: Path, shard_format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_folder(tmp_path, shard_format)
    forbid_keys(monkeypatch)
    facts = describe_output(str(path))
    assert facts["images"] == {"done": 4, "truncated": 1, "overflow": 1} and facts["total_images"] == 6
    assert facts["tiles"] == sum(columns * rows + thumbnail for columns, rows, thumbnail in GRIDS)


def test_an_unfinished_file_is_told_of_without_reading_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(str(tmp_path / "feats.h5"))
    helpers.fill_partial(output, helpers.make_shard(helpers.make_table(GRIDS)), SKIPS)
    forbid_keys(monkeypatch)
    facts = describe_output(output.partial_path(0))
    assert facts["images"] == {"done": 4, "truncated": 1, "overflow": 1} and facts["shards"] == 1


@BOTH
def test_rows_that_count_no_more_are_left_out(tmp_path: Path, shard_format: Format) -> None:
    first = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3, [b"a", b"b", b"c"]))
    second = helpers.make_shard(helpers.make_table([(2, 1, 1)] * 2, [b"b", b"d"]))
    output = Output(str(tmp_path / "feats"), shard_format)
    output.prepare()
    helpers.fill_partial(output, first, {1: SKIPS[1]})
    helpers.publish(output, first)
    helpers.fill_partial(output, second)
    helpers.publish(output, second, {"shard-00000": ["b"]})
    facts = describe_output(output.path)
    assert facts["total_images"] == 4 and facts["images"] == {"done": 4}
    assert facts["tiles"] == 8 and facts["shards"] == 2, "of the images that count"


@given(st.integers(1, 700), st.lists(st.sampled_from(list(Status)), max_size=12))
def test_statuses_are_found_however_the_index_falls_into_blocks(size: int, statuses: list[Status]) -> None:
    keys = [b'%d", "status":  7, "digest": "\n' % row for row in range(len(statuses))]
    table = helpers.make_table([(1, 1, 0)] * len(statuses), keys) if statuses else None
    lines: list[bytes] = []
    if table is not None:
        table = table.with_status(np.array(statuses, np.uint8))
        lines = list(npy._finished_lines(table, np.zeros((len(table), 32), np.uint8), np.zeros(len(table), np.uint32)))
    longest = max(map(len, lines), default=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(npy, "LINES_BLOCK", longest + size)
        found = npy._last_columns(io.BytesIO(b"".join(lines)))  # type: ignore[arg-type]
    assert found is not None and found.tolist() == statuses


def test_an_index_that_another_program_wrote_is_read_line_by_line(tmp_path: Path) -> None:
    path = make_folder(tmp_path, Format.NPY)
    before = describe_output(str(path))
    index = path / "shard-00000.images.jsonl"
    entries = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text("".join(json.dumps(dict(sorted(entry.items()))) + "\n" for entry in entries))
    after = describe_output(str(path))
    assert after.pop("bytes") != before.pop("bytes")
    assert after == before


def lose_a_line(index: Path) -> None:
    index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:-1]))


def cut_the_last_line(index: Path) -> None:
    os.truncate(index, index.stat().st_size - 2)


def lose_all(index: Path) -> None:
    os.truncate(index, 0)


def spoil_a_status(index: Path) -> None:
    index.write_bytes(index.read_bytes().replace(b'"status":  1', b'"status":  x', 1))


def make_a_status_unknown(index: Path) -> None:
    index.write_bytes(index.read_bytes().replace(b'"status":  1', b'"status": 77', 1))


@pytest.mark.parametrize(
    "damage",
    [lose_a_line, cut_the_last_line, lose_all, spoil_a_status, make_a_status_unknown],
    ids=lambda f: f.__name__,
)
def test_a_damaged_index_of_npy_shards_is_refused(tmp_path: Path, damage: Any) -> None:
    path = make_folder(tmp_path, Format.NPY)
    damage(path / "shard-00000.images.jsonl")
    with pytest.raises(OutputError) as caught:
        describe_output(str(path))
    assert caught.value.hint


@pytest.mark.parametrize("name", ["columns", "rows", "thumbnail", "tile_offset", "status"])
def test_a_damaged_grid_or_status_of_an_hdf5_file_is_refused(tmp_path: Path, name: str) -> None:
    path = make_file(tmp_path)
    with h5py.File(path, "r+") as file:
        file[f"image/{name}"][1] = 99
    with pytest.raises(OutputError, match=r"statuses|tile offsets"):
        describe_output(str(path))


@pytest.mark.parametrize("name", ["key", "width", "rows", "status", "tile_offset"])
def test_a_missing_or_shorter_column_of_an_hdf5_file_is_refused(tmp_path: Path, name: str) -> None:
    path = make_file(tmp_path)
    for is_there in (True, False):
        with h5py.File(path, "r+") as file:
            values = file[f"image/{name}"][:-1] if is_there else None
            del file[f"image/{name}"]
            if values is not None:
                file[f"image/{name}"] = values
        with pytest.raises(OutputError) as caught:
            describe_output(str(path))
        assert caught.value.hint


@BOTH
def test_a_changed_recipe_is_refused(tmp_path: Path, shard_format: Format) -> None:
    path = make_folder(tmp_path, shard_format)
    if shard_format is Format.H5:
        with h5py.File(path / "shard-00000.h5", "r+") as file:
            file.attrs["recipe"] = str(file.attrs["recipe"]).replace('"layer":24', '"layer":23')
    else:
        attributes = path / "shard-00000.json"
        attributes.write_text(attributes.read_text().replace('\\"layer\\":24', '\\"layer\\":23'))
    with pytest.raises(OutputError, match="recipe"):
        describe_output(str(path))


@BOTH
def test_a_shard_of_another_size_than_the_manifest_says_is_refused(tmp_path: Path, shard_format: Format) -> None:
    path = make_folder(tmp_path, shard_format)
    helpers.make_output(tmp_path / "other", helpers.make_shard(helpers.make_table(GRIDS[:3])), shard_format)
    (path / MANIFEST).write_bytes((tmp_path / "other" / MANIFEST).read_bytes())
    with pytest.raises(OutputError, match="its manifest says 3"):
        describe_output(str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [("recipe", b"\xb9"), ("model", np.arange(3)), ("compute_error", "{"), ("store_error", "seven")],
)
def test_attributes_that_mean_nothing_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = make_file(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(OutputError) as caught:
        describe_output(str(path))
    assert caught.value.hint


@pytest.mark.parametrize("columns", [60, 80])
def test_no_word_of_the_table_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    helpers.make_output(tmp_path / "feats.h5", helpers.make_shard(helpers.make_table(GRIDS)))
    shown = internvit("info", tmp_path / "feats.h5").stdout
    assert helpers.RECIPE.weights_digest in shown.split()
    assert "1 shard" in shown and "shard(s)" not in shown
    wide = {line for line in shown.splitlines() if len(line) > columns}
    assert all(len(line.split()) <= 2 or line.startswith(("file", "weights")) for line in wide), wide
