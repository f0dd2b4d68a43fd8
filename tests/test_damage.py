"""Bits flipped and bytes lost in everything that a run reads of its output: refused or mended, never believed.

Each case is a copy of an output with one file damaged, seeded. `info` and `verify` look at it, the same command goes
on with it, and what comes out is held against the rows that are known to be right. Each runs in a process of its own,
so that a crash or a hang of a library is seen.
"""

from __future__ import annotations

import shutil
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import crash_checks as checks
import crash_driver
import crash_tracing as tracing
import h5py
import numpy as np
import pytest
from crash_checks import KINDS
from drivers import PROCESSES

from internvit_cli import open_features
from internvit_cli.cli import app
from internvit_cli.config import Status
from internvit_cli.errors import ExitCode, InternvitError

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor

    from numpy.typing import NDArray

FEW, MANY = 2, 63
"""Cases of each scene and kind."""
SCENES = ("unfinished", "unfinished after others", "finished", "finished and to be continued")
FIRST = ["a.png", "b.png", "bad.png", "c.png", "d/e.png", "spoiled.png", "g.png"]
ADDED = ["aa.png", "d/f.png", "h.png", "c.png"]
FOREIGN = ("is not an internvit feature file", "is not an HDF5 file", "is not a manifest of internvit features")
FEATURES = ("pooled", "visual_tokens", "tile_pooled")


@dataclass(frozen=True)
class Scene:
    """An output to be damaged, and the pictures that it follows."""

    folder: Path
    kind: str
    known: dict[str, set[bytes]]

    @property
    def before(self) -> Path:
        return self.folder / "before"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    def output(self, where: Path) -> Path:
        return where / KINDS[self.kind][0]

    def arguments(self, where: Path, *more: str) -> list[str]:
        options = [*KINDS[self.kind][1:], *more]
        return ["extract", str(self.pictures), "-o", str(self.output(where)), *options]


def set_scene(folder: Path, kind: str, name: str) -> Scene:
    """Make the pictures and the output as it is before the damage."""
    scene = Scene(folder, kind, {})
    scene.before.mkdir()
    checks.make_pictures(scene.pictures, FIRST)
    learn(scene)
    log = folder / "log"
    if name != "unfinished":
        assert tracing.run_forked(lambda: crash_driver.run(scene.arguments(scene.before)), log) == ExitCode.SKIPPED
    if name != "finished":
        checks.make_pictures(scene.pictures, ADDED, seed=1)
        learn(scene)
    if name.startswith("unfinished"):
        probe = shutil.copytree(scene.before, folder / "probe")
        syncs = [cut for cut in tracing.calls_on(probe, scene.arguments(probe), folder) if cut.call == "fdatasync"]
        assert tracing.kill_at(syncs[len(syncs) // 2], scene.arguments(scene.before), log) == -9
        assert list(scene.before.rglob("*.partial"))
    return scene


def learn(scene: Scene) -> None:
    for key, digest in checks.digests_of(scene.pictures).items():
        scene.known.setdefault(key, set()).add(digest)


# ---------------------------------------------------------------------------------------------------------- the damage


def places(file: Path) -> NDArray[np.int64]:
    """Bytes of a file that may be damaged: of a finished shard not its rows, which are for `verify` to check."""
    data = np.frombuffer(file.read_bytes(), np.uint8)
    is_unfinished = ".partial" in str(file)
    allowed = np.ones(len(data), bool)
    if file.suffix == ".npy" and not is_unfinished:
        allowed[4096:] = False
    if file.suffix == ".h5":
        with h5py.File(file) as shard:
            for name in FEATURES:
                offset, size = shard[name].id.get_offset(), shard[name].nbytes
                if offset is not None:
                    allowed[offset : offset + size] = False
    # Zeros and blanks are mostly padding; a few of them are damaged all the same.
    rare = np.random.default_rng(len(data)).random(len(data)) < 0.02
    found: NDArray[np.int64] = np.flatnonzero(allowed & (((data != 0) & (data != ord(" "))) | rare))
    return found


def damage(file: Path, random: np.random.Generator) -> str:
    """Damage a file in one of five ways; returns what was done."""
    data = bytearray(file.read_bytes())
    if not data:
        file.write_bytes(b"\0")
        return "a byte in an empty file"
    allowed = places(file)
    at = int(random.choice(allowed)) if len(allowed) else 0
    way = int(random.integers(8))
    if way == 0:
        file.write_bytes(data[:at])
        return f"cut at {at}"
    if way == 1:
        file.write_bytes(data + random.bytes(int(random.integers(1, 5000))))
        return "more bytes behind the end"
    if way == 2:
        stop = min(at + 512, len(data)) if at in allowed else at
        for position in range(at, stop):
            if position in allowed:
                data[position] = 0
        what = f"512 zeros at {at}"
    elif way == 3:
        data[at] = int(random.integers(256))
        what = f"another byte at {at}"
    else:
        bit = int(random.integers(8))
        data[at] ^= 1 << bit
        what = f"bit {bit} at {at}"
    file.write_bytes(data)
    return what


# ------------------------------------------------------------------------------------------------- what must come of it


def check_case(scene: Scene, seed: int) -> str:
    """Damage one file, and see what comes of it; returns `refused` or `finished`."""
    random = np.random.default_rng(seed)
    where = Path(shutil.copytree(scene.before, scene.folder / f"case-{seed}"))
    log = scene.folder / f"case-{seed}.log"
    files = sorted(path for path in where.rglob("*") if path.is_file() and path.suffix != ".lock")
    file = files[int(random.integers(len(files)))]
    done = f"{file.relative_to(where)}: {damage(file, random)}"
    output = scene.output(where)
    target = output if output.exists() else Path(f"{output}.partial")
    try:
        for command in ("info", "verify"):
            code = tracing.run_forked(lambda command=command: app.run([command, str(target)]), log)  # type: ignore[misc]
            assert code in (0, 1) and "Traceback" not in log.read_text(), f"{command} ended with {code}"
        code = tracing.run_forked(lambda: crash_driver.run(scene.arguments(where)), log)
        said = log.read_text()
        assert "Traceback" not in said
        outcome = "finished"
        if code != ExitCode.SKIPPED:
            assert code in (ExitCode.CANNOT_RUN, ExitCode.OTHER_RECIPE), f"ended with {code}"
            assert "\nerror: " in f"\n{said}" and "\nhint: " in said
            outcome = "refused"
            code = tracing.run_forked(lambda: crash_driver.run(scene.arguments(where, "--overwrite")), log)
            if code == ExitCode.CANNOT_RUN and any(words in log.read_text() for words in FOREIGN):
                outcome = "foreign"  # what is not ours is not overwritten either
        if outcome != "foreign":
            assert code == ExitCode.SKIPPED, f"at last ended with {code}"
            wrong = wrong_rows(output, scene)
            is_seen = bool(wrong) and tracing.run_forked(lambda: app.run(["verify", str(output)]), log) == 1
            assert not wrong or is_seen, wrong
            assert not (wrong and ".partial" in done), f"rows of an unfinished shard were believed: {wrong}"
    except BaseException as error:
        said = log.read_text() if log.exists() else ""
        raise AssertionError(f"case {seed}, {done}: {error}\n{said}") from error
    shutil.rmtree(where)
    log.unlink()
    return outcome


def wrong_rows(output: Path, scene: Scene) -> list[str]:
    """Images whose features are not those of their picture, and missing ones."""
    features = open_features(output)
    present = checks.digests_of(scene.pictures)
    wrong = [f"{key} is missing" for key in present if key not in features]
    for key, image in features.items():
        if image.status is not Status.DONE:
            continue
        try:
            tokens, vectors, pooled = image.visual_tokens, image.tile_pooled, image.pooled
        except InternvitError as error:
            wrong.append(f"{key}: {error}")
            continue
        for digest in scene.known.get(key, ()):
            expected = [crash_driver.features(digest, tile, tokens.shape[1:]) for tile in range(len(tokens))]
            same = all(
                np.array_equal(tokens[tile], part) and np.array_equal(vectors[tile], vector)
                for tile, (part, vector) in enumerate(expected)
            )
            if same and np.array_equal(pooled, expected[-1][1]):
                break
        else:
            wrong.append(f"{key} has other features")
    return wrong


def check_cases(scene: Scene, seeds: range) -> tuple[dict[str, int], list[str]]:
    """How many cases ended how, and what went wrong."""
    outcomes: dict[str, int] = {}
    wrong = []
    for seed in seeds:
        try:
            outcome = check_case(scene, seed)
        except BaseException:  # noqa: BLE001 - told by the test, with all others
            outcome = "wrong"
            wrong.append(traceback.format_exc())
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes, wrong


@pytest.mark.skipif(bool(tracing.why_not_traceable()), reason=tracing.why_not_traceable() or "strace")
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_output_is_refused_or_mended_and_its_rows_are_never_wrong(
    processes: ProcessPoolExecutor, kind: str, name: str, count: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        scene = processes.submit(set_scene, Path(folder), kind, name).result()
        first = 1_000_000 if count == MANY else 0
        parts = [
            processes.submit(check_cases, scene, range(first + start, first + count, PROCESSES))
            for start in range(PROCESSES)
        ]
        results = [part.result() for part in parts]
    outcomes = {word: sum(found.get(word, 0) for found, _ in results) for word in ("finished", "refused", "foreign")}
    wrong = [text for _, texts in results for text in texts]
    print(f"\n{kind}, {name}: {count} cases, {outcomes}, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:5])
    assert sum(outcomes.values()) == count
