"""Several devices on one plan, CPU encoders standing in for cards: the same rows as one device makes, whatever dies."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import crash_checks as checks
import numpy as np
import pytest
from crash_checks import ALL_KINDS
from forking import run_apart
from moments import COMMIT, EVERY_IMAGE, RECORD, TELL, Moment, held, wait_until
from run_helpers import Result, extract, make_pictures, summary_of

from internvit_cli import open_features
from internvit_cli.cli.arguments import chosen_devices, device_list
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.config import Status
from internvit_cli.errors import UsageError
from internvit_cli.extract.multi_device import scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICES = ("--devices", "cpu,cpu")
SHAPE = ("--dtype", "float32", "--max-tiles", "4")
PICTURES = 16


@pytest.fixture(scope="module", autouse=True)
def several_shards() -> Iterator[None]:
    """Shards of folders are small; one file has none."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INTERNVIT_SHARD_SIZE", "6MB")
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    paths = make_pictures(folder, PICTURES, seed=4, size=240)
    (folder / "cut.jpg").write_bytes(paths[0].read_bytes()[: paths[0].stat().st_size // 2])
    (folder / "text.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one device makes, as each kind of output."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, (name, *options) in ALL_KINDS.items():
        (folder / kind).mkdir()
        result = extract(pictures, "-o", folder / kind / name, *SHAPE, *options)
        assert result.returncode == 3, result.stderr
    return folder


def arguments(pictures: Path, output: Path, *options: object) -> tuple[object, ...]:
    return "extract", pictures, "-o", output, "--model", "tiny-random", *SHAPE, *DEVICES, *options


def device_processes(parent: int) -> list[int]:
    """Process ids of a run's devices."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"serve_device" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def are_gone(processes: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in processes)


@pytest.mark.parametrize(
    "kind",
    ["file", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("npy folder", "h5 folder", "several layers"))],
)
def test_two_devices_make_the_same_output_as_one(pictures: Path, whole: Path, tmp_path: Path, kind: str) -> None:
    name, *options = ALL_KINDS[kind]
    result = extract(pictures, "-o", tmp_path / name, *SHAPE, *DEVICES, *options, "--json")
    assert result.returncode == 3, result.stderr
    summary = summary_of(result)
    assert (summary["found"], summary["done"], summary["skipped"]) == (PICTURES + 2, PICTURES, 2)
    assert summary["device"] == "cpu, cpu" and summary["encoded"] == PICTURES
    checks.assert_same_output(tmp_path / name, whole / kind / name)


def run_with_dying_devices(
    line: tuple[object, ...], folder: Path, once: Path | None
) -> subprocess.CompletedProcess[str]:
    """Run; each device, or the first one, is killed when it is about to tell of its third image."""
    folder.mkdir()
    dying = Moment(TELL, 3).environment("SIGKILL", folder, "serve_device", once)
    return run_apart(*line, env=dying)


@pytest.mark.sweep
def test_a_device_that_dies_costs_no_image(pictures: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "feats.h5"
    output.parent.mkdir()
    ended = run_with_dying_devices(arguments(pictures, output, "--json"), tmp_path / "site", tmp_path / "died")
    summary = json.loads(ended.stdout)
    assert ended.returncode == 3 and summary["done"] == PICTURES
    assert any("killed by SIGKILL" in note and "the others did its images" in note for note in summary["notes"])
    checks.assert_same_output(output, whole / "file" / "feats.h5")


@pytest.mark.sweep
def test_when_all_devices_die_what_is_done_stays_and_the_same_command_goes_on(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "feats.h5"
    output.parent.mkdir()
    ended = run_with_dying_devices(arguments(pictures, output), tmp_path / "site", None)
    assert ended.returncode == 1 and "error: no device is left" in ended.stderr and "Traceback" not in ended.stderr
    statuses = [image.status for image in open_features(f"{output}.partial").values()]
    assert len(statuses) - statuses.count(Status.PENDING) == 4 + 1, "two of each, and the picture without a header"
    done = statuses.count(Status.DONE)
    summary = summary_of(extract(pictures, "-o", output, *SHAPE, *DEVICES, "--json"))
    assert summary["encoded"] == PICTURES - done
    checks.assert_same_output(output, whole / "file" / "feats.h5")


@pytest.mark.sweep
def test_a_device_that_dies_before_it_is_given_work_leaves_the_others_to_it(
    pictures: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the moment when the parent has read a message of it, and so finds room for another image."""
    receive = scheduler.ShardScheduler._receive
    killed: list[int] = []

    def receive_and_kill(self: scheduler.ShardScheduler, device: scheduler.Device) -> None:
        receive(self, device)
        if not killed and device is self._devices[-1] and self._tally.images:
            killed.append(device.process.pid)
            device.process.kill()
            device.process.wait()

    monkeypatch.setattr(scheduler.ShardScheduler, "_receive", receive_and_kill)
    output = tmp_path / "feats.h5"
    ended = extract(pictures, "-o", output, *SHAPE, *DEVICES, "--json")
    assert killed and ended.returncode == 3, ended.stderr
    assert summary_of(ended)["device"] == "cpu, cpu", "those that it began with"
    checks.assert_same_output(output, whole / "file" / "feats.h5")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.sweep)])
def test_a_signal_commits_what_every_device_has_encoded(
    pictures: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "out" / "feats.h5"
    output.parent.mkdir()
    line = arguments(pictures, output, "--json")
    with held(Moment(RECORD, 3), tmp_path / "mark", *line, stdout=subprocess.PIPE) as held_run:
        devices = device_processes(held_run.process.pid)
        assert len(devices) == 2
        held_run.process.send_signal(number)
        stdout, _ = held_run.end()
    assert held_run.process.returncode == 128 + number
    assert are_gone(devices)
    first = json.loads(stdout)
    assert first["found"] == first["done"] + first["skipped"] + first["pending"]
    second = summary_of(extract(pictures, "-o", output, *SHAPE, *DEVICES, "--json"))
    assert second["encoded"] == PICTURES - first["done"]  # type: ignore[operator]
    checks.assert_same_output(output, whole / "file" / "feats.h5")


@pytest.mark.sweep
def test_devices_end_with_a_killed_parent_and_one_device_finishes_what_two_began(
    pictures: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "feats.h5"
    output.parent.mkdir()
    one_is_committed = Moment(COMMIT, 2, settings=EVERY_IMAGE)
    with held(one_is_committed, tmp_path / "mark", *arguments(pictures, output)) as held_run:
        devices = device_processes(held_run.process.pid)
        assert len(devices) == 2
        held_run.process.kill()
    wait_until(lambda: are_gone(devices))
    assert any(image.is_done for image in open_features(f"{output}.partial").values())
    assert extract(pictures, "-o", output, *SHAPE).returncode == 3
    checks.assert_same_output(output, whole / "file" / "feats.h5")


@pytest.mark.sweep
def test_an_error_of_a_device_ends_the_run_and_what_was_encoded_is_kept(pictures: Path, tmp_path: Path) -> None:
    strict = extract(pictures, "-o", tmp_path / "f.h5", *SHAPE, *DEVICES, "--strict")
    assert strict.returncode == 1 and "text.jpg: not_an_image" in strict.stderr
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder, ignore=shutil.ignore_patterns("text.jpg"))
    strict = extract(folder, "-o", tmp_path / "f.h5", *SHAPE, *DEVICES, "--strict")
    assert (
        strict.returncode == 1
        and "cut.jpg: truncated" in strict.stderr
        and "hint: run without --strict" in strict.stderr
    )
    partial = tmp_path / "f.h5.partial"
    if partial.exists():  # something was encoded before the error
        features = open_features(partial)
        assert len(features.done) and features["cut.jpg"].status is Status.PENDING
    assert extract(folder, "-o", tmp_path / "f.h5", *SHAPE, *DEVICES).returncode == 3


def test_a_device_that_is_not_there_is_one_error_line(pictures: Path, tmp_path: Path) -> None:
    for devices in ("cpu,cuda:7", "all", "cuda:7,cpu"):
        result: Result = extract(pictures, "-o", tmp_path / "f.h5", "--devices", devices)
        assert result.returncode == 1, devices
        assert [line.partition(":")[0] for line in result.stderr.splitlines() if "tiles" not in line] == [
            "error",
            "hint",
        ]
        assert not list(tmp_path.glob("*"))


@pytest.mark.sweep
def test_taken_over_and_incremental_rows_work_with_several_devices(pictures: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "pictures", tmp_path / "feats.h5"
    shutil.copytree(pictures, folder)
    assert extract(folder, "-o", output, *SHAPE, *DEVICES).returncode == 3
    make_pictures(folder / "more", 3, seed=8)
    summary = summary_of(extract(folder, "-o", output, *SHAPE, *DEVICES, "--json"))
    assert (summary["encoded"], summary["done"]) == (3, PICTURES + 3)
    assert extract(folder, "-o", tmp_path / "one.h5", *SHAPE).returncode == 3
    one, two = open_features(tmp_path / "one.h5"), open_features(output)
    for key in one:
        if one[key].status is Status.DONE:
            np.testing.assert_array_equal(one[key].visual_tokens, two[key].visual_tokens)


@pytest.mark.parametrize(
    ("device", "devices", "names"),
    [
        (None, None, ("auto",)),
        ("cuda:1", None, ("cuda:1",)),
        (None, "all", ("all",)),
        (None, "0,1", ("cuda:0", "cuda:1")),
        (None, "cuda:2", ("cuda:2",)),
        (None, "cpu,cpu", ("cpu", "cpu")),
    ],
)
def test_devices_are_named_by_numbers_or_names(device: str | None, devices: str | None, names: tuple[str, ...]) -> None:
    assert chosen_devices(device, devices and device_list(devices)) == names


@pytest.mark.parametrize("devices", ["", "0,", "0,0", "all,0", "0," * 70])
def test_what_is_no_list_of_devices_is_refused_with_a_hint(devices: str) -> None:
    with pytest.raises(UnusableWordError) as caught:
        device_list(devices)
    assert caught.value.hint


def test_one_device_and_several_contradict_each_other() -> None:
    with pytest.raises(UsageError) as caught:
        chosen_devices("cpu", ("cpu", "cpu"))
    assert caught.value.hint
