"""kill -9 at random calls: of the real command with tiny-random, and, by the score, of the crash driver.

Calls are counted, not seconds: every kill hits, however fast the machine is.
"""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import crash_checks as checks
import pytest
from crash_checks import ALL_KINDS
from crash_driver import Behavior
from forking import run_apart
from moments import DISK, EVERY_IMAGE, WRITE, Moment
from run_helpers import make_pictures

if TYPE_CHECKING:
    from pathlib import Path

    from drivers import Driver

PICTURES = 30
KILLS = 30
CHAIN = 20
"""Kills of one run, one after another, unless it comes to its end before."""
SMALL_SHARDS = Behavior(shard_images=4)
LAST_CALLS = 12
"""After the last image a run calls the disk more often than this."""


def extract(pictures: Path, folder: Path, kind: str) -> tuple[object, ...]:
    """The real command; shards are small, so that there are several."""
    name, *options = ALL_KINDS[kind]
    options += [*checks.shards_of(kind, "6MB"), *("--dtype", "float32"), *("--max-tiles", "4"), "--quiet"]
    return "extract", pictures, "-o", folder / name, "--model", "tiny-random", *options


def finish(*arguments: object) -> None:
    ended = run_apart(*arguments)
    assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, PICTURES, seed=3, size=200)
    return folder


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_command_killed_at_random_moments_ends_as_if_it_had_not_been(
    pictures: Path, tmp_path: Path, kind: str
) -> None:
    """Spread over the run from its first call of the disk to its last; each run is finished by the same command."""
    whole, tries, chance = tmp_path / "whole", KILLS // len(ALL_KINDS), random.Random(kind)
    whole.mkdir()
    finish(*extract(pictures, whole, kind))
    for number in range(tries):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        call = chance.randint(1, LAST_CALLS)
        moment = Moment(WRITE, number * PICTURES // (tries - 1), settings=EVERY_IMAGE).then(DISK, call)
        if not number:
            moment = Moment(DISK, call)
        assert moment.run("SIGKILL", *extract(pictures, folder, kind)).returncode == -9
        finish(*extract(pictures, folder, kind))
        checks.assert_same_output(folder / ALL_KINDS[kind][0], whole / ALL_KINDS[kind][0])
        shutil.rmtree(folder)
    print(f"\n{kind}: {tries} kills of {tries} runs, 0 losses")


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(pictures: Path, tmp_path: Path, kind: str) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    finish(*extract(pictures, folders[0], kind))
    chance, kills = random.Random(kind), 0
    arguments = extract(pictures, folders[1], kind)
    while kills < CHAIN:
        # After a third of the images at most, so that the second kill hits too whatever the first one left.
        moment = Moment(WRITE, chance.randint(1, PICTURES // 3), settings=EVERY_IMAGE).then(DISK, chance.randint(1, 12))
        code = moment.run("SIGKILL", *arguments).returncode
        if code != -9:
            assert code == 0
            break
        kills += 1
    finish(*arguments)
    checks.assert_same_output(*(folder / ALL_KINDS[kind][0] for folder in reversed(folders)))
    print(f"\n{kind}: {kills} kills of one run, 0 losses")
    assert kills > 1


@pytest.mark.parametrize(
    "kind",
    ["file", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("npy folder", "h5 folder", "several layers"))],
)
def test_the_storage_protocol_killed_again_and_again_ends_as_if_it_had_not_been(
    driver: Driver, tmp_path: Path, kind: str
) -> None:
    """Every row's right content is known, and is looked at after every kill."""
    pictures, folders = tmp_path / "pictures", [tmp_path / name for name in ("whole", "killed")]
    checks.make_pictures(pictures, [*(f"{number:03d}.png" for number in range(60)), "bad.png", "spoiled.png"])
    known = {key: {digest} for key, digest in checks.digests_of(pictures).items()}
    name, *options = ALL_KINDS[kind]
    for folder in folders:
        folder.mkdir()
    lines = [("extract", pictures, "-o", folder / name, "--quiet", *options) for folder in folders]
    assert driver.run(lines[0], SMALL_SHARDS).code == 3
    chance, settled = random.Random(kind), [0]
    while len(settled) <= CHAIN:
        # At most a third of the rows come to the disk between two kills: at least two of them hit.
        moment = Moment(WRITE, chance.randint(1, 20)).then(DISK, chance.randint(1, LAST_CALLS))
        ended = driver.run(lines[1], SMALL_SHARDS, moment)
        if ended.code != -9:
            assert ended.code == 3, ended.said
            break
        settled.append(checks.check_output(folders[1] / name, known))
        assert settled[-1] >= settled[-2], "images that were settled no more are"
    ended = driver.run(lines[1], SMALL_SHARDS)
    assert ended.code == 3, ended.said
    checks.check_output(folders[1] / name, known)
    checks.assert_same_output(folders[1] / name, folders[0] / name)
    print(f"\n{kind}: {len(settled) - 1} kills of one run, images settled after each: {settled[1:]}")
    assert len(settled) > 2
