"""`internvit verify`: whatever is wrong with an output is found, by the image's key where it has one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from folders import REFERENCE
from model_helpers import FAMILIES, LAYOUTS
from PIL import Image
from run_helpers import Result, extract, internvit, make_pictures, state_of
from storage_helpers import AWKWARD_KEYS, fill_partial, make_output, make_shard, make_table, publish, random_image

from internvit_cli.config import Format, Skipped, Status, StoreDtype, TokenOrder, Tokens
from internvit_cli.errors import OutputError
from internvit_cli.model.native import pixel_shuffle
from internvit_cli.model.vit import pixel_unshuffle
from internvit_cli.runtime.observer import Observer, Phase
from internvit_cli.storage import output as output_module
from internvit_cli.storage.check import checksums
from internvit_cli.storage.format.interface import backend_of
from internvit_cli.storage.format.layout import DIGEST, POOLED, STATUS, Extent
from internvit_cli.storage.output import Output
from internvit_cli.storage.write.commit import ShardWriter, create_shard
from internvit_cli.verify.checks import verify
from internvit_cli.verify.result import Finding, VerifyOptions, VerifyResult
from internvit_cli.verify.tolerance import Tolerance, compare_values

FORMATS = {"feats.h5": Format.H5, "feats": Format.NPY, "shards": Format.H5}
KINDS = list(FORMATS)
GRIDS = [(1, 1, 0), (3, 2, 1), (2, 1, 1), (1, 1, 0), (5, 2, 1), (1, 1, 0), (2, 2, 1), (1, 2, 1), (4, 3, 1), (1, 1, 0)]
KEYS = [*AWKWARD_KEYS, b"g.jpg", b"h.jpg", b"i.jpg", b"j.jpg"]
SKIPPED = Skipped(Status.TRUNCATED, "OSError", "too short")
BROKEN_HEADER, FAILED = 3, 7
"""Rows of images that were skipped, when planned and when decoded."""


def sound_shard(seed: int = 0, **options: Any) -> Any:
    """Ten images with every dataset, two of them skipped."""
    table = make_table(GRIDS, [b"%d-" % seed + key for key in KEYS], {BROKEN_HEADER: Status.NOT_AN_IMAGE})
    return make_shard(table, tile_pooled=True, tile_size=56, **options)


def make_sound(folder: Path, kind: str) -> Path:
    """A finished output of random rows: one file, or a folder of two shards."""
    path = folder / kind
    for seed in range(1 if kind == "feats.h5" else 2):
        make_output(path, sound_shard(seed), FORMATS[kind], {FAILED: SKIPPED}, seed)
    return path


@pytest.fixture(params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_sound(tmp_path, str(request.param))


def check(path: Path | str, **options: Any) -> VerifyResult:
    return verify(VerifyOptions(str(path), **options))


def one_finding(path: Path | str, **options: Any) -> Finding:
    findings = check(path, **options).findings
    assert len(findings) == 1, findings
    return findings[0]


def shards_of(path: Path) -> list[tuple[Any, str]]:
    """Format and path of each shard of a finished output."""
    output = Output(str(path))
    return [(shard.backend, shard.path) for shard in output.finished()]


def flip(path: str, offset: int, bit: int) -> None:
    """Turn one bit over; a second time turns it back."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def flip_in_row(extent: Extent, start: int, stop: int, random: np.random.Generator) -> tuple[str, int, int]:
    """Flip a random bit of rows start:stop; returns what flips it back."""
    size = extent.spec.row_bytes
    place = extent.path, extent.offset + int(random.integers(start * size, stop * size)), int(random.integers(8))
    flip(*place)
    return place


# ----------------------------------------------------------------------------------------------------- what is sound


def test_a_sound_output_is_all_right_and_every_row_is_read(sound: Path) -> None:
    before = state_of(sound.parent)
    verdict = check(sound)
    shards = 1 if sound.suffix else 2
    assert verdict.findings == () and verdict.exit_code == 0
    assert verdict.images == {"done": 8 * shards, "not_an_image": shards, "truncated": shards}
    assert verdict.rows == 10 * shards
    rows = [backend.extents(path) for backend, path in shards_of(sound)]
    tiles = sum(c * r + t for i, (c, r, t) in enumerate(GRIDS) if i not in {BROKEN_HEADER, FAILED})
    per_tile = sum(rows[0][name].spec.row_bytes for name in ("visual_tokens", "tile_pooled"))
    assert verdict.bytes == shards * (10 * rows[0][POOLED].spec.row_bytes + tiles * per_tile)
    assert state_of(sound.parent) == before, "verify writes nothing"


@pytest.mark.parametrize("tokens", [Tokens.PATCH, Tokens.PROJECTED, Tokens.NONE])
@pytest.mark.parametrize("dtype", list(StoreDtype))
def test_every_kind_of_tokens_in_every_type_is_all_right(tmp_path: Path, tokens: Tokens, dtype: StoreDtype) -> None:
    tile_size = 28 if tokens is Tokens.PATCH else 56  # four tokens a tile
    shard = make_shard(make_table(GRIDS), tokens, dtype, tile_size=tile_size)
    for name, kind in (("a.h5", Format.H5), ("a", Format.NPY)):
        make_output(tmp_path / name, shard, kind)
        assert check(tmp_path / name).findings == ()


def test_an_output_without_rows_is_all_right(tmp_path: Path) -> None:
    failed = dict.fromkeys(range(3), Status.NOT_AN_IMAGE)
    for name, kind in (("a.h5", Format.H5), ("a", Format.NPY)):
        make_output(tmp_path / name, make_shard(make_table([(1, 1, 0)] * 3, failed=failed), tile_size=56), kind)
        assert check(tmp_path / name).findings == ()


@pytest.mark.parametrize("block", [4, 36, 100, 1 << 20])
@pytest.mark.parametrize("chunk", [1, 300, 1000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_depends_on_neither_blocks_nor_chunks_nor_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, chunk: int, threads: int
) -> None:
    path = make_sound(tmp_path, "feats.h5")
    monkeypatch.setattr(checksums, "BLOCK_BYTES", block)
    monkeypatch.setattr(checksums, "CHUNK_BYTES", chunk)
    sound = check(path, threads=threads)
    assert sound.findings == () and sound.rows == 10
    extents = backend_of(Format.H5).extents(str(path))
    flip_in_row(extents["visual_tokens"], 8, 9, np.random.default_rng(0))  # of the third image
    assert one_finding(path, threads=threads).key == "0-line\nbreak\r.jpg"


def test_an_unfinished_file_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    for name, kind in (("feats.h5", Format.H5), ("feats", Format.NPY)):
        output = Output(str(tmp_path / name), kind)
        output.prepare()
        shard = sound_shard()
        partial = output.partial_path(0)
        create_shard(output.backend, partial, shard)
        writer = ShardWriter(output.backend, partial, shard.table)
        for row in (0, 1, 4):
            writer.write(random_image(shard, row))
        writer.checkpoint()
        writer.write(random_image(shard, 5))  # not committed
        writer.close()
        target = partial if output.is_file else output.path
        verdict = check(target)
        assert verdict.findings == () and verdict.images == {"pending": 6, "done": 3, "not_an_image": 1}
        assert any("6 of 10 images pending" in note for note in verdict.notes)
        flip_in_row(output.backend.extents(partial)["visual_tokens"], 11, 12, np.random.default_rng(0))
        assert one_finding(target).key == os.fsdecode(shard.table.keys[4])
    with pytest.raises(output_module.OutputError, match="is not there") as caught:
        check(tmp_path / "feats.h5")
    assert "feats.h5.partial" in caught.value.hint


# -------------------------------------------------------------------------------------------------------- flipped bits


@pytest.mark.parametrize("flips", [30, pytest.param(110, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_of_a_committed_row_is_found_by_its_key(tmp_path: Path, kind: str, flips: int) -> None:
    path = make_sound(tmp_path, kind)
    random = np.random.default_rng(1)
    shards = [(sound_shard(n).table, backend.extents(where)) for n, (backend, where) in enumerate(shards_of(path))]
    for _ in range(flips):
        table, extents = shards[int(random.integers(len(shards)))]
        name = random.choice([POOLED, "visual_tokens", "tile_pooled"])
        row = int(random.integers(len(table)))
        if name == POOLED:
            span = row, row + 1
        elif row in {BROKEN_HEADER, FAILED}:
            continue  # nothing was committed there
        else:
            span = int(table.tile_offset[row]), int(table.tile_offset[row + 1])
        place = flip_in_row(extents[name], *span, random)
        finding = one_finding(path)
        assert (finding.check, finding.key) == ("rows", os.fsdecode(table.keys[row])), (name, row)
        flip(*place)
    assert check(path).findings == ()


@pytest.mark.parametrize("name", ["status", "crc32", "width", "columns", "source", "file_mtime_ns", "tile_offset"])
def test_every_flipped_bit_of_the_index_is_found_in_hdf5(tmp_path: Path, name: str) -> None:
    path = make_sound(tmp_path, "feats.h5")
    list_skipped(path)
    extents = backend_of(Format.H5).extents(str(path))
    random = np.random.default_rng(2)
    rows = extents[f"image/{name}"].spec.shape[0]
    for _ in range(40):
        row = int(random.integers(rows))
        if name == "crc32" and row in {BROKEN_HEADER, FAILED}:
            continue  # says nothing there
        place = flip_in_row(extents[f"image/{name}"], row, row + 1, random)
        findings = check(path).findings
        assert findings, (row, place)
        if name == "crc32":
            assert [finding.key for finding in findings] == [os.fsdecode(sound_shard().table.keys[row])]
        flip(*place)
    assert check(path).findings == ()


def list_skipped(path: Path) -> None:
    """Write the list of skipped images that an extraction keeps."""
    output = Output(str(path))
    reasons = {BROKEN_HEADER: "not_an_image", FAILED: "truncated"}
    keys = sound_shard().table.keys
    lines = [json.dumps({"key": os.fsdecode(keys[row]), "reason": word}) for row, word in reasons.items()]
    Path(output.skipped_path).write_text("\n".join(lines) + "\n")


def what_a_reader_gets(path: Path) -> Any:
    """Attributes and datasets of an HDF5 file, as h5py gives them; unwritten rows and the log of runs left out."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        found["attributes"] = {name: str(value) for name, value in file.attrs.items()}
        for name in [*(f"image/{name}" for name in file["image"]), POOLED, "visual_tokens", "tile_pooled"]:
            item = file[name]
            value = item[...].astype("S") if name == "image/key" else item[...]
            found[name] = item.shape, str(item.dtype), value.tobytes(), dict(item.attrs)
    return found


def test_every_flipped_bit_of_an_hdf5_files_structure_is_found_if_it_changes_what_a_reader_gets(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats.h5")
    list_skipped(path)
    before = what_a_reader_gets(path)
    extents = backend_of(Format.H5).extents(str(path))
    rows = [(extent.offset, extent.offset + extent.spec.nbytes) for extent in extents.values()]
    data = path.read_bytes()
    structure = [at for at in range(len(data)) if data[at] and not any(a <= at < b for a, b in rows)]
    random = np.random.default_rng(3)
    found = 0
    for _ in range(250):
        place = str(path), int(random.choice(structure)), int(random.integers(8))
        flip(*place)
        if check(path).findings:
            found += 1
        else:
            assert what_a_reader_gets(path) == before, place
        flip(*place)
    assert found > 100
    assert check(path).findings == ()


def test_every_flipped_bit_of_an_npy_shards_json_is_found_if_it_changes_what_is_said(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats")
    random = np.random.default_rng(4)
    for name in ("shard-00001.images.jsonl", "shard-00000.json", "manifest.json"):
        file = path / name
        before, text = said(file), file.read_bytes()
        for _ in range(80):
            place = str(file), int(random.integers(len(text.rstrip()))), int(random.integers(8))
            flip(*place)
            if not check(path).findings:
                assert said(file) == before, (place, text[place[1] - 20 : place[1] + 20])
            flip(*place)
    assert check(path).findings == ()


def said(file: Path) -> Any:
    """What decides anything in a JSON file, and can be told without pictures; of a skipped image not its CRC."""
    entries = [json.loads(line) for line in file.read_bytes().splitlines()] if file.suffix == ".jsonl" else []
    if not entries:
        value = json.loads(file.read_bytes())
        value.pop("run_log", None)
        return value
    for entry in entries:
        entry.update(digest=entry["digest"] != "0" * 64, crc32=int(entry["crc32"], 16))
        if entry["status"] > 1:
            entry.update(status="skipped", crc32=0)
    return entries


def test_a_header_that_says_another_shape_or_type_is_found(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats")
    tokens = path / "shard-00000.visual_tokens.npy"
    text = tokens.read_bytes()
    tokens.write_bytes(text.replace(b"<f2", b"<u2", 1))
    assert one_finding(path).problem.endswith("visual_tokens has type <u2, not <f2")
    tokens.write_bytes(text.replace(b"4, 6)", b"6, 4)", 1))
    assert "visual_tokens has shape" in one_finding(path).problem
    tokens.write_bytes(text.replace(b"'<f2'", b"'>f2'", 1))
    assert "not a sound .npy file" in one_finding(path).problem


def test_a_type_that_other_programs_would_read_differently_is_found(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats.h5")
    with h5py.File(path, "r+") as file:
        del file["pooled"].file["visual_tokens"].attrs["dtype"]
    assert "visual_tokens says that its type is None" in one_finding(path).problem
    with h5py.File(path, "r+") as file:
        values = file["pooled"][...]
        del file["pooled"]
        file.create_dataset("pooled", data=values.byteswap().view(">f4"))
    assert "pooled has type >f4, not <f4" in one_finding(path).problem


# ------------------------------------------------------------------------------------------------------- other damage


def test_a_truncated_file_is_found(sound: Path) -> None:
    files = [sound] if sound.is_file() else [file for file in sorted(sound.iterdir()) if file.stat().st_size]
    for file in files:
        data = file.read_bytes()
        text = len(data.rstrip())  # blanks behind JSON say nothing
        for size in (0, 1, text // 2, text - 1):
            file.write_bytes(data[:size])
            assert is_found_wrong(sound), (file.name, size)
        file.write_bytes(data)
    assert check(sound).findings == ()


def is_found_wrong(path: Path) -> bool:
    """Whether there are findings, or nothing of ours is left to find fault with."""
    try:
        return bool(check(path).findings)
    except OutputError:
        return True


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats")
    for file in sorted(path.iterdir()):
        file.rename(tmp_path / "away")
        findings = check(path).findings
        assert findings, file.name
        if file.suffix == ".npy":
            assert f"{file.name.split('.')[1]} is missing" in findings[0].problem
        (tmp_path / "away").rename(file)


@pytest.mark.parametrize(("field", "value"), [("images", 11), ("tiles", 1), ("superseded", ["nobody.jpg"])])
def test_a_manifest_that_says_something_else_than_its_shards_is_found(
    tmp_path: Path, field: str, value: object
) -> None:
    path = make_sound(tmp_path, "feats")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][1][field] = value
    manifest["digest"] = output_module._digest(manifest["shards"])
    (path / "manifest.json").write_text(json.dumps(manifest))
    finding = one_finding(path)
    assert finding.check == "manifest"
    assert finding.key == ("nobody.jpg" if field == "superseded" else None)


def test_rows_that_count_twice_and_shards_of_two_recipes_are_found(tmp_path: Path) -> None:
    path = tmp_path / "feats"
    make_output(path, sound_shard())
    make_output(path, sound_shard(layer=7))
    findings = check(path).findings
    assert findings[0].problem.endswith("in layer")
    assert {finding.key for finding in findings[1:]} == {os.fsdecode(key) for key in sound_shard().table.keys}


def test_a_superseded_row_does_not_count_but_its_bits_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "feats"
    make_output(path, sound_shard())
    output, newer = Output(str(path)), make_shard(make_table([(1, 1, 0)], [b"0-j.jpg"]), tile_pooled=True, tile_size=56)
    fill_partial(output, newer)
    publish(output, newer, {"shard-00000": ["0-j.jpg"]})
    verdict = check(path)
    assert verdict.findings == () and sum(verdict.images.values()) == 10 and verdict.rows == 11
    flip_in_row(backend_of(Format.NPY).extents(str(path / "shard-00000"))[POOLED], 9, 10, np.random.default_rng(0))
    assert one_finding(path).key == "0-j.jpg"


def test_what_a_status_cannot_be_is_found(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats.h5")
    list_skipped(path)
    extents = backend_of(Format.H5).extents(str(path))

    def put(name: str, row: int, data: bytes) -> bytes:
        extent = extents[name]
        with path.open("r+b") as file:
            file.seek(extent.offset + row * extent.spec.row_bytes)
            before = file.read(len(data))
            file.seek(-len(data), os.SEEK_CUR)
            file.write(data)
        return before

    for name, row, data, problem in [
        (DIGEST, 0, bytes(32), "it is done, but has no digest"),
        (DIGEST, FAILED, b"\1" * 32, "it was skipped, but has a digest"),
        (STATUS, 1, b"\0", "it is pending in a finished file"),
        (STATUS, FAILED, b"\5", "it was skipped as timeout"),
        (STATUS, 0, b"\3", "it was skipped, but its vector is not NaN"),
        (STATUS, 0, b"\x63", "the statuses of"),
    ]:
        before = put(name, row, data)
        assert any(problem in finding.problem for finding in check(path).findings), problem
        put(name, row, before)
    assert check(path).findings == ()


def test_a_part_that_the_disk_cannot_read_is_named_by_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_sound(tmp_path, "feats.h5")
    extent = backend_of(Format.H5).extents(str(path))["visual_tokens"]
    bad = extent.offset + 8 * extent.spec.row_bytes  # of the third image
    read = os.preadv

    def preadv(descriptor: int, buffers: Any, offset: int) -> int:
        if offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    finding = one_finding(path)
    assert finding.key == "0-line\nbreak\r.jpg" and "cannot be read: Input/output error" in finding.problem


def test_a_file_that_a_run_replaces_meanwhile_is_said_to_be_replaced(tmp_path: Path) -> None:
    path, other = make_sound(tmp_path, "feats.h5"), tmp_path / "other.h5"
    make_output(other, sound_shard(5), seed=5)

    class Replacing(Observer):
        def began(self, phase: Phase) -> None:
            if phase.name == "checking rows":
                os.replace(other, path)

    findings = verify(VerifyOptions(str(path)), Replacing()).findings
    assert len(findings) == 1 and "was replaced after its index was read" in findings[0].problem


# ------------------------------------------------------------------------------------------------- against the pictures


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, and their features of tiny-random as one file and as shards, in float32."""
    folder = tmp_path_factory.mktemp("extracted")
    make_pictures(folder / "pictures", 6)
    for name in ("feats.h5", "feats"):
        options = ("--dtype", "float32", "--max-tiles", 2, "--tile-pooled")
        assert extract(folder / "pictures", "-o", folder / name, *options).returncode == 0
    return folder


@pytest.fixture
def copied(extracted: Path, tmp_path: Path) -> Path:
    """The features, to be damaged; the pictures stay where they are."""
    shutil.copy(extracted / "feats.h5", tmp_path / "feats.h5")
    shutil.copytree(extracted / "feats", tmp_path / "feats")
    return tmp_path


@pytest.mark.parametrize("output", ["feats.h5", "feats"])
def test_changed_and_missing_pictures_are_noted_and_touched_ones_are_not(
    extracted: Path, tmp_path: Path, output: str
) -> None:
    folder = tmp_path / "pictures"
    make_pictures(folder, 6)
    path = tmp_path / output
    assert extract(folder, "-o", path, "--max-tiles", 1).returncode == 0
    first, second, third, fourth = sorted(folder.rglob("*.*"))[:4]
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"?")
    third.write_bytes(third.read_bytes() + b"more")
    os.utime(fourth, (1, 1))
    verdict = check(path)
    assert verdict.findings == ()
    assert verdict.pictures is not None and verdict.pictures.unchanged == 3
    assert verdict.pictures.missing == (str(first.relative_to(folder)),)
    assert verdict.pictures.changed == tuple(str(p.relative_to(folder)) for p in (second, third))
    assert check(path, pictures=False).pictures is None
    result = internvit("verify", path)
    assert result.returncode == 0
    assert "3 unchanged, 2 changed, 1 missing" in result.stdout
    assert f"{first.relative_to(folder)}: the picture is missing" in result.stdout


def test_every_flipped_bit_of_a_digest_is_found_while_its_picture_is_there(copied: Path) -> None:
    path = copied / "feats.h5"
    extent = backend_of(Format.H5).extents(str(path))[DIGEST]
    random = np.random.default_rng(5)
    with h5py.File(path) as file:
        keys = [key.decode() for key in file["image/key"]]
    for row in random.integers(0, 6, 40).tolist():
        place = flip_in_row(extent, row, row + 1, random)
        finding = one_finding(path)
        assert (finding.check, finding.key) == ("pictures", keys[row])
        flip(*place)


# ----------------------------------------------------------------------------------------------------- encoded again


@pytest.mark.parametrize("output", ["feats.h5", "feats"])
def test_a_sample_encoded_again_is_bit_equal_and_agrees_with_transformers(extracted: Path, output: str) -> None:
    verdict = check(extracted / output, re_extract=3, reference=True)
    assert verdict.findings == ()
    ours, reference = verdict.comparisons
    assert (ours.images, ours.bit_equal, ours.difference) == (3, 3, 0.0)
    assert reference.images == 3 and reference.agrees
    assert 0 < reference.relative < 2e-3 and reference.cosine > 0.999998


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "bfloat16", "--store-dtype", "bfloat16"),
        ("--dtype", "float16", "--tokens", "patch", "--pool", "cls+mean"),
        ("--no-thumbnail", "--pool", "cls", "--store-dtype", "float32"),
        pytest.param(("--tokens", "none", "--preprocess", "clip"), marks=pytest.mark.sweep),
        ("--tile-size", 224, "--layer", 1, "--preprocess", "squash"),
        pytest.param(
            ("--tokens", "none", "--no-thumbnail", "--background", "white", "--layer", 0), marks=pytest.mark.sweep
        ),
        ("--layer", "0,-2,-1", "--tile-pooled", "--store-dtype", "int8"),
    ],
)
def test_every_recipe_can_be_encoded_again(extracted: Path, tmp_path: Path, options: tuple[object, ...]) -> None:
    given = ("--max-tiles", 2, *(() if "--dtype" in options else ("--dtype", "float32")), *options)
    assert extract(extracted / "pictures" / "part0", "-o", tmp_path / "f.h5", *given).returncode == 0
    verdict = check(tmp_path / "f.h5", re_extract=2, reference=True)
    assert verdict.findings == ()
    assert [comparison.images for comparison in verdict.comparisons] == [2, 2]
    assert verdict.comparisons[0].bit_equal == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_agrees_on_every_published_layout(
    extracted: Path, tmp_path: Path, family: str, layout: str
) -> None:
    model, path = REFERENCE / f"{family}-{layout}", tmp_path / "f.h5"
    tokens = "visual" if layout == "standalone" else "projected"
    arguments = ("--model", model, "--tokens", tokens, "--dtype", "float32", "--store-dtype", "float32")
    pictures = extracted / "pictures" / "part0"
    assert internvit("extract", pictures, "-o", path, *arguments, "--max-tiles", 2).returncode == 0
    verdict = check(path, re_extract=2, reference=True)
    assert verdict.findings == ()
    assert [comparison.images for comparison in verdict.comparisons] == [2, 2]
    assert verdict.comparisons[1].relative < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_swapped_row_whose_crc_was_swapped_too_is_found(extracted: Path, tmp_path: Path, dtype: str) -> None:
    pictures, path = tmp_path / "pictures", tmp_path / "f.h5"
    pictures.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40), color).save(pictures / f"{number}.png")
    assert extract(pictures, "-o", path, "--dtype", dtype).returncode == 0
    with h5py.File(path, "r+") as file:
        for name in ("pooled", "visual_tokens", "image/crc32"):
            dataset = file[name]
            dataset[0:2] = dataset[0:2][::-1].copy()
    assert check(path).findings == (), "the swap is beyond what CRCs can tell"
    findings = check(path, re_extract=3, reference=True).findings
    for name in ("re-extract", "reference"):
        assert {finding.key for finding in findings if finding.check == name} == {"0.png", "1.png"}
    assert all("lowest cosine" in finding.problem for finding in findings)


def test_the_sample_follows_the_seed_and_only_pictures_that_are_as_they_were_count(tmp_path: Path) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "f.h5"
    paths = make_pictures(folder, 6)
    assert extract(folder, "-o", path, "--max-tiles", 1, "--dtype", "float32").returncode == 0
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes() + b"more")
    data = paths[2].read_bytes()
    paths[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(paths[3], (1, 1))
    verdict = check(path, re_extract=6)
    assert verdict.comparisons[0].images == verdict.comparisons[0].bit_equal == 3
    assert any("3 of 6 images encoded again" in note for note in verdict.notes)
    assert verdict.findings == ()
    assert check(path, re_extract=2, seed=9).comparisons[0].images == 2
    shutil.rmtree(folder)
    finding = one_finding(path, re_extract=2)
    assert finding.check == "re-extract" and "no picture is unchanged" in finding.problem


def test_missing_and_other_weights_are_said_plainly(extracted: Path, copied: Path) -> None:
    path = copied / "feats.h5"
    finding = one_finding(path, re_extract=1, model=str(copied / "nowhere"))
    assert "the weights are not available" in finding.problem and "--model" in finding.problem
    finding = one_finding(path, re_extract=1, model=str(REFERENCE / "300m-standalone"))
    assert "are not those that made the rows" in finding.problem
    finding = one_finding(path, re_extract=1, device="cuda:9")
    assert "--device cuda:9" in finding.problem


def test_the_official_shuffle_and_ours_agree_in_both_orders() -> None:
    patches = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0))
    for order in (TokenOrder.V1, TokenOrder.V2):
        assert torch.equal(pixel_shuffle(patches, order), pixel_unshuffle(patches, order))


def test_differences_are_told_apart() -> None:
    stored = np.array([[[1.0, 0.0], [0.0, 2.0]]], np.float32)
    assert compare_values(stored, stored, StoreDtype.FLOAT32).is_within(Tolerance(0.0, 1.0 - 1e-12))
    turned = compare_values(stored, stored[:, ::-1], StoreDtype.FLOAT32)
    assert (turned.bit_equal, turned.largest, turned.relative, turned.cosine) == (0, 2.0, 1.0, 0.0)
    for odd in (np.nan, np.inf):
        assert not compare_values(stored, np.full_like(stored, odd), StoreDtype.FLOAT32).is_within(Tolerance(1.0, -1.0))
        assert not compare_values(np.full_like(stored, odd), stored, StoreDtype.FLOAT32).is_within(Tolerance(1.0, -1.0))
    zeros = np.zeros_like(stored)
    assert compare_values(zeros, zeros, StoreDtype.FLOAT32).is_within(Tolerance(0.0, 1.0))
    assert not compare_values(zeros, stored, StoreDtype.FLOAT32).is_within(Tolerance(1.0, 0.5))
    bits = np.array([[0x3F80, 0x4000]], np.uint16)
    assert compare_values(bits, np.array([[1.0, 2.0]], np.float32), StoreDtype.BFLOAT16).largest == 0.0


# ---------------------------------------------------------------------------------------------------- the command line


def damaged(copied: Path) -> tuple[Path, str]:
    """An output with one flipped bit, and the key of its row."""
    path = copied / "feats.h5"
    flip_in_row(backend_of(Format.H5).extents(str(path))["visual_tokens"], 0, 1, np.random.default_rng(0))
    with h5py.File(path) as file:
        return path, file["image/key"][0].decode()


def test_the_command_says_what_was_checked_and_ends_with_the_verdict(copied: Path) -> None:
    result = internvit("verify", copied / "feats.h5")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "images      6: 6 done"
    assert lines[1].startswith("rows        6 read and compared with their CRCs: ") and lines[1].endswith("GB/s")
    assert lines[2].startswith("pictures    6 unchanged, 0 changed, 0 missing")
    assert lines[-1] == f"{copied / 'feats.h5'}: everything is right"
    assert internvit("verify", copied / "feats.h5", "-q").stdout == ""


def test_each_finding_is_a_line_and_the_exit_code_is_1(copied: Path) -> None:
    path, key = damaged(copied)
    for options in ((), ("-q",)):
        result = internvit("verify", path, *options)
        assert result.returncode == 1
        wrong = [line for line in result.stdout.splitlines() if line.startswith("wrong: ")]
        assert len(wrong) == 1 and wrong[0].startswith(f"wrong: {key}: its rows have CRC ")
        assert result.stdout.splitlines()[-1] == f"{path}: 1 thing is wrong"


def test_json_is_one_object_with_the_findings(copied: Path) -> None:
    path, key = damaged(copied)
    result = internvit("verify", path, "--json", "--re-extract", 2)
    assert result.returncode == 1
    verdict = json.loads(result.stdout)
    assert verdict["exit_code"] == 1 and verdict["error"] == "1 thing is wrong"
    assert [(finding["check"], finding["key"]) for finding in verdict["findings"]] == [("rows", key)]
    assert verdict["rows"] == 6 and verdict["bytes_per_second"] > 0
    assert verdict["comparisons"][0]["images"] == 2


def test_no_key_can_steer_a_terminal(tmp_path: Path) -> None:
    path = make_sound(tmp_path, "feats.h5")
    rows = backend_of(Format.H5).extents(str(path))[POOLED]
    for row in range(6):
        flip_in_row(rows, row, row + 1, np.random.default_rng(row))
    result = internvit("verify", path)
    assert result.returncode == 1 and "\x1b" not in result.stdout
    assert sum(line.startswith("wrong: ") for line in result.stdout.splitlines()) == 6
    assert len(json.loads(internvit("verify", path, "--json").stdout)["findings"]) == 6


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nowhere.h5"], 1, "nowhere.h5 is not there"),
        (["text.txt"], 1, "not a feature file"),
        (["feats.h5", "--reference"], 2, "--reference needs --re-extract"),
        (["feats.h5", "--re-extract", "-1"], 2, "--re-extract"),
        ([], 2, "OUT"),
    ],
)
def test_what_cannot_be_verified_is_an_error_and_a_hint(
    copied: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, complaint: str
) -> None:
    monkeypatch.chdir(copied)
    Path("text.txt").write_text("text")
    result: Result = internvit("verify", *arguments)
    assert result.returncode == code
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "empty holds no features"),
        ("text.h5", "text.h5 is not an HDF5 file"),
        ("other.h5", "other.h5 is not an internvit feature file"),
        ("pipe.h5", "pipe.h5 is a pipe, not a feature file"),
        ("pipe", "pipe is a pipe, not a feature file"),
        ("socket.h5", "socket.h5 is a socket, not a feature file"),
        ("folder.h5", "folder.h5 holds no features"),
        ("/dev/zero", "/dev/zero is a device, not a feature file"),
    ],
)
def test_what_is_no_feature_file_at_all_is_called_what_it_is(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.h5").mkdir()
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    for pipe in ("pipe", "pipe.h5"):
        os.mkfifo(tmp_path / pipe)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.h5"))
        with pytest.raises(OutputError) as caught:
            check(tmp_path / name)
    assert caught.value.message.endswith(words.rpartition("/")[2] if name[0] != "/" else words)
    assert caught.value.hint


def test_nothing_but_re_extract_loads_torch(extracted: Path) -> None:
    code = (
        "import sys; from internvit_cli.cli.app import run; code = run(sys.argv[1:]);"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    for name in ("feats.h5", "feats"):
        command = [sys.executable, "-c", code, "verify", str(extracted / name)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert "everything is right" in result.stdout


def test_progress_on_a_terminal_is_a_bar(extracted: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "internvit_cli", "verify", str(extracted / "feats.h5")]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=follower, env=environment) as process:
        os.close(follower)
        drawn = b""
        try:
            while block := os.read(leader, 65536):
                drawn += block
        except OSError:
            pass  # the terminal closes with the process
    os.close(leader)
    assert process.returncode == 0 and b"\r" in drawn and b"rows" in drawn
