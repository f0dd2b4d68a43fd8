"""A disk that is full, or fails: real filesystems of 64 MB, and I/O errors in place of every sync."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import crash_checks as checks
import crash_driver
import crash_tracing as tracing
import pytest
from crash_checks import KINDS
from crash_driver import Behavior
from forking import PATIENCE

from internvit_cli.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import ProcessPoolExecutor

    from drivers import Driver

QUICK_KINDS = ["file", "npy folder", pytest.param("h5 folder", marks=pytest.mark.sweep)]
DISK = "64M"
NAMES = [*(f"{number:02d}.png" for number in range(60)), "bad.png", "spoiled.png"]
ROWS = Behavior(tokens=(256, 256), checkpoint_bytes=2_000_000)
"""A tile takes 128 kB: all pictures together fill about half of the disk."""


def words(pictures: Path, output: Path, options: Sequence[str] = ()) -> tuple[object, ...]:
    cut = [] if output.suffix == ".h5" else ["--shard-size", "8MB"]
    return "extract", pictures, "-o", output, *cut, *options


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    checks.make_pictures(folder, NAMES)
    return folder


@pytest.fixture(params=["ext4", pytest.param("tmpfs", marks=pytest.mark.sweep)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty filesystem of 64 MB; tmpfs has no room set aside for root, ext4 has."""
    folder, image = tmp_path / "disk", tmp_path / "image"
    folder.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    else:
        with image.open("wb") as file:
            file.truncate(64 << 20)
        mount = ["mount", "-o", "loop", str(image), str(folder)]
        if shutil.which("mkfs.ext4") is None or run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)]).returncode:
            pytest.skip("mkfs.ext4 is not installed")
    if (mounted := run(mount)).returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder
    run(["umount", str(folder)])


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_a_plan_that_cannot_fit_ends_with_6_and_both_figures_before_any_work(
    driver: Driver, disk: Path, pictures: Path, kind: str
) -> None:
    name, *options = KINDS[kind]
    line = words(pictures, disk / name, options)
    filler = disk / "filler"
    crash_driver.fill_disk(str(filler))
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - (4 << 20))
    ended = driver.run(line, ROWS)
    assert ended.code == ExitCode.NO_SPACE, ended.said
    assert "bytes more, and" in ended.said and "hint: free some space" in ended.said
    assert "encoding with" not in ended.said and "Traceback" not in ended.said
    assert not list(disk.rglob("*.partial*")), "nothing was begun"
    filler.unlink()
    assert driver.run(line, ROWS).code == ExitCode.SKIPPED


@pytest.mark.parametrize("after", [*(pytest.param(after, marks=pytest.mark.sweep) for after in (0, 7)), 30])
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_when_space_runs_out_in_the_middle_nothing_committed_is_lost_and_the_rerun_finishes(
    driver: Driver, disk: Path, pictures: Path, kind: str, after: int
) -> None:
    """As where space cannot be set aside: some other program takes all of it while rows are written."""
    name, *options = KINDS[kind]
    line = words(pictures, disk / name, options)
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}
    filler = disk / "filler"
    ended = driver.run(line, replace(ROWS, no_reserve=True, report=True, fill_disk=str(filler), fill_disk_after=after))
    assert ended.code == ExitCode.NO_SPACE, ended.said
    assert "error: no room for" in ended.said and "hint: " in ended.said and "Traceback" not in ended.said
    said = [int(line) for line in ended.said.splitlines() if line.isdigit()]
    assert checks.check_output(disk / name, known) >= (said[-1] if said else 0)
    filler.unlink()
    again = driver.run(line, ROWS)
    assert again.code == ExitCode.SKIPPED, again.said
    assert checks.check_output(disk / name, known) == len(NAMES)


@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_space_that_was_set_aside_is_there_whatever_others_write(
    driver: Driver, disk: Path, pictures: Path, kind: str
) -> None:
    name, *options = KINDS[kind]
    if kind != "file":
        options += ["--shard-size", "1GB"]  # one shard: of later ones nothing is set aside
    line = words(pictures, disk / name, options)
    filler = disk / "filler"
    ended = driver.run(line, replace(ROWS, fill_disk=str(filler), fill_disk_after=5))
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}
    if ended.code == ExitCode.SKIPPED:
        assert checks.check_output(disk / name, known) == len(NAMES)
        return
    # The list of skipped images and the published index are small files that come last; they had no room.
    assert ended.code == ExitCode.NO_SPACE, ended.said
    assert checks.check_output(disk / name, known) >= len(NAMES) - 2
    filler.unlink()
    assert driver.run(line, ROWS).code == ExitCode.SKIPPED
    assert checks.check_output(disk / name, known) == len(NAMES)


# --------------------------------------------------------------------------------------------------------- I/O errors


def fail_each_sync(folder: Path, kind: str) -> tuple[int, list[str]]:
    """Run once for every sync of a run, with an I/O error in its place; returns how many, and what went wrong."""
    pictures, name, options = folder / "pictures", *KINDS[kind][:1], KINDS[kind][1:]
    checks.make_pictures(pictures, ["a.png", "b.png", "bad.png", "c.png", "d/e.png", "spoiled.png", "g.png"])
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}

    def arguments(where: Path) -> list[str]:
        return ["extract", str(pictures), "-o", str(where / name), *options]

    for part in ("whole", "counted"):
        (folder / part).mkdir()
    assert tracing.run_traced(arguments(folder / "whole"), folder / "log") == ExitCode.SKIPPED
    calls = tracing.calls_on(folder / "counted", arguments(folder / "counted"), folder)
    syncs = [cut for cut in calls if cut.call in tracing.SYNCS]
    wrong = []
    for cut in syncs:
        where = folder / f"{cut.call}-{cut.number}"
        where.mkdir()
        log = folder / f"{where.name}.log"
        code = tracing.fail_at(cut, arguments(where), log)
        said = log.read_text()
        is_clean = "error: cannot write" in said and "Input/output error" in said and "Traceback" not in said
        if code != ExitCode.CANNOT_RUN or not is_clean:
            wrong.append(f"{cut}: ended with {code}:\n{said}")
        checks.check_output(where / name, known)
        again = tracing.run_traced(arguments(where), log)
        if again != ExitCode.SKIPPED:
            wrong.append(f"{cut}: the next run ended with {again}:\n{log.read_text()}")
            continue
        checks.check_output(where / name, known)
        checks.assert_same_output(where / name, folder / "whole" / name)
        shutil.rmtree(where)
    return len(syncs), wrong


@pytest.mark.sweep
@pytest.mark.skipif(bool(tracing.why_not_traceable()), reason=tracing.why_not_traceable() or "strace")
@pytest.mark.parametrize("kind", QUICK_KINDS)
def test_an_io_error_at_any_sync_is_fatal_and_the_next_run_finishes(processes: ProcessPoolExecutor, kind: str) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        count, wrong = processes.submit(fail_each_sync, Path(folder), kind).result()
    print(f"\n{kind}: {count} syncs failed in turn, {len(wrong)} went wrong")
    assert count > 8
    assert not wrong, "\n".join(wrong[:5])
