"""From a listing to shards: tables, cuts, recipes, headers in parallel, counts and the words of the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from array import array
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import storage_helpers as helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvit_cli.cli.arguments import MEASURED
from internvit_cli.cli.declarations import REGISTERED
from internvit_cli.cli.values import UnusableWordError, value_of
from internvit_cli.config import (
    ComputeDtype,
    Format,
    PixelRule,
    Recipe,
    RecipeError,
    Skipped,
    Status,
    StoreDtype,
    TilingRule,
    Tokens,
)
from internvit_cli.errors import ExitCode, OtherRecipeError, OutputError, UsageError
from internvit_cli.extract.results import Counts, Stages, Summary
from internvit_cli.extract.shard_plan import ShardSize
from internvit_cli.plan import scan
from internvit_cli.plan.scan import Plan, PlanOptions, plan_images
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable, concatenate, count_statuses
from internvit_cli.plan.tiling import choose_grid, tile_count
from internvit_cli.recipes import check_same
from internvit_cli.runtime.workers import WorkerSpec
from internvit_cli.sources import DiscoverOptions, Source, discover
from internvit_cli.sources.interface import Listing
from internvit_cli.storage.format import hdf5, npy
from internvit_cli.storage.format.interface import backend_of
from internvit_cli.storage.format.layout import FeatureShape, NewShard, stored_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli.storage.format.interface import ShardFormat

# ----------------------------------------------------------------------------------------------------------- tables

images = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1))


@st.composite
def tables(draw: Any, least: int = 0) -> ImageTable:
    """Tables of images, some of which have no readable header."""
    grids = draw(st.lists(images, min_size=least, max_size=30))
    failed = draw(st.sets(st.integers(0, max(0, len(grids) - 1))))
    keys = [b"%d-%d" % (draw(st.integers(0, 9)), row) for row in range(len(grids))]
    return helpers.make_table(grids, keys, dict.fromkeys(failed, Status.TRUNCATED))


def assert_same_table(one: ImageTable, other: ImageTable) -> None:
    assert list(one.keys) == list(other.keys)
    for name in (*COLUMN_DTYPES, "tile_offset", "status"):
        assert getattr(one, name).dtype == getattr(other, name).dtype
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name


@given(tables(least=1), st.data())
def test_taking_rows_keeps_each_row_together(table, data):
    """In any order, with tile offsets that follow from the rows taken."""
    rows = data.draw(st.lists(st.integers(0, len(table) - 1), max_size=20))
    taken = table.take(np.array(rows, np.int64))
    assert list(taken.keys) == [table.keys[row] for row in rows]
    for name in (*COLUMN_DTYPES, "status"):
        assert getattr(taken, name).tolist() == [int(getattr(table, name)[row]) for row in rows]
    assert taken.tile_counts.tolist() == [int(table.tile_counts[row]) for row in rows]
    assert taken.tiles == sum(taken.tile_counts.tolist())


@given(tables(least=1), st.data())
def test_cutting_and_joining_gives_the_same_table(table, data):
    cut = data.draw(st.integers(0, len(table)))
    parts = [table.take(np.arange(cut)), table.take(np.arange(cut, len(table)))]
    assert_same_table(concatenate(parts), table)


@given(tables(least=1))
def test_statuses_are_counted(table):
    counts = count_statuses(table.status)
    assert sum(counts.values()) == len(table)
    assert all(count == table.status.tolist().count(status) for status, count in counts.items())


# ----------------------------------------------------------------------------------------------------------- shards

shapes = st.builds(
    FeatureShape,
    st.sampled_from(Tokens),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from(StoreDtype),
    st.booleans(),
)


def size_of(table: ImageTable, shape: FeatureShape, backend: ShardFormat) -> int:
    """Bytes of the shard that a table becomes, with the log of its first start."""
    attributes = helpers.make_shard(table).attributes
    return backend.planned_bytes(NewShard(table, shape, attributes)) + backend.LOG_BYTES


def least_size(shape: FeatureShape, backend: ShardFormat) -> ShardSize:
    """Shards of the least size that there can be."""
    attributes = helpers.make_shard(helpers.make_table([(1, 1, 0)])).attributes
    with pytest.raises(UsageError) as caught:
        ShardSize.of(1, backend, shape, attributes)
    least = int(caught.value.hint.removeprefix("give ").partition(" ")[0].replace(",", ""))
    return ShardSize.of(least, backend, shape, attributes)


@pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)
@settings(max_examples=30)
@given(table=tables(least=1), shape=shapes, more=st.integers(0, 20_000))
def test_shards_hold_every_image_once_in_order_and_are_no_larger_than_asked_for(shard_format, table, shape, more):
    """No image spans two. All bytes of a shard count; only one with a single image may be larger, by that image."""
    backend = backend_of(shard_format)
    size = least_size(shape, backend)
    size = dataclasses.replace(size, most=size.most + more)
    shards = list(size.split(table))
    assert_same_table(concatenate(shards), table)
    for shard in shards:
        beyond = size_of(shard, shape, backend) - size.most
        rows = sum(spec.nbytes for spec in shape.row_datasets(len(shard), shard.tiles))
        index = int(backend.index_bytes(shard).sum())
        assert beyond <= 0 or (len(shard) == 1 and beyond <= rows + index)


@given(table=tables(least=3), shape=shapes)
def test_a_shard_takes_all_images_that_have_room_in_it(table, shape):
    size = least_size(shape, npy)
    one = table.take(np.arange(1))
    images = size_of(table, shape, npy) - size_of(one, shape, npy)
    assert len(list(dataclasses.replace(size, most=size_of(one, shape, npy) + images + 4096).split(table))) == 1


@given(table=tables(least=2), shape=shapes, more=st.integers(0, 5000), data=st.data())
def test_cuts_do_not_depend_on_what_follows(table, shape, more, data):
    """A run that goes on after its first shards makes the ones that it would have made."""
    size = least_size(shape, npy)
    size = dataclasses.replace(size, most=size.most + more)
    shards = list(size.split(table))
    shorter = table.take(np.arange(data.draw(st.integers(1, len(table)))))
    prefix = list(size.split(shorter))
    for ours, theirs in zip(prefix[:-1], shards, strict=False):
        assert_same_table(ours, theirs)
    rest = table.take(np.arange(len(shards[0]), len(table)))
    if len(rest):
        for ours, theirs in zip(size.split(rest), shards[1:], strict=True):
            assert_same_table(ours, theirs)


@pytest.mark.parametrize("length", [6, 100, 1000, 2100, 4090, 9000])
def test_keys_of_any_length_take_no_more_than_they_are_planned_for(length):
    shape = helpers.make_shard(helpers.make_table([(1, 1, 0)])).features
    for images in (2, 40):
        table = helpers.make_table([(1, 1, 0)] * images, [b"%06d" % n + b"k" * (length - 6) for n in range(images)])
        for backend in (npy, hdf5):
            size = least_size(shape, backend)
            rows = sum(spec.nbytes for spec in shape.row_datasets(images, table.tiles))
            assert size_of(table, shape, backend) <= size.fixed + rows + int(backend.index_bytes(table).sum())


@given(table=tables())
def test_the_index_of_npy_shards_is_as_long_as_planned(table):
    lines = list(npy._finished_lines(table, np.zeros((len(table), 32), np.uint8), np.zeros(len(table), np.uint32)))
    assert npy.index_bytes(table).tolist() == [len(line) for line in lines]


# ---------------------------------------------------------------------------------------------------------- recipes


def changed(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case Enum():
            return next(member for member in type(value) if member is not value and member is not ComputeDtype.AUTO)
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (0.1, 0.2, 0.3) if value else (1, 2)  # none are numbers of layers
    return (1, 2, 3)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_every_field_of_a_recipe_counts(name):
    """A change of any one is a difference by that name, another digest, and a refusal that names both values."""
    value = StoreDtype.INT8 if name == "projected_from" else changed(getattr(helpers.RECIPE, name))
    other = dataclasses.replace(helpers.RECIPE, **{name: value})
    assert helpers.RECIPE.differences(other) == [name]
    assert helpers.RECIPE.digest != other.digest
    with pytest.raises(OtherRecipeError, match=f"feats.h5 was made with another recipe: {name} was") as caught:
        check_same(other, helpers.RECIPE, "feats.h5")
    assert caught.value.exit_code == ExitCode.OTHER_RECIPE
    assert "--" in caught.value.hint
    assert Recipe.from_json(other.to_json()) == other


def test_equal_recipes_differ_in_nothing():
    assert helpers.RECIPE.differences(dataclasses.replace(helpers.RECIPE)) == []
    check_same(helpers.RECIPE, dataclasses.replace(helpers.RECIPE), "feats.h5")


@given(st.text(max_size=200) | st.from_regex(r'\{("\w+":\d,)*"layer":1\}', fullmatch=True))
def test_what_is_no_recipe_is_an_error_of_its_own(text):
    with pytest.raises(RecipeError):
        Recipe.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("store_dtype", "int4"),
        ("tokens", "hidden"),
        ("tokens", ["visual"]),
        ("pool", None),
        ("compute_dtype", "auto"),
        ("token_order", "v3"),
        ("layer", "24"),
        ("layer", 24.0),
        ("layer", -1),
        ("tile_size", 1 << 40),
        ("exif", 1),
        ("mean", [0.5, 0.5]),
        ("mean", [10**400, 0, 0]),
        ("std", [float("nan"), 1, 1]),
        ("background", [0, 0, "red"]),
        ("weights_digest", 7),
        ("rotation", "none"),
    ],
)
def test_a_value_that_this_version_does_not_know_is_named_with_the_version_that_wrote_it(name, value):
    text = json.dumps(json.loads(helpers.RECIPE.to_json()) | {name: value})
    with pytest.raises(OutputError) as caught:
        stored_recipe({"recipe": text, "created_by": "internvit 9.1"}, "feats.h5")
    assert name in caught.value.message
    assert "feats.h5" in caught.value.message
    assert "internvit 9.1 wrote it" in caught.value.message


def test_a_recipe_that_lacks_a_field_is_damaged():
    stored = json.loads(helpers.RECIPE.to_json())
    del stored["pool"]
    with pytest.raises(OutputError, match="lacks the field 'pool'"):
        stored_recipe({"recipe": json.dumps(stored)}, "feats.h5")


def test_the_digest_of_a_recipe_stays_what_earlier_versions_computed():
    """It decides whether a stored file is continued."""
    assert helpers.RECIPE.digest == "4369c66c09a764516f56c9fe1ae4545bb89811f576c0d56e23a5500d3606ac2b"


# ---------------------------------------------------------------------------------------------------------- planning

RULE = PixelRule(TilingRule())


def options(**changes: Any) -> PlanOptions:
    return dataclasses.replace(PlanOptions(RULE, 2, 30.0, 4 << 30), **changes)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Sixty pictures of many shapes, and between them what is none."""
    folder = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for number in range(60):
        width, height = (int(n) for n in rng.integers(1, 900, 2))
        Image.new("L", (width, height)).save(folder / f"{number:03d}.png")
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:20])
    (folder / "007.jpg").write_bytes(b"no picture at all")
    (folder / "008.jpg").touch()
    (folder / "009.gif").write_bytes(b"GIF89a")
    return folder


def plan_of(folder: Path, plan_options: PlanOptions | None = None) -> tuple[Listing, Plan]:
    listing = discover([str(folder)], DiscoverOptions())
    return listing, plan_images(listing, range(len(listing)), plan_options or options())


def test_a_plan_has_one_row_an_entry_with_the_sizes_that_pillow_gives(tree):
    """In the listing's order, whatever order the headers came in; what cannot be read has no tiles and a reason."""
    listing, plan = plan_of(tree)
    table = plan.table
    assert table.keys == listing.keys
    assert len(table) == 63
    bad = {b"001.png", b"007.jpg", b"008.jpg", b"009.gif"}
    assert {listing.keys[row] for row in plan.skipped} == bad
    for row, key in enumerate(table.keys):
        status = os.stat(tree / os.fsdecode(key))
        assert int(table.file_size[row]) == status.st_size
        assert int(table.file_mtime_ns[row]) == status.st_mtime_ns
        if key in bad:
            assert table.status[row] == plan.skipped[row].status != Status.PENDING
            assert (table.width[row], table.tile_counts[row], table.orientation[row]) == (0, 0, 0)
            continue
        with Image.open(tree / os.fsdecode(key)) as image:
            assert (int(table.width[row]), int(table.height[row])) == image.size
        grid = choose_grid(image.width, image.height, RULE.tiling)
        assert (table.columns[row], table.rows[row]) == grid
        assert table.tile_counts[row] == tile_count(grid, thumbnail=True)
        assert table.status[row] == Status.PENDING


def test_a_plan_of_some_entries_has_just_those(tree):
    listing, whole = plan_of(tree)
    entries = [5, 1, 40]
    plan = plan_images(listing, entries, options())
    assert_same_table(plan.table, whole.table.take(np.array(entries)))
    assert set(plan.skipped) == {1}
    assert len(plan_images(listing, [], options()).table) == 0


def test_progress_ends_with_all(tree):
    listing = discover([str(tree)], DiscoverOptions())
    seen: list[int] = []
    plan_images(listing, range(len(listing)), options(), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(listing)


def test_entries_that_must_not_be_opened_are_not(tmp_path):
    """What discovery has ruled out, such as a link that leaves its source, is not looked at again."""
    Image.new("L", (9, 9)).save(tmp_path / "a.png")
    outside = Skipped(Status.LINK_OUTSIDE, "", "it leaves the source")
    source = Source(os.fsencode(tmp_path))
    listing = Listing((source,), [b"a.png", b"b.png"], array("I", [0, 0]), {0: outside}, (), 0)
    plan = plan_images(listing, [0, 1], options())
    assert plan.skipped[0] is outside
    assert plan.skipped[1].status is Status.VANISHED
    assert plan.table.status.tolist() == [Status.LINK_OUTSIDE, Status.VANISHED]


def test_a_file_whose_header_crashes_its_reader_costs_itself_alone(tree, monkeypatch):
    """Its chunk is read again one by one, and all other headers are there."""
    spec = WorkerSpec
    monkeypatch.setattr(
        scan,
        "WorkerSpec",
        lambda handler, arguments, **rest: spec("worker_handlers:deadly_header", (b"030.png", *arguments), **rest),
    )
    listing, plan = plan_of(tree)
    crashed = listing.keys.index(b"030.png")
    assert plan.skipped[crashed].status is Status.WORKER_DIED
    assert "SIGSEGV" in plan.skipped[crashed].message
    assert len(plan.skipped) == 5


# ------------------------------------------------------------------------------------------------- counts and codes


@pytest.mark.parametrize(
    ("counts", "allowed", "code"),
    [
        ({"found": 5, "done": 5}, 0, 0),
        ({"found": 5, "done": 4, "skipped": 1}, 0, 3),
        ({"found": 5, "done": 4, "skipped": 1}, 1, 0),
        ({"found": 5, "done": 3, "skipped": 2}, 1, 3),
        ({"found": 5, "skipped": 5}, 0, 1),
        ({"found": 5, "skipped": 5}, 5, 1),
        ({"found": 5, "done": 1, "pending": 4, "stopped_by": 2}, 0, 130),
        ({"found": 5, "done": 1, "pending": 4, "stopped_by": 15}, 0, 143),
        ({"found": 5, "done": 1, "pending": 4, "stopped_by": 10}, 0, 138),
        ({"found": 5, "skipped": 5, "stopped_by": 15}, 0, 143),
    ],
)
def test_the_exit_code_follows_from_the_counts(counts, allowed, code):
    stopped_by = counts.pop("stopped_by", 0)
    result = Summary(
        output="feats.h5",
        skipped_path="feats.h5.skipped.jsonl",
        model="m",
        counts=Counts(**counts),
        tiles=0,
        encoded=0,
        bytes=0,
        seconds=1.0,
        stages=Stages(),
        stopped_by=stopped_by,
    )
    assert result.exit_code(allowed) == code
    facts = result.to_json()
    assert facts["found"] == facts["done"] + facts["skipped"] + facts["pending"]
    assert (facts["skipped_path"] is None) == (not facts["skipped"])


seconds = st.integers(0, 10**9).map(lambda milliseconds: milliseconds / 1000)


@given(seconds, seconds, seconds, seconds, seconds)
def test_the_sentence_on_the_bottleneck_names_the_busiest_stage(wall, decode, device, write, host):
    stages = Stages(wall, decode, device, write, host)
    sentence = stages.bottleneck
    assert sentence.endswith(".")
    assert stages.idle >= 0
    if wall and max(decode, device, write, host) > wall:
        words = [(decode, "Decoding"), (device, "encoder"), (write, "Writing"), (host, "Filling batches")]
        assert any(word in sentence for value, word in words if value == max(decode, device, write, host))
    assert stages.plus(Stages()) == stages


@pytest.mark.parametrize(
    ("stages", "advice"),
    [
        (Stages(wall=10, decode=9.9, device=4), "the encoder waited 60 % of the time; try more --workers"),
        (Stages(wall=10, decode=5, device=2.5, write=9), "the encoder waited 75 % of the time; try a faster disk"),
        (Stages(wall=10, decode=5, device=2.5, host=9), "the encoder waited 75 % of the time; try fewer --workers"),
    ],
)
def test_a_card_that_waits_is_told_with_the_cause_and_the_flag_that_helps(stages, advice):
    assert advice in stages.bottleneck


# ------------------------------------------------------------------------------------------- words of the command line

awkward = st.text(max_size=30) | st.from_regex(r"[-+]?\d{0,5000}\.?\d{0,20}[a-zA-Z%]{0,3}", fullmatch=True)


def parse(option: str, text: str) -> Any:
    """What a word means for an option of extract."""
    return value_of(REGISTERED["extract"].by_key[option], text)


def value_if_any(option: str, text: str) -> Any:
    """What a word means; None where it means nothing, and then it is said what is expected."""
    try:
        return parse(option, text)
    except UnusableWordError as error:
        assert error.expected
        return None


@given(awkward | st.sampled_from(["1" * 400 + "G", "9e99", "0", "-1", "\u0661k", "1KiB", " 5 MB "]))
def test_a_size_is_a_number_of_bytes_or_refused(text):
    size = value_if_any("shard-size", text)
    assert size is None or (isinstance(size, int) and 1 <= size < 1 << 63)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1k", 1024), ("4GiB", 4 << 30), ("500M", 500 << 20), ("1.5g", 3 << 29), ("2 TB", 2 << 40), ("7b", 7)],
)
def test_sizes_have_binary_units(text, size):
    assert parse("shard-size", text) == size


@given(awkward | st.sampled_from(["auto", "-4", "1_0", "9" * 5000, "nan", "inf", "1.0"]))
def test_a_layer_is_an_index_or_refused(text):
    layers = value_if_any("layer", text)
    assert layers is None or (layers and all(isinstance(layer, int) for layer in layers))


@given(awkward | st.sampled_from(["auto", "1", "65536", "65537", "0", "1" * 5000, "²", "٣"]))
def test_a_batch_is_a_number_of_tiles_or_refused(text):
    tiles = value_if_any("batch-size", text)
    assert tiles is None or tiles == (MEASURED if text == "auto" else tiles) <= 65536
    assert tiles != MEASURED or text == "auto"


@given(
    awkward
    | st.from_regex(r"#[0-9a-fA-F]{0,9}", fullmatch=True)
    | st.from_regex(r"(rgb|hsl|hsv|rgba)\(\d{0,9}%?,\d{0,90}%?,\d{0,9}%?\)", fullmatch=True)
    | st.sampled_from(["white", "rgb(999,0,0)", "rgb(300%,0%,0%)", "#fff", "#ffffff80", "hsl(0,100%,50%)"])
)
def test_a_color_is_three_bytes_or_refused(text):
    color = value_if_any("background", text)
    assert color is None or (len(color) == 3 and all(0 <= part <= 255 for part in color))


def test_colors_have_names_and_values():
    assert parse("background", "white") == (255, 255, 255)
    assert parse("background", "#ff8000") == (255, 128, 0)
    assert parse("background", "rgb(1, 2, 3)") == (1, 2, 3)
    for text in ("rgb(999,0,0)", "", "no color", "rgb(1,2)"):
        with pytest.raises(UnusableWordError):
            parse("background", text)


@given(awkward | st.sampled_from(["nan%", "inf%", "-inf%", "nan", "1e3", "100%", "100.1%", "%", "9" * 5000, "-0"]))
def test_allowed_skips_are_a_number_a_percentage_or_refused(text):
    """And whatever it is, a limit can be computed from it."""
    parsed = value_if_any("allow-skipped", text)
    if parsed is not None:
        value, is_percentage = parsed
        assert value >= 0
        assert value <= (100 if is_percentage else sys.maxsize)
        assert int(1000 * value / 100) >= 0


def test_allowed_skips_as_they_are_written():
    assert parse("allow-skipped", "10") == (10, False)
    assert parse("allow-skipped", "2.5%") == (2.5, True)
    for text in ("nan%", "101%", "-1", "1.5", "ten", ""):
        with pytest.raises(UnusableWordError):
            parse("allow-skipped", text)
