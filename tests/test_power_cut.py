"""Power cuts: ext4 on a loop mount that is shut down, without its journal's last entries, while the driver writes."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import crash_checks as checks
import pytest
from crash_checks import KINDS, shards_of
from forking import PATIENCE
from moments import COMMIT, DISK, WRITE, Moment, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.sweep

SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN of Linux."""
WITHOUT_LOG_FLUSH = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH: what was not synced is gone, as after a power cut."""
DISK_MEGABYTES = 192
DRIVER = Path(__file__).with_name("crash_driver.py")
CUTS = 7
"""Of each kind of output."""
CONTROL_CUTS = 3
LAST_CALLS = 8
"""After the last image a run calls the disk more often than this."""
PICTURES = 40
ROW_SIZE = ("--tokens", "256", "256")
"""A tile takes 128 kB, as those of real models take megabytes."""
CHECKPOINT = ("--checkpoint-bytes", "2000000")


class Disk:
    """A small ext4 filesystem whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self._image, self.mount_point = folder / "disk.img", folder / "disk"
        self.mount_point.mkdir(parents=True)

    def make(self) -> None:
        self._image.unlink(missing_ok=True)
        with self._image.open("wb") as file:
            file.truncate(DISK_MEGABYTES << 20)
        _command("mkfs.ext4", "-q", "-F", str(self._image))
        self.mount()

    def mount(self) -> None:
        _command("mount", "-o", "loop", str(self._image), str(self.mount_point))

    def unmount(self) -> None:
        if os.path.ismount(self.mount_point):
            _command("umount", str(self.mount_point))

    def cut_power(self) -> None:
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
        finally:
            os.close(descriptor)


def _command(*arguments: str) -> None:
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)
    if run.returncode:
        raise OSError(f"{' '.join(arguments)}: {run.stderr.strip()}")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    disk = Disk(tmp_path_factory.mktemp("power"))
    try:
        disk.make()
        disk.cut_power()
    except OSError as error:
        disk.unmount()
        pytest.skip(f"this needs root, loop mounts, and ext4 that can be shut down: {error}")
    disk.unmount()
    yield disk
    disk.unmount()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    names = [f"{number:02d}.png" for number in range(PICTURES)]
    checks.make_pictures(folder, [*names, "bad.png", "spoiled.png"])
    return folder


def driver(pictures: Path, disk: Disk, kind: str, *own: str) -> list[str]:
    output, *options = KINDS[kind]
    where = str(disk.mount_point / output)
    arguments = ["extract", str(pictures), "-o", where, *shards_of(kind, "20MB"), "--quiet", *options]
    return [sys.executable, str(DRIVER), *ROW_SIZE, *CHECKPOINT, *own, "--", *arguments]


def run_and_cut(disk: Disk, pictures: Path, kind: str, moment: Moment, *own: str) -> int:
    """Run the driver up to a moment, and cut the power while it stands still there.

    Returns:
        The images that it had said to be on the disk by then.
    """
    command = driver(pictures, disk, kind, "--report", "--moment", moment.plan("SIGSTOP"), *own)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0)
    assert process.stdout is not None
    wait_until(lambda: is_stopped(process.pid), process)
    disk.cut_power()
    process.kill()
    reports = [int(line) for line in process.stdout.read().split()]
    process.wait()
    disk.unmount()
    disk.mount()
    return total_of(reports)


def is_stopped(pid: int) -> bool:
    """Whether every thread of a process stands still: the signal that stops one takes a moment for the others."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):  # a thread that ended since it was listed: look again
        return False
    return set(states) == {"T"}


def total_of(reports: list[int]) -> int:
    """Settled images over all shards, from each shard's rising counts."""
    total, last = 0, 0
    for count in reports:
        if count < last:
            total += last
        last = count
    return total + last


def finishes(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 3, run.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_power_cut_every_committed_row_is_there_and_the_same_command_finishes(
    disk: Disk, pictures: Path, kind: str
) -> None:
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}
    chance, settled = random.Random(kind), []
    for cut in range(CUTS):
        disk.make()
        # Spread over the images, and there at any call of the disk; after the last image there are as many.
        moment = Moment(WRITE, 1 + cut * (PICTURES - 1) // (CUTS - 1)).then(DISK, chance.randint(1, LAST_CALLS))
        said = run_and_cut(disk, pictures, kind, moment)
        found = checks.check_output(disk.mount_point / KINDS[kind][0], known)
        assert found >= said, f"{said} images were said to be on the disk, and {found} are"
        settled.append(found)
        finishes(driver(pictures, disk, kind))
        assert checks.check_output(disk.mount_point / KINDS[kind][0], known) == PICTURES + 2
        disk.unmount()
    print(f"\n{kind}: {CUTS} power cuts, images committed at each: {sorted(settled)}, none lost")


def test_the_power_cut_finds_statuses_that_are_written_before_their_rows(disk: Disk, pictures: Path) -> None:
    """The control: the wrong order, in the driver only, must be caught, or else the test above proves nothing."""
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}
    caught = 0
    for number in range(2, 2 + CONTROL_CUTS):
        disk.make()
        run_and_cut(disk, pictures, "file", Moment(COMMIT, number), "--misordered", "--inline")
        caught += is_damaged(disk.mount_point / "feats.h5", known)
        disk.unmount()
    print(f"\ncontrol, statuses first: {caught} of {CONTROL_CUTS} power cuts found rows that were not there")
    assert caught


def is_damaged(output: Path, known: dict[str, set[bytes]]) -> bool:
    try:
        checks.check_output(output, known)
    except AssertionError:
        return True
    return False
