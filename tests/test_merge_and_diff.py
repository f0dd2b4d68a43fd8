"""`internvit merge` and `internvit diff`: several outputs as one, and two held against each other."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import exchange_helpers as exchange
import h5py
import numpy as np
import pytest
import storage_helpers as helpers
from comparing import same_bytes
from exchange_helpers import fails, least_shard_size, make, names_in, ok, plain
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import datasets, extract, internvit, make_pictures, summary_of

from internvit_cli import open_features
from internvit_cli.config import Skipped, Status, StoreDtype, TokenOrder, Tokens
from internvit_cli.export.cka import LinearCka, cosines
from internvit_cli.storage.output import Output
from internvit_cli.storage.skipped import SkipLog, read_skip_log

if TYPE_CHECKING:
    from pathlib import Path

VANISHED = Skipped(Status.VANISHED, "FileNotFoundError", "it is gone")


def simple(
    path: Path,
    keys: list[bytes],
    seed: int = 0,
    skips: tuple[int, ...] = (),
    why: Skipped = VANISHED,
    **options: Any,
) -> None:
    """An output of one-tile images, some of them skipped."""
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * len(keys), keys), **options)
    output = Output(str(path))
    output.prepare()
    helpers.fill_partial(output, shard, dict.fromkeys(skips, why), seed)
    SkipLog(output.skipped_path).append((keys[row], why) for row in skips)
    helpers.publish(output, shard)


def values(path: Path, key: str) -> tuple[bytes, bytes, bytes]:
    image = open_features(path)[key]
    return image.pooled.tobytes(), image.visual_tokens.tobytes(), image.digest


# --------------------------------------------------------------------------------------------------------------- merge


@pytest.mark.parametrize("target", ["c.h5", "c"])
def test_merged_outputs_hold_every_row_of_both(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5")
    simple(tmp_path / "b", [b"x.jpg", b"y.jpg"], seed=7)
    cut = (
        ["--shard-size", least_shard_size("merge", tmp_path / "a.h5", tmp_path / "b", "-o", tmp_path / "c")]
        if target == "c"
        else []
    )
    ok("merge", tmp_path / "a.h5", tmp_path / "b", "-o", tmp_path / target, *cut)
    ok("verify", tmp_path / target)
    merged = open_features(tmp_path / target)
    assert len(merged) == 8
    for path in (tmp_path / "a.h5", tmp_path / "b"):
        for key in open_features(path).done:
            assert values(path, key) == values(tmp_path / target, key)
    skips = read_skip_log(Output(str(tmp_path / target)).skipped_path)
    assert [entry["reason"] for entry in skips] == ["not_an_image", "truncated"]


def test_two_halves_of_a_folder_merge_into_what_one_run_makes_and_extract_goes_on_with_it(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path / "imgs", 6)
    options = ["--root", tmp_path / "imgs", "--dtype", "float32", "--device", "cpu"]
    half = [str(path) for path in paths if "part0" in str(path)], [str(path) for path in paths if "part1" in str(path)]
    for name, pictures in (("a.h5", half[0]), ("b.h5", half[1]), ("whole.h5", half[0] + half[1])):
        assert extract(*pictures, "-o", tmp_path / name, *options).returncode == 0
    ok("merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o", tmp_path / "c.h5")
    ok("verify", tmp_path / "c.h5")
    whole, merged = datasets(tmp_path / "whole.h5"), datasets(tmp_path / "c.h5")
    assert whole.keys() == merged.keys()
    for name, array in whole.items():
        assert same_bytes(array, merged[name]) or array.dtype == object, name
    assert "identical" in ok("diff", tmp_path / "c.h5", tmp_path / "whole.h5").stdout
    again = extract(*half[0], *half[1], "-o", tmp_path / "c.h5", *options, "--json")
    assert summary_of(again)["encoded"] == 0


def test_sources_of_both_are_kept_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_pictures(tmp_path / name, 2, seed=len(name))
        assert extract(f"{name}={tmp_path / name}", "-o", tmp_path / f"{name}.h5", "--dtype", "float32").returncode == 0
    ok("merge", tmp_path / "one.h5", tmp_path / "two.h5", "-o", tmp_path / "c.h5")
    for key, image in open_features(tmp_path / "c.h5").items():
        assert image.path == str(tmp_path / key)
    sources = [f"{name}={tmp_path / name}" for name in ("one", "two")]
    again = extract(*sources, "-o", tmp_path / "c.h5", "--dtype", "float32", "--json")
    assert summary_of(again)["encoded"] == 0


def test_a_key_of_two_outputs_counts_once_and_two_pictures_by_one_key_are_refused(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"k.jpg", b"a.jpg"], seed=1)
    simple(tmp_path / "same.h5", [b"k.jpg", b"b.jpg"], seed=1)
    simple(tmp_path / "other.h5", [b"k.jpg"], seed=2)
    result = ok("merge", tmp_path / "a.h5", tmp_path / "same.h5", "-o", tmp_path / "c.h5")
    assert "1 image in more than one" in result.stderr
    assert sorted(open_features(tmp_path / "c.h5")) == ["a.jpg", "b.jpg", "k.jpg"]
    said = fails(1, "merge", tmp_path / "a.h5", tmp_path / "other.h5", "-o", tmp_path / "d.h5")
    assert "k.jpg" in said
    assert "--prefer" in said
    assert "d.h5" not in names_in(tmp_path)
    for prefer, counts in (("first", "a.h5"), ("last", "other.h5")):
        target = tmp_path / f"{prefer}.h5"
        ok("merge", tmp_path / "a.h5", tmp_path / "other.h5", "-o", target, "--prefer", prefer)
        assert values(target, "k.jpg") == values(tmp_path / counts, "k.jpg")
        ok("verify", target)


def test_an_image_that_one_output_skipped_and_another_has_is_done(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"k.jpg", b"l.jpg"], skips=(1,))
    simple(tmp_path / "b.h5", [b"k.jpg", b"l.jpg", b"m.jpg"], skips=(0, 2))
    ok("merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o", tmp_path / "c.h5")
    features = open_features(tmp_path / "c.h5")
    assert {key: image.status.word for key, image in features.items()} == {
        "k.jpg": "done",
        "l.jpg": "done",
        "m.jpg": "vanished",
    }
    assert [entry["key"] for entry in read_skip_log(str(tmp_path / "c.h5.skipped.jsonl"))] == ["m.jpg"]
    ok("verify", tmp_path / "c.h5")


@pytest.mark.parametrize(("prefer", "reason"), [("first", "truncated"), ("last", "not_an_image")])
def test_an_image_that_both_skipped_has_the_one_reason_of_the_row_that_counts(
    tmp_path: Path, prefer: str, reason: str
) -> None:
    simple(tmp_path / "a.h5", [b"k.jpg", b"bad.jpg"], skips=(1,), why=exchange.TRUNCATED)
    simple(tmp_path / "b.h5", [b"bad.jpg", b"l.jpg"], skips=(0,), why=exchange.NOT_AN_IMAGE)
    ok("merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o", tmp_path / "c.h5", "--prefer", prefer)
    assert open_features(tmp_path / "c.h5")["bad.jpg"].status.word == reason
    skips = read_skip_log(str(tmp_path / "c.h5.skipped.jsonl"))
    assert [(entry["key"], entry["reason"]) for entry in skips] == [("bad.jpg", reason)]


def test_an_output_merged_with_itself_has_one_line_a_skipped_image_and_a_folder_that_could_not_be_read(
    tmp_path: Path,
) -> None:
    simple(tmp_path / "a.h5", [b"k.jpg", b"bad.jpg"], skips=(1,))
    SkipLog(str(tmp_path / "a.h5.skipped.jsonl")).append([(b"closed/", exchange.NOT_AN_IMAGE), (b"bad.jpg", VANISHED)])
    ok("merge", tmp_path / "a.h5", tmp_path / "a.h5", "-o", tmp_path / "c.h5")
    keys = [entry["key"] for entry in read_skip_log(str(tmp_path / "c.h5.skipped.jsonl"))]
    assert sorted(keys) == ["bad.jpg", "closed/"]


def test_of_unfinished_outputs_what_is_committed_is_merged(tmp_path: Path) -> None:
    exchange.make_partial(tmp_path / "a.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)] * 4)), [0, 2])
    simple(tmp_path / "b.h5", [b"0001.jpg"])
    result = ok("merge", tmp_path / "a.h5.partial", tmp_path / "b.h5", "-o", tmp_path / "c.h5")
    assert "1 image left out" in result.stderr
    assert sorted(open_features(tmp_path / "c.h5").done) == ["0000.jpg", "0001.jpg", "0002.jpg"]
    ok("verify", tmp_path / "c.h5")


def test_images_that_another_output_has_encoded_are_not_left_out(tmp_path: Path) -> None:
    exchange.make_partial(tmp_path / "a.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3)), [0])
    simple(tmp_path / "b.h5", [b"0001.jpg", b"0002.jpg"])
    result = ok("merge", tmp_path / "a.h5.partial", tmp_path / "b.h5", "-o", tmp_path / "c.h5")
    assert "left out" not in result.stderr
    assert len(open_features(tmp_path / "c.h5").done) == 3


def test_figures_that_one_output_could_not_measure_are_those_of_another_and_go_with_the_tokens(tmp_path: Path) -> None:
    for name, figures in (("a", {"tiles": 0}), ("b", {"tiles": 3, "lowest_cosine": 0.99}), ("c", {"tiles": 5})):
        shard = helpers.make_shard(helpers.make_table([(1, 1, 0)], [name.encode()]), store_dtype=StoreDtype.INT8)
        shard.attributes["store_error"] = json.dumps(figures)
        helpers.make_output(tmp_path / f"{name}.h5", shard)
    ok("merge", *(tmp_path / f"{name}.h5" for name in "abc"), "-o", tmp_path / "m.h5")
    assert json.loads(plain(tmp_path / "m.h5").attributes["store_error"]) == {"tiles": 3, "lowest_cosine": 0.99}
    ok("export", tmp_path / "m.h5", tmp_path / "v.h5", "--no-tokens")
    assert "store_error" not in plain(tmp_path / "v.h5").attributes
    for name in ("m.h5", "v.h5"):
        ok("verify", tmp_path / name)


def test_outputs_of_two_recipes_are_refused_with_the_differing_field(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"a.jpg"])
    simple(tmp_path / "b.h5", [b"b.jpg"], max_tiles=6)
    said = fails(5, "merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o", tmp_path / "c.h5")
    assert "max_tiles is 12 in" in said
    assert "6 in" in said


def test_merges_that_make_no_sense_are_usage_errors(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"a.jpg"])
    simple(tmp_path / "b.h5", [b"b.jpg"])
    both = (tmp_path / "a.h5", tmp_path / "b.h5")
    assert "features are not written" in fails(2, "merge", *both, "-o", tmp_path / "c.parquet")
    assert "cannot be merged" in fails(2, "merge", both[0], "-o", tmp_path / "c.h5")
    assert "is the output that is read" in fails(2, "merge", *both, "-o", tmp_path / "b.h5", "--overwrite")
    assert "no output" in fails(2, "merge", *both)
    assert "not one of first, last" in fails(2, "merge", *both, "-o", tmp_path / "c.h5", "--prefer", "newest")


def test_a_damaged_row_of_one_output_ends_a_merge(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"a.jpg"])
    simple(tmp_path / "b.h5", [b"b.jpg"])
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["pooled"][0, 0] += 1
    assert "'b.jpg'" in fails(1, "merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o", tmp_path / "c")
    assert "c" not in names_in(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- diff


def difference(*arguments: object) -> dict[str, Any]:
    return json.loads(ok("diff", *arguments, "--json", "-q").stdout)


def test_an_output_and_its_export_are_identical(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    ok("export", tmp_path / "a.h5", tmp_path / "b")
    result = ok("diff", tmp_path / "a.h5", tmp_path / "b", "--threshold", "1")
    assert "identical in everything that was compared" in result.stdout
    found = difference(tmp_path / "a.h5", tmp_path / "b")
    assert (found["identical"], found["common"], found["equal_vectors"], found["equal_tokens"]) == (True, 4, 4, 4)


def test_every_kind_of_difference_is_listed_by_key(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"a.jpg", b"k.jpg", b"l.jpg", b"m.jpg"], seed=1, skips=(3,))
    simple(tmp_path / "b.h5", [b"b.jpg", b"k.jpg", b"l.jpg", b"m.jpg"], seed=1)
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        file["image/digest"][1] = 7
        file["pooled"][2] = -file["pooled"][2]
    found = difference(tmp_path / "a.h5", tmp_path / "b.h5")
    assert (found["only_one"], found["only_other"]) == (["a.jpg"], ["b.jpg"])
    assert found["statuses"] == {"m.jpg": ["vanished", "done"]}
    assert found["pictures"] == ["k.jpg"]
    assert (found["common"], found["equal_vectors"], found["equal_tokens"]) == (2, 1, 2)
    assert found["pooled"]["worst"][0] == ["l.jpg", pytest.approx(-1)]
    assert not found["identical"]
    said = ok("diff", tmp_path / "a.h5", tmp_path / "b.h5").stdout
    for line in ("only in A   a.jpg", "only in B   b.jpg", "m.jpg: vanished in A, done in B", "k.jpg: different files"):
        assert line in said


def test_cosines_of_vectors_and_tokens_are_those_of_plain_numpy(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", exchange.mixed_shard(), seed=1)
    make(tmp_path / "b.h5", exchange.mixed_shard(store_dtype=StoreDtype.BFLOAT16), seed=2)
    found = difference(tmp_path / "a.h5", tmp_path / "b.h5")
    assert found["recipe"] == {"store_dtype": ["float16", "bfloat16"]}
    one, other = open_features(tmp_path / "a.h5"), open_features(tmp_path / "b.h5")

    def plain_cosines(name: str, key: str) -> np.ndarray:
        left, right = (getattr(f[key], name).reshape(-1, getattr(f[key], name).shape[-1]) for f in (one, other))
        left, right = left.astype(np.float64), right.astype(np.float64)
        return (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)

    vectors = {key: plain_cosines("pooled", key)[0] for key in one.done}
    tokens = {key: plain_cosines("visual_tokens", key) for key in one.done}
    assert found["pooled"]["lowest"] == pytest.approx(min(vectors.values()))
    assert found["pooled"]["mean"] == pytest.approx(np.mean(list(vectors.values())))
    assert [key for key, _ in found["pooled"]["worst"]] == sorted(vectors, key=vectors.__getitem__)
    assert found["tokens"]["lowest"] == pytest.approx(min(values.min() for values in tokens.values()))
    assert found["token_mean"] == pytest.approx(np.concatenate(list(tokens.values())).mean())


def test_a_cosine_below_the_threshold_is_exit_code_1(tmp_path: Path) -> None:
    simple(tmp_path / "a.h5", [b"a.jpg"], seed=1)
    simple(tmp_path / "b.h5", [b"a.jpg"], seed=2)
    assert "below 0.9" in fails(1, "diff", tmp_path / "a.h5", tmp_path / "b.h5", "--threshold", "0.9")
    ok("diff", tmp_path / "a.h5", tmp_path / "b.h5", "--threshold", "-1")
    assert internvit("diff", tmp_path / "a.h5", tmp_path / "b.h5").returncode == 0


def test_tokens_of_other_tiles_or_shapes_are_not_compared_and_that_is_said(tmp_path: Path) -> None:
    table = helpers.make_table([(1, 1, 0), (2, 1, 1)])
    helpers.make_output(tmp_path / "a.h5", helpers.make_shard(table))
    helpers.make_output(tmp_path / "b.h5", helpers.make_shard(helpers.make_table([(1, 1, 0), (1, 2, 1)])))
    helpers.make_output(tmp_path / "c.h5", helpers.make_shard(table, Tokens.PATCH))
    helpers.make_output(tmp_path / "d.h5", helpers.make_shard(table, Tokens.NONE))
    helpers.make_output(tmp_path / "e.h5", helpers.make_shard(table, token_order=TokenOrder.V1))
    found = difference(tmp_path / "a.h5", tmp_path / "b.h5")
    assert found["tokens"]["images"] == 1
    assert "tokens of 1 image not compared, because their tiles differ" in found["notes"]
    assert "patch [tiles, 4, 6]" in difference(tmp_path / "a.h5", tmp_path / "c.h5")["notes"][0]
    assert difference(tmp_path / "a.h5", tmp_path / "d.h5")["tokens"] is None
    assert "their orders differ" in difference(tmp_path / "a.h5", tmp_path / "e.h5")["notes"][0]
    assert difference(tmp_path / "a.h5", tmp_path / "b.h5", "--no-tokens")["notes"] == []


def test_two_models_of_different_width_are_compared_by_their_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = helpers.make_table([(1, 1, 0)] * 20)
    helpers.make_output(tmp_path / "a.h5", helpers.make_shard(table), seed=1)
    monkeypatch.setattr(helpers, "POOLED_WIDTH", 9)
    helpers.make_output(tmp_path / "b.h5", helpers.make_shard(table, weights_digest="1" * 64), seed=2)
    found = difference(tmp_path / "a.h5", tmp_path / "b.h5")
    assert found["pooled"] is None
    assert "their cosine is not defined" in found["notes"][0]
    one, other = plain(tmp_path / "a.h5").arrays["pooled"], plain(tmp_path / "b.h5").arrays["pooled"]
    assert found["cka"] == pytest.approx(alignment(one, other))
    assert "no cosine" in fails(1, "diff", tmp_path / "a.h5", tmp_path / "b.h5", "--threshold", "0.5")


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Linear CKA in the words of its paper: of centered Gram matrices."""
    grams = []
    for vectors in (one.astype(np.float64), other.astype(np.float64)):
        centered = vectors - vectors.mean(axis=0)
        grams.append(centered @ centered.T)
    return float((grams[0] * grams[1]).sum() / np.linalg.norm(grams[0]) / np.linalg.norm(grams[1]))


@given(st.integers(0, 1000), st.integers(3, 12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 12))
def test_the_alignment_added_up_in_blocks_is_that_of_all_at_once(
    seed: int, count: int, width: int, other_width: int, cut: int
) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.standard_normal((count, width)) + 100, rng.standard_normal((count, other_width))
    kernels = LinearCka(width, other_width)
    for part in (slice(0, cut), slice(cut, None)):
        if len(one[part]):
            kernels.add(one[part], other[part])
    assert kernels.alignment == pytest.approx(alignment(one, other), abs=1e-6)
    turned = LinearCka(width, width)
    turned.add(one, 3 * one @ np.linalg.qr(rng.standard_normal((width, width)))[0])
    assert turned.alignment == pytest.approx(1, abs=1e-6)


def test_cosines_of_equal_and_of_zero_vectors_are_exact() -> None:
    vectors = np.array([[1, 2, 3], [0, 0, 0], [0, 0, 0], [1e-30, 0, 0]], np.float32)
    assert cosines(vectors, vectors).tolist() == [1, 1, 1, 1]
    assert cosines(vectors[:1], vectors[1:2]).tolist() == [0]
    assert cosines(vectors[:1], -vectors[:1]).tolist() == [pytest.approx(-1)]
