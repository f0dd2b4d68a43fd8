"""Situations that nobody plans: names that lead elsewhere, streams that fail, files of others, clocks gone wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import storage_helpers as helpers
from forking import PATIENCE, run_apart
from moments import WRITE, Moment, held
from run_helpers import Result, command, extract, internvit, make_pictures, summary_of

from internvit_cli.cli.app import run
from internvit_cli.config import Format, Status
from internvit_cli.errors import InternvitError, OutputError
from internvit_cli.storage.format.layout import STATUS
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.reader import open_features
from internvit_cli.storage.write.commit import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS = {"feats.h5": None, "h5 folder": Format.H5, "npy folder": Format.NPY}


def make_shard(images: int = 3) -> helpers.NewShard:
    return helpers.make_shard(helpers.make_table([(1, 1, 0)] * images))


# ------------------------------------------------------------------------------------------------- what readers get


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_never_takes_rows_of_a_file_that_got_the_inode_of_its_own(tmp_path: Path, kind: str) -> None:
    """Filesystems give inodes out again, and the file after next may have the size of the first."""
    path, other = tmp_path / kind, tmp_path / f"other {kind}"
    helpers.make_output(path, make_shard(), KINDS[kind])
    helpers.make_output(other, make_shard(), KINDS[kind], seed=1)
    features = open_features(path)
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        before = file.stat()
        with open(file, "r+b") as same_inode:
            same_inode.write((other / file.name if other.is_dir() else other).read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert (file.stat().st_ino, file.stat().st_size) == (before.st_ino, before.st_size)
    with pytest.raises(OutputError, match="was replaced after its index was read"):
        _ = features["0000.jpg"].pooled
    assert open_features(path)["0000.jpg"].pooled is not None


def test_an_unfinished_file_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    output = helpers.Output(str(tmp_path / "feats.h5"))
    written = helpers.fill_partial(output, make_shard())
    partial = tmp_path / "feats.h5.partial"
    features = open_features(partial)
    os.utime(partial, ns=(1, 1))
    assert (features["0000.jpg"].pooled == helpers.rows_of(written[0])["pooled"]).all()


# ------------------------------------------------------------------------------------------------- files of others


def state_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".h5", ".json", ".pooled.npy", ".images.jsonl"])
@pytest.mark.parametrize("numbers", [(0,), (0, 1, 2), (7,)], ids=str)
def test_shards_of_another_program_are_left_alone(tmp_path: Path, suffix: str, numbers: tuple[int, ...]) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for number in numbers:
        (folder / f"shard-{number:05d}{suffix}").write_bytes(b"years of work %d" % number)
    before = state_of(folder)
    with pytest.raises(OutputError) as caught:
        output = Output(str(folder))
        output.prepare()
        output.partial()
    assert caught.value.hint
    assert state_of(folder) == before


@pytest.mark.parametrize("kind", ["h5 folder", "npy folder"])
def test_a_lost_manifest_costs_no_shard(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    for seed in range(3):
        helpers.make_output(path, make_shard(), KINDS[kind], seed=seed)
    manifest = path / "manifest.json"
    named = manifest.read_bytes()
    manifest.unlink()
    before = state_of(path)
    with pytest.raises(OutputError, match=r"no manifest\.json that names them"):
        Output(str(path)).prepare()
    assert state_of(path) == before
    manifest.write_bytes(named)
    Output(str(path)).prepare()
    assert len(open_features(path).tables) == 3


# -------------------------------------------------------------------------------------------- names that lead elsewhere


def test_two_names_of_one_folder_are_one_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link, `.` and `..` name a folder as well as its own name does: there is one lock."""
    folder = tmp_path / "feats"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    names = (folder, f"{folder}/", f"{folder}/.", f"{folder}/sub/..", tmp_path / "link", f"{tmp_path}/link/", ".", "./")
    assert {Output(str(name)).path for name in names} == {str(folder)}
    assert Output("..").path == str(tmp_path)
    assert Output("sub").path == "sub", "what is no other name stays as it was typed"


def test_an_output_that_is_a_link_is_written_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    target, link = tmp_path / "large disk" / "feats.h5", tmp_path / "feats.h5"
    link.symlink_to(target)
    for name in (link, target):
        output = Output(str(name))
        assert (output.path, output.is_file) == (str(target), True)
    helpers.make_output(link, make_shard())
    assert link.is_symlink() and not target.is_symlink()
    assert list(open_features(link)) == list(open_features(target))


def test_the_current_folder_can_be_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "feats").mkdir()
    monkeypatch.chdir(tmp_path / "feats")
    for _ in range(2):
        result = extract(tmp_path / "pictures", "-o", ".", "--json")
        assert result.returncode == 0, result.stderr
    assert summary_of(result)["encoded"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["feats", "pictures"]


def test_a_lock_that_is_a_link_costs_nobodys_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "feats.h5.lock").symlink_to("thesis.txt")
    with pytest.raises(OutputError) as caught, exclusive(str(tmp_path / "feats.h5")):
        pass
    assert caught.value.hint
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_run_made_pending_again_gets_no_final_name(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs without a lock: the one writes statuses of its own over the other's."""
    make_pictures(tmp_path / "pictures", 3)
    options = ("-o", tmp_path / kind, "--format", KINDS[kind].value) if KINDS[kind] else ("-o", tmp_path / kind)
    real = ShardWriter.append_run_log

    def interfere(writer: ShardWriter, entry: dict[str, Any]) -> None:
        extent = writer.extents[STATUS]
        with open(extent.path, "r+b") as file:
            file.seek(extent.offset)
            file.write(bytes(2))
        real(writer, entry)

    monkeypatch.setattr(ShardWriter, "append_run_log", interfere)
    result = extract(tmp_path / "pictures", *options)
    assert result.returncode == 1 and "another run writes to" in result.stderr
    assert not Output(str(tmp_path / kind)).finished()
    monkeypatch.undo()
    assert extract(tmp_path / "pictures", *options).returncode == 0
    assert internvit("verify", tmp_path / kind).returncode == 0


# ------------------------------------------------------------------------------------------------- streams that fail


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not there")
def test_a_full_disk_under_the_log_changes_neither_the_work_nor_the_exit_code(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 2)
    line = ("extract", tmp_path / "pictures", "-o", tmp_path / "feats.h5", "--model", "tiny-random", "--json")
    with open("/dev/full", "wb") as full:
        ended = run_apart(*line, stderr=full.fileno())
    assert ended.returncode == 0 and json.loads(ended.stdout)["done"] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not there")
@pytest.mark.parametrize("name", ["extract", "plan", "info", "verify"])
@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["text", "json"])
def test_a_result_that_cannot_be_written_is_an_error_and_no_traceback(
    tmp_path: Path, name: str, json_option: tuple[str, ...]
) -> None:
    make_pictures(tmp_path / "pictures", 2)
    output = tmp_path / "feats.h5"
    assert extract(tmp_path / "pictures", "-o", output).returncode == 0
    model = ("--model", "tiny-random")
    words = {"extract": (tmp_path / "pictures", "-o", output, *model), "plan": (tmp_path / "pictures", *model)}
    line = (name, *words.get(name, (output,)), *json_option)
    with open("/dev/full", "wb") as full:
        if name == "extract":
            ended = run_apart(*line, stdout=full.fileno())
        else:
            ended = subprocess.run(command(*line), stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "error: cannot write to standard output: No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr and "Exception ignored" not in ended.stderr


def test_a_run_survives_its_terminal(tmp_path: Path) -> None:
    """Whoever started it in the background has logged out: writes fail with an I/O error."""
    make_pictures(tmp_path / "pictures", 12)
    line = ("extract", tmp_path / "pictures", "-o", tmp_path / "feats.h5", "--model", "tiny-random")
    ours, theirs = pty.openpty()
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with held(Moment(WRITE), tmp_path / "mark", *line, **streams, start_new_session=True) as held_run:
        os.close(theirs)
        os.close(ours)
        held_run.end()
    assert held_run.process.returncode == 0
    assert len(open_features(tmp_path / "feats.h5")) == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_ends_the_reader_of_stderr_too_still_stops_the_run_in_good_order(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C under `2>&1 | tee log`."""
    make_pictures(tmp_path / "pictures", 30)
    line = ("extract", tmp_path / "pictures", "-o", tmp_path / "feats.h5", "--model", "tiny-random", "--json")
    ours, theirs = os.pipe()
    with held(Moment(WRITE), tmp_path / "mark", *line, stdout=subprocess.PIPE, stderr=theirs) as held_run:
        os.close(theirs)
        os.close(ours)
        held_run.process.send_signal(number)
        stdout, _ = held_run.end()
    assert held_run.process.returncode == 128 + number
    told = json.loads(stdout)
    assert told["exit_code"] == 128 + number
    assert told["found"] == told["done"] + told["skipped"] + told["pending"]


@pytest.mark.sweep
def test_an_encoding_that_lacks_a_letter_shows_escapes(tmp_path: Path) -> None:
    make_pictures(tmp_path / "été", 2)
    line = command("extract", tmp_path / "été", "-o", tmp_path / "日本.h5", "--model", "tiny-random")
    ended = subprocess.run(line, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and b"\\u65e5\\u672c.h5: 2 images found" in ended.stdout


# ------------------------------------------------------------------------------------------------- clocks gone wrong


@pytest.mark.parametrize("output", ["feats.h5", "feats"])
def test_a_picture_of_any_year_is_one_like_the_others(tmp_path: Path, output: str) -> None:
    """Nanoseconds since 1970 end in 2262; filesystems go on."""
    years = [-(2**31), -1, 0, 2**32, 9_223_372_035, 9_223_372_037, 15_000_000_000]
    pictures = make_pictures(tmp_path / "pictures", len(years) + 1)
    for picture, seconds in zip(pictures, years, strict=False):
        os.utime(picture, ns=(seconds * 10**9, seconds * 10**9))
    target = tmp_path / output
    for encoded in (len(pictures), 0):
        result = extract(tmp_path / "pictures", "-o", target, "--json")
        assert result.returncode == 0, result.stderr
        assert (summary_of(result)["done"], summary_of(result)["encoded"]) == (len(pictures), encoded)
    assert internvit("plan", tmp_path / "pictures", "--model", "tiny-random").returncode == 0
    verdict = summary_of(internvit("verify", target, "--re-extract", len(pictures), "--json"))
    assert verdict["exit_code"] == 0 and verdict["pictures"]["unchanged"] == len(pictures)


# --------------------------------------------------------------------------------- what the system does not give


def limited(limit: str, *words: object) -> Result:
    """Run the command under a limit of the shell."""
    line = ["bash", "-c", f'{limit}; exec "$@"', "bash", *command(*words)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=PATIENCE)
    return Result(ended.returncode, ended.stdout, ended.stderr)


@pytest.mark.parametrize(
    ("limit", "options", "code"),
    [
        ("ulimit -n 8", (), 1),
        pytest.param("ulimit -n 12", ("--format", "npy"), 1, marks=pytest.mark.sweep),
        pytest.param("ulimit -f 0", (), 6, marks=pytest.mark.sweep),
        ("ulimit -f 1000", (), 6),
        pytest.param("ulimit -v 4000000", ("--batch-size", 65536), 1, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_a_limit_of_the_shell_is_an_error_and_its_exit_code(
    tmp_path: Path, limit: str, options: tuple[object, ...], code: int
) -> None:
    make_pictures(tmp_path / "pictures", 9)
    output = tmp_path / ("feats" if "npy" in options else "feats.h5")
    words = ("extract", tmp_path / "pictures", "-o", output, "--model", "tiny-random", *options)
    result = limited(limit, *words, "--json")
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and "hint:" in result.stderr
    told = summary_of(result)
    assert told["exit_code"] == code and told["error"]
    batch = ("--batch-size", "auto") if "--batch-size" in options else ()
    assert extract(*words[1:], *batch).returncode == 0, "without the limit the same command goes on"


def test_without_a_working_directory_every_command_says_so(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 2)
    gone = tmp_path / "gone"
    for words in (("extract", tmp_path / "pictures", "-o", tmp_path / "f.h5"), ("plan", "."), ("info", "f.h5")):
        gone.mkdir()
        result = limited(f"cd {gone}; rmdir {gone}", *words, "--json")
        assert result.returncode == 1 and summary_of(result)["error"] == "the working directory has been removed"
        assert "Traceback" not in result.stderr


def test_a_bug_is_a_traceback_and_still_one_json_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_path: str) -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr("internvit_cli.commands.info.describe_output", fail)
    with pytest.raises(ZeroDivisionError):
        run(["info", "feats.h5", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["exit_code"], told["error"]) == (1, "ZeroDivisionError: seven")


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300", "1e10", "0", "-1"])
def test_a_time_limit_that_is_none_is_a_usage_error(tmp_path: Path, seconds: str) -> None:
    result = extract(tmp_path, "-o", tmp_path / "f.h5", "--decode-timeout", seconds, "--json")
    assert result.returncode == 2 and summary_of(result)["exit_code"] == 2


# --------------------------------------------------------------------------------------- what nobody can read


def make_unreadable(path: Path) -> None:
    """A folder has its place: nobody can read that as a file, root neither."""
    path.unlink()
    path.mkdir()


def write(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.encode()) and None


def damage_run_log(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run_log": 5}))


def claim_strange_key(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["superseded"] = ["\ud800"]
    text = json.dumps(manifest["shards"], sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(manifest | {"digest": hashlib.sha256(text.encode()).hexdigest()}))


DAMAGE = {
    "no manifest to read": ("manifest.json", make_unreadable, True),
    "no vectors to read": ("shard-00000.pooled.npy", make_unreadable, True),
    "no list to read": ("skipped.jsonl", make_unreadable, False),
    "deep attributes": ("shard-00000.json", write("[" * 200_000), True),
    "deep index": ("shard-00000.images.jsonl", write("[" * 200_000), True),
    "a key that cannot be superseded": ("manifest.json", claim_strange_key, True),
    "a key that cannot be skipped": ("skipped.jsonl", write('{"key": "\\ud800", "reason": "x"}\n'), False),
    "a log of runs that is none": ("shard-00000.json", damage_run_log, False),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_read_is_an_error_of_ours_everywhere(tmp_path: Path, damage: str) -> None:
    name, inflict, ends_readers = DAMAGE[damage]
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "pictures" / "bad.png").write_bytes(b"no picture")
    path = tmp_path / "feats"
    assert extract(tmp_path / "pictures", "-o", path).returncode == 3
    inflict(path / name)
    for words in (("info", path), ("verify", path), ("extract", tmp_path / "pictures", "-o", path, "--retry-skipped")):
        model = ("--model", "tiny-random") if words[0] == "extract" else ()
        result = internvit(*words, *model, "--json")
        assert summary_of(result)["exit_code"] == result.returncode
        assert result.returncode in ((1,) if ends_readers else (0, 1, 3)), (words, result.stdout)
    if ends_readers:
        with pytest.raises(OutputError) as caught:
            _ = [image.pooled for image in open_features(path).values() if image.status is Status.DONE]
        assert caught.value.hint


def test_a_pipe_under_the_name_of_an_output_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 1)
    pipe = tmp_path / "feats.h5"
    os.mkfifo(pipe)
    for words in (("info", pipe), ("verify", pipe), ("extract", tmp_path / "pictures", "-o", pipe)):
        model = ("--model", "tiny-random") if words[0] == "extract" else ()
        ended = subprocess.run(command(*words, *model), capture_output=True, text=True, timeout=PATIENCE)
        told = ended.stdout + ended.stderr
        assert ended.returncode == 1 and ("is a pipe" in told or "is not a regular file" in told)
    assert pipe.is_fifo()


# ------------------------------------------------------------------------------------------------- from run to run


@pytest.mark.parametrize("output", ["feats.h5", "feats"])
def test_pictures_that_were_away_for_a_moment_are_done_when_they_are_back(tmp_path: Path, output: str) -> None:
    """A network folder that drops out in the middle of a run: planned, and gone when they are to be decoded."""
    pictures, away = tmp_path / "pictures", tmp_path / "away"
    make_pictures(pictures, 4)
    real = ShardWriter.rewrite_commit_records

    def drop_out(writer: ShardWriter) -> None:
        pictures.rename(away)
        real(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "rewrite_commit_records", drop_out)
        first = summary_of(extract(pictures, "-o", tmp_path / output, "--json"))
    assert first["reasons"] == {"vanished": 4}
    away.rename(pictures)
    second = extract(pictures, "-o", tmp_path / output, "--json")
    assert second.returncode == 0 and summary_of(second)["encoded"] == 4
    assert internvit("verify", tmp_path / output).returncode == 0


def test_rows_that_an_interrupted_prune_dropped_are_not_counted_as_kept(tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "feats.h5"
    paths = make_pictures(pictures, 6)
    assert extract(pictures, "-o", output).returncode == 0
    for path in paths[:2]:
        path.unlink()
    make_pictures(pictures / "new", 2, seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internvit_cli.extract.engine.LocalEngine.encode", interrupted)
        patch.setattr(Output, "withdraw", lambda _: None)  # nobody clears up after a power cut
        assert extract(pictures, "-o", output, "--prune").returncode == 1
    assert (tmp_path / "feats.h5.partial").exists()
    told = summary_of(extract(pictures, "-o", output, "--json"))
    assert (told["done"], told["kept"], len(open_features(output))) == (6, 0, 6)


def interrupted(*_: object) -> None:
    raise InternvitError("the power went")


@pytest.mark.parametrize("kind", ["h5 folder", "npy folder"])
def test_a_folder_takes_more_shards_than_five_digits_count(tmp_path: Path, kind: str) -> None:
    """Cron adds one a run; tiny shards make them by the thousand."""
    path = tmp_path / kind
    helpers.make_output(path, make_shard(1), KINDS[kind])
    for file in path.glob("shard-00000*"):
        file.rename(path / file.name.replace("00000", "99999"))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "shard-99999"
    text = json.dumps(manifest["shards"], sort_keys=True, separators=(",", ":"))
    manifest["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    for seed in (1, 2):
        helpers.make_output(path, make_shard(2), KINDS[kind], seed=seed)
    Output(str(path)).prepare()
    assert [shard.name for shard in Output(str(path)).finished()] == ["shard-99999", "shard-100000", "shard-100001"]
    assert len(open_features(path)) == 2


@pytest.mark.parametrize(("begun", "finished"), [("h5", "npy"), ("npy", "h5")])
def test_a_finished_run_leaves_nothing_of_one_that_was_cut_short_for_another_format(
    tmp_path: Path, begun: str, finished: str
) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "feats"
    make_pictures(pictures, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internvit_cli.extract.engine.LocalEngine.encode", interrupted)
        patch.setattr(Output, "withdraw", lambda _: None)  # nobody clears up after a power cut
        assert extract(pictures, "-o", output, "--format", begun).returncode == 1
    assert list(output.glob("*.partial"))
    assert extract(pictures, "-o", output, "--format", finished).returncode == 0
    assert not [path.name for path in output.iterdir() if path.suffix in (".partial", ".tmp")]
    assert summary_of(extract(pictures, "-o", output, "--json"))["encoded"] == 0


def test_verify_finds_nothing_wrong_while_an_output_is_being_replaced(tmp_path: Path) -> None:
    """The unfinished shard has the recipe of the output to come."""
    pictures, output = tmp_path / "pictures", tmp_path / "feats"
    make_pictures(pictures, 3)
    assert extract(pictures, "-o", output).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("internvit_cli.extract.engine.LocalEngine.encode", interrupted)
        patch.setattr(Output, "withdraw", lambda _: None)  # nobody clears up after a power cut
        assert extract(pictures, "-o", output, "--pool", "cls", "--overwrite").returncode == 1
    verdict = internvit("verify", output, "--json")
    assert verdict.returncode == 0, summary_of(verdict)["findings"]
    assert extract(pictures, "-o", output, "--pool", "cls", "--overwrite").returncode == 0
    assert internvit("verify", output).returncode == 0


# ------------------------------------------------------------------------------------------- found by hostile users


def test_a_folder_of_coarse_arrays_is_replaced_and_leaves_nothing(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 3)
    output = tmp_path / "feats"
    assert extract(tmp_path / "pictures", "-o", output, "--store-dtype", "int8").returncode == 0
    assert any("visual_scales" in name for name in os.listdir(output))
    assert extract(tmp_path / "pictures", "-o", output, "--store-dtype", "float16", "--overwrite").returncode == 0
    assert not any("visual_scales" in name for name in os.listdir(output))


def test_info_counts_the_tiles_of_rows_that_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = make_pictures(tmp_path / "pictures", 6)
    output = tmp_path / "feats"
    assert extract(tmp_path / "pictures", "-o", output).returncode == 0
    for path in paths[:2]:
        path.unlink()
    assert extract(tmp_path / "pictures", "-o", output, "--prune").returncode == 0
    capsys.readouterr()
    assert run(["info", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tiles"] == sum(image.tiles for image in open_features(output).values())


@pytest.mark.parametrize("command", ["verify", "info", "search"])
def test_an_output_without_a_name_is_a_usage_error_and_never_the_root(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--key", "a"] if command == "search" else []
    assert run([command, "", *extra]) == 2
    assert "the name of the output is empty" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["h5 folder", "npy folder"])
def test_a_folder_whose_first_shard_is_being_filled_can_be_looked_at(tmp_path: Path, kind: str) -> None:
    output = Output(str(tmp_path / "feats"), KINDS[kind])
    output.prepare()
    helpers.fill_partial(output, make_shard(3))
    for path in (tmp_path / "feats", output.partial_path(0)):
        assert run(["info", str(path), "--json"]) == 0
        assert len(open_features(path)) == 3
