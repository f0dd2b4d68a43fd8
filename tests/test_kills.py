"""kill -9 at random moments: of the real command with tiny-random, and, by the score, of the crash driver."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import crash_checks as checks
import pytest
from crash_checks import KINDS
from run_helpers import bounds, command, finish, make_pictures

PICTURES = 30
KILLS = 30
CHAIN = 20
"""Kills of one run, one after another."""
DRIVER = Path(__file__).with_name("crash_driver.py")


def extract(pictures: Path, folder: Path, kind: str) -> list[str]:
    """The real command; shards are small, so that there are several."""
    name, *options = KINDS[kind]
    options += [*checks.shards_of(kind, "6MB"), *("--dtype", "float32"), *("--max-tiles", "4"), "--quiet"]
    return command("extract", pictures, "-o", folder / name, "--model", "tiny-random", *options)


def drive(pictures: Path, folder: Path, kind: str) -> list[str]:
    """The same with the crash driver, slowed down so that there is something to kill."""
    name, *options = KINDS[kind]
    own = ["--pause", "0.004", "--shard-images", "4", "--"]
    return [
        *(sys.executable, str(DRIVER), *own),
        *("extract", str(pictures), "-o", str(folder / name), "--quiet", *options),
    ]


def kill_after(arguments: list[str], seconds: float) -> bool:
    """Run, and kill after a time; returns whether there was anything left to kill."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() == -9


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, PICTURES, seed=3, size=200)
    return folder


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_killed_at_random_moments_ends_as_if_it_had_not_been(
    pictures: Path, tmp_path: Path, kind: str
) -> None:
    """Spread over the run from its first file to its end; each run is finished by the same command."""
    (tmp_path / "whole").mkdir()
    whole = tmp_path / "whole" / KINDS[kind][0]
    begun, ended = bounds(extract(pictures, tmp_path / "whole", kind), whole)
    kills, tries, chance = 0, KILLS // len(KINDS), random.Random(kind)
    for number in range(tries):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        arguments = extract(pictures, folder, kind)
        kills += kill_after(arguments, begun + (number + chance.random()) / tries * (ended - begun))
        finish(arguments)
        checks.assert_same_output(folder / KINDS[kind][0], whole)
        shutil.rmtree(folder)
    print(f"\n{kind}: {kills} kills of {tries} runs, 0 losses")
    assert kills > tries // 2


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(pictures: Path, tmp_path: Path, kind: str) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole, killed = (folder / KINDS[kind][0] for folder in folders)
    begun, ended = bounds(extract(pictures, folders[0], kind), whole)
    chance, kills = random.Random(kind), 0
    arguments = extract(pictures, folders[1], kind)
    while kills < CHAIN and kill_after(arguments, begun + chance.random() * 0.4 * (ended - begun)):
        kills += 1
    finish(arguments)
    checks.assert_same_output(killed, whole)
    print(f"\n{kind}: {kills} kills of one run, 0 losses")
    assert kills > 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_storage_protocol_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path, kind: str) -> None:
    """Every row's right content is known, and is looked at after every kill."""
    pictures, folders = tmp_path / "pictures", [tmp_path / name for name in ("whole", "killed")]
    checks.make_pictures(pictures, [*(f"{number:03d}.png" for number in range(60)), "bad.png", "spoiled.png"])
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}
    for folder in folders:
        folder.mkdir()
    whole, killed = (folder / KINDS[kind][0] for folder in folders)
    begun, ended = bounds(drive(pictures, folders[0], kind), whole)
    chance, settled = random.Random(kind), [0]
    arguments = drive(pictures, folders[1], kind)
    while len(settled) <= CHAIN and kill_after(arguments, begun + chance.random() * 0.4 * (ended - begun)):
        settled.append(checks.check_output(killed, known))
        assert settled[-1] >= settled[-2], "images that were settled no more are"
    finish(arguments, 3)
    checks.check_output(killed, known)
    checks.assert_same_output(killed, whole)
    print(f"\n{kind}: {len(settled) - 1} kills of one run, images settled after each: {settled[1:]}")
    assert len(settled) > 2
