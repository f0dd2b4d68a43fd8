"""SIGINT, SIGTERM and SIGUSR1 at any moment: what is encoded is kept, and the run ends soon and says how."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import crash_checks as checks
import pytest
from crash_checks import KINDS, shards_of
from run_helpers import bounds, command, extract, finish, make_pictures, wait_for

from internvit_cli import open_features
from internvit_cli.config import Status
from internvit_cli.pipeline import extract as extract_in_process
from internvit_cli.stopping import StopRequest

if TYPE_CHECKING:
    from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MOST_SECONDS = 10.0
MOMENTS = 4
"""Of each signal and kind of output."""
PICTURES = 30


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, PICTURES, seed=3, size=200)
    return folder


def arguments(pictures: Path, folder: Path, kind: str) -> list[str]:
    name, *options = KINDS[kind]
    options += [*shards_of(kind, "6MB"), *("--dtype", "float32"), *("--max-tiles", "4"), "--json"]
    return command("extract", pictures, "-o", folder / name, "--model", "tiny-random", *options)


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str], number: int) -> tuple[float, str, str]:
    """Send a signal; returns the seconds that the run went on, and what it said on both streams."""
    started = time.monotonic()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return time.monotonic() - started, stdout, stderr


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_at_any_moment_ends_the_run_in_time_and_the_same_command_finishes(
    pictures: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "whole").mkdir()
    begun, ended = bounds(arguments(pictures, tmp_path / "whole", kind), tmp_path / "whole" / KINDS[kind][0])
    chance, slowest, stops = random.Random(kind), 0.0, 0
    for number in SIGNALS:
        for moment in range(MOMENTS):
            folder = tmp_path / f"{number}-{moment}"
            folder.mkdir()
            process = start(arguments(pictures, folder, kind))
            # From the first moment on, interpreter and model included.
            time.sleep(0.3 + (moment + chance.random()) / MOMENTS * (ended - 0.3))
            seconds, stdout, stderr = end(process, number)
            # For the first tenths of a second Python's own reaction holds, which a shell shows as the same number.
            assert process.returncode in (0, 128 + number, -number), (process.returncode, stderr)
            assert "Traceback" not in stderr and seconds < MOST_SECONDS, (seconds, stderr)
            slowest, stops = max(slowest, seconds), stops + (process.returncode != 0)
            if process.returncode >= 0:
                told = json.loads(stdout)
                assert told["exit_code"] == process.returncode
                if "done" in told:
                    assert told["found"] == told["done"] + told["skipped"] + told["pending"] == PICTURES
            finish(arguments(pictures, folder, kind))
            checks.assert_same_output(folder / KINDS[kind][0], tmp_path / "whole" / KINDS[kind][0])
            shutil.rmtree(folder)
    print(f"\n{kind}: {stops} stops, the slowest took {slowest:.1f} s; begun after {begun:.1f} of {ended:.1f} s")
    assert stops > len(SIGNALS) * MOMENTS // 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_the_run_at_once_and_what_was_committed_stays(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    line = arguments(pictures, tmp_path, "file")
    process = start([*line, "--batch-size", "64"])  # all tiles: a batch that takes longer than this test waits
    assert process.stderr is not None
    wait_for(tmp_path / "feats.h5.partial")
    time.sleep(0.2)
    process.send_signal(number)
    assert "stopping after the batch in flight" in "".join(process.stderr.readline() for _ in range(4))
    seconds, _, stderr = end(process, number)
    assert process.returncode == 128 + number and seconds < 1
    assert "Traceback" not in stderr
    finish(line)
    assert len(open_features(tmp_path / "feats.h5")) == PICTURES


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_model_loads_ends_the_run_where_it_stands(
    pictures: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download of gigabytes, or the digest of a 6B, must not outlast what Slurm grants."""
    script = (
        "import sys, time\n"
        "from internvit_cli import encoder\n"
        "from internvit_cli.cli.app import main\n"
        "def load(checkpoint, options):\n"
        "    print('loading', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "encoder.Encoder.load = load\n"
        "main(sys.argv[1:])\n"
    )
    line = arguments(pictures, tmp_path, "file")
    process = start([line[0], "-c", script, *line[3:]])
    assert process.stderr is not None
    while "loading" not in process.stderr.readline():
        assert process.poll() is None
    seconds, stdout, stderr = end(process, number)
    assert process.returncode == 128 + number and seconds < 2, stderr
    assert json.loads(stdout)["error"].startswith("stopped before anything was encoded") and "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.glob("feats.h5*")) == []


def test_a_stop_while_rows_are_taken_over_keeps_them_and_the_next_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "feats.h5"
    shutil.copytree(pictures, folder)
    options = ("--dtype", "float32", "--max-tiles", 1)
    assert extract(folder, "-o", output, *options).returncode == 0
    before = {key: image.pooled.tobytes() for key, image in open_features(output).items()}
    make_pictures(folder / "more", 2, seed=9)

    class StopAtOnce(StopRequest):
        """As a signal that comes when the first row is to be taken over."""

        @property
        def signal(self) -> int:
            return signal.SIGTERM if self.is_working else 0

        @signal.setter
        def signal(self, number: int) -> None:
            pass

    from internvit_cli.config import ComputeDtype
    from internvit_cli.options import ExtractOptions, ModelOptions, PictureOptions, RunOptions, StoreOptions

    summary = extract_in_process(
        ExtractOptions(
            sources=(str(folder),),
            model=ModelOptions("tiny-random"),
            pictures=PictureOptions(max_tiles=1),
            store=StoreOptions(str(output)),
            run=RunOptions(dtype=ComputeDtype.FLOAT32),
        ),
        StopAtOnce(),
    )
    assert summary.stopped_by == signal.SIGTERM
    assert {key: image.pooled.tobytes() for key, image in open_features(output).items()} == before
    assert extract(folder, "-o", output, *options).returncode == 0
    after = open_features(output)
    assert len(after) == PICTURES + 2 and all(image.status is Status.DONE for image in after.values())
    assert all(after[key].pooled.tobytes() == vector for key, vector in before.items())


def test_a_stop_before_any_work_is_an_error_of_its_own() -> None:
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        stop.request(signal.SIGTERM)
    working = StopRequest()
    working.is_working = True
    working.request(signal.SIGINT)
    assert working.signal == signal.SIGINT
