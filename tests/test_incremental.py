"""A folder that changes between runs: the output follows it, and nothing that is there already is done again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_helpers import extract, internvit, make_pictures, state_of, summary_of

from internvit_cli import open_features
from internvit_cli.config import Status

OUTPUTS = ("feats.h5", "feats")
DTYPE = ("--dtype", "float32")


def assert_same_features(left: Path, right: Path) -> None:
    """Two outputs hold the same images with the same features, in whatever order."""
    ours, theirs = open_features(left), open_features(right)
    assert set(ours) == set(theirs)
    for key in ours:
        assert ours[key].status == theirs[key].status, key
        if ours[key].status is Status.DONE:
            np.testing.assert_array_equal(ours[key].visual_tokens, theirs[key].visual_tokens, err_msg=key)
            np.testing.assert_array_equal(ours[key].pooled, theirs[key].pooled, err_msg=key)


def put(path: Path, random: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = random.integers(20, 90, 2)
    Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)


@pytest.fixture(params=OUTPUTS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 6)
    return tmp_path / "pictures"


@pytest.mark.parametrize("turns", [8, pytest.param(30, marks=pytest.mark.sweep)])
def test_many_runs_over_a_changing_folder_end_equal_to_one_run_over_the_last(
    output: Path, tmp_path: Path, turns: int
) -> None:
    random = np.random.default_rng(7)
    folder = tmp_path / "pictures"
    for number in range(5):
        put(folder / f"start{number}.png", random)
    for turn in range(turns):
        present = sorted(folder.rglob("*.png"))
        put(folder / f"new{turn % 4}" / f"{turn:02d}.png", random)
        if turn % 3 == 0:
            put(present[int(random.integers(len(present)))], random)
        if turn % 4 == 1:
            present[0].rename(folder / f"renamed{turn}.png")
        if turn % 5 == 2:
            present[-1].unlink()
        if turn % 7 == 3:
            (folder / "bad.png").write_text("no picture")
        if turn % 7 == 5:
            put(folder / "bad.png", random)
        result = extract(folder, "-o", output, "--max-tiles", 1, "--prune", "--json", *DTYPE)
        assert result.returncode in (0, 3), result.stderr
        summary = summary_of(result)
        assert summary["found"] == summary["done"] + summary["skipped"] + summary["pending"]  # type: ignore[operator]
        assert summary["pending"] == 0 and summary["kept"] == 0
    assert extract(folder, "-o", tmp_path / "anew.h5", "--max-tiles", 1, *DTYPE).returncode in (0, 3)
    assert_same_features(output, tmp_path / "anew.h5")
    before = state_of(tmp_path)
    assert summary_of(extract(folder, "-o", output, "--max-tiles", 1, "--prune", "--json", *DTYPE))["encoded"] == 0
    assert state_of(tmp_path) == before


def test_rows_of_deleted_pictures_stay_until_they_are_pruned(output: Path, pictures: Path) -> None:
    assert extract(pictures, "-o", output, *DTYPE).returncode == 0
    (pictures / "part0" / "000.jpg").unlink()
    assert summary_of(extract(pictures, "-o", output, "--json", *DTYPE))["kept"] == 1
    assert "part0/000.jpg" in open_features(output)
    pruned = summary_of(extract(pictures, "-o", output, "--prune", "--json", *DTYPE))
    assert (pruned["kept"], pruned["encoded"]) == (0, 0)
    assert "part0/000.jpg" not in open_features(output) and len(open_features(output)) == 5
    assert json.loads(internvit("info", output, "--json").stdout)["total_images"] == 5


def test_prune_refuses_what_looks_like_a_disk_that_is_not_mounted(output: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_pictures(other, 2)
    sources = (f"a={pictures}", f"b={other}")
    assert extract(*sources, "-o", output, *DTYPE).returncode == 0
    before = {key: image.pooled for key, image in open_features(output).items()}
    for path in other.rglob("*.*"):
        path.unlink()
    emptied = extract(*sources, "-o", output, "--prune", *DTYPE)
    assert emptied.returncode == 1 and "holds no pictures" in emptied.stderr
    make_pictures(other, 2)
    for path in sorted(pictures.rglob("*.*"))[:-1]:
        path.unlink()
    most = extract(*sources, "-o", output, "--prune", *DTYPE)
    assert most.returncode == 1 and "--yes" in most.stderr
    after = {key: image.pooled for key, image in open_features(output).items()}
    assert before.keys() == after.keys()
    assert extract(*sources, "-o", output, "--prune", "--yes", *DTYPE).returncode == 0
    assert len(open_features(output)) == 3


def test_prune_touches_only_the_sources_of_this_command(output: Path, pictures: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "other", 2)
    both = (f"a={pictures}", f"b={tmp_path / 'other'}")
    assert extract(*both, "-o", output, *DTYPE).returncode == 0
    (pictures / "part0" / "000.jpg").unlink()
    assert extract(both[0], "-o", output, "--prune", *DTYPE).returncode == 0
    keys = set(open_features(output))
    assert "a/part0/000.jpg" not in keys and sum(key.startswith("b/") for key in keys) == 2


def test_skipped_pictures_are_left_alone_until_they_are_retried(output: Path, pictures: Path) -> None:
    import os

    bad = pictures / "bad.png"
    bad.write_text("no picture")
    assert extract(pictures, "-o", output, *DTYPE).returncode == 3
    assert summary_of(extract(pictures, "-o", output, "--json", *DTYPE))["encoded"] == 0
    entries = Path(str(output) + ".skipped.jsonl") if output.suffix else output / "skipped.jsonl"
    assert [json.loads(line)["attempt"] for line in entries.read_text().splitlines()] == [1]
    assert extract(pictures, "-o", output, "--retry-skipped", *DTYPE).returncode == 3
    assert [json.loads(line)["attempt"] for line in entries.read_text().splitlines()] == [2]
    # The same size and time as before: only a retry looks at it again.
    status = bad.stat()
    Image.new("RGB", (3, 3)).save(bad)
    content = bad.read_bytes()
    bad.write_bytes(content.ljust(status.st_size, b"\0")[: max(status.st_size, len(content))])
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert extract(pictures, "-o", output, "--retry-skipped", *DTYPE).returncode == 0
    assert open_features(output)["bad.png"].status is Status.DONE
    assert not entries.exists()


def test_a_tree_that_moved_is_recognised_when_told_and_then_for_good(
    output: Path, pictures: Path, tmp_path: Path
) -> None:
    assert extract(pictures, "-o", output, *DTYPE).returncode == 0
    moved = tmp_path / "elsewhere"
    pictures.rename(moved)
    refused = extract(moved, "-o", output, *DTYPE)
    assert refused.returncode == 5 and "--relocate" in refused.stderr
    relocated = summary_of(extract(moved, "-o", output, "--relocate", f"{pictures}={moved}", "--json", *DTYPE))
    assert (relocated["encoded"], relocated["done"]) == (0, 6)
    before = state_of(tmp_path)
    assert summary_of(extract(moved, "-o", output, "--json", *DTYPE))["encoded"] == 0
    assert state_of(tmp_path) == before
    assert extract(moved, "-o", tmp_path / "anew.h5", *DTYPE).returncode == 0
    assert_same_features(output, tmp_path / "anew.h5")


def test_a_row_that_is_damaged_is_encoded_again_when_its_file_is_made_anew(pictures: Path, tmp_path: Path) -> None:
    import h5py

    output = tmp_path / "feats.h5"
    assert extract(pictures, "-o", output, *DTYPE).returncode == 0
    shutil.copy(output, tmp_path / "sound.h5")
    with h5py.File(output) as file:
        offset = file["visual_tokens"].id.get_offset()
    with output.open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"\xff\x00\xff")
    put(pictures / "zz.png", np.random.default_rng(0))
    assert summary_of(extract(pictures, "-o", output, "--json", *DTYPE))["encoded"] == 2
    sound, mended = open_features(tmp_path / "sound.h5"), open_features(output)
    for key in sound:
        np.testing.assert_array_equal(sound[key].visual_tokens, mended[key].visual_tokens)
