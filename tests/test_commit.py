"""The commit protocol: what is on the disk before what, what a failing disk does, and who may write at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import storage_helpers as helpers
from forking import PATIENCE

from internvit_cli.config import Format, Skipped, Status
from internvit_cli.errors import ExitCode, InternvitError, LockedError, NoSpaceError, OutputError
from internvit_cli.storage import lock
from internvit_cli.storage.durable import check_space, free_bytes, write_file
from internvit_cli.storage.format.layout import CRC32, DIGEST, STATUS, Extent
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output
from internvit_cli.storage.skipped import SkipLog, read_skip_log
from internvit_cli.storage.write.commit import ShardWriter, create_shard
from internvit_cli.storage.write.reuse import reuse_rows

GRIDS = [(1, 1, 0), (2, 1, 1), (1, 1, 0), (1, 3, 1)]
BOTH = pytest.mark.parametrize("shard_format", list(Format), ids=lambda f: f.value)


@pytest.fixture(params=list(Format), ids=lambda f: f.value)
def output(request, tmp_path) -> Output:
    made = Output(str(tmp_path / "feats"), request.param)
    made.prepare()
    return made


def open_writer(output: Output, shard: Any) -> ShardWriter:
    """A writer of a fresh shard."""
    create_shard(output.backend, output.partial_path(0), shard)
    return ShardWriter(output.backend, output.partial_path(0), shard.table)


def reopen_writer(output: Output) -> ShardWriter:
    """A writer as the next process opens it."""
    partial = output.partial()
    return ShardWriter(output.backend, partial.path, partial.stored.table)


@dataclass(frozen=True)
class Call:
    """One system call of a writer."""

    name: str
    path: str
    offset: int = 0
    size: int = 0


@pytest.fixture
def calls(monkeypatch) -> list[Call]:
    """Records positioned writes and syncs, and lets them happen."""
    recorded: list[Call] = []
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def record_pwrite(descriptor: int, data: Any, offset: int) -> int:
        recorded.append(Call("write", path_of(descriptor), offset, len(data)))
        return pwrite(descriptor, data, offset)

    def record_fdatasync(descriptor: int) -> None:
        recorded.append(Call("sync", path_of(descriptor)))
        fdatasync(descriptor)

    monkeypatch.setattr(os, "pwrite", record_pwrite)
    monkeypatch.setattr(os, "fdatasync", record_fdatasync)
    return recorded


def dataset_of(call: Call, extents: dict[str, Extent]) -> str:
    """The dataset that a write went to, whole."""
    for name, extent in extents.items():
        inside = extent.offset <= call.offset and call.offset + call.size <= extent.offset + extent.spec.nbytes
        if call.path == extent.path and inside:
            return name
    raise AssertionError(f"{call} is outside of every dataset")


# ------------------------------------------------------------------------------------------------- order of writes


def test_a_status_is_written_only_after_its_rows_are_synced(output, calls):
    """Rows, digests and CRCs; fdatasync of their files; statuses; fdatasync of theirs: in every checkpoint."""
    shard = helpers.make_shard(helpers.make_table(GRIDS), tile_pooled=True)
    writer = open_writer(output, shard)
    extents = output.backend.extents(output.partial_path(0))
    for rows in ((2, 0), (1,)):
        calls.clear()
        for row in rows:
            writer.write(helpers.random_image(shard, row))
        assert {dataset_of(c, extents) for c in calls} == {"pooled", "visual_tokens", "tile_pooled"}
        assert writer.checkpoint() == len(rows)
        names = [dataset_of(c, extents) if c.name == "write" else "sync" for c in calls]
        first_status, last_status = names.index(STATUS), len(names) - 1 - names[::-1].index(STATUS)
        assert not {DIGEST, CRC32, "pooled", "visual_tokens", "tile_pooled"} & set(names[first_status:])
        before = [i for i, name in enumerate(names[:first_status]) if name == "sync"]
        last_record = max(i for i, name in enumerate(names[:first_status]) if name != "sync")
        synced = {calls[i].path for i in before if i > last_record}
        assert synced >= {c.path for c in calls[:first_status] if c.name == "write"}
        assert calls[last_status + 1 :] == [Call("sync", extents[STATUS].path)]
    writer.close()


def test_no_prefix_of_the_system_calls_leaves_a_status_without_its_rows(output, calls):
    """The statuses of unsynced rows never reach the file, whatever was written in between."""
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    writer = open_writer(output, shard)
    extents = output.backend.extents(output.partial_path(0))
    calls.clear()
    for row in range(4):
        writer.write(helpers.random_image(shard, row))
        assert reopen_writer(output).status.tolist() == [1] * (row // 2 * 2) + [0] * (4 - row // 2 * 2)
        if row == 1:
            writer.checkpoint()
    writer.close()
    dirty: set[str] = set()
    for call in calls:
        if call.name == "sync":
            dirty.discard(call.path)
        elif dataset_of(call, extents) == STATUS:
            assert not dirty - {extents[STATUS].path}
        else:
            dirty.add(call.path)
    assert reopen_writer(output).status.tolist() == [1, 1, 0, 0]


def test_a_status_and_other_bytes_of_its_file_are_synced_apart(tmp_path, calls):
    """In HDF5 all share one file: between the last row and the first status there is a sync of that file."""
    output = Output(str(tmp_path / "feats.h5"))
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    writer = open_writer(output, shard)
    extents = output.backend.extents(output.partial_path(0))
    calls.clear()
    writer.write(helpers.random_image(shard, 1))
    writer.skip(2, Skipped(Status.TRUNCATED, "", ""))
    writer.checkpoint()
    writer.close()
    names = [dataset_of(c, extents) if c.name == "write" else "sync" for c in calls]
    assert names[-3:] == ["sync", STATUS, "sync"]
    assert names.count("sync") == 2


def test_a_writer_that_is_dropped_commits_nothing(output):
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    writer = open_writer(output, shard)
    writer.write(helpers.random_image(shard, 0))
    writer.close()
    assert not reopen_writer(output).status.any()


def test_resuming_writes_every_commit_record_again(output, calls):
    """A sync that failed earlier may have dropped them: same bytes, all rows, synced, statuses last."""
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    helpers.fill_partial(output, shard, {2: Skipped(Status.TRUNCATED, "", "")})
    before = {path: Path(path).read_bytes() for path in {e.path for e in extents_of(output).values()}}
    writer = reopen_writer(output)
    calls.clear()
    writer.rewrite_commit_records()
    writer.close()
    extents = extents_of(output)
    covered = {name: [c for c in calls if c.name == "write" and dataset_of(c, extents) == name] for name in extents}
    for name in (DIGEST, CRC32, STATUS):
        assert sum(call.size for call in covered[name]) == extents[name].spec.nbytes
    names = [dataset_of(c, extents) if c.name == "write" else "sync" for c in calls]
    assert names[-2:] == [STATUS, "sync"]
    assert names[names.index(STATUS) - 1] == "sync"
    assert {path: Path(path).read_bytes() for path in before} == before


def extents_of(output: Output) -> dict[str, Extent]:
    return output.backend.extents(output.partial_path(0))


# --------------------------------------------------------------------------------------------------- failing disks


@pytest.mark.parametrize("which", ["first", "second", "last"])
def test_a_failed_sync_ends_the_run_and_is_never_retried(output, monkeypatch, which):
    """After it nobody knows what is on the disk, so no status follows and the same sync is not asked for again."""
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    writer = open_writer(output, shard)
    syncs = len({extent.path for extent in extents_of(output).values()}) + 1
    failing = {"first": 1, "second": 2, "last": syncs}[which]
    synced: list[str] = []
    real = os.fdatasync

    def fail(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(synced) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fail)
    writer.write(helpers.random_image(shard, 0))
    with pytest.raises(OutputError, match="Input/output error") as caught:
        writer.checkpoint()
    assert caught.value.exit_code == ExitCode.CANNOT_RUN
    assert caught.value.hint
    asked = len(synced)
    assert asked == max(failing, syncs - 1), "those of one step are asked for together"
    if failing < syncs:
        assert not reopen_writer(output).status.any()
    with pytest.raises(OutputError):
        writer.checkpoint()
    assert len(synced) == asked, "a second checkpoint must not sync again as if nothing had happened"
    writer.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_an_exit_code_of_its_own(output, monkeypatch, number):
    """Whichever write meets it first; what was committed stays."""
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    writer = open_writer(output, shard)
    writer.write(helpers.random_image(shard, 0))
    writer.checkpoint()

    def fail(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fail)
        for act in (
            lambda: writer.write(helpers.random_image(shard, 1)),
            lambda: writer.skip(2, Skipped(Status.TRUNCATED, "", "")),
            lambda: writer.append_run_log({}),
            writer.rewrite_commit_records,
        ):
            with pytest.raises(NoSpaceError) as caught:
                act()
            assert caught.value.exit_code == ExitCode.NO_SPACE
            assert caught.value.hint
    writer.close()
    assert reopen_writer(output).status.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_while_small_files_are_written_is_no_traceback(output, monkeypatch, call):
    """The list of skipped images, the manifest and the names of shards are written past the shard's writer."""
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    log = SkipLog(output.skipped_path)
    log.append([(b"a.jpg", Skipped(Status.TRUNCATED, "", ""))])
    helpers.fill_partial(output, shard)

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        for act in (
            lambda: create_shard(output.backend, f"{output.path}/shard-00001.partial", shard),
            lambda: helpers.publish(output, shard),
            lambda: log.rewrite(lambda _: True),
            output.replace_all,
            *([lambda: log.append([(b"b.jpg", Skipped(Status.TRUNCATED, "", ""))])] if call == "fsync" else []),
        ):
            with pytest.raises(NoSpaceError):
                act()


TOO_LARGE = """
import resource, sys
import storage_helpers as helpers
from internvit_cli.config import Format
from internvit_cli.errors import InternvitError
from internvit_cli.storage.write.commit import create_shard
from internvit_cli.storage.output import Output
output = Output(sys.argv[1], Format(sys.argv[2]))
output.prepare()
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    create_shard(output.backend, output.partial_path(0), helpers.make_shard(helpers.make_table([(3, 4, 1)] * 2000)))
except InternvitError as error:
    print(error.message)
    sys.exit(int(error.exit_code))
"""


@BOTH
def test_a_file_over_the_filesystems_limit_is_refused_like_a_full_disk(tmp_path, shard_format):
    """A real limit of the kernel, met while the shard is laid out; no crash of HDF5, and nothing under its name."""
    run = subprocess.run(
        [sys.executable, "-c", TOO_LARGE, tmp_path / "feats", shard_format.value],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == ExitCode.NO_SPACE, run.stdout + run.stderr
    assert not any(name.endswith(".partial") for name in os.listdir(tmp_path / "feats"))


def test_a_plan_that_cannot_fit_is_refused_with_both_figures(tmp_path):
    free = free_bytes(str(tmp_path / "not" / "there" / "yet"))
    check_space(str(tmp_path), free // 2)
    with pytest.raises(NoSpaceError, match=r"needs [\d,]+ bytes more, and [\d,]+ are free"):
        check_space(str(tmp_path), free * 2 + 10**12)


def test_a_small_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_file(str(path), b"one")

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, call, fail)
            with pytest.raises((OSError, InternvitError)):
                write_file(str(path), b"two")
        assert path.read_bytes() == b"one"
    write_file(str(path), b"three")
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["manifest.json"]


# ------------------------------------------------------------------------------------------ the list of the skipped


def test_the_skipped_list_counts_attempts_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "feats.h5.skipped.jsonl"
    truncated = Skipped(Status.TRUNCATED, "OSError", "image file is truncated")
    names = [b"line\nbreak.jpg", b"\xff.jpg"]
    SkipLog(str(path)).append([(name, truncated) for name in names])
    with open(path, "ab") as file:
        file.write(b'{"key": "torn')
    log = SkipLog(str(path))
    log.append([(names[0], truncated)])
    entries = read_skip_log(str(path))
    assert [os.fsencode(entry["key"]) for entry in entries] == [*names, names[0]]
    assert [entry["attempt"] for entry in entries] == [1, 1, 2]
    assert entries[0] == {
        "key": "line\nbreak.jpg",
        "reason": "truncated",
        "exception": "OSError",
        "message": "image file is truncated",
        "attempt": 1,
    }
    log.rewrite(lambda key: key == "line\nbreak.jpg")
    assert [entry["attempt"] for entry in read_skip_log(str(path))] == [2]
    log.rewrite(lambda _: False)
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------- the lock

HOLD = """
import sys, time
from internvit_cli.storage.lock import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the output, ended with the test."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "feats.h5"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_run_is_told_who_holds_the_output(tmp_path, holder):
    """Exit code 75; the message names the process; the holder is not disturbed."""
    with (
        pytest.raises(LockedError, match=rf"process {holder.pid} on \S+, since 20") as caught,
        exclusive(str(tmp_path / "feats.h5")),
    ):
        pass
    assert caught.value.exit_code == 75
    assert caught.value.hint
    assert holder.poll() is None
    assert json.loads((tmp_path / "feats.h5.lock").read_text())["pid"] == holder.pid


def test_a_killed_holder_leaves_nothing_to_clean_up(tmp_path, holder):
    """The kernel drops the lock with the process, and the next run takes the file over."""
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "feats.h5.lock").exists()
    with exclusive(str(tmp_path / "feats.h5")):
        assert json.loads((tmp_path / "feats.h5.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "feats.h5.lock").exists()


def test_a_finished_run_leaves_no_lock_file(tmp_path):
    """However it ends."""
    with exclusive(str(tmp_path / "feats.h5")):
        assert (tmp_path / "feats.h5.lock").exists()
    with pytest.raises(ZeroDivisionError), exclusive(str(tmp_path / "feats.h5")):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_lock_file_that_somebody_removed_spoils_nothing(tmp_path):
    with exclusive(str(tmp_path / "feats.h5")):
        (tmp_path / "feats.h5.lock").unlink()


def test_a_lock_on_an_unlinked_file_is_no_lock(tmp_path, monkeypatch):
    """Whoever waited for a file that its holder unlinked looks again, and locks what the path names now."""
    path = tmp_path / "feats.h5.lock"
    real = fcntl.flock
    raced: list[bool] = []

    def unlink_first(descriptor: int, operation: int) -> None:
        if not raced:
            raced.append(True)
            path.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", unlink_first)
    with exclusive(str(tmp_path / "feats.h5")), open(path) as ours:
        assert json.load(ours)["pid"] == os.getpid()
        with pytest.raises(BlockingIOError), open(path) as theirs:
            real(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_full_disk_does_not_keep_a_run_from_its_lock(tmp_path, monkeypatch):
    """The lock is the kernel's; what is written into its file is for people."""

    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with exclusive(str(tmp_path / "feats.h5")):
        pass


def test_a_filesystem_without_locks_is_an_error_that_names_the_option(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", fail)
    with pytest.raises(OutputError) as caught, exclusive(str(tmp_path / "feats.h5")):
        pass
    assert "--no-lock" in caught.value.hint
    with exclusive(str(tmp_path / "feats.h5"), enabled=False):
        pass


def test_a_folder_that_is_not_there_cannot_be_locked(tmp_path):
    with pytest.raises(OutputError) as caught, exclusive(str(tmp_path / "missing" / "feats.h5")):
        pass
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff\x00", b'{"pid": 1}'])
def test_a_lock_file_of_any_content_is_survived(tmp_path, content):
    path = tmp_path / "feats.h5.lock"
    path.write_bytes(content)
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LockedError), exclusive(str(tmp_path / "feats.h5")):
            pass
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------- rows of an older file


def test_rows_of_a_finished_file_are_taken_over_bit_for_bit(tmp_path):
    """Same file, same row; what changed, is new, or was damaged on the disk stays pending."""
    keys = [b"a", b"b", b"c", b"d", b"skipped"]
    grids = [(1, 1, 0), (2, 1, 1), (1, 3, 1), (1, 1, 0), (1, 2, 1)]
    old_shard = helpers.make_shard(helpers.make_table(grids, keys), tile_pooled=True)
    path = tmp_path / "feats.h5"
    written = helpers.make_output(path, old_shard, skips={4: Skipped(Status.TRUNCATED, "", "")})
    output = Output(str(path))
    tokens = output.backend.extents(str(path))["visual_tokens"]
    with open(path, "r+b") as file:  # one bit of the second tile of b, which is tile row 2
        file.seek(tokens.offset + 2 * tokens.spec.row_bytes + 3)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))

    order = np.array([3, 1, 2, 0, 4])
    table = old_shard.table.take(order)
    changed = table.file_mtime_ns.copy()
    changed[2] += 1  # c
    columns = {name: getattr(table, name) for name in helpers.COLUMN_DTYPES} | {"file_mtime_ns": changed}
    new_shard = helpers.make_shard(
        helpers.ImageTable.build(table.keys, np.zeros(5, np.uint8), columns), tile_pooled=True
    )
    writer = open_writer(output, new_shard)
    assert reuse_rows(output.finished()[0], new_shard.table, writer) == 2
    writer.close()
    assert reopen_writer(output).status.tolist() == [1, 0, 0, 1, 0]

    plain = helpers._read_h5(output.partial_path(0)).arrays
    offset = plain["image/tile_offset"].tolist()
    for row, before in ((0, 3), (3, 0)):
        image, tiles = written[before], slice(offset[row], offset[row + 1])
        for name, rows in helpers.rows_of(image).items():
            place = slice(row, row + 1) if name.startswith("pooled") else tiles
            assert plain[name][place].tobytes() == rows.tobytes()
        assert plain["image/digest"][row].tobytes() == image.digest
        assert plain["image/crc32"][row] == helpers.expected_crc32(image)
        assert zlib.crc32(plain["pooled"][row].tobytes()) != 0


def test_messages_of_a_failing_disk_name_the_file(output, monkeypatch):
    shard = helpers.make_shard(helpers.make_table(GRIDS))
    writer = open_writer(output, shard)

    def fail(*_: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OutputError, match=re.escape(output.path)):
        writer.write(helpers.random_image(shard, 0))
    writer.close()
