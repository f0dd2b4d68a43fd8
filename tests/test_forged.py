"""Outputs that somebody forged: each command refuses them in one line with a hint, or gives what it gave before."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import crash_driver
import crash_tracing as tracing
import forging
import h5py
import pytest
from crash_checks import KINDS

from internvit_cli.errors import OutputError
from internvit_cli.storage.format import npy
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from collections.abc import Iterator

PROCESSES = 2
FEW, MANY = 1, 80
"""Forgeries that are tried of each kind of output. There are some 800 of each, and one takes most of a second."""


def begin_process() -> None:
    tracing.warm_up(crash_driver.Behavior(inline=True))


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context, begin_process) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "is_unfinished", "most"),
    [
        ("file", True, FEW),
        *(
            pytest.param(kind, is_unfinished, MANY, marks=pytest.mark.sweep)
            for kind in KINDS
            for is_unfinished in (False, True)
        ),
    ],
)
def test_a_forged_output_is_refused_in_one_line_or_changes_nothing_and_tells_of_no_other_file(
    processes: ProcessPoolExecutor, kind: str, is_unfinished: bool, most: int
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        places = [Path(folder, str(part)) for part in range(PROCESSES)]
        for place in places:
            place.mkdir()
        parts = [
            processes.submit(forging.try_forgeries, str(place), kind, is_unfinished, part, PROCESSES, most)
            for part, place in enumerate(places)
        ]
        results = [part.result() for part in parts]
    cases = [case for found, _ in results for case in found]
    assert len(cases) == results[0][1] >= FEW
    refused = sum(case.refused > 0 for case in cases)
    print(f"\n{kind}: {len(cases)} forgeries, {refused} refused; {max(case.seconds for case in cases):.1f} s at most")
    wrong = [f"{case.name}:\n" + "\n".join(case.problems) for case in cases if case.problems]
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:10])
    assert refused > len(cases) // 2


@pytest.mark.parametrize("kind", ["file", pytest.param("npy folder", marks=pytest.mark.sweep)])
def test_what_no_run_can_have_made_is_refused_although_its_digests_fit(kind: str, tmp_path: Path) -> None:
    tiles = (" tile_size 449", " min_tiles 0", " min_tiles 100")
    parts = (
        *tiles,
        " layer 1048576",
        " std ",
        " rescale_factor ",
        " background ",
        "column width 0",
        "room between strings",
    )
    scene = forging.set_scene(tmp_path, kind)
    chosen = [one for one in forging.forgeries(scene) if any(part in one.name for part in parts)]
    assert len(chosen) == len(parts) - (kind != "file")
    for forgery in chosen:
        case = forging.try_case(scene, forgery, {})
        assert case.refused > 3 and not case.problems, (case.name, case.problems)


@pytest.mark.parametrize(
    ("name", "number"), [("width", 1 << 32), ("rows", 1 << 16), ("file_size", -1), ("status", 257)]
)
def test_a_number_that_its_column_cannot_hold_is_refused_and_not_cut_off(
    name: str, number: int, tmp_path: Path
) -> None:
    scene = forging.set_scene(tmp_path, "npy folder")
    index = Path(f"{scene.shard(tmp_path / 'sound')}.images.jsonl")
    first, rest = index.read_text().split("\n", 1)
    index.write_text(json.dumps(json.loads(first) | {name: number}) + "\n" + rest)
    with pytest.raises(OutputError, match=rf"an image has a {name} that is out of range"):
        npy.read(str(scene.shard(tmp_path / "sound")))


@pytest.mark.parametrize("name", ["image/key", "image/crc32", "image/digest", "pooled", "run_log"])
def test_what_has_the_name_of_a_dataset_and_is_none_is_named_in_our_words(name: str, tmp_path: Path) -> None:
    scene = forging.set_scene(tmp_path, "file")
    path = str(scene.shard(tmp_path / "sound"))
    for content, problem in ((None, "is not a dataset"), (h5py.Empty("f4"), "has no shape")):
        with h5py.File(path, "r+") as file:
            del file[name]
            file.create_group(name) if content is None else file.create_dataset(name, data=content)
        with pytest.raises(OutputError, match=f"{name} {problem}"):
            open_features(path)


def test_of_a_log_of_runs_without_end_the_newest_entries_count(tmp_path: Path) -> None:
    scene = forging.set_scene(tmp_path, "npy folder")
    shard = scene.shard(tmp_path / "sound")
    file = Path(f"{shard}.json")
    log = [{"run": number} for number in range(50_000)]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"run_log": log}))
    kept = npy.run_log(str(shard))
    assert kept == log[-len(kept) :] and 1000 < len(kept) < 10_000


@pytest.mark.parametrize(
    "change",
    [{"key": 7}, {"width": 2048.5}, {"rows": None}, {"crc32": "12"}, {"digest": "00 " * 32}, {"status": "done"}],
    ids=str,
)
def test_a_line_that_describes_no_image_is_named_by_its_number(change: dict[str, object], tmp_path: Path) -> None:
    scene = forging.set_scene(tmp_path, "npy folder")
    index = Path(f"{scene.shard(tmp_path / 'sound')}.images.jsonl")
    first, second, rest = index.read_text().split("\n", 2)
    index.write_text("\n".join([first, json.dumps(json.loads(second) | change), rest]))
    with pytest.raises(OutputError, match=r"line 2 of images\.jsonl does not describe an image"):
        npy.read(str(scene.shard(tmp_path / "sound")))
