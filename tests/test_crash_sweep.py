"""A kill at every system call of a run that changes or syncs anything at its output; creation and renames included."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import crash_checks as checks
import crash_driver
import crash_tracing as tracing
import pytest
from crash_checks import ALL_KINDS
from drivers import PROCESSES

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.sweep,
    pytest.mark.skipif(bool(tracing.why_not_traceable()), reason=tracing.why_not_traceable() or "strace"),
]

KILLED, DONE_WITH_SKIPS = -9, 3
FIRST = ["a.png", "b.png", "bad.png", "c.png", "d/e.png", "spoiled.png", "g.png"]
ADDED = ["aa.png", "d/f.png", "h.png", "spoiled-too.png"]
CHANGED = ["c.png"]


@dataclass(frozen=True)
class Case:
    """A run to be cut: where it starts from, and what it must come to."""

    folder: Path
    kind: str
    known: dict[str, set[bytes]]
    """Digests that each picture has had."""

    @property
    def before(self) -> Path:
        """The output's folder as it is when the run begins."""
        return self.folder / "before"

    @property
    def whole(self) -> Path:
        """The same after an uninterrupted run."""
        return self.folder / "whole"

    def output(self, where: Path) -> Path:
        return where / ALL_KINDS[self.kind][0]

    def arguments(self, where: Path) -> list[str]:
        options = ALL_KINDS[self.kind][1:]
        return [
            "extract",
            str(self.folder / "pictures"),
            "-o",
            str(self.output(where)),
            *options,
        ]

    def run(self, where: Path) -> None:
        log = self.folder / f"{where.name}.log"
        code = tracing.run_traced(self.arguments(where), log)
        assert code == DONE_WITH_SKIPS, log.read_text()


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: a kill of the process leaves the page cache alone, whatever the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def set_scene(folder: Path, kind: str, scene: str) -> Case:
    """Make the pictures, the output as it is before the run, and the output of a run that nothing interrupts."""
    pictures = folder / "pictures"
    checks.make_pictures(pictures, FIRST)
    case = Case(folder, kind, {key: {digest} for key, digest in checks.digests_of(pictures).items()})
    case.before.mkdir()
    if scene == "resume":
        # Cut in the middle of writing rows: some of them are committed, some are not, some were never begun.
        probe = shutil.copytree(case.before, folder / "probe")
        cuts = tracing.calls_on(probe, case.arguments(probe), folder)
        syncs = [cut for cut in cuts if cut.call == "fdatasync"]
        assert tracing.kill_at(syncs[len(syncs) // 3], case.arguments(case.before), folder / "log") == KILLED
        assert list(case.before.rglob("*.partial"))
    elif scene == "takeover":
        case.run(case.before)
    if scene != "creation":
        checks.make_pictures(pictures, ADDED + CHANGED, seed=1)
        for key, digest in checks.digests_of(pictures).items():
            case.known.setdefault(key, set()).add(digest)
    case.run(shutil.copytree(case.before, case.whole))
    return case


def sweep(case: Case, cuts: list[tracing.Cut]) -> list[str]:
    """Cut a run at each of some calls, and finish it with the same command; returns what went wrong."""
    wrong = []
    for cut in cuts:
        name = f"{cut.call}-{cut.number}"
        where = shutil.copytree(case.before, case.folder / name)
        try:
            check_cut(case, cut, where)
        except BaseException:  # noqa: BLE001 - told by the test, with all others
            wrong.append(f"killed at {cut.call} {cut.number}:\n{traceback.format_exc()}")
            continue
        shutil.rmtree(where)
    return wrong


def check_cut(case: Case, cut: tracing.Cut, where: Path) -> None:
    log = case.folder / f"{where.name}.log"
    output = case.output(where)
    code = tracing.kill_at(cut, case.arguments(where), log)
    assert code == KILLED, f"not killed, but ended with {code}:\n{log.read_text()}"
    checks.check_output(output, case.known)
    case.run(where)
    checks.check_output(output, case.known)
    checks.assert_same_output(output, case.output(case.whole))
    log.unlink()


@pytest.mark.parametrize("scene", ["creation", "resume", "takeover"])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_kill_at_any_call_loses_nothing_and_the_same_command_finishes(
    processes: ProcessPoolExecutor, scratch: Path, kind: str, scene: str
) -> None:
    case = processes.submit(set_scene, scratch, kind, scene).result()
    counted = shutil.copytree(case.before, scratch / "counted")
    cuts = processes.submit(tracing.calls_on, counted, case.arguments(counted), scratch).result()
    assert len(cuts) > 50
    parts = [processes.submit(sweep, case, cuts[start::PROCESSES]) for start in range(PROCESSES)]
    wrong = [text for part in parts for text in part.result()]
    names = sorted({cut.call for cut in cuts})
    print(f"\n{kind}, {scene}: {len(cuts)} cut points ({', '.join(names)}), {len(wrong)} losses")
    assert not wrong, f"{len(wrong)} of {len(cuts)} cuts:\n" + "\n".join(wrong[:5])


def test_the_sweep_sees_statuses_that_are_written_before_their_rows(scratch: Path) -> None:
    """The control: what the tests above look for is found where it is."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, begin_misordered_process) as pool:
        case = pool.submit(set_scene, scratch, "file", "creation").result()
        counted = shutil.copytree(case.before, scratch / "counted")
        cuts = pool.submit(tracing.calls_on, counted, case.arguments(counted), scratch).result()
        writes = [cut for cut in cuts if cut.call == "pwrite64"]
        wrong = pool.submit(sweep, case, writes).result()
    lost = [text for text in wrong if "wrong tokens" in text]
    print(f"\ncontrol, statuses first: {len(lost)} of {len(writes)} cuts found")
    assert lost


def begin_misordered_process() -> None:
    tracing.warm_up(crash_driver.Behavior(inline=True, misordered=True, shard_images=4))
