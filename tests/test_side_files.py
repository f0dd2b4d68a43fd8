"""Files beside a result: never written through a link, and gone again when a start fails."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import storage_helpers as helpers
from exchange_helpers import make, names_in
from run_helpers import extract, internvit, make_pictures, state_of, summary_of

from internvit_cli.config import Format, Skipped, Status
from internvit_cli.errors import InternvitError, OutputError
from internvit_cli.extract import pipeline, shard_filler
from internvit_cli.storage.durable import append, create, folder_for, make_way, open_ours, write_file
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.reader import open_features
from internvit_cli.storage.skipped import SkipLog, read_skip_log

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS = {"f.h5": None, "h5 folder": Format.H5, "npy folder": Format.NPY}
FILE_NAMES = [
    f"f.h5{end}"
    for end in (".lock", ".partial", ".partial.tmp", ".skipped.jsonl", ".skipped.jsonl.tmp", ".skipped.jsonl.tmp.tmp")
]
FOLDER_NAMES = [
    *("skipped.jsonl", "skipped.jsonl.tmp", "manifest.json", "manifest.json.tmp", "manifest.next.json.tmp"),
    *(f"shard-00000{end}" for end in (".partial", ".partial.tmp", ".h5.partial", ".h5.partial.tmp", ".h5", ".h5.tmp")),
    *(f"shard-00000{end}" for end in (".json", ".json.tmp", ".images.jsonl.tmp", ".pooled.npy", ".pooled.npy.tmp")),
]
PLANTED = [("f.h5", name) for name in FILE_NAMES] + [
    (kind, name) for kind in KINDS if kind != "f.h5" for name in FOLDER_NAMES
]
SKIPPED = Skipped(Status.TRUNCATED, "OSError", "image file is truncated")


def write_everything(path: Path, shard_format: Format | None) -> None:
    """All that a run writes at its output and beside it."""
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3))
    output = Output(str(path), shard_format)
    with exclusive(output.path):
        output.prepare()
        log = SkipLog(output.skipped_path)
        log.append([(b"0001.jpg", SKIPPED)])
        helpers.fill_partial(output, shard, {1: SKIPPED})
        log.append([(b"0001.jpg", SKIPPED)])
        log.rewrite(lambda _: True)
        helpers.publish(output, shard)


def plant(place: Path, victim: Path, way: str) -> None:
    """Have a name stand for another file."""
    victim.write_text("years of work")
    if way == "hard":
        os.link(victim, place)
    else:
        place.symlink_to(victim)


# --------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("way", ["soft", "hard"])
@pytest.mark.parametrize(("kind", "name"), PLANTED)
def test_no_run_writes_through_a_link_or_another_name_of_a_file(tmp_path: Path, kind: str, name: str, way: str) -> None:
    """It goes on past the link, or ends with an error that names it; the link's target is as it was either way."""
    victim, output = tmp_path / "thesis.txt", tmp_path / kind
    place = tmp_path / name
    if kind != "f.h5":
        output.mkdir()
        (output / "skipped.jsonl").touch()  # a folder of ours: one that holds other files is refused
        place = output / name
        place.unlink(missing_ok=True)
    plant(place, victim, way)
    try:
        write_everything(output, KINDS[kind])
    except InternvitError as error:
        assert str(output) in error.message
        assert error.hint
    else:
        assert open_features(output)["0000.jpg"].pooled is not None
    assert victim.read_text() == "years of work"


@pytest.mark.parametrize("way", ["soft", "hard"])
@pytest.mark.parametrize("name", ["f.h5.skipped.jsonl.tmp", "f.h5.partial.tmp"])
def test_a_temporary_name_that_is_taken_costs_neither_the_run_nor_the_file(tmp_path: Path, name: str, way: str) -> None:
    plant(tmp_path / name, tmp_path / "thesis.txt", way)
    write_everything(tmp_path / "f.h5", None)
    assert names_in(tmp_path) == ["f.h5", "f.h5.skipped.jsonl", "thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("way", ["soft", pytest.param("hard", marks=pytest.mark.sweep)])
def test_no_result_is_written_through_a_link(tmp_path: Path, way: str) -> None:
    make_pictures(tmp_path / "pictures", 3)
    assert extract(tmp_path / "pictures", "-o", tmp_path / "a.h5").returncode == 0
    key = next(iter(open_features(tmp_path / "a.h5")))
    picture = f"{key.replace('/', '__')}.show.png"
    results = {
        "r.html": ("report", tmp_path / "a.h5", "-o", tmp_path / "r.html", "--thumbnails", "0"),
        picture: ("show", tmp_path / "a.h5", key, "-o", tmp_path),
        "s.png": ("search", tmp_path / "a.h5", "--key", key, "--sheet", tmp_path / "s.png"),
        "e.csv": ("export", tmp_path / "a.h5", tmp_path / "e.csv"),
        "e.tar": ("export", tmp_path / "a.h5", tmp_path / "e.tar"),
        "e.safetensors": ("export", tmp_path / "a.h5", tmp_path / "e.safetensors"),
        "e.h5": ("export", tmp_path / "a.h5", tmp_path / "e.h5"),
    }
    victim = tmp_path / "thesis.txt"
    for name, line in results.items():
        for place in (f"{name}.tmp", f"{name}.exporting", f"{name}.lock", f"{name}.skipped.jsonl"):
            plant(tmp_path / place, victim, way)
            result = internvit(*line)
            assert result.returncode == 0 or (place in result.stderr and "hint: " in result.stderr), (place, result)
            assert victim.read_text() == "years of work", place
            if result.returncode == 0:
                assert (tmp_path / name).is_file()
                (tmp_path / name).unlink()
            (tmp_path / place).unlink(missing_ok=True)


def test_a_page_or_picture_takes_the_place_of_a_link_and_leaves_its_target_alone(tmp_path: Path) -> None:
    plant(tmp_path / "r.html", tmp_path / "thesis.txt", "soft")
    write_file(str(tmp_path / "r.html"), b"page")
    assert not (tmp_path / "r.html").is_symlink()
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_folder_of_a_search_index_is_never_a_link(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    make_pictures(tmp_path / "pictures", 3)
    assert extract(tmp_path / "pictures", "-o", tmp_path / "a.h5", "--tokens", "none").returncode == 0
    key = next(iter(open_features(tmp_path / "a.h5")))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "chosen.json").write_text("years of work")
    (tmp_path / "a.h5.search").symlink_to("other")
    line = ("search", tmp_path / "a.h5", "--key", key, "--index")
    result = internvit(*line)
    assert result.returncode == 1 and "a.h5.search is a link" in result.stderr
    assert (tmp_path / "other" / "chosen.json").read_text() == "years of work"
    (tmp_path / "a.h5.search").unlink()
    (tmp_path / "a.h5.search").mkdir()
    for name in ("chosen.tmp", "chosen.npz", "chosen.usearch", "chosen.json"):
        plant(tmp_path / "a.h5.search" / name, tmp_path / "thesis.txt", "soft")
    assert internvit(*line).returncode == 0
    assert names_in(tmp_path / "a.h5.search") == ["chosen.json", "chosen.npz", "chosen.usearch"]
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_list_that_has_another_name_is_copied_before_it_grows(tmp_path: Path) -> None:
    """A snapshot of hard links keeps what was there when it was taken."""
    path = tmp_path / "skipped.jsonl"
    log = SkipLog(str(path))
    log.append([(b"a.jpg", SKIPPED)])
    os.link(path, tmp_path / "snapshot")
    log.append([(b"b.jpg", SKIPPED)])
    assert [entry["key"] for entry in read_skip_log(str(path))] == ["a.jpg", "b.jpg"]
    assert [entry["key"] for entry in read_skip_log(str(tmp_path / "snapshot"))] == ["a.jpg"]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_has_the_name_of_a_file_of_ours_is_named(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "file"
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        plant(place, tmp_path / "thesis.txt", "soft")
    acts: tuple[Callable[[str], object], ...] = (append, open_ours)
    for act in acts:
        with pytest.raises(OutputError, match=f"file is a {kind}") as caught:
            act(str(place))
        assert caught.value.hint
    with pytest.raises(FileExistsError):
        create(str(place))
    if kind != "link":
        for act in (make_way, lambda path: write_file(path, b"")):  # type: ignore[assignment]
            with pytest.raises(OutputError, match=f"file is a {kind}"):
                act(str(place))
    assert place.lstat().st_mode and names_in(tmp_path)[0] == "file"


# ------------------------------------------------------------------------------------- a link as the output itself


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_leads_with_all_that_lies_beside_it(
    tmp_path: Path, is_there: bool
) -> None:
    """Features may lie on another disk: the link stays, and its lock, rows and reasons are those of its target."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "f.h5").symlink_to(disk / "f.h5")
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "bad.jpg").write_text("no picture")
    line = [tmp_path / "pictures", "-o", tmp_path / "f.h5", "--tokens", "none", "--json"]
    if is_there:
        assert extract(*line).returncode == 3
        make_pictures(tmp_path / "pictures", 3)
    assert extract(*line).returncode == 3
    assert (tmp_path / "f.h5").is_symlink()
    assert names_in(tmp_path) == ["disk", "f.h5", "pictures"]
    assert names_in(disk) == ["f.h5", "f.h5.skipped.jsonl"]


def test_an_output_on_a_disk_that_is_not_there_is_an_error_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "f.h5").symlink_to(tmp_path / "disk" / "f.h5")
    make_pictures(tmp_path / "pictures", 1)
    result = extract(tmp_path / "pictures", "-o", tmp_path / "f.h5")
    assert result.returncode == 1 and "disk" in result.stderr
    assert (tmp_path / "f.h5").is_symlink() and names_in(tmp_path) == ["f.h5", "pictures"]


# -------------------------------------------------------------------------------------------------------- failed starts

FAILURES = {
    "no card": ["--device", "cuda:7"],
    "no model": ["--model", "nowhere"],
    "no projector": ["--tokens", "projected"],
    "a bad option of the model": ["--layer", "99"],
    "shards that are too small": ["--shard-size", "1"],
    "a picture that cannot be used": ["--strict"],
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", ["f.h5", "f", "made/"])
def test_a_start_that_fails_leaves_nothing(tmp_path: Path, name: str, failure: str) -> None:
    """Not even a list of the pictures that cannot be used, which the next start finds again."""
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "bad.jpg").write_text("no picture")
    (tmp_path / "made").mkdir()
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    result = extract(tmp_path / "pictures", "-o", f"{tmp_path}/{name}", *FAILURES[failure])
    assert result.returncode in (1, 2), result.stderr
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_without_pictures_there_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("f", "f.h5"):
        assert extract(tmp_path / "empty", "-o", tmp_path / name).returncode == 4
    assert names_in(tmp_path) == ["empty"]


@pytest.mark.parametrize("name", ["f.h5", "f", "h5 folder"])
@pytest.mark.parametrize("when", ["at once", "after a row"])
def test_a_run_that_fails_keeps_what_it_stored_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    """Also the space that was set aside for rows goes."""
    make_pictures(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "bad.jpg").write_text("no picture")
    encode = shard_filler.ShardFiller._encode_pending

    def fail(*arguments: Any, **options: Any) -> None:
        if when == "after a row":
            encode(*arguments, **options)
        raise InternvitError("the device is gone", "look for it")

    options = ["--tokens", "none", "--json", *(["--format", "h5"] if name == "h5 folder" else [])]
    line = [tmp_path / "pictures", "-o", tmp_path / name, *options]
    with monkeypatch.context() as patched:
        patched.setattr(shard_filler.ShardFiller, "_encode_pending", fail)
        assert extract(*line).returncode == 1
    if when == "at once":
        assert names_in(tmp_path) == ["pictures"]
    else:
        assert len(names_in(tmp_path)) > 1
    again = extract(*line)
    assert again.returncode == 3, again.stderr
    assert summary_of(again)["encoded"] == (4 if when == "at once" else 0)


@pytest.mark.parametrize("name", ["f.h5", "f"])
def test_a_continued_run_that_fails_leaves_the_output_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "bad.jpg").write_text("no picture")
    line = [tmp_path / "pictures", "-o", tmp_path / name, "--tokens", "none"]
    assert extract(*line).returncode == 3
    before = {path: content for path, (_, content) in state_of(tmp_path).items()}
    make_pictures(tmp_path / "pictures" / "more", 2, seed=9)
    (tmp_path / "pictures" / "worse.jpg").write_text("no picture")
    assert extract(*line, "--device", "cuda:7").returncode == 1

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "create_shard", fail)
        with pytest.raises(OSError, match="Input/output"):
            pipeline_run(line)
    after = {path: content for path, (_, content) in state_of(tmp_path).items() if "pictures" not in path}
    assert after == {path: content for path, content in before.items() if "pictures" not in path}


def pipeline_run(line: list[object]) -> None:
    """A run of which every exception comes through."""
    from internvit_cli.config import Tokens
    from internvit_cli.options import ExtractOptions, ModelOptions, StoreOptions
    from internvit_cli.runtime.signals import StopRequest

    store = StoreOptions(str(line[2]), tokens=Tokens.NONE)
    pipeline.extract(ExtractOptions((str(line[0]),), store, model=ModelOptions("tiny-random")), StopRequest())


def test_a_folder_that_was_made_for_a_file_goes_when_the_file_cannot_be_written(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "file")
    with pytest.raises(ZeroDivisionError), folder_for(path):
        raise ZeroDivisionError
    assert names_in(tmp_path) == []
    with folder_for(path):
        write_file(path, b"")
    with pytest.raises(ZeroDivisionError), folder_for(path):
        raise ZeroDivisionError
    assert names_in(tmp_path / "new") == ["file"]


# ----------------------------------------------------------------------------------------------- lists after a prune


@pytest.mark.parametrize("name", ["f.h5", "f"])
@pytest.mark.parametrize("also", ["nothing else", "a new picture"])
def test_the_list_of_skipped_images_names_no_picture_that_was_pruned(tmp_path: Path, name: str, also: str) -> None:
    pictures = tmp_path / "pictures"
    make_pictures(pictures, 5)
    for bad in ("bad.jpg", "worse.jpg"):
        (pictures / bad).write_text("no picture")
    line = [pictures, "-o", tmp_path / name, "--tokens", "none", "--prune"]
    assert extract(*line).returncode == 3
    log = Output(str(tmp_path / name)).skipped_path
    (pictures / "bad.jpg").unlink()
    if also == "a new picture":
        make_pictures(pictures / "more", 1)
    assert extract(*line).returncode == 3
    assert [entry["key"] for entry in read_skip_log(log)] == ["worse.jpg"]
    before = state_of(tmp_path)
    assert extract(*line).returncode == 3
    assert state_of(tmp_path) == before, "what is right is not touched"
    (pictures / "worse.jpg").unlink()
    assert extract(*line).returncode == 0
    assert not os.path.exists(log)


def test_lines_that_an_earlier_version_left_go_with_the_next_prune(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 3)
    line = [tmp_path / "pictures", "-o", tmp_path / "f", "--tokens", "none"]
    assert extract(*line).returncode == 0
    entry = {"key": "gone.jpg", "reason": "truncated", "exception": "", "message": "", "attempt": 1}
    (tmp_path / "f" / "skipped.jsonl").write_text(json.dumps(entry) + "\n")
    assert extract(*line, "--prune").returncode == 0
    assert not (tmp_path / "f" / "skipped.jsonl").exists()


def test_an_export_over_another_complains_of_the_output_and_not_of_what_lies_beside_it(tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5", "both.h5"):
        make(tmp_path / name)
    for line in (["export", tmp_path / "a.h5"], ["merge", tmp_path / "a.h5", tmp_path / "b.h5", "-o"]):
        result = internvit(*line, tmp_path / "both.h5")
        assert result.returncode == 2
        assert f"error: {tmp_path}/both.h5 exists already" in result.stderr
