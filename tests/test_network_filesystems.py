"""Filesystems that answer as network and shared ones do: without locks, without folders to sync, without fallocate."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import storage_helpers as helpers
from exchange_helpers import make, names_in
from run_helpers import Result, command, extract, internvit, make_pictures, summary_of

from internvit_cli.commands import doctor
from internvit_cli.errors import ENOTSUPP, InternvitError, LockedError, OutputError
from internvit_cli.storage import durable
from internvit_cli.storage.durable import rename_durably, sync_path, unsynced_folder, write_file
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output

if TYPE_CHECKING:
    from pathlib import Path

HELD = (errno.EWOULDBLOCK, errno.EAGAIN)
LOCKLESS = sorted({*errno.errorcode, ENOTSUPP, 526, 528, 9999} - {*HELD, errno.EINTR})
"""Whatever else flock may answer, what the C library has no words for among it."""
SYNCLESS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, ENOTSUPP)
FAILING = (errno.EIO, errno.EDQUOT, errno.ENOSPC, errno.EROFS, errno.ENXIO, errno.ESTALE, errno.EREMOTEIO)


def failing(number: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize("number", LOCKLESS, ids=lambda number: errno.errorcode.get(number, str(number)))
def test_only_one_answer_of_flock_means_that_another_run_holds_the_output(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(OutputError) as caught, exclusive(str(tmp_path / "feats.h5")):
        pass
    assert caught.value.exit_code == 1
    assert "feats.h5.lock has no locks that work" in caught.value.message
    if number not in (ENOTSUPP, 526, 528):
        assert os.strerror(number) in caught.value.message
    assert "Unknown error" not in caught.value.message or number == 9999
    assert "--no-lock" in caught.value.hint
    assert names_in(tmp_path) == []
    with exclusive(str(tmp_path / "feats.h5"), enabled=False):
        pass


@pytest.mark.parametrize("number", sorted(set(HELD)))
def test_that_answer_is_an_exit_code_of_its_own_and_leaves_the_lock(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with pytest.raises(LockedError) as caught, exclusive(str(tmp_path / "feats.h5")):
        pass
    assert caught.value.exit_code == 75
    assert names_in(tmp_path) == ["feats.h5.lock"]


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "pipe"])
def test_what_has_the_name_of_the_lock_is_named_and_left_alone(kind: str, tmp_path: Path) -> None:
    lock, other = tmp_path / "feats.h5.lock", tmp_path / "thesis.txt"
    other.write_text("years of work")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(other if kind == "link" else "nowhere")
    before = lock.lstat()[:7]  # all but its times
    with pytest.raises(OutputError) as caught, exclusive(str(tmp_path / "feats.h5")):
        pass
    assert f"{lock} is a {kind.rsplit(maxsplit=1)[-1]}" in caught.value.message
    assert caught.value.hint
    assert other.read_text() == "years of work"
    assert lock.lstat()[:7] == before and not (tmp_path / "nowhere").exists()


def test_a_lock_that_has_another_name_is_replaced_and_the_other_keeps_what_it_has(tmp_path: Path) -> None:
    """A snapshot of hard links, taken while a run held the output that died since."""
    (tmp_path / "feats.h5.lock").write_text("of then")
    os.link(tmp_path / "feats.h5.lock", tmp_path / "snapshot")
    with exclusive(str(tmp_path / "feats.h5")):
        assert json.loads((tmp_path / "feats.h5.lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "snapshot").read_text() == "of then"
    assert names_in(tmp_path) == ["snapshot"]


# --------------------------------------------------------------------------------------------------- syncs of folders


def only_for_folders(number: int) -> Any:
    """An fsync that fails for folders."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return fail


@pytest.mark.parametrize("number", SYNCLESS)
def test_a_folder_that_cannot_be_synced_ends_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", only_for_folders(number))
    write_file(str(tmp_path / "a"), b"a")
    rename_durably(str(tmp_path / "a"), str(tmp_path / "b"))
    helpers.make_output(tmp_path / "feats.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)])))
    helpers.make_output(tmp_path / "feats", helpers.make_shard(helpers.make_table([(1, 1, 0)])))
    note = unsynced_folder(str(tmp_path))
    assert "Unknown error" not in note and "power cut" in note and str(tmp_path) in note


@pytest.mark.parametrize("number", FAILING)
def test_a_disk_that_fails_under_a_folder_is_fatal_and_asked_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fail = [], only_for_folders(number)

    def count(descriptor: int) -> None:
        calls.append(descriptor)
        fail(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    with pytest.raises(InternvitError, match=re.escape(os.strerror(number))):
        unsynced_folder(str(tmp_path))
    assert len(calls) == 1


@pytest.mark.parametrize("number", SYNCLESS)
def test_a_file_that_cannot_be_synced_is_fatal(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OutputError):
        sync_path(str(tmp_path / "a"))
    with pytest.raises(OutputError):
        write_file(str(tmp_path / "b"), b"b")
    assert names_in(tmp_path) == ["a"]


def test_a_folder_that_can_be_written_and_not_read_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", failing(errno.EACCES))
        assert sync_path(str(tmp_path)) == os.strerror(errno.EACCES)
        with pytest.raises(OutputError):
            sync_path(str(tmp_path / "file"))


def test_a_run_says_once_what_is_not_promised_and_so_does_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "pictures", 2)
    make(tmp_path / "a.h5")
    monkeypatch.setattr(os, "fsync", only_for_folders(errno.EINVAL))
    for name in ("f.h5", "f"):
        result = extract(tmp_path / "pictures", "-o", tmp_path / name, "--tokens", "none", "--json")
        assert result.returncode == 0, result.stderr
        assert sum("power cut" in note for note in summary_of(result)["notes"]) == 1  # type: ignore[attr-defined]
    again = extract(tmp_path / "pictures", "-o", tmp_path / "f", "--tokens", "none", "--json")
    assert not any("power cut" in note for note in summary_of(again)["notes"])  # type: ignore[attr-defined]
    for line in (
        ("export", tmp_path / "a.h5", tmp_path / "b.csv"),
        ("merge", tmp_path / "a.h5", tmp_path / "a.h5", "-o", tmp_path / "m"),
    ):
        assert internvit(*line).stderr.count("power cut") == 1


def test_doctor_tries_the_output_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {check.state for check in doctor._folder(str(tmp_path / "f.h5"))} == {doctor.CheckState.OK}
    monkeypatch.setattr(os, "fsync", only_for_folders(errno.EOPNOTSUPP))
    monkeypatch.setattr(fcntl, "flock", failing(ENOTSUPP))
    monkeypatch.setattr(doctor, "reserve", lambda _: False)
    found = {check.name: check for check in doctor._folder(str(tmp_path / "f.h5"))}
    for name in ("names", "reserving", "locking"):
        assert found[name].state is doctor.CheckState.NOTE and found[name].hint, name
    assert "power cut" in found["names"].found and "ENOTSUPP" in found["locking"].found
    monkeypatch.setattr(os, "fsync", only_for_folders(errno.EIO))
    found = {check.name: check for check in doctor._folder(str(tmp_path / "f.h5"))}
    assert found["names"].state is doctor.CheckState.BAD
    assert names_in(tmp_path) == []


# -------------------------------------------------------------------------------------------------- the system's calls


@pytest.fixture(scope="session")
def shim(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that stands before the C library and answers as such filesystems do."""
    source = shared / "cases" / "shim.c"
    if shutil.which("gcc") is None or not source.exists():
        pytest.skip("there is no gcc, or no shim.c")
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def run_with(shim: Path, answers: str, *arguments: object) -> Result:
    surroundings = os.environ | {"LD_PRELOAD": str(shim), "SHIM": answers}
    result = subprocess.run(command(*arguments), capture_output=True, text=True, env=surroundings)
    return Result(result.returncode, result.stdout, result.stderr)


@pytest.mark.parametrize("answer", ["flock37", "flock38", "flock524", "flock5", "flock13", "flock9"])
def test_the_command_ends_with_1_where_locks_fail_and_leaves_nothing(shim: Path, tmp_path: Path, answer: str) -> None:
    make_pictures(tmp_path / "pictures", 1)
    line = ("extract", tmp_path / "pictures", "-o", tmp_path / "f.h5", "--model", "tiny-random", "--tokens", "none")
    result = run_with(shim, answer, *line)
    assert result.returncode == 1
    assert "has no locks that work" in result.stderr and "--no-lock" in result.stderr
    assert names_in(tmp_path) == ["pictures"]


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("feats", "dirsync22,falloc95"),
        pytest.param("feats.h5", "dirsync95,falloc1", marks=pytest.mark.sweep),
        pytest.param("feats.h5", "dirsync9,falloc1,flock524", marks=pytest.mark.sweep),
    ],
)
def test_the_command_goes_on_where_folders_are_not_synced_and_space_is_not_set_aside(
    shim: Path, tmp_path: Path, name: str, answers: str
) -> None:
    make_pictures(tmp_path / "pictures", 2)
    line = ["extract", tmp_path / "pictures", "-o", tmp_path / name, "--model", "tiny-random", "--tokens", "none"]
    result = run_with(shim, answers, *line, "--json", "--no-lock")
    assert result.returncode == 0, result.stderr
    assert sum("power cut" in note for note in summary_of(result)["notes"]) == 1


@pytest.mark.sweep
def test_a_file_s_sync_that_is_refused_is_fatal(shim: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 1)
    line = ("extract", tmp_path / "pictures", "-o", tmp_path / "f.h5", "--model", "tiny-random", "--tokens", "none")
    result = run_with(shim, "fdatasync22", *line)
    assert result.returncode == 1 and "Invalid argument" in result.stderr


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, ENOTSUPP])
def test_a_filesystem_that_sets_no_space_aside_leaves_files_sparse(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"a")
    answers = iter([errno.EINTR, number])

    class Library:
        @staticmethod
        def fallocate(*_: Any) -> int:
            return -1

    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: Library)
    monkeypatch.setattr(durable.ctypes, "get_errno", lambda: next(answers))
    assert durable.reserve(str(tmp_path / "a")) is False


def test_a_run_may_hold_an_output_that_is_not_there_yet(tmp_path: Path) -> None:
    with exclusive(Output(str(tmp_path / "f")).path), pytest.raises(LockedError), exclusive(str(tmp_path / "f")):
        pass
