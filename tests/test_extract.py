"""The main job from end to end, through the command line; files are read back with plain h5py and numpy."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from comparing import same_bytes
from forking import Forked, run_apart
from moments import DISK, EVERY_IMAGE, SUBMIT, WRITE, Moment, held
from PIL import Image
from run_helpers import (
    assert_same_content,
    command,
    extract,
    internvit,
    make_pictures,
    state_of,
    summary_of,
)

from internvit_cli import open_features
from internvit_cli.config import Status

DTYPE = ("--dtype", "float32")
"""Where values of two runs are compared: auto takes whichever type was faster at the moment."""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 8)
    return tmp_path / "pictures"


# ------------------------------------------------------------------------------------------------------ the plain case


def test_photographs_go_in_and_a_finished_file_of_exactly_the_planned_size_comes_out(
    photos: Path, tmp_path: Path
) -> None:
    names = ["028_exif-samples_640x480.jpg", "066_libwebp-gallery_800x600.webp", "040_imageio_768x512.png"]
    for name in names:
        shutil.copy(photos / name, tmp_path)
    output = tmp_path / "feats.h5"
    planned = json.loads(internvit("plan", tmp_path, "--model", "tiny-random", "-o", output, "--json").stdout)
    result = extract(tmp_path, "-o", output, "--json")
    assert result.returncode == 0, result.stderr
    summary = summary_of(result)
    assert (summary["found"], summary["done"], summary["skipped"], summary["pending"]) == (3, 3, 0, 0)
    assert planned["tiles"] == summary["tiles"]
    assert planned["bytes"] == summary["bytes"] == output.stat().st_size
    with h5py.File(output) as file:
        assert [key.decode() for key in file["image/key"]] == sorted(names)
        assert (file["image/status"][...] == Status.DONE).all()
        offsets = file["image/tile_offset"][...]
        grid = file["image/columns"][...] * file["image/rows"][...] + file["image/thumbnail"][...]
        np.testing.assert_array_equal(np.diff(offsets), grid)
        tokens, pooled = file["visual_tokens"], file["pooled"]
        assert tokens.shape == (offsets[-1], 256, 256) and tokens.dtype == np.float16
        assert pooled.shape == (3, 64) and np.isfinite(pooled[...]).all()
        for row, name in enumerate(sorted(names)):
            assert file["image/digest"][row].tobytes() == hashlib.sha256((photos / name).read_bytes()).digest()
            # The pooled vector is the mean of the patch tokens of the thumbnail, the image's last tile.
            thumbnail = tokens[offsets[row + 1] - 1].astype(np.float32).reshape(-1, 64)
            np.testing.assert_allclose(thumbnail.mean(axis=0), pooled[row], atol=2e-3)
    assert not list(tmp_path.glob("feats.h5?*")), "neither lock nor partial file is left"


@pytest.mark.parametrize("output", ["feats.h5", "feats"])
def test_a_second_run_does_nothing_touches_no_byte_and_loads_no_torch(
    pictures: Path, tmp_path: Path, output: str
) -> None:
    target = tmp_path / "out" / output
    target.parent.mkdir()
    assert extract(pictures, "-o", target).returncode == 0
    before = state_of(tmp_path)
    code = (
        "import sys; from internvit_cli.cli.app import run;"
        "assert run(sys.argv[1:]) == 0; assert 'torch' not in sys.modules"
    )
    arguments = ["extract", str(pictures), "-o", str(target), "--model", "tiny-random"]
    again = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "nothing new to do" in again.stdout
    assert state_of(tmp_path) == before


def test_both_formats_hold_the_same_features(pictures: Path, tmp_path: Path) -> None:
    options = ("--tile-pooled", "--store-dtype", "bfloat16")
    assert extract(pictures, "-o", tmp_path / "one.h5", *options).returncode == 0
    assert extract(pictures, "-o", tmp_path / "npy", "--shard-size", "1MB", *options).returncode == 0
    assert extract(pictures, "-o", tmp_path / "h5s", "--shard-size", "1MB", "--format", "h5", *options).returncode == 0
    assert len(list((tmp_path / "npy").glob("*.json"))) > 2
    one = open_features(tmp_path / "one.h5")
    for other in (open_features(tmp_path / "npy"), open_features(tmp_path / "h5s")):
        assert list(other) == list(one)
        for key in one:
            np.testing.assert_array_equal(one[key].visual_tokens, other[key].visual_tokens)
            np.testing.assert_array_equal(one[key].tile_pooled, other[key].tile_pooled)
            np.testing.assert_array_equal(one[key].pooled, other[key].pooled)
            assert one[key].grid == other[key].grid


@pytest.mark.parametrize("tokens", ["visual", "patch", "none"])
@pytest.mark.parametrize("pool", ["mean", "cls", "cls+mean"])
def test_what_is_stored_follows_the_options(pictures: Path, tmp_path: Path, tokens: str, pool: str) -> None:
    output = tmp_path / "feats.h5"
    options = ("--tokens", tokens, "--pool", pool, "--store-dtype", "float32", "--dtype", "float32")
    assert extract(pictures / "part0", "-o", output, "--max-tiles", 2, *options).returncode == 0
    with h5py.File(output) as file:
        assert file["pooled"].shape[1] == (128 if pool == "cls+mean" else 64)
        assert {name for name in file if name.endswith("tokens")} == ({f"{tokens}_tokens"} - {"none_tokens"})
        if tokens == "patch":
            assert file["patch_tokens"].shape[1:] == (1024, 64)
            last = int(file["image/tile_offset"][1]) - 1
            mean = file["patch_tokens"][last].mean(axis=0)
            if pool != "cls":
                np.testing.assert_allclose(file["pooled"][0][-64:], mean, rtol=1e-4, atol=1e-5)


def test_pooled_vectors_do_not_depend_on_what_else_is_stored(pictures: Path, tmp_path: Path) -> None:
    assert extract(pictures, "-o", tmp_path / "all.h5").returncode == 0
    assert extract(pictures, "-o", tmp_path / "pooled.h5", "--tokens", "none").returncode == 0
    with h5py.File(tmp_path / "all.h5") as everything, h5py.File(tmp_path / "pooled.h5") as pooled:
        np.testing.assert_array_equal(everything["pooled"][...], pooled["pooled"][...])


def test_without_thumbnails_the_vector_is_the_mean_over_the_tiles(pictures: Path, tmp_path: Path) -> None:
    assert extract(pictures, "-o", tmp_path / "f.h5", "--no-thumbnail", "--tile-pooled").returncode == 0
    with h5py.File(tmp_path / "f.h5") as file:
        assert file.attrs["pooled_from"] == "tiles"
        offsets = file["image/tile_offset"][...]
        for row in range(len(offsets) - 1):
            tiles = file["tile_pooled"][offsets[row] : offsets[row + 1]]
            np.testing.assert_allclose(file["pooled"][row], tiles.mean(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["300m-standalone", "6b-chat", "6b-hf"])
def test_a_real_checkpoint_encodes_from_the_command_line(
    reference: Path, pictures: Path, tmp_path: Path, family: str
) -> None:
    tokens = "visual" if "standalone" in family else "projected"
    arguments = ("-o", tmp_path / "f.h5", "--model", reference / family, "--tokens", tokens, "--dtype", "float32")
    result = internvit("extract", pictures, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    with h5py.File(tmp_path / "f.h5") as file:
        assert file[f"{tokens}_tokens"].shape[1:] == ((16, 256) if tokens == "visual" else (16, 48))
    again = internvit("extract", pictures, *arguments, "--json")
    assert summary_of(again)["encoded"] == 0, "the weights' digest is found equal without loading them"


# ------------------------------------------------------------------------------------------------- stopped and resumed


SHAPE = ("--dtype", "float32", "--max-tiles", 3)


@pytest.fixture(scope="module")
def many_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    make_pictures(folder, 40, seed=1, size=300)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "feats.h5"
    assert extract(many_pictures, "-o", output, *SHAPE).returncode == 0
    return output


@pytest.mark.parametrize(
    ("image", "call"), [(25, 8), *(pytest.param(*at, marks=pytest.mark.sweep) for at in ((2, 3), (1, 1), (40, 8)))]
)
def test_kill_9_in_the_middle_and_the_same_command_give_the_file_of_an_uninterrupted_run(
    many_pictures: Path, uninterrupted: Path, tmp_path: Path, image: int, call: int
) -> None:
    """At a call of the disk while, or after, an image is written."""
    output = tmp_path / "feats.h5"
    arguments = ("extract", many_pictures, "-o", output, "--model", "tiny-random", *SHAPE)
    moment = Moment(WRITE, image, settings=EVERY_IMAGE).then(DISK, call)
    killed = moment.run("SIGKILL", *arguments)
    assert killed.returncode == -9, killed.stderr
    assert not output.exists(), "a file under its final name is complete"
    with h5py.File(f"{output}.partial") as partial:
        done = partial["image/status"][...] == Status.DONE
        with h5py.File(uninterrupted) as whole:
            np.testing.assert_array_equal(partial["pooled"][done], whole["pooled"][done])
    assert extract(many_pictures, "-o", output, *SHAPE).returncode == 0
    assert_same_content(output, uninterrupted)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.sweep) for s in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_commits_what_is_encoded_and_the_same_command_goes_on(
    many_pictures: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "feats.h5"
    arguments = ("extract", many_pictures, "-o", output, "--model", "tiny-random", *SHAPE, "--json", "--batch-size", 4)
    process = Moment(SUBMIT, 5).run(number.name, *arguments)
    assert process.returncode == 128 + number, process.stderr
    first = json.loads(process.stdout)
    assert first["found"] == first["done"] + first["skipped"] + first["pending"] and first["done"] and first["pending"]
    with h5py.File(f"{output}.partial") as partial:
        assert int((partial["image/status"][...] == Status.DONE).sum()) == first["done"]
    second = summary_of(extract(many_pictures, "-o", output, *SHAPE, "--json"))
    assert second["encoded"] == first["pending"], "nothing that was committed is done again"
    assert_same_content(output, uninterrupted)


def test_a_signal_while_planning_ends_the_run_at_once_with_nothing_made(tmp_path: Path) -> None:
    picture = make_pictures(tmp_path / "one", 1)[0].read_bytes()
    for number in range(2000):
        (tmp_path / f"{number:05d}.jpg").write_bytes(picture)
    output = tmp_path / "feats.h5"
    arguments = ("extract", tmp_path, "-o", output, "--model", "tiny-random", "--max-tiles", 1, "--json")
    process = Moment(("internvit_cli.runtime.workers:WorkerPool.wait",)).run("SIGTERM", *arguments)
    assert process.returncode == 143 and json.loads(process.stdout)["exit_code"] == 143
    assert "images to encode" not in process.stderr, "the plan never came to its end"
    assert not list(tmp_path.glob("feats.h5*"))


@pytest.mark.sweep
def test_a_killed_run_over_a_folder_of_shards_goes_on_with_the_next_shard(many_pictures: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "feats"
    options = (*SHAPE, "--shard-size", "6MB")
    assert extract(many_pictures, "-o", whole, *options).returncode == 0
    arguments = ("extract", many_pictures, "-o", output, "--model", "tiny-random", *options)
    moment = Moment(("internvit_cli.extract.pipeline:create_shard",), 2).then(WRITE)
    assert moment.run("SIGKILL", *arguments).returncode == -9
    assert open_features(output), "the shards that the manifest names can be read"
    assert (output / "shard-00001.partial").exists()
    assert extract(many_pictures, "-o", output, *options).returncode == 0
    arrays = sorted(path.name for path in whole.glob("*.npy"))
    assert sorted(path.name for path in output.glob("*.npy")) == arrays
    for name in arrays:
        assert same_bytes(whole / name, output / name), name
    assert json.loads((whole / "manifest.json").read_text()) == json.loads((output / "manifest.json").read_text())


def test_new_changed_and_deleted_pictures_are_taken_up_by_the_same_command(pictures: Path, tmp_path: Path) -> None:
    changed, deleted = pictures / "part0" / "000.jpg", pictures / "part1" / "001.png"
    for output in (tmp_path / "feats.h5", tmp_path / "feats"):
        shutil.rmtree(pictures)
        make_pictures(pictures, 8)
        assert extract(pictures, "-o", output, *DTYPE).returncode == 0
        make_pictures(pictures / "added", 3, seed=5)
        Image.new("RGB", (90, 33), "red").save(changed)
        deleted.unlink()
        os.utime(pictures / "part0" / "002.png", (1, 1))
        summary = summary_of(extract(pictures, "-o", output, *DTYPE, "--json"))
        assert (summary["encoded"], summary["found"], summary["kept"]) == (4, 10, 1)
        assert extract(pictures, "-o", tmp_path / "anew.h5", "--overwrite", *DTYPE).returncode == 0
        anew, features = open_features(tmp_path / "anew.h5"), open_features(output)
        assert set(features) == {*anew, "part1/001.png"}
        for key in anew:
            np.testing.assert_array_equal(anew[key].visual_tokens, features[key].visual_tokens)
        assert internvit("info", output, "--json").returncode == 0
        (tmp_path / "anew.h5").unlink()


# ----------------------------------------------------------------------------------------------------------- bad input


def test_each_bad_picture_is_one_skipped_image_with_its_reason(pictures: Path, tmp_path: Path) -> None:
    good = (pictures / "part0" / "000.jpg").read_bytes()
    (pictures / "cut.jpg").write_bytes(good[: len(good) // 2])
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "text.jpeg").write_text("no picture")
    (pictures / "new\nline\x1b[31m.jpg").write_bytes(b"bad")
    (pictures / "link.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(pictures / "pipe.jpg")
    Image.new("1", (20000, 20000)).save(pictures / "bomb.png")
    output = tmp_path / "feats.h5"
    result = extract(pictures, "-o", output, *DTYPE, "--json")
    assert result.returncode == 3
    assert "\x1b" not in result.stderr + result.stdout
    lines = Path(f"{output}.skipped.jsonl").read_text().splitlines()
    reasons = {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons == {
        "cut.jpg": "truncated",
        "empty.png": "not_an_image",
        "text.jpeg": "not_an_image",
        "new\nline\x1b[31m.jpg": "not_an_image",
        "link.jpg": "vanished",
        "pipe.jpg": "not_regular",
        "bomb.png": "too_large",
    }
    features = open_features(output)
    assert {key for key in features if features[key].status is not Status.DONE} == set(reasons)
    with h5py.File(output) as file:
        done = file["image/status"][...] == Status.DONE
        assert np.isnan(file["pooled"][~done]).all() and np.isfinite(file["pooled"][done]).all()
    clean = tmp_path / "clean"
    make_pictures(clean, 8)
    assert extract(clean, "-o", tmp_path / "clean.h5", *DTYPE).returncode == 0
    reference = open_features(tmp_path / "clean.h5")
    for key in reference:
        np.testing.assert_array_equal(reference[key].visual_tokens, features[key].visual_tokens)
    again = extract(pictures, "-o", output, "--json", "--allow-skipped", "7")
    assert again.returncode == 0 and summary_of(again)["encoded"] == 0
    assert extract(pictures, "-o", output, "--allow-skipped", "10%").returncode == 3


def test_strict_stops_at_the_first_bad_picture_and_leaves_it_pending(pictures: Path, tmp_path: Path) -> None:
    good = (pictures / "part0" / "000.jpg").read_bytes()
    (pictures / "part1" / "zz.jpg").write_bytes(good[: len(good) // 2])
    result = extract(pictures, "-o", tmp_path / "f.h5", "--strict")
    assert result.returncode == 1 and "part1/zz.jpg" in result.stderr
    with h5py.File(tmp_path / "f.h5.partial") as file:
        assert file["image/status"][-1] == Status.PENDING
    (pictures / "part1" / "zz.jpg").write_bytes(good)
    assert extract(pictures, "-o", tmp_path / "f.h5").returncode == 0, "the mended picture is planned anew"


def test_when_not_one_picture_can_be_used_the_exit_code_is_1(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    result = extract(tmp_path, "-o", tmp_path / "f.h5", "--json")
    assert result.returncode == 1
    assert summary_of(result)["error"] == "no image could be used"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["nowhere", "-o", "f.h5"], 2, "no such file or folder: nowhere"),
        (["empty", "-o", "f.h5"], 4, "no pictures found"),
        (["pictures", "-o", "missing/f.h5"], 1, "missing"),
        (["pictures", "-o", "pictures"], 1, "not a feature store"),
        (["pictures", "-o", "f.npy"], 2, "folder of shards"),
        (["pictures", "-o", "f.h5", "--format", "npy"], 2, "--format npy"),
        (["pictures", "-o", "f.h5", "--bogus"], 2, "--bogus"),
        (["pictures", "-o", "f.h5", "--tokens", "some"], 2, "'some'"),
        (["pictures", "-o", "f.h5", "--tokens", "projected"], 2, "no projector"),
        (["pictures", "-o", "f.h5", "--tile-size", "450"], 2, "450"),
        (["pictures", "-o", "f.h5", "--min-tiles", "5", "--max-tiles", "2"], 2, "--min-tiles 5"),
        (["pictures", "-o", "f.h5", "--layer", "9"], 2, "--layer 9"),
        (["pictures", "-o", "f.h5", "--layer", "last"], 2, "--layer is 'last'"),
        (["pictures", "-o", "f.h5", "--device", "cuda:7"], 1, "--device cuda:7"),
        (["pictures", "-o", "f.h5", "--device", "tpu"], 2, "--device tpu"),
        (["pictures", "-o", "f.h5", "--batch-size", "many"], 2, "--batch-size is 'many'"),
        (["pictures", "-o", "f.h5", "--background", "nocolor"], 2, "nocolor"),
        (["pictures", "-o", "f.h5", "--shard-size", "big"], 2, "--shard-size is 'big'"),
        (["pictures", "-o", "text.h5"], 1, "not an HDF5 file"),
        (["pictures", "pictures/part0", "pictures/part1=pictures", "-o", "f.h5"], 2, "pictures/part1=pictures"),
        (["pictures"], 2, "no output"),
        (["-o", "f.h5"], 2, "no sources"),
    ],
)
def test_what_cannot_be_done_is_one_error_line_one_hint_line_and_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "pictures", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_text("not mine")
    result = extract(*arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: ", "Traceback"))]
    assert result.returncode == code, result.stderr
    assert [line.partition(":")[0] for line in lines] == ["error", "hint"]
    assert complaint in lines[0]
    assert not (tmp_path / "f.h5").exists()


def test_a_model_that_cannot_be_fetched_is_an_error_that_names_the_ways_out(pictures: Path, tmp_path: Path) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    arguments = command("extract", pictures, "-o", tmp_path / "f.h5")
    result = subprocess.run(arguments, capture_output=True, text=True, env=offline)
    assert result.returncode == 1
    assert "error: OpenGVLab/InternViT-300M-448px-V2_5" in result.stderr
    assert "--model tiny-random" in result.stderr and "directory" in result.stderr and "Traceback" not in result.stderr


def test_json_reports_errors_too(tmp_path: Path) -> None:
    result = extract(tmp_path / "nowhere", "-o", tmp_path / "f.h5", "--json")
    assert summary_of(result)["exit_code"] == 2 and "nowhere" in str(summary_of(result)["error"])


def test_a_broken_checkpoint_is_refused_with_the_tensor_named(reference: Path, pictures: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(reference / "300m-standalone", model, copy_function=shutil.copyfile)
    tensors = load_file(model / "model.safetensors")
    del tensors["encoder.layers.1.mlp.fc1.weight"]
    save_file(tensors, model / "model.safetensors")
    result = internvit("extract", pictures, "-o", tmp_path / "f.h5", "--model", model)
    assert result.returncode == 1
    assert "encoder.layers.1.mlp.fc1.weight" in result.stderr and "Traceback" not in result.stderr


# ----------------------------------------------------------------------------------------------- outputs of other runs


@pytest.mark.parametrize("output", ["feats.h5", "feats"])
def test_overwrite_keeps_the_old_output_until_the_new_one_is_complete(
    pictures: Path, tmp_path: Path, output: str
) -> None:
    target = tmp_path / output
    assert extract(pictures, "-o", target, "--dtype", "float32").returncode == 0
    old = {key: image.pooled for key, image in open_features(target).items()}
    arguments = ("-o", target, "--dtype", "float32", "--max-tiles", 2, "--overwrite")
    bad = pictures / "part1" / "zz.jpg"
    whole = (pictures / "part0" / "000.jpg").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    assert extract(pictures, *arguments, "--strict").returncode == 1
    for key, image in open_features(target).items():
        np.testing.assert_array_equal(image.pooled, old[key])
    bad.unlink()
    assert extract(pictures, *arguments).returncode == 0, "zz.jpg was planned, but is not in the listing any more"
    assert max(image.grid[0] * image.grid[1] for image in open_features(target).values()) <= 2
    assert extract(pictures, *arguments[:-1]).returncode == 0


def test_a_second_run_on_the_same_output_is_told_who_holds_it(many_pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "feats.h5"
    arguments = ("extract", many_pictures, "-o", output, "--model", "tiny-random", *SHAPE, "-q")
    with held(Moment(WRITE), tmp_path / "mark", *arguments) as held_run:
        second = extract(many_pictures, "-o", output, *SHAPE)
        assert second.returncode == 75 and f"process {held_run.process.pid}" in second.stderr
        held_run.process.kill()
    assert extract(many_pictures, "-o", output, *SHAPE).returncode == 0, "a dead run's lock needs no human"


def test_a_key_from_another_root_is_refused_with_both_named(tmp_path: Path) -> None:
    make_pictures(tmp_path / "a", 2)
    make_pictures(tmp_path / "b", 2)
    assert extract(tmp_path / "a", "-o", tmp_path / "f.h5").returncode == 0
    result = extract(tmp_path / "b", "-o", tmp_path / "f.h5")
    assert result.returncode == 5
    assert str(tmp_path / "a") in result.stderr and str(tmp_path / "b") in result.stderr


def test_a_disk_that_is_too_small_is_refused_before_any_work(pictures: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", mount], capture_output=True)
    if made.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        for output in (mount / "f.h5", mount / "feats"):
            result = extract(pictures, "-o", output)
            assert result.returncode == 6, result.stderr
            assert "bytes" in result.stderr and "encoding with" not in result.stderr
    finally:
        subprocess.run(["umount", mount], check=True)


# ------------------------------------------------------------------------------------------------------- sources, plan


def test_lists_come_from_files_and_from_standard_input(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    keys = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    (tmp_path / "list").write_bytes(b"\0".join(key.encode() for key in keys))
    options = ("-0", "--root", pictures)
    assert extract("--files-from", tmp_path / "list", *options, "-o", tmp_path / "a.h5").returncode == 0
    (tmp_path / "lines").write_text("\n".join(keys))
    with (tmp_path / "lines").open() as lines:
        ended = run_apart("extract", "-", "-o", tmp_path / "b.h5", "--model", "tiny-random", stdin=lines.fileno())
    assert ended.returncode == 0, ended.stderr
    assert list(open_features(tmp_path / "a.h5")) == list(open_features(tmp_path / "b.h5")) == keys


def test_plan_writes_nothing_and_counts_what_extract_finds(pictures: Path, tmp_path: Path) -> None:
    (pictures / "bad.jpg").write_text("no picture")
    before = state_of(tmp_path)
    planned = json.loads(
        internvit("plan", pictures, "-o", tmp_path / "f.h5", "--model", "tiny-random", "--json").stdout
    )
    dry = extract(pictures, "-o", tmp_path / "f.h5", "--dry-run")
    assert dry.returncode == 0 and f"{planned['bytes']:,} bytes" in dry.stdout
    assert state_of(tmp_path) == before
    assert planned["images"] == 9 and planned["skipped"] == 1 and planned["reasons"] == {"not_an_image": 1}
    assert sum(planned["histogram"].values()) == 8
    assert sum(int(tiles) * images for tiles, images in planned["histogram"].items()) == planned["tiles"]
    summary = summary_of(extract(pictures, "-o", tmp_path / "f.h5", "--json"))
    assert summary["bytes"] == planned["bytes"]


def test_plan_of_a_known_model_needs_no_network(pictures: Path, tmp_path: Path) -> None:
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    result = subprocess.run(command("plan", pictures, "--json"), capture_output=True, text=True, env=offline)
    planned = json.loads(result.stdout)
    per_tile = 256 * 4096 * 2
    assert planned["bytes"] > planned["tiles"] * per_tile


@pytest.mark.parametrize(
    "closing",
    [
        "<&- >&- 2>&-",
        *(pytest.param(one, marks=pytest.mark.sweep) for one in ("2>&1 | true", "<&-", ">&-", "2>&-", "| true")),
    ],
)
def test_closed_and_broken_streams_change_neither_the_work_nor_the_exit_code(
    pictures: Path, tmp_path: Path, closing: str
) -> None:
    output = tmp_path / "feats.h5"
    line = shlex.join(command("extract", pictures / "part0", "-o", output, "--model", "tiny-random"))
    script = f"set -o pipefail; {line} {closing}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert len(open_features(output)) == 4


def test_progress_is_drawn_on_a_terminal_and_elsewhere_told_in_lines(pictures: Path, tmp_path: Path) -> None:
    import pty

    plain = extract(pictures, "-o", tmp_path / "a.h5")
    assert "\r" not in plain.stderr and "8 images found = 8 to encode (26 tiles)" in plain.stderr
    leader, follower = pty.openpty()
    arguments = ("extract", pictures, "-o", tmp_path / "b.h5", "--model", "tiny-random")
    process = Forked(*arguments, stderr=follower, env=os.environ | {"TERM": "xterm"})
    os.close(follower)
    drawn = b""
    try:
        while block := os.read(leader, 65536):
            drawn += block
    except OSError:
        pass  # the terminal closes with the process
    os.close(leader)
    assert process.wait() == 0 and b"\r" in drawn
