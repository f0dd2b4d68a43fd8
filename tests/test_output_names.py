"""What names stand for: files, folders, and what no output can be; one rule for all commands that write."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import storage_helpers as helpers
from exchange_helpers import fails, make, names_in, ok
from run_helpers import extract, internvit, make_pictures, summary_of

from internvit_cli.config import Format
from internvit_cli.errors import OutputError, UsageError
from internvit_cli.export.targets import TARGET_OF_SUFFIX, Target, choose_target
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output
from internvit_cli.storage.output_names import (
    DATA_FILE_SUFFIXES,
    EXPORTED_SUFFIXES,
    SINGLE_FILE_SUFFIXES,
    check_features_name,
    is_single_file,
)
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from pathlib import Path

OTHER_FILES = (
    *("f.parquet", "f.PARQUET", "f.pt", "f.pth", "f.safetensors", "f.csv", "f.tsv", "f.json", "f.jsonl", "f.txt"),
    *("f.tar", "f.tar.gz", "f.tgz", "f.zip", "f.npy", "f.npz", "f.zarr", "f.lance", "f.pkl", "f.arrow", "f.Feather"),
    *("f.bin", "f.ckpt", "f.mat", "f.nc", "f.sqlite", "f.tfrecord", "f.html", "f.png", "f.h5.gz", ".parquet"),
)
FOLDERS = ("f", "feats.v2", "run-2024.11.27", "imagenet.train", "448px.mean", "v1.5", "a.b/f", "f.", "h5", "npy", ".f")


@pytest.mark.parametrize("name", OTHER_FILES)
def test_features_are_not_written_by_the_name_of_another_format(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_features_name(name)
    assert name in caught.value.message
    assert ".h5" in caught.value.hint


@pytest.mark.parametrize("name", [" ", "  ", "\t"])
def test_a_name_of_blanks_alone_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="only blanks"):
        check_features_name(name)


@pytest.mark.parametrize("name", ["f.h5.gz", "f.hdf5.zip", "f.h5.skipped.jsonl"])
def test_the_name_that_is_proposed_has_one_suffix(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_features_name(name)
    assert ".h5.h5" not in caught.value.hint
    assert ".hdf5.h5" not in caught.value.hint


def test_a_name_that_is_too_long_is_to_be_made_shorter(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="File name too long") as caught, exclusive(str(tmp_path / ("x" * 300))):
        pass
    assert caught.value.hint == "choose a shorter name"


@pytest.mark.parametrize("name", EXPORTED_SUFFIXES)
def test_for_a_format_that_export_writes_the_hint_is_the_command_that_does(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_features_name(f"sub/feats{name}")
    assert f"-o sub/feats.h5, and afterwards: internvit export sub/feats.h5 sub/feats{name}" in caught.value.hint


@pytest.mark.parametrize("name", [*FOLDERS, "f.parquet/", "f.tar.gz/", "feats.h5/", "f.tmp/"])
def test_a_name_with_any_other_dot_or_a_slash_at_its_end_is_a_folder(name: str) -> None:
    check_features_name(name)
    assert not is_single_file(name)


@pytest.mark.parametrize("name", ["f.h5", "f.hdf5", "f.H5", "f.HDF5", "f.Hdf5", ".h5", "feats.v2.h5"])
def test_hdf5_files_are_files_however_their_suffix_is_spelled(name: str) -> None:
    check_features_name(name)
    assert is_single_file(name)
    assert choose_target(name, None).target is Target.H5


def test_a_file_of_any_spelling_is_written_read_and_continued(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 2)
    for _ in range(2):
        result = extract(tmp_path / "pictures", "-o", tmp_path / "f.HDF5", "--tokens", "none", "--json")
        assert result.returncode == 0, result.stderr
    assert summary_of(result)["encoded"] == 0
    assert (tmp_path / "f.HDF5").is_file()
    ok("verify", tmp_path / "f.HDF5")
    ok("export", tmp_path / "f.HDF5", tmp_path / "g.H5")
    ok("diff", tmp_path / "f.HDF5", tmp_path / "g.H5")
    assert names_in(tmp_path) == ["f.HDF5", "g.H5", "pictures"]


def test_features_in_a_folder_that_is_named_like_a_file_are_found_by_every_command(tmp_path: Path) -> None:
    """A slash makes such a folder; from then on what is there decides."""
    make_pictures(tmp_path / "pictures", 2)
    for name in ("f.parquet", "f.h5"):
        assert extract(tmp_path / "pictures", "-o", f"{tmp_path}/{name}/", "--tokens", "none").returncode == 0
        assert (tmp_path / name / "manifest.json").is_file()
        again = extract(tmp_path / "pictures", "-o", tmp_path / name, "--tokens", "none", "--json")
        assert summary_of(again)["encoded"] == 0, again.stderr
        for words in (["info"], ["verify"]):
            ok(*words, tmp_path / name)
        ok("export", tmp_path / name, f"{tmp_path}/copy of {name}/")
        assert len(open_features(tmp_path / f"copy of {name}")) == 2


def test_a_folder_that_is_named_like_a_file_is_not_filled_without_a_slash(tmp_path: Path) -> None:
    (tmp_path / "f.h5").mkdir()
    with pytest.raises(OutputError, match="is a folder") as caught:
        Output(str(tmp_path / "f.h5")).prepare()
    assert "f.h5/" in caught.value.hint
    assert names_in(tmp_path / "f.h5") == []


NOWHERE = [
    "-",
    "/dev/null",
    "/dev/null.h5",
    "/dev/stdout",
    "/dev/fd/1",
    "/proc/self/f.h5",
    "/sys/f",
    "s3://bucket/f.h5",
]


@pytest.mark.parametrize("name", NOWHERE)
def test_what_is_no_place_for_files_is_a_usage_error_of_every_command_that_writes(name: str, tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    make(tmp_path / "b.h5")
    lines = [
        ["extract", tmp_path, "-o", name],
        ["plan", tmp_path, "-o", name],
        ["export", tmp_path / "a.h5", name],
        ["merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o", name],
        ["report", tmp_path / "a.h5", "-o", f"{name}.html" if name != "-" else name],
        ["search", tmp_path / "a.h5", "--key", "a.jpg", "--sheet", f"{name}.png" if name != "-" else name],
        ["duplicates", tmp_path / "a.h5", "--sheet", f"{name}.png" if name != "-" else name],
        ["show", tmp_path / "a.h5", "a.jpg", "-o", name],
    ]
    for line in lines:
        assert name in fails(2, *line), line


def test_memory_and_a_link_into_another_folder_are_places_for_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc/self/cwd")
    for name in ("/dev/shm/f.h5", "/dev/shm/f", f"{tmp_path}/link/f.h5", "/device/f.h5", "dev/f.h5", "./-"):
        check_features_name(name)


@pytest.mark.parametrize("kind", ["pipe", "socket", "loop", "device"])
@pytest.mark.parametrize("name", ["f.h5", "f"])
def test_what_is_there_and_is_neither_file_nor_folder_is_refused_and_left_alone(
    kind: str, name: str, tmp_path: Path
) -> None:
    make_pictures(tmp_path / "pictures", 1)
    make(tmp_path / "a.h5")
    place = tmp_path / name
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(str(place))
    elif kind == "loop":
        place.symlink_to(place)
    else:
        try:
            os.mknod(place, 0o20666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("devices cannot be made here")
    before = place.lstat()[:7]  # all but its times
    assert extract(tmp_path / "pictures", "-o", place).returncode == 1
    fails(2, "export", tmp_path / "a.h5", place, "--overwrite")
    assert place.lstat()[:7] == before
    assert names_in(tmp_path) == sorted(["a.h5", "a.h5.skipped.jsonl", name, "pictures"])


@pytest.mark.parametrize("name", ["f.partial", "f.h5.partial", "f.partial/", "f.lock", "f.exporting", "f.tmp"])
def test_names_of_what_is_unfinished_are_not_those_of_a_result(name: str) -> None:
    for check in (check_features_name, lambda path: choose_target(path, None)):
        with pytest.raises(UsageError, match="unfinished"):
            check(name)


@pytest.mark.parametrize("name", ["x.txt", "x.pt", "x.zip", "x.npy", "x.npz", "x.tar.gz", "x.zarr", "x.JSON"])
def test_export_makes_no_folder_by_the_name_of_a_file(name: str, tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    before = names_in(tmp_path)
    assert name in fails(2, "export", tmp_path / "a.h5", tmp_path / name)
    assert name in fails(2, "merge", tmp_path / "a.h5", tmp_path / "a.h5", "-o", tmp_path / name)
    assert names_in(tmp_path) == before
    assert choose_target(f"{name}/", None).is_folder
    assert not choose_target(name, Target.CSV).is_folder, "a format that is named outright may have any name"


def test_a_folder_and_a_format_of_one_file_contradict() -> None:
    with pytest.raises(UsageError, match="names a folder"):
        choose_target("x/", Target.CSV)


def test_the_suffixes_that_export_knows_are_those_that_the_names_say() -> None:
    assert set(TARGET_OF_SUFFIX) == {*SINGLE_FILE_SUFFIXES, *EXPORTED_SUFFIXES}
    assert not {*SINGLE_FILE_SUFFIXES} & DATA_FILE_SUFFIXES


def test_show_makes_no_folder_by_the_name_of_a_picture(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    assert "fig.png/" in fails(2, "show", tmp_path / "a.h5", "a.jpg", "-o", tmp_path / "fig.png")
    assert not (tmp_path / "fig.png").exists()


# ----------------------------------------------------------------------------------------------------- size of shards


def test_a_size_of_shards_for_what_has_none_is_a_usage_error(tmp_path: Path) -> None:
    make(tmp_path / "a.h5")
    make_pictures(tmp_path / "pictures", 1)
    before = names_in(tmp_path)
    size = ("--shard-size", "1GB")
    for line in (
        ["extract", tmp_path / "pictures", "-o", tmp_path / "f.h5", "--model", "tiny-random"],
        ["plan", tmp_path / "pictures", "-o", tmp_path / "f.h5", "--model", "tiny-random"],
        ["export", tmp_path / "a.h5", tmp_path / "f.parquet"],
        ["export", tmp_path / "a.h5", tmp_path / "f.H5"],
        ["merge", tmp_path / "a.h5", tmp_path / "a.h5", "-o", tmp_path / "f.h5"],
    ):
        assert "one file" in fails(2, *line, *size)
    assert names_in(tmp_path) == before


def test_a_size_that_is_there_for_all_commands_is_passed_over_where_there_are_no_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a.h5")
    make_pictures(tmp_path / "pictures", 1)
    monkeypatch.setenv("INTERNVIT_SHARD_SIZE", "1GB")
    assert extract(tmp_path / "pictures", "-o", tmp_path / "f.h5", "--tokens", "none").returncode == 0
    ok("export", tmp_path / "a.h5", tmp_path / "f.csv")


def test_a_plan_without_an_output_is_for_a_folder_when_shards_are_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "pictures", 1)
    monkeypatch.chdir(tmp_path)
    plan = ("plan", tmp_path / "pictures", "--model", "tiny-random", "--json")
    assert summary_of(internvit(*plan, "--shard-size", "1GB"))["output"] == "feats"
    monkeypatch.setenv("INTERNVIT_SHARD_SIZE", "1GB")
    assert summary_of(internvit(*plan))["output"] == "feats.h5"


@pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)
def test_shards_are_no_larger_than_asked_for_and_too_small_a_size_names_the_least(
    tmp_path: Path, shard_format: Format
) -> None:
    make_pictures(tmp_path / "pictures", 12, size=60)
    options = [tmp_path / "pictures", "--format", shard_format.value, "--tokens", "none", "--json"]
    small = extract(*options, "-o", tmp_path / "f", "--shard-size", "10KB")
    assert small.returncode == 2 and "10,240 bytes are too few" in str(summary_of(small)["error"])
    least = int(str(summary_of(small)["hint"]).removeprefix("give ").partition(" ")[0].replace(",", ""))
    assert names_in(tmp_path) == ["pictures"]
    size = least + 4000
    made = extract(*options, "-o", tmp_path / "f", "--shard-size", size)
    assert made.returncode == 0, made.stderr
    shards: dict[str, int] = {}
    for path in (tmp_path / "f").glob("shard-*"):
        name = path.name.partition(".")[0]
        shards[name] = shards.get(name, 0) + path.stat().st_size
    assert len(shards) > 1
    assert max(shards.values()) <= size


def test_tars_of_a_series_are_no_larger_than_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "a.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)] * 60)))
    assert "an empty tar takes" in fails(2, "export", tmp_path / "a.h5", tmp_path / "s.tar", "--shard-size", "2KB")
    ok("export", tmp_path / "a.h5", tmp_path / "s.tar", "--shard-size", "40KB")
    sizes = [path.stat().st_size for path in tmp_path.glob("s-*.tar")]
    assert len(sizes) > 2 and max(sizes) <= 40 << 10
