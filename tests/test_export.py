"""`internvit export`: features in other files and formats, read back by what others read them with."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
import sys
import tarfile
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
from run_helpers import extract, make_pictures, summary_of

from internvit_cli import open_features
from internvit_cli.config import Format, Status, StoreDtype, Tokens
from internvit_cli.export.csv_index import FIELDS, as_line
from internvit_cli.export.safetensors_file import tensor_header
from internvit_cli.export.tar import entry_header, npy_header, padding
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FLAT = ["parquet", "safetensors", "tar", "csv"]
TARGETS = ["new.h5", "new", *(f"new.{suffix}" for suffix in FLAT)]
DONE_ROWS = [0, 1, 3, 5]
NOT_UTF8 = os.fsdecode(helpers.AWKWARD_KEYS[3])


# --------------------------------------------------------------------------------------------- as another feature file


@pytest.mark.parametrize("options", exchange.ALL_ROWS, ids=lambda o: "-".join(map(str, o.values())))
def test_from_hdf5_to_npy_and_back_every_value_is_the_same(tmp_path: Path, options: dict[str, Any]) -> None:
    make(tmp_path / "one.h5", exchange.mixed_shard(**options))
    ok("export", tmp_path / "one.h5", tmp_path / "two")
    ok("export", tmp_path / "two", tmp_path / "three.h5")
    one, three = plain(tmp_path / "one.h5"), plain(tmp_path / "three.h5")
    helpers.assert_same_shard(one, three)
    assert one.run_log == three.run_log == plain(tmp_path / "two").run_log == [exchange.RUN]
    assert set(plain(tmp_path / "two").arrays) == set(one.arrays)
    for left, right in (("one.h5.skipped.jsonl", "two/skipped.jsonl"), ("one.h5.skipped.jsonl",) * 2):
        assert same_bytes(tmp_path / left, tmp_path / right)
    assert (tmp_path / "three.h5.skipped.jsonl").read_bytes() == (tmp_path / "one.h5.skipped.jsonl").read_bytes()


def test_the_result_is_sound_and_extract_has_nothing_to_do_with_it(tmp_path: Path) -> None:
    make_pictures(tmp_path / "imgs", 4)
    (tmp_path / "imgs" / "bad.jpg").write_text("no picture")
    options = ["--dtype", "float32", "--device", "cpu"]
    assert extract(tmp_path / "imgs", "-o", tmp_path / "a.h5", *options).returncode == 3
    ok("export", tmp_path / "a.h5", tmp_path / "b", "--shard-size", "200kB")
    ok("export", tmp_path / "b", tmp_path / "c.h5")
    ok("export", tmp_path / "a.h5", tmp_path / "d.h5", "--no-tokens")
    for name, own in (("b", []), ("c.h5", []), ("d.h5", ["--tokens", "none"])):
        ok("verify", tmp_path / name)
        again = extract(tmp_path / "imgs", "-o", tmp_path / name, *options, *own, "--json")
        assert again.returncode == 3
        assert summary_of(again)["encoded"] == 0
    assert len(Output(str(tmp_path / "b")).finished()) > 1


def test_shards_are_cut_anew_and_superseded_rows_stay_behind(tmp_path: Path) -> None:
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3))
    helpers.make_output(tmp_path / "old", shard)
    newer = helpers.make_shard(helpers.make_table([(2, 1, 1)], [b"0001.jpg"]))
    output = Output(str(tmp_path / "old"))
    output.prepare()
    helpers.fill_partial(output, newer, seed=9)
    helpers.publish(output, newer, {"shard-00000": ["0001.jpg"]})
    export = ("export", tmp_path / "old", tmp_path / "new", "--format", "h5")
    ok(*export, "--shard-size", least_shard_size(*export))
    old, new = open_features(tmp_path / "old"), open_features(tmp_path / "new")
    assert len(new.shards) == 3
    assert set(new) == set(old)
    for key, image in old.items():
        assert same_bytes(image.pooled, new[key].pooled)
        assert same_bytes(image.visual_tokens, new[key].visual_tokens)
        assert image.digest == new[key].digest
    ok("verify", tmp_path / "new")


def test_only_what_is_asked_for_is_written_and_an_unknown_key_suggests_close_ones(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    (tmp_path / "keys").write_bytes(helpers.AWKWARD_KEYS[3] + b"\nsub/folder/b.png\n")
    ok("export", tmp_path / "a.h5", tmp_path / "b.h5", "--keys-from", tmp_path / "keys", "-k", "a.jpg")
    assert list(open_features(tmp_path / "b.h5")) == ["a.jpg", "sub/folder/b.png", NOT_UTF8]
    assert not (tmp_path / "b.h5.skipped.jsonl").exists()
    ok("verify", tmp_path / "b.h5")
    assert "'sub/folder/b.png'" in fails(2, "export", tmp_path / "a.h5", tmp_path / "c.h5", "-k", "sub/folder/c.png")
    (tmp_path / "keys").write_text("")
    assert "names no image" in fails(
        2, "export", tmp_path / "a.h5", tmp_path / "c.h5", "--keys-from", tmp_path / "keys"
    )


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (b"\xef\xbb\xbfa.jpg\r\n\nsub/folder/b.png", []),
        (b"a.jpg\0sub/folder/b.png\0", ["-0"]),
    ],
)
def test_keys_come_on_standard_input_too_with_a_mark_of_utf8_or_ended_by_nul(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, more: list[str]
) -> None:
    make(tmp_path / "a.h5")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    ok("export", tmp_path / "a.h5", tmp_path / "b.h5", "--keys-from", "-", *more)
    assert list(open_features(tmp_path / "b.h5")) == ["a.jpg", "sub/folder/b.png"]


@pytest.mark.parametrize("target", TARGETS)
def test_without_tokens_vectors_are_all_that_is_written(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5", exchange.mixed_shard(tile_pooled=True))
    ok("export", tmp_path / "a.h5", tmp_path / "whole.tar")
    ok("export", tmp_path / "a.h5", tmp_path / target, "--no-tokens")
    if target in TARGETS[:2]:
        one, new = open_features(tmp_path / "a.h5"), open_features(tmp_path / target)
        assert new.stored == ("pooled", "tile_pooled")
        for key, image in one.done.items():
            assert same_bytes(image.pooled, new[key].pooled)
            assert same_bytes(image.tile_pooled, new[key].tile_pooled)
        ok("verify", tmp_path / target)
    elif target == "new.tar":
        whole, new_samples = samples_of(tmp_path / "whole.tar"), samples_of(tmp_path / target)
        for name, sample in new_samples.items():
            assert set(sample) in ({"json"}, {"json", "pooled.npy", "tile_pooled.npy"})
            assert all(sample[part] == whole[name][part] for part in sample if part != "json")
    else:
        assert b"visual_tokens" not in (tmp_path / target).read_bytes()


def test_an_output_without_a_single_tile_goes_from_hdf5_to_npy_and_back(tmp_path: Path) -> None:
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)], failed={0: Status.NOT_AN_IMAGE}))
    helpers.make_output(tmp_path / "a.h5", shard)
    ok("export", tmp_path / "a.h5", tmp_path / "b")
    ok("export", tmp_path / "b", tmp_path / "c.h5")
    helpers.assert_same_shard(plain(tmp_path / "a.h5"), plain(tmp_path / "c.h5"))
    for suffix in FLAT:
        ok("export", tmp_path / "b", tmp_path / f"d.{suffix}")


def test_of_an_unfinished_output_what_is_committed_is_exported_and_the_rest_is_named(tmp_path: Path) -> None:
    exchange.make_partial(tmp_path / "a.h5", exchange.mixed_shard(), [0, 3])
    result = ok("export", tmp_path / "a.h5.partial", tmp_path / "b.h5")
    assert "3 images left out" in result.stderr
    assert list(open_features(tmp_path / "b.h5")) == ["a.jpg", "line\nbreak\r.jpg", NOT_UTF8]
    exchange.make_partial(tmp_path / "folder", exchange.mixed_shard(), [1])
    ok("export", tmp_path / "folder", tmp_path / "c.h5", "-k", "sub/folder/b.png")
    ok("verify", tmp_path / "c.h5")
    exchange.make_partial(tmp_path / "none.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)])), [])
    assert "no finished image" in fails(1, "export", tmp_path / "none.h5.partial", tmp_path / "d.h5")


# ------------------------------------------------------------------------------------------------------------- parquet


@pytest.mark.parametrize("options", exchange.ALL_ROWS, ids=lambda o: "-".join(map(str, o.values())))
def test_plain_pyarrow_reads_every_value_of_a_parquet_file(tmp_path: Path, options: dict[str, Any]) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    shard = exchange.mixed_shard(**options)
    written = make(tmp_path / "a.h5", shard)
    ok("export", tmp_path / "a.h5", tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    rows = table.to_pylist()
    assert [row["key_bytes"] or row["key"].encode() for row in rows] == list(helpers.AWKWARD_KEYS)
    assert [row["status"] for row in rows] == ["done", "done", "not_an_image", "done", "truncated", "done"]
    assert rows[4]["reason"] == "OSError: image file is truncated"
    assert json.loads(table.schema.metadata[b"internvit.recipe"])["store_dtype"] == options["store_dtype"].value
    for row in (2, 4):
        assert all(rows[row][name] is None for name in ("pooled", "digest", "crc32"))
    for row in DONE_ROWS:
        assert rows[row]["digest"] == written[row].digest
        for name, array in exchange.image_of(shard, written, row).items():
            if name.startswith("pooled"):
                assert np.array(rows[row][name], np.float32).tobytes() == array.tobytes()
                continue
            facts = table.schema.field(name).metadata
            shape = (rows[row]["tiles"], *json.loads(facts[b"shape"])[1:])
            values = np.frombuffer(rows[row][name], facts[b"numpy"].decode()).reshape(shape)
            assert values.shape == array.shape
            assert same_bytes(values, array)


def test_row_groups_are_bounded_and_bfloat16_is_widened_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    make(tmp_path / "a.h5", exchange.mixed_shard(store_dtype=StoreDtype.BFLOAT16))
    monkeypatch.setattr("internvit_cli.export.parquet.GROUP_BYTES", 100)
    assert "uint16" in ok("export", tmp_path / "a.h5", tmp_path / "bits.parquet").stderr
    assert "uint16" not in ok("export", tmp_path / "a.h5", tmp_path / "wide.parquet", "--widen").stderr
    file = pq.ParquetFile(tmp_path / "wide.parquet")
    assert file.num_row_groups > 2
    assert file.schema_arrow.field("visual_tokens").metadata[b"dtype"] == b"float32"
    expected = open_features(tmp_path / "a.h5")["sub/folder/b.png"].visual_tokens
    assert file.read().to_pylist()[1]["visual_tokens"] == expected.tobytes()


def test_without_pyarrow_the_error_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    said = fails(2, "export", tmp_path / "a.h5", tmp_path / "a.parquet")
    assert "pip install 'internvit-cli[parquet]'" in said
    assert names_in(tmp_path) == ["a.h5", "a.h5.skipped.jsonl"]


# --------------------------------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("options", exchange.ALL_ROWS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_safetensors_library_reads_every_value(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from safetensors import safe_open

    shard = exchange.mixed_shard(**options)
    written = make(tmp_path / "a.h5", shard)
    ok("export", tmp_path / "a.h5", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        metadata = file.metadata()
    ends, names = tensors["key_offset"].tolist(), tensors["key_bytes"].numpy().tobytes()
    assert tuple(names[a:b] for a, b in itertools.pairwise(ends)) == helpers.AWKWARD_KEYS
    assert tensors["status"].tolist() == [1, 1, Status.NOT_AN_IMAGE, 1, Status.TRUNCATED, 1]
    assert metadata["recipe"] == shard.attributes["recipe"]
    skips = [json.loads(line) for line in tensors["skipped_jsonl"].numpy().tobytes().splitlines()]
    assert [entry["reason"] for entry in skips] == ["not_an_image", "truncated"]
    assert torch.isnan(tensors["pooled"][[2, 4]]).all()
    if options["store_dtype"] is StoreDtype.BFLOAT16:
        assert tensors["visual_tokens"].dtype == torch.bfloat16
    for row in DONE_ROWS:
        assert tensors["digest"][row].numpy().tobytes() == written[row].digest
        first, last = tensors["tile_offset"][row : row + 2].tolist()
        for name, array in exchange.image_of(shard, written, row).items():
            rows = tensors[name][row] if name.startswith("pooled") else tensors[name][first:last]
            assert rows.contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes()


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), SHAPES, max_size=8),
    st.dictionaries(NAMES, NAMES),
)
def test_any_header_is_one_that_the_safetensors_library_reads(shapes: dict[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.numpy import load

    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    header, starts = tensor_header({name: ("F32", shape, sizes[name]) for name, shape in shapes.items()}, metadata)
    data = bytearray(header + bytes(sum(sizes.values())))
    for number, name in enumerate(shapes):
        data[starts[name] : starts[name] + sizes[name]] = np.float32(number).tobytes() * (sizes[name] // 4)
    tensors = load(bytes(data))
    assert len(header) % 4096 == 0
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    for number, name in enumerate(shapes):
        assert (tensors[name] == number).all()


# ----------------------------------------------------------------------------------------------------------------- tar


def samples_of(*paths: Path) -> dict[str, dict[str, bytes]]:
    """Files of a tar by sample and extension."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.uname, member.mode) == (0, 0, "", 0o644)
                name, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(name, {})[extension] = file.read()
    return samples


@pytest.mark.parametrize("options", exchange.ALL_ROWS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_value_is_in_a_tar_of_samples(tmp_path: Path, options: dict[str, Any]) -> None:
    shard = exchange.mixed_shard(**options)
    written = make(tmp_path / "a.h5", shard)
    ok("export", tmp_path / "a.h5", tmp_path / "a.tar")
    ok("export", tmp_path / "a.h5", tmp_path / "again.tar")
    assert same_bytes(tmp_path / "a.tar", tmp_path / "again.tar")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert json.loads(tar.pax_headers["comment"])["recipe"] == shard.attributes["recipe"]
    samples = samples_of(tmp_path / "a.tar")
    facts = [json.loads(samples[f"{row:08d}"]["json"]) for row in range(6)]
    assert [os.fsencode(fact["key"]) for fact in facts] == list(helpers.AWKWARD_KEYS)
    assert set(samples["00000004"]) == {"json"}
    assert facts[4]["reason"] == "OSError: image file is truncated"
    for row in DONE_ROWS:
        assert facts[row]["digest"] == written[row].digest.hex()
        for name, array in exchange.image_of(shard, written, row).items():
            values = np.load(io.BytesIO(samples[f"{row:08d}"][f"{name}.npy"]))
            assert (values.dtype, values.shape, values.tobytes()) == (array.dtype, array.shape, array.tobytes())
            assert facts[row]["arrays"][name]["shape"] == list(array.shape)


def test_a_series_of_tars_holds_each_sample_once_and_its_list_comes_last(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    export = ("export", tmp_path / "a.h5", tmp_path / "s.tar")
    ok(*export, "--shard-size", least_shard_size(*export))
    listed = json.loads((tmp_path / "s.json").read_text())["shardlist"]
    assert len(listed) > 1
    assert sum(shard["nsamples"] for shard in listed) == 6
    assert [shard["filesize"] for shard in listed] == [(tmp_path / shard["url"]).stat().st_size for shard in listed]
    whole = tmp_path / "a.tar"
    ok("export", tmp_path / "a.h5", whole)
    assert samples_of(*(tmp_path / shard["url"] for shard in listed)) == samples_of(whole)
    assert "exists already" in fails(2, "export", tmp_path / "a.h5", tmp_path / "s.tar", "--shard-size", "1GB")
    ok("export", tmp_path / "a.h5", tmp_path / "s.tar", "--shard-size", "1GB", "--overwrite")
    assert [name for name in names_in(tmp_path) if name.startswith("s")] == ["s-000000.tar", "s.json"]


def test_the_webdataset_library_reads_a_tar(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    make(tmp_path / "a.h5")
    ok("export", tmp_path / "a.h5", tmp_path / "a.tar")
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode())
    assert [os.fsencode(sample["json"]["key"]) for sample in samples] == list(helpers.AWKWARD_KEYS)
    image = open_features(tmp_path / "a.h5")["sub/folder/b.png"]
    np.testing.assert_array_equal(samples[1]["visual_tokens.npy"], image.visual_tokens)
    np.testing.assert_array_equal(samples[1]["pooled.npy"], image.pooled)


@given(st.integers(0, 1 << 40))
def test_a_header_of_any_size_is_read_by_tarfile(size: int) -> None:
    header = entry_header("00000007.visual_tokens.npy", size)
    with tarfile.open(fileobj=io.BytesIO(header + bytes(1024))) as tar:
        entry = tar.next()
    assert entry is not None
    assert (entry.name, entry.size) == ("00000007.visual_tokens.npy", size)
    assert (size + len(padding(size))) % 512 == 0


@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.sampled_from(["<f4", "<f2", "<u2", "|u1", "|i1"]))
def test_a_npy_header_is_what_numpy_would_write(shape: list[int], dtype: str) -> None:
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    expected = io.BytesIO()
    np.save(expected, array)
    assert npy_header(array) + array.tobytes() == expected.getvalue()


# ----------------------------------------------------------------------------------------------------------------- csv


def test_a_csv_file_has_every_key_and_reason_and_says_that_features_are_not_in_it(tmp_path: Path) -> None:
    keys = (
        b"=cmd|' /C calc'!A0.jpg",
        b"@sum.jpg",
        b'line\nbreak,"\r.jpg',
        b"not-utf8-\xff\xfe.jpg",
        b"-1.jpg",
        b"z.jpg",
    )
    written = make(tmp_path / "a.h5", exchange.mixed_shard(keys))
    assert "a .csv does not hold features" in ok("export", tmp_path / "a.h5", tmp_path / "a.csv").stderr
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [bytes.fromhex(row["key_hex"]) or row["key"].removeprefix("./").encode() for row in rows]
    assert tuple(names) == keys
    assert not any(cell.startswith(("=", "+", "@", "-")) for row in rows for cell in row.values())
    assert [row["status"] for row in rows] == ["done", "done", "not_an_image", "done", "truncated", "done"]
    assert rows[2]["reason"] == "PIL.UnidentifiedImageError: in no supported picture format"
    assert rows[1]["digest"] == written[1].digest.hex()
    assert (rows[1]["columns"], rows[1]["rows"], rows[1]["thumbnail"], rows[1]["tiles"]) == ("2", "3", "1", "7")


@given(st.binary(min_size=1, max_size=30).filter(lambda key: b"\0" not in key and not key.startswith(b"./")))
def test_any_key_comes_back_from_a_line_of_a_csv_file(key: bytes) -> None:
    facts = dict.fromkeys(FIELDS, 0) | {"key": os.fsdecode(key), "reason": "", "path": "/" + os.fsdecode(key)}
    [row] = csv.DictReader(io.StringIO(as_line(facts).decode(), newline=""), FIELDS)
    assert (bytes.fromhex(row["key_hex"]) or row["key"].removeprefix("./").encode()) == key
    assert not row["key"].startswith(("=", "+", "-", "@", "\t", "\r"))


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_a_file_of_options_for_extract_serves_export_and_diff_too(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    (tmp_path / "options.toml").write_text('tokens = "visual"\nshard-size = "1GB"\nmax-tiles = 6\n')
    own = ["--config", tmp_path / "options.toml"]
    ok("export", tmp_path / "a.h5", tmp_path / "b.h5", *own)
    ok("diff", tmp_path / "a.h5", tmp_path / "b.h5", *own)
    assert "visual_tokens" in open_features(tmp_path / "b.h5").stored


def test_a_damaged_row_is_named_and_never_copied(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["visual_tokens"][10, 0, 0] += 1
    before = names_in(tmp_path)
    for target in TARGETS[:-1]:
        assert "the rows of 'not-utf8-" in fails(1, "export", tmp_path / "a.h5", tmp_path / target)
        assert names_in(tmp_path) == before
    ok("export", tmp_path / "a.h5", tmp_path / "new.csv")  # which has no rows


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_there_is_replaced_only_when_asked_for_and_complete(
    tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a.h5")
    one = helpers.make_shard(helpers.make_table([(1, 1, 0)]))
    helpers.make_output(tmp_path / "b.h5", one)
    ok("export", tmp_path / "a.h5", tmp_path / target)
    names = names_in(tmp_path)
    assert "exists already" in fails(2, "export", tmp_path / "b.h5", tmp_path / target)
    with monkeypatch.context() as patch:
        patch.setattr("internvit_cli.export.export.read_blocks", lambda *_, **__: iter(["no block"]))
        with pytest.raises((AttributeError, TypeError)):
            ok("export", tmp_path / "b.h5", tmp_path / target, "--overwrite")
    assert names_in(tmp_path) == names
    if target in TARGETS[:2]:
        assert len(open_features(tmp_path / target)) == 6
    ok("export", tmp_path / "b.h5", tmp_path / target, "--overwrite")
    if target in TARGETS[:2]:
        assert len(open_features(tmp_path / target)) == 1
        ok("verify", tmp_path / target)
    assert not (tmp_path / "new.h5.skipped.jsonl").exists()


def test_places_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    make(tmp_path / "folder", shard_format=Format.H5)
    (tmp_path / "link.h5").symlink_to("a.h5")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["precious"] = 1
    (tmp_path / "new.h5.partial").write_text("an unfinished run")
    os.mkfifo(tmp_path / "pipe.csv")
    before = names_in(tmp_path)
    for code, arguments, said in [
        (2, ["a.h5", "a.h5"], "is the output that is read"),
        (2, ["a.h5", "link.h5", "--overwrite"], "is the output that is read"),
        (2, ["folder", "folder/new.h5"], "lies inside"),
        (2, ["folder/shard-00000.h5", "folder", "--overwrite"], "lies inside"),
        (2, ["a.h5", "full", "--overwrite"], "mine.txt"),
        (2, ["a.h5", "pipe.csv", "--overwrite"], "not a regular file"),
        (2, ["a.h5", "full.h5", "--format", "npy"], "names a h5 file"),
        (2, ["a.h5", "x.npy"], ".npy shards go into a folder"),
        (2, ["a.h5", "x.npz"], ".npz files are not supported"),
        (2, ["a.h5", "x.h5.partial"], "unfinished"),
        (2, ["a.h5", "x.h5", "--widen"], "--widen"),
        (2, ["a.h5", "new.h5"], "exists already"),
        (1, ["a.h5", "foreign.h5", "--overwrite"], "not an internvit feature file"),
        (1, ["a.h5", "nowhere/x.h5"], "does not exist"),
        (1, ["missing.h5", "x.h5"], "is not there"),
    ]:
        paths = [str(tmp_path / word) if number < 2 else word for number, word in enumerate(arguments)]
        assert said in fails(code, "export", *paths), arguments
    assert names_in(tmp_path) == before


def test_an_empty_folder_may_take_the_result(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    (tmp_path / "empty").mkdir()
    ok("export", tmp_path / "a.h5", tmp_path / "empty")
    ok("verify", tmp_path / "empty")


def test_a_link_to_another_place_is_followed(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link.csv").symlink_to("elsewhere/real.csv")
    ok("export", tmp_path / "a.h5", tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "elsewhere" / "real.csv").read_text().startswith("key,")


def test_a_file_of_a_newer_format_version_says_so(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["format_version"] = 2
    said = fails(1, "export", tmp_path / "a.h5", tmp_path / "b.h5")
    assert "has format version 2; this program reads version 1" in said
    assert "newer" in said


def test_what_cannot_fit_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.h5")
    monkeypatch.setattr("internvit_cli.storage.durable.free_bytes", lambda _: 100)
    before = names_in(tmp_path)
    for target in TARGETS[:-1]:
        assert "100 are free" in fails(6, "export", tmp_path / "a.h5", tmp_path / target)
    assert names_in(tmp_path) == before


LIMITED = """
import resource, sys
from internvit_cli.cli.app import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("target", ["new.tar", "new.parquet", "new.safetensors", "new.h5"])
def test_when_space_runs_out_in_the_middle_it_ends_with_6_and_nothing_is_left(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5", helpers.make_shard(helpers.make_table([(3, 3, 1)] * 20)))
    before = names_in(tmp_path)
    run = exchange.python(LIMITED, 4096, "export", tmp_path / "a.h5", tmp_path / target)
    assert run.returncode == 6, run.stderr
    assert "Traceback" not in run.stderr
    assert names_in(tmp_path) == before


def test_a_place_that_another_run_holds_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    with exclusive(str(tmp_path / "b.csv")):
        assert "is held by another run" in fails(75, "export", tmp_path / "a.h5", tmp_path / "b.csv")
    ok("export", tmp_path / "a.h5", tmp_path / "b.csv")


DIES = """
import os, sys
import internvit_cli.export.export as export
from internvit_cli.cli.app import main
blocks, number, read = int(sys.argv[1]), int(sys.argv[2]), export.read_blocks
def until(*arguments, **options):
    for count, block in enumerate(read(*arguments, block_bytes=1, **options)):
        if count == blocks:
            os.kill(os.getpid(), number)
        yield block
export.read_blocks = until
main(sys.argv[3:])
"""


@pytest.mark.parametrize("target", TARGETS)
def test_a_killed_export_leaves_nothing_by_its_name_and_the_same_command_finishes(tmp_path: Path, target: str) -> None:
    make(tmp_path / "a.h5")
    run = exchange.python(DIES, 3, int(signal.SIGKILL), "export", tmp_path / "a.h5", tmp_path / target)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / target).exists()
    assert f"{target}.exporting" in names_in(tmp_path)
    ok("export", tmp_path / "a.h5", tmp_path / target)
    left = {"a.h5", "a.h5.skipped.jsonl", target, f"{target}.skipped.jsonl"}
    assert set(names_in(tmp_path)) <= left


DIES_AT_A_RENAME = """
import os, signal, sys
from internvit_cli.cli.app import main
left, after, replace = [int(sys.argv[1])], sys.argv[2] == "after", os.replace
def dying(*arguments):
    left[0] -= 1
    if left[0] == 0 and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*arguments)
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
main(sys.argv[3:])
"""


@pytest.mark.parametrize(
    ("target", "moments"),
    [
        ("new.h5", ["before"]),
        *(pytest.param(target, ["before", "after"], marks=pytest.mark.sweep) for target in ("new.h5", "new")),
    ],
)
def test_killed_before_or_after_any_rename_the_name_stands_for_the_old_or_the_new_result(
    tmp_path: Path, target: str, moments: list[str]
) -> None:
    make(tmp_path / "a.h5")
    helpers.make_output(tmp_path / "old.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)])))
    outcomes, number = set(), 0
    while True:
        number += 1
        for moment in moments:
            ok("export", tmp_path / "old.h5", tmp_path / target, "--overwrite")
            arguments = ["export", tmp_path / "a.h5", tmp_path / target, "--overwrite", "-q"]
            run = exchange.python(DIES_AT_A_RENAME, number, moment, *arguments)
            images = len(open_features(tmp_path / target))
            outcomes.add(images)
            assert images in (1, 6)
            ok("verify", tmp_path / target)
            ok(*arguments)
            assert len(open_features(tmp_path / target)) == 6
            assert not [name for name in names_in(tmp_path) if name.endswith((".exporting", ".lock"))]
        if run.returncode == 0:
            break
    assert outcomes == {1, 6}
    assert number > 3


def killed_at_each_rename(*arguments: object) -> Iterator[int]:
    """Run a command again and again, killed before its first rename, then before its second, and so on to the end."""
    for number in range(1, 100):
        run = exchange.python(DIES_AT_A_RENAME, number, "before", *arguments)
        yield number
        if run.returncode == 0:
            return
        assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.mark.sweep
def test_a_list_of_skipped_images_never_stands_beside_features_that_it_is_not_of(tmp_path: Path) -> None:
    new = tmp_path / "new.h5"
    for seed, name in enumerate(("old.h5", "a.h5")):
        make(tmp_path / name, seed=seed)
    log = tmp_path / "old.h5.skipped.jsonl"
    log.write_text(log.read_text().replace("is truncated", "has holes"))
    vectors = {name: plain(tmp_path / name).arrays["pooled"].tobytes() for name in ("old.h5", "a.h5")}
    found = set()
    for _ in killed_at_each_rename("export", tmp_path / "a.h5", new, "--overwrite", "-q"):
        present = plain(new).arrays["pooled"].tobytes() if new.exists() else None
        own = next((name for name in vectors if vectors[name] == present), "")
        listed = tmp_path / "new.h5.skipped.jsonl"
        if listed.exists():
            assert listed.read_text() == (tmp_path / f"{own}.skipped.jsonl").read_text()
        found.add((own, listed.exists()))
        ok("export", tmp_path / "old.h5", new, "--overwrite")
    assert ("a.h5", True) in found
    assert ("a.h5", False) in found


@pytest.mark.sweep
def test_a_list_of_a_series_never_names_tars_of_two_results(tmp_path: Path) -> None:
    for seed, name in enumerate(("old.h5", "a.h5")):
        make(tmp_path / name, seed=seed)
    series = [tmp_path / "s.tar", "--shard-size", "10kB", "--overwrite", "-q"]
    whole = []
    for name in ("old.h5", "a.h5"):
        ok("export", tmp_path / name, *series)
        whole.append({path.name: path.read_bytes() for path in tmp_path.glob("s*.tar")})
        assert len(whole[-1]) > 1
    lists = []
    for _ in killed_at_each_rename("export", tmp_path / "a.h5", *series):
        lists.append((tmp_path / "s.json").exists())
        if lists[-1]:
            assert {path.name: path.read_bytes() for path in tmp_path.glob("s*.tar")} in whole
        ok("export", tmp_path / "old.h5", *series)
    assert lists.count(False) > 2
    assert lists[-1]


def test_a_folder_of_that_name_that_no_export_made_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    folder = tmp_path / "b.h5.exporting"
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    for more in ([], ["--overwrite"]):
        said = fails(2, "export", tmp_path / "a.h5", tmp_path / "b.h5", *more)
        assert "b.h5.exporting is in the way" in said
    assert (folder / "mine.txt").read_text() == "precious"
    (folder / "mine.txt").unlink()
    ok("export", tmp_path / "a.h5", tmp_path / "b.h5")  # an empty one is what a crash may leave
    assert not folder.exists()


@pytest.mark.parametrize(
    ("beside", "arguments"), [("b.h5.skipped.jsonl", ["b.h5"]), ("b.json", ["b.tar", "--shard-size", "10kB"])]
)
def test_files_beside_a_result_that_would_be_replaced_are_refused_before_it_is_there(
    tmp_path: Path, beside: str, arguments: list[str]
) -> None:
    make(tmp_path / "a.h5")
    (tmp_path / beside).write_text("precious")
    before = names_in(tmp_path)
    command = ["export", tmp_path / "a.h5", tmp_path / arguments[0], *arguments[1:]]
    assert f"{beside} exists already" in fails(2, *command)
    assert (tmp_path / beside).read_text() == "precious"
    assert names_in(tmp_path) == before
    ok(*command, "--overwrite")
    assert (tmp_path / beside).read_text() != "precious"
    (tmp_path / beside).unlink()
    (tmp_path / beside).mkdir()
    assert "is a folder" in fails(2, *command, "--overwrite")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_export_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    make(tmp_path / "a.h5")
    before = names_in(tmp_path)
    run = exchange.python(DIES, 3, int(number), "export", tmp_path / "a.h5", tmp_path / "b", "--json")
    assert run.returncode == 128 + number, run.stderr
    assert json.loads(run.stdout)["exit_code"] == 128 + number
    assert names_in(tmp_path) == before


PEAK = """
import resource, sys
from internvit_cli.cli.app import run
assert run(["export", *sys.argv[1:], "-q"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(
    ("target", "bound"),
    [
        *(pytest.param(name, 48, marks=pytest.mark.sweep) for name in ("new.tar", "new", "new.safetensors")),
        pytest.param("new.parquet", 230, marks=pytest.mark.sweep),
    ],
)
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, bound: int
) -> None:
    """A file of 230 MB, against one of 12 MB, in every format."""
    for name in ("TOKENS_PER_TILE", "CHANNELS"):
        monkeypatch.setattr(helpers, name, getattr(helpers, name))
    for name, images in (("small.h5", 6), ("large.h5", 120)):
        helpers.make_output(tmp_path / name, exchange.wide(images))
    assert (tmp_path / "large.h5").stat().st_size > 200e6
    peaks = []
    for name in ("small.h5", "large.h5"):
        run = exchange.python(PEAK, tmp_path / name, tmp_path / target, "--overwrite")
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout) * 1024)
    assert peaks[1] - peaks[0] < bound * 1e6


def test_the_json_of_an_export_accounts_for_every_image(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", shard_format=Format.H5)
    facts = json.loads(ok("export", tmp_path / "a.h5", tmp_path / "b", "--json", "-q").stdout)
    assert facts["images"] == {"done": 4, "not_an_image": 1, "truncated": 1}
    assert (facts["format"], facts["tiles"], facts["pending"], facts["exit_code"]) == ("npy", 16, 0, 0)
    assert facts["bytes"] == sum(file.stat().st_size for file in (tmp_path / "b").iterdir())
    assert facts["files"] == len(list((tmp_path / "b").iterdir()))
    assert Tokens.VISUAL.dataset in open_features(tmp_path / "b").stored
