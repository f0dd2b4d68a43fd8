"""Processes that may die: a crash or a hang costs the task at hand, never a neighbor, and never leaves a process."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import types
from typing import TYPE_CHECKING, Any
from unittest.mock import ANY

import numpy as np
import pytest
from moments import wait_until
from PIL import Image
from worker_handlers import FOR_EVER

from internvit_cli.config import PixelRule, Skipped, Status, TilingRule
from internvit_cli.decode import decoder as decoder_module
from internvit_cli.decode.decoder import DecodedImage, DecodeJob, DecodeOptions, Decoder, FailedImage
from internvit_cli.decode.pictures import decode_tiles
from internvit_cli.errors import InternvitError
from internvit_cli.plan.headers import read_header
from internvit_cli.plan.tiling import choose_grid, tile_count
from internvit_cli.runtime import workers
from internvit_cli.runtime.workers import QUEUE_DEPTH, FinishedTask, LostTask, WorkerPool, WorkerSpec, map_in_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fresh_workers")

OBEY = WorkerSpec("worker_handlers:obey")


def drain(pool: WorkerPool) -> dict[int, FinishedTask | LostTask]:
    """All outcomes that are still to come, by task."""
    outcomes: dict[int, FinishedTask | LostTask] = {}
    while pool.outstanding:
        for outcome in pool.wait():
            assert outcome.task_id not in outcomes
            outcomes[outcome.task_id] = outcome
    return outcomes


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int]) -> None:
    wait_until(lambda: not any(map(is_alive, pids)))


class Clock:
    """The time that a pool sees: it passes as a test says, so that no task is late for the machine's sake."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, passing: Callable[[float], float]) -> None:
        """Replace the clock of `workers`.

        Args:
            monkeypatch: pytest's.
            passing: called when a pool has waited in vain; gets the seconds that it meant to wait, and returns those
                that have passed.
        """
        self._now = 0.0
        self._passing = passing
        self._wait = workers.wait
        monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=self.monotonic, perf_counter=time.time))
        monkeypatch.setattr(workers, "wait", self.wait)

    def monotonic(self) -> float:
        self._now += 1e-6  # no two looks at a clock are at the same time
        return self._now

    def wait(self, connections: list[Any], timeout: float | None) -> list[Any]:
        ready = self._wait(connections, 0.01)
        if not ready and timeout is not None:
            self._now += self._passing(timeout)
        return ready


# -------------------------------------------------------------------------------------------------------- results


def test_every_task_has_its_result():
    with WorkerPool(WorkerSpec("worker_handlers:double"), 2, 30) as pool:
        for number in range(50):
            pool.submit(number, number)
        outcomes = drain(pool)
    assert {task: outcome.result for task, outcome in outcomes.items()} == {n: 2 * n for n in range(50)}
    assert all(outcome.seconds >= 0 for outcome in outcomes.values())


def test_one_worker_keeps_the_order_of_its_queue():
    with WorkerPool(WorkerSpec("worker_handlers:double"), 1, 30) as pool:
        for number in (5, 3, 9, 1):
            pool.submit(number, number)
        order = []
        while pool.outstanding:
            order += [outcome.task_id for outcome in pool.wait()]
    assert order == [5, 3, 9, 1]


def test_mapping_yields_every_outcome_and_reads_its_input_lazily():
    """Only a pool's fill of payloads is taken from the iterable ahead of the outcomes."""
    taken = 0

    def payloads() -> Iterator[int]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    with WorkerPool(WorkerSpec("worker_handlers:double"), 2, 30) as pool:
        seen = {}
        for outcome in map_in_workers(pool, payloads()):
            seen[outcome.task_id] = outcome.result
            assert taken <= len(seen) + 2 * QUEUE_DEPTH + 1
        assert seen == {n: 2 * n for n in range(40)}
        assert list(map_in_workers(pool, [])) == []


def test_waiting_has_a_time_limit(tmp_path):
    with WorkerPool(OBEY, 1, FOR_EVER) as pool:
        assert pool.wait(0.01) == []
        pool.submit(0, ("hang", str(tmp_path / "begun")))
        started = time.monotonic()
        assert pool.wait(0.2) == [], "it came back, although the task never ends"
        assert time.monotonic() - started > 0.15
        assert pool.outstanding == 1


# --------------------------------------------------------------------------------------------------- deaths and hangs


@pytest.mark.parametrize(
    ("task", "words"), [(("die", 0), "SIGKILL"), (("exit", 7), "exit code 7"), (("raise", "x"), "exit code 1")]
)
def test_a_death_costs_the_task_at_hand_and_no_other(task, words):
    """The others that were in the dead worker's queue are done by its successor."""
    with WorkerPool(OBEY, 1, 30) as pool:
        for number in range(6):
            pool.submit(number, task if number == 2 else ("echo", number))
        outcomes = drain(pool)
        assert isinstance(outcomes[2], LostTask)
        assert outcomes[2].status is Status.WORKER_DIED
        assert words in outcomes[2].message
        assert [outcomes[n].result for n in (0, 1, 3, 4, 5)] == [0, 1, 3, 4, 5]


def test_a_hang_costs_one_task_and_its_worker(tmp_path, monkeypatch):
    begun = tmp_path / "begun"
    pids: list[int] = []
    Clock(monkeypatch, lambda seconds: seconds if begun.exists() and is_alive(pids[0]) else 0.0)
    with WorkerPool(OBEY, 1, 0.5) as pool:
        pool.submit(0, ("pid", 0))
        pids.append(drain(pool)[0].result)
        pool.submit(1, ("hang", str(begun)))
        pool.submit(2, ("pid", 0))
        outcomes = drain(pool)
        assert outcomes[1] == LostTask(1, Status.TIMEOUT, "gave no result within 0.5 s")
        assert outcomes[2].result not in pids
        wait_until_gone(pids)


def test_time_in_the_queue_does_not_count(tmp_path, monkeypatch):
    """A task's clock starts when its worker takes it up, not when it was given."""
    files = [(tmp_path / f"begun{number}", tmp_path / f"end{number}") for number in range(4)]
    left = dict.fromkeys(range(4), 0.6)

    def passing(seconds: float) -> float:
        """Each task takes six tenths of a second."""
        at_hand = next((n for n, (begun, end) in enumerate(files) if begun.exists() and not end.exists()), None)
        if at_hand is None:
            return 0.0
        step = min(seconds, left[at_hand])
        left[at_hand] -= step
        if left[at_hand] <= 0:
            files[at_hand][1].touch()
        return step

    Clock(monkeypatch, passing)
    with WorkerPool(OBEY, 1, 1.0) as pool:
        for number, (begun, end) in enumerate(files):
            pool.submit(number, ("hold", (str(begun), str(end))))
        assert all(isinstance(outcome, FinishedTask) for outcome in drain(pool).values())
    assert not any(left.values()), "two seconds and more have passed"


def test_time_in_which_everything_was_stopped_does_not_count(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP and SIGCONT for all processes of a job, as a batch system suspends it."""
    begun, end = tmp_path / "begun", tmp_path / "end"
    stopped: list[int] = []

    def passing(seconds: float) -> float:
        if stopped or not begun.exists():
            return 0.0
        os.kill(first.result, signal.SIGSTOP)
        stopped.append(True)
        os.kill(first.result, signal.SIGCONT)
        end.touch()
        return seconds + 100.0

    Clock(monkeypatch, passing)
    with WorkerPool(OBEY, 1, 1.0) as pool:
        pool.submit(0, ("pid", None))
        (first,) = pool.wait()
        pool.submit(1, ("hold", (str(begun), str(end))))
        assert pool.wait() == [FinishedTask(1, (str(begun), str(end)), ANY)]
        assert pool.pids == [first.result] and stopped


def test_a_task_that_must_be_alone_shares_its_worker_with_none(tmp_path):
    """While it runs nothing else is queued behind it, so its death is its own fault and costs no retry."""
    with WorkerPool(OBEY, 2, 30) as pool:
        pool.submit(0, ("die", 0), alone=True)
        for number in range(1, 8):
            pool.submit(number, ("sleep", 0.02))
        pool.submit(8, ("die", 0), alone=True)
        seen = []
        while pool.outstanding:
            for worker in pool._workers:
                assert len(worker.tasks) == 1 or not any(task.alone for task in worker.tasks)
            seen += pool.wait()
    assert {o.task_id for o in seen if isinstance(o, LostTask)} == {0, 8}
    assert len(seen) == 9


def test_a_worker_that_can_never_start_ends_the_run():
    for handler, words in (
        ("worker_handlers:broken", "no such luck"),
        ("worker_handlers:missing", "missing"),
        ("no_such_module:x", "no_such_module"),
        ("worker_handlers:dies_at_start", "exit code 3"),
    ):
        with WorkerPool(WorkerSpec(handler), 2, 30) as pool:
            pool.submit(0, 0)
            with pytest.raises(InternvitError, match=words):
                pool.wait()
            pids = pool.pids
        wait_until_gone(pids)


def test_a_worker_that_is_killed_while_it_starts_costs_nothing(tmp_path):
    """The machine may be short of memory for a moment; no task has anything to do with it."""
    with WorkerPool(WorkerSpec("worker_handlers:dies_at_first_start", (str(tmp_path / "marker"),)), 1, 30) as pool:
        for number in range(3):
            pool.submit(number, ("echo", number))
        assert {task: outcome.result for task, outcome in drain(pool).items()} == {0: 0, 1: 1, 2: 2}


def test_a_memory_limit_is_felt_by_the_task():
    """It sees MemoryError, and the worker lives on."""
    spec = WorkerSpec("worker_handlers:obey", memory_bytes=1 << 30)
    with WorkerPool(spec, 1, 30) as pool:
        pool.submit(0, ("allocate", 4 << 30))
        pool.submit(1, ("allocate", 1 << 20))
        pids = pool.pids
        outcomes = drain(pool)
        assert outcomes[0].result == "MemoryError"
        assert outcomes[1].result == 1 << 20
        assert pool.pids == pids


def test_descriptors_are_inherited_when_they_are_named():
    read, write = os.pipe()
    with WorkerPool(WorkerSpec("worker_handlers:writes_to", (write,), descriptors=(write,)), 1, 30) as pool:
        pool.submit(0, b"hello")
        assert drain(pool)[0].result == 5
    os.close(write)
    assert os.read(read, 100) == b"hello"
    os.close(read)


# --------------------------------------------------------------------------------------------- parents and signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_that_stop_a_run_leave_its_workers_alone(tmp_path, number):
    """The parent decides: tasks in hand are finished first."""
    files = [(tmp_path / f"begun{place}", tmp_path / f"end{place}") for place in range(2)]
    with WorkerPool(OBEY, 2, 30) as pool:
        for task in range(2):
            pool.submit(task, ("sleep", 0))
        drain(pool)
        pids = pool.pids
        for task, (begun, end) in enumerate(files, 2):
            pool.submit(task, ("hold", (str(begun), str(end))))
        wait_until(lambda: all(begun.exists() for begun, _ in files))
        for pid in pids:
            os.kill(pid, number)
        for _, end in files:
            end.touch()
        outcomes = drain(pool)
        assert all(isinstance(outcome, FinishedTask) for outcome in outcomes.values())
        assert pool.pids == pids


def test_closing_a_pool_ends_its_workers_whatever_they_do(tmp_path):
    pool = WorkerPool(OBEY, 2, FOR_EVER)
    pool.submit(0, ("hang", str(tmp_path / "begun")))
    wait_until((tmp_path / "begun").exists)
    pids = pool.pids
    pool.close()
    wait_until_gone(pids)
    assert pool.outstanding == 0


PARENT = """
import sys, time
from internvit_cli.runtime.workers import WorkerPool, WorkerSpec
pool = WorkerPool(WorkerSpec("worker_handlers:obey"), 3, 60)
for number in range(3):
    pool.submit(number, ("pid", 0))
while pool.outstanding:
    pool.wait()
for number in range(2):
    pool.submit(number, ("sleep", 1.0))
print(*pool.pids, flush=True)
sys.stdin.read()
"""


def test_workers_end_when_their_parent_is_killed():
    """At once when they are idle, after the task at hand otherwise; nothing is left for a human to clean up."""
    places = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment, text=True, **pipes) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3 and all(map(is_alive, pids))
        parent.send_signal(signal.SIGKILL)
    wait_until_gone(pids)


def test_workers_import_nothing_from_the_working_directory(tmp_path, monkeypatch):
    """A folder of pictures may hold a file called numpy.py, and it is not code of ours."""
    (tmp_path / "internvit_cli.py").write_text("raise SystemExit(9)")
    (tmp_path / "pickle.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with WorkerPool(OBEY, 1, 30) as pool:
        pool.submit(0, ("cwd", 0))
        assert drain(pool)[0].result == str(tmp_path)


# ---------------------------------------------------------------------------------------------------- the decoder

RULE = PixelRule(TilingRule(tile_size=28, max_tiles=4))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Forty small pictures of several shapes, no two alike."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(40):
        width, height = (int(n) for n in rng.integers(20, 120, 2))
        path = folder / f"{number:02d}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        paths.append(path)
    return paths


def jobs_for(paths: list[Path]) -> list[DecodeJob]:
    jobs = []
    for row, path in enumerate(paths):
        header = read_header(os.fsencode(path), RULE)
        assert not isinstance(header, Skipped)
        jobs.append(DecodeJob(row, os.fsencode(path), header, choose_grid(header.width, header.height, RULE.tiling)))
    return jobs


def expected_tiles(job: DecodeJob) -> Any:
    out = np.empty((tile_count(job.grid, thumbnail=True), 28, 28, 3), np.uint8)
    decode_tiles(job.path, job.header, job.grid, RULE, out)
    return out


def options(workers: int = 2, timeout: float = 30) -> DecodeOptions:
    return DecodeOptions(RULE, tiles=5, workers=workers, timeout_seconds=timeout, memory_bytes=4 << 30)


@pytest.fixture
def slow_decoder(monkeypatch):
    """The decoder with workers that rest a moment before each picture, so that a test can strike meanwhile."""
    spec = decoder_module.WorkerSpec

    def slowed(handler: str, arguments: tuple[Any, ...], **rest: Any) -> WorkerSpec:
        assert handler == "internvit_cli.decode.decoder:tile_decoder"
        return spec("worker_handlers:slow_copy", (0.05, *arguments), **rest)

    monkeypatch.setattr(decoder_module, "WorkerSpec", slowed)
    return Decoder


def all_slots(decoder: Decoder) -> list[int]:
    return list(range(decoder._slots.shape.slots))


def test_every_picture_comes_back_as_decoding_it_here_gives(pictures):
    """Tiles, digest and row of each, through shared memory; and all slots are free again."""
    jobs = jobs_for(pictures)
    decoder = Decoder(options())
    seen: dict[int, Any] = {}
    with contextlib.closing(decoder):
        for image in decoder.run(jobs):
            assert isinstance(image, DecodedImage)
            seen[image.row] = image.tiles.copy()
            image.release()
        assert sorted(decoder._free) == all_slots(decoder)
        assert decoder.busy_seconds > 0
    assert sorted(seen) == list(range(40))
    for job in jobs:
        assert np.array_equal(seen[job.row], expected_tiles(job))


def test_tiles_stay_as_they_are_until_they_are_released(pictures):
    """A slot is not filled again while its tiles are in use: the decoder waits, and goes on when one is free."""
    jobs = jobs_for(pictures)
    decoder = Decoder(options())
    held: list[tuple[Any, Any]] = []
    rows = []
    with contextlib.closing(decoder):
        for image in decoder.run(jobs):
            rows.append(image.row)
            held.append((image, image.tiles.copy()))
            if len(held) == len(all_slots(decoder)):
                assert not decoder._free
                for kept, copy in held:
                    assert np.array_equal(kept.tiles, copy)
                    kept.release()
                held.clear()
    assert sorted(rows) == list(range(40))


def test_what_cannot_be_decoded_is_a_value_and_costs_nothing_else(pictures, tmp_path):
    jobs = jobs_for(pictures[:6])
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(pictures[2].read_bytes()[:-200])
    status = os.stat(damaged)
    header = jobs[2].header._replace(file_size=status.st_size, file_mtime_ns=status.st_mtime_ns)
    jobs[2] = jobs[2]._replace(path=os.fsencode(damaged), header=header)
    jobs[4] = jobs[4]._replace(path=os.fsencode(tmp_path / "missing.png"))
    decoder = Decoder(options())
    outcomes: dict[int, Any] = {}
    with contextlib.closing(decoder):
        for image in decoder.run(jobs):
            outcomes[image.row] = image.skipped.status if isinstance(image, FailedImage) else Status.DONE
            if isinstance(image, DecodedImage):
                image.release()
        assert sorted(decoder._free) == all_slots(decoder)
    assert outcomes == dict.fromkeys(range(6), Status.DONE) | {2: Status.TRUNCATED, 4: Status.VANISHED}


@pytest.mark.sweep
def test_kills_at_random_cost_at_most_the_pictures_at_hand(pictures, slow_decoder):
    """A dozen kill -9 during a run, at starting workers as well: a picture is tried again alone, and all come."""
    jobs = jobs_for(pictures)
    decoder = slow_decoder(options())
    rng = random.Random(3)
    kills = 0
    done: dict[int, Any] = {}
    with contextlib.closing(decoder):
        for image in decoder.run(jobs):
            if isinstance(image, DecodedImage):
                assert np.array_equal(image.tiles, expected_tiles(jobs[image.row]))
                image.release()
                done[image.row] = Status.DONE
            else:
                done[image.row] = image.skipped.status
            if kills < 12 and rng.random() < 0.4:
                os.kill(rng.choice(decoder.pids), signal.SIGKILL)
                kills += 1
        assert sorted(decoder._free) == all_slots(decoder)
    assert kills >= 8
    assert sorted(done) == list(range(40))
    lost = [row for row, status in done.items() if status is not Status.DONE]
    assert len(lost) <= kills // 2, "a picture is lost only when its worker dies twice"
    assert {done[row] for row in lost} <= {Status.WORKER_DIED}


def test_a_picture_that_kills_its_worker_is_tried_again_alone_and_then_skipped(pictures, monkeypatch):
    """Twice, and no more; no other picture suffers."""
    spec = decoder_module.WorkerSpec
    monkeypatch.setattr(
        decoder_module,
        "WorkerSpec",
        lambda handler, arguments, **rest: spec("worker_handlers:deadly", (b"05.png", *arguments), **rest),
    )
    jobs = jobs_for(pictures[:12])
    decoder = Decoder(options())
    submitted = []
    submit = decoder._pool.submit
    monkeypatch.setattr(
        decoder._pool,
        "submit",
        lambda row, task, *, alone=False: (submitted.append((row, alone)), submit(row, task, alone=alone)),
    )
    failed = {}
    with contextlib.closing(decoder):
        for image in decoder.run(jobs):
            if isinstance(image, DecodedImage):
                image.release()
            else:
                failed[image.row] = image.skipped
        assert sorted(decoder._free) == all_slots(decoder)
    assert {row: skipped.status for row, skipped in failed.items()} == {5: Status.WORKER_DIED}
    assert "SIGSEGV" in failed[5].message
    assert [alone for row, alone in submitted if row == 5] == [False, True]
    assert len(submitted) == 13 + sum(alone for row, alone in submitted if row != 5)


def test_a_picture_that_takes_too_long_is_skipped(pictures, tmp_path, monkeypatch):
    spec, begun = decoder_module.WorkerSpec, tmp_path / "begun"
    pids: list[int] = []
    Clock(monkeypatch, lambda seconds: seconds if begun.exists() and is_alive(pids[0]) else 0.0)
    monkeypatch.setattr(
        decoder_module,
        "WorkerSpec",
        lambda handler, arguments, **rest: spec("worker_handlers:endless", (b"01.png", str(begun), *arguments), **rest),
    )
    decoder = Decoder(options(workers=1, timeout=0.7))  # time passes for all workers, so there is no other
    pids += decoder.pids
    with contextlib.closing(decoder):
        outcomes = {}
        for image in decoder.run(jobs_for(pictures[:4])):
            outcomes[image.row] = image.skipped.status if isinstance(image, FailedImage) else Status.DONE
            if isinstance(image, DecodedImage):
                image.release()
        assert outcomes == {0: Status.DONE, 1: Status.TIMEOUT, 2: Status.DONE, 3: Status.DONE}
        assert sorted(decoder._free) == all_slots(decoder)


def test_after_a_stop_nothing_more_is_returned(pictures, slow_decoder):
    """What was in hand stays pending: it is neither done nor skipped."""
    decoder = slow_decoder(options())
    seen: dict[int, Any] = {}
    with contextlib.closing(decoder):
        for image in decoder.run(jobs_for(pictures), lambda: len(seen) >= 3):
            seen[image.row] = image
    assert len(seen) == 3
