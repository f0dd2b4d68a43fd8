"""Signals at any moment: what is encoded is kept, the run ends and says how; a lost terminal costs nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
from subprocess import PIPE
from typing import TYPE_CHECKING

import crash_checks as checks
import pytest
from crash_checks import KINDS, shards_of
from forking import PATIENCE, Forked, run_apart
from moments import LOAD, SUBMIT, Moment, held, wait_until
from run_helpers import command, extract, internvit, make_pictures
from terminal_helpers import Terminal

from internvit_cli import open_features
from internvit_cli.cli.signals import stop_on_signals
from internvit_cli.config import Status
from internvit_cli.export import export as export_module
from internvit_cli.extract.pipeline import extract as extract_in_process
from internvit_cli.runtime.signals import StopRequest

if TYPE_CHECKING:
    from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
IMPATIENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Those of which a second one ends the run at once."""
BATCHES_OF_A_PICTURE = 2
"""Of four tiles each: more than the tiles of a picture."""
MOMENTS = 4
"""Of each signal and kind of output."""
PICTURES = 30

AT_AN_EVENT = """
import atexit, os, sys

wanted, number, sys.argv[1:] = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
count = 0

def hook(event, arguments):
    global count
    count += 1
    is_it = event == "import" and arguments[0] == wanted if not wanted.isdigit() else count == int(wanted)
    if is_it and number:
        os.kill(os.getpid(), number)

atexit.register(lambda: print("EVENTS", count, file=sys.stderr))
from internvit_cli.__main__ import main
sys.addaudithook(hook)
main()
"""
"""Sends a signal to itself at a counted event of the interpreter, such as a file that is opened, or at an import."""

ON_A_TERMINAL_OF_ITS_OWN = """
import fcntl, termios
from internvit_cli.__main__ import main

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
main()
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, PICTURES, seed=3, size=200)
    return folder


def words(pictures: Path, folder: Path, kind: str) -> tuple[object, ...]:
    name, *options = KINDS[kind]
    options += [*shards_of(kind, "6MB"), *("--dtype", "float32"), *("--max-tiles", "4"), "--json"]
    return "extract", pictures, "-o", folder / name, "--model", "tiny-random", *options


def arguments(pictures: Path, folder: Path, kind: str) -> list[str]:
    return command(*words(pictures, folder, kind))


def finish(*arguments: object) -> None:
    ended = run_apart(*arguments)
    assert ended.returncode == 0, ended.stderr


def start(line: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """Send a signal; returns what the process then says on both streams."""
    process.send_signal(number)
    return process.communicate(timeout=PATIENCE)


def read_until(process: subprocess.Popen[str] | Forked, text: str) -> None:
    assert process.stderr is not None
    while text not in (told := process.stderr.readline()):
        assert told, "it ended without that word"


def scripted(script: str, line: list[str], *arguments: object) -> list[str]:
    """The same command line, run by a script."""
    return [line[0], "-c", script, *map(str, arguments), *line[3:]]


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_at_any_moment_ends_the_run_and_the_same_command_finishes(
    pictures: Path, tmp_path: Path, kind: str
) -> None:
    """Moments are counted in events of the interpreter, from the first line of the program on."""
    (tmp_path / "whole").mkdir()
    line = arguments(pictures, tmp_path / "whole", kind)
    counted = subprocess.run(scripted(AT_AN_EVENT, line, 0, 0), capture_output=True, text=True, timeout=PATIENCE)
    events = int(counted.stderr.rpartition("EVENTS ")[2])
    chance = random.Random(kind)
    for number in SIGNALS:
        for moment in range(MOMENTS):
            folder = tmp_path / f"{number}-{moment}"
            folder.mkdir()
            event = int(events * 0.9 * (moment + chance.random()) / MOMENTS) + 1
            script = scripted(AT_AN_EVENT, arguments(pictures, folder, kind), event, int(number))
            ended = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE)
            # Before the command has begun there is nothing to save, and the system ends it: a shell shows the same.
            assert ended.returncode in (128 + number, -number), (event, ended.stderr)
            assert "Traceback" not in ended.stderr
            if ended.stdout:
                told = json.loads(ended.stdout)
                assert told["exit_code"] == ended.returncode
                if "done" in told:
                    assert told["found"] == told["done"] + told["skipped"] + told["pending"] == PICTURES
            finish(*words(pictures, folder, kind))
            checks.assert_same_output(folder / KINDS[kind][0], tmp_path / "whole" / KINDS[kind][0])
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    "name", ["typer", "internvit_cli.cli.app", "numpy", "h5py", "internvit_cli.extract.pipeline", "torch"]
)
def test_an_interrupt_during_any_import_ends_with_130_and_no_traceback(
    pictures: Path, tmp_path: Path, name: str
) -> None:
    script = scripted(AT_AN_EVENT, arguments(pictures, tmp_path, "file"), name, int(signal.SIGINT))
    ended = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr and "KeyboardInterrupt" not in ended.stderr


@pytest.mark.parametrize("command_line", [("verify", "nothing.h5"), ("info", "nothing.h5"), ("models",), ("--help",)])
def test_an_interrupt_ends_a_command_that_has_nothing_to_save_with_130(command_line: tuple[str, ...]) -> None:
    script = scripted(AT_AN_EVENT, command(*command_line), "internvit_cli.cli.console", int(signal.SIGINT))
    ended = subprocess.run(script, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 130 and "Traceback" not in ended.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_after_a_signal_no_more_goes_to_the_encoder_than_the_picture_at_hand(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    line = (*words(pictures, tmp_path, "file"), "--batch-size", 4)
    ended = Moment(SUBMIT, 3).run(number.name, *line, tell=tmp_path / "batches")
    assert ended.returncode == 128 + number, ended.stderr
    batches = (tmp_path / "batches").stat().st_size if (tmp_path / "batches").exists() else 0
    assert batches <= BATCHES_OF_A_PICTURE
    told = json.loads(ended.stdout)
    assert told["done"] > 0 and told["found"] == told["done"] + told["skipped"] + told["pending"] == PICTURES


@pytest.mark.parametrize("number", IMPATIENT)
def test_a_second_signal_ends_the_run_at_once_and_what_was_committed_stays(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """While a batch is encoded that never comes to its end."""
    line = words(pictures, tmp_path, "file")
    with held(Moment(SUBMIT, 2), tmp_path / "mark", *line, stdout=PIPE, stderr=PIPE) as run:
        run.process.send_signal(number)
        read_until(run.process, "stopping after the batch in flight")
        run.process.send_signal(number)
        _, stderr = run.process.communicate()
        assert run.process.returncode == 128 + number and "Traceback" not in stderr
        assert run.mark.exists(), "the batch is still being encoded"
    finish(*line)
    assert len(open_features(tmp_path / "feats.h5")) == PICTURES


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_model_loads_ends_the_run_where_it_stands(
    pictures: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A download of gigabytes, or the digest of a 6B, must not outlast what Slurm grants: here it never ends."""
    line = words(pictures, tmp_path, "file")
    with held(Moment(LOAD), tmp_path / "mark", *line, stdout=PIPE, stderr=PIPE) as run:
        run.process.send_signal(number)
        stdout, stderr = run.process.communicate()
        assert run.process.returncode == 128 + number, stderr
        assert run.mark.exists(), "it is still loading"
    assert json.loads(stdout)["error"].startswith("stopped before anything was encoded") and "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.glob("feats.h5*")) == []


# ----------------------------------------------------------------------------------------------- a lost terminal


@pytest.mark.sweep
def test_a_terminal_that_closes_costs_no_finished_image(pictures: Path, tmp_path: Path) -> None:
    """The kernel and the shell both send SIGHUP, and nothing can be written any more."""
    line = words(pictures, tmp_path, "file")
    terminal = Terminal()
    process = subprocess.Popen(
        scripted(ON_A_TERMINAL_OF_ITS_OWN, command(*line, "--batch-size", "1")),
        stdin=terminal.follower,
        stdout=subprocess.PIPE,
        stderr=terminal.follower,
        env=os.environ | {"TERM": "xterm"},
        start_new_session=True,
    )
    wait_until(lambda: re.search(rb"encoding \|[^\r]* [1-9]\d*/30", terminal.so_far) is not None, process)
    terminal.hang_up()
    process.send_signal(signal.SIGHUP)
    stdout, _ = process.communicate(timeout=PATIENCE)
    terminal.close()
    told = json.loads(stdout)
    if process.returncode == 0:  # it was through with all of them
        assert told["done"] == PICTURES
        return
    assert process.returncode == told["exit_code"] == 129
    assert told["done"] > 0 and told["found"] == told["done"] + told["pending"] == PICTURES
    assert len(open_features(tmp_path / "feats.h5.partial").done) == told["done"]
    finish(*line)


@pytest.mark.sweep
def test_under_nohup_a_closing_terminal_is_no_reason_to_stop(pictures: Path, tmp_path: Path) -> None:
    process = start(["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *arguments(pictures, tmp_path, "file")])
    read_until(process, "encoding with")
    stdout, stderr = end(process, signal.SIGHUP)
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["done"] == PICTURES


def sent(monkeypatch: pytest.MonkeyPatch, *numbers: signal.Signals) -> tuple[int, list[int]]:
    """Send signals to work that does not end; returns which one asked it to stop, and the codes it was ended with."""
    ends: list[int] = []
    with stop_on_signals() as stop, monkeypatch.context() as patch:
        patch.setattr(os, "_exit", ends.append)
        stop.is_working = True
        for number in numbers:
            signal.raise_signal(number)
    return stop.signal, ends


HUP, TERM, INT = signal.SIGHUP, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("numbers", "asked", "ends"),
    [
        ((HUP, HUP, HUP), HUP, []),  # from the kernel, then from the shell
        ((TERM, HUP), TERM, []),  # from a service manager
        ((HUP, TERM), HUP, []),
        ((HUP, TERM, TERM), HUP, [143]),
        ((INT, HUP, INT), INT, [130]),
        ((INT, TERM), INT, [143]),
    ],
)
def test_a_terminal_that_closes_is_nobody_who_cannot_wait(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[signal.Signals, ...], asked: int, ends: list[int]
) -> None:
    assert sent(monkeypatch, *numbers) == (asked, ends)


def test_a_signal_that_is_ignored_from_the_start_under_nohup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        assert sent(monkeypatch, HUP) == (0, [])
        assert signal.getsignal(HUP) == signal.SIG_IGN
    finally:
        signal.signal(HUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_an_export_with_its_own_code_and_leaves_nothing(
    pictures: Path, tmp_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "feats.h5"
    assert extract(pictures / "part0", "-o", output, "--max-tiles", 1).returncode == 0
    monkeypatch.setattr(export_module, "read_blocks", lambda *_, **__: signal.raise_signal(number))
    result = internvit("export", output, tmp_path / "new.safetensors", "--json")
    assert (result.returncode, json.loads(result.stdout)["exit_code"]) == (128 + number, 128 + number)
    assert [path.name for path in tmp_path.iterdir()] == ["feats.h5"]


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
