"""A later run goes on with what an earlier one left, and a reader never mistakes the one's rows for the other's."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
from typing import TYPE_CHECKING

import numpy as np
import pytest
import storage_helpers as helpers
from filling_helpers import SIDE, Encoder, Shard
from moments import SUBMIT, Moment, wait_until
from PIL import Image
from run_helpers import extract, internvit, make_pictures, summary_of

from internvit_cli import open_features
from internvit_cli.config import Format, Status
from internvit_cli.decode.decoder import DecodedImage
from internvit_cli.errors import NoSpaceError, OutputError
from internvit_cli.extract import encode_loop as filling
from internvit_cli.extract import writer_thread as storing
from internvit_cli.extract.encode_loop import EncodeJob, EncodeLoop, EncodeRules
from internvit_cli.extract.writer_thread import ShardSink
from internvit_cli.runtime import workers
from internvit_cli.sources import FolderProblem, discover
from internvit_cli.sources import walk as walk_module
from internvit_cli.storage.format.layout import index_digest
from internvit_cli.storage.output import Output
from internvit_cli.storage.skipped import SkipLog, read_skip_log
from internvit_cli.storage.write import commit
from internvit_cli.storage.write.commit import ShardWriter, create_shard

if TYPE_CHECKING:
    from pathlib import Path

DTYPE = ("--dtype", "float32")
OUTPUTS = pytest.mark.parametrize("name", ["feats.h5", "feats"])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    make_pictures(tmp_path / "pictures", 4)
    return tmp_path / "pictures"


# ------------------------------------------------------------------------------------------------------- readers


def test_a_reader_of_a_file_that_was_replaced_says_so_instead_of_giving_other_rows(tmp_path, pictures):
    """The rows of a single file move when pictures are added: an index read before must not be used on them."""
    output = tmp_path / "feats.h5"
    assert extract(pictures, "-o", output, *DTYPE).returncode == 0
    before, pickled = open_features(output), pickle.dumps(open_features(output))
    vector = before["part0/000.jpg"].pooled
    Image.new("RGB", (40, 40), (9, 200, 30)).save(pictures / "0.png")
    assert extract(pictures, "-o", output, *DTYPE).returncode == 0
    for stale in (before, pickle.loads(pickled)):
        with pytest.raises(OutputError, match="was replaced") as caught:
            _ = stale["part0/000.jpg"].pooled
        assert "again" in caught.value.hint
    assert np.array_equal(open_features(output)["part0/000.jpg"].pooled, vector)


def test_a_reader_of_an_unfinished_file_goes_on_until_it_is_finished(tmp_path):
    output = Output(str(tmp_path / "feats.h5"))
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 2))
    output.prepare()
    create_shard(output.backend, output.partial_path(0), shard)
    unfinished = open_features(output.partial_path(0))
    assert unfinished["0000.jpg"].status is Status.PENDING
    os.replace(output.partial_path(0), output.path)
    with pytest.raises(OutputError, match="is not there"):
        unfinished.pooled_matrix()


# ------------------------------------------------------------------------------------------- what the output decides


@OUTPUTS
def test_what_is_left_to_auto_stays_as_the_output_has_it(tmp_path, pictures, name):
    chosen = ("--layer", "-2", "--tile-size", "224")
    assert extract(pictures, "-o", tmp_path / name, *chosen).returncode == 0
    Image.new("RGB", (300, 300), (9, 200, 30)).save(pictures / "new.png")
    again = extract(pictures, "-o", tmp_path / name, "--json")
    assert again.returncode == 0 and summary_of(again)["encoded"] == 1, again.stderr
    recipe = json.loads(internvit("info", tmp_path / name, "--json").stdout)["recipe"]
    assert (recipe["layer"], recipe["tile_size"]) == (1, 224)
    other = extract(pictures, "-o", tmp_path / name, "--layer", "-1")
    assert other.returncode == 5 and "layer was 1, is now 2" in other.stderr and "--layer" in other.stderr


def test_the_batch_of_a_cpu_is_not_recorded(tmp_path, pictures):
    """No row depends on it there, and the next run may have a card or fewer cores."""
    assert extract(pictures, "-o", tmp_path / "feats.h5", "--device", "cpu", "--batch-size", "3").returncode == 0
    assert open_features(tmp_path / "feats.h5").attributes["batch_tiles"] == 0


def test_a_recipe_of_another_version_is_an_error_with_a_hint_and_can_be_overwritten(tmp_path, pictures):
    h5py = pytest.importorskip("h5py")
    output = Output(str(tmp_path / "feats.h5"))
    assert extract(pictures, "-o", output.path).returncode == 0
    stored = output.finished()[0].stored
    recipe = json.dumps(json.loads(stored.attributes["recipe"]) | {"of_later_versions": 1})
    attributes = {name: value for name, value in stored.attributes.items() if name != "index_digest"}
    with h5py.File(output.path, "r+") as file:
        file.attrs["recipe"] = recipe
        file.attrs["index_digest"] = index_digest(stored.table, attributes | {"recipe": recipe})
    refused = extract(pictures, "-o", output.path)
    assert refused.returncode == 1 and "recipe" in refused.stderr and "hint: " in refused.stderr
    assert extract(pictures, "-o", output.path, "--overwrite").returncode == 0
    assert len(open_features(output.path)) == 4


def test_the_log_of_runs_tells_how_the_rows_were_made(tmp_path, pictures):
    assert extract(pictures, "-o", tmp_path / "feats.h5", "--workers", 2).returncode == 0
    (entry,) = json.loads(internvit("info", tmp_path / "feats.h5", "--json").stdout)["runs"]
    assert entry["workers"] == 2 and entry["model"] == "tiny-random"
    assert entry["output"] == str(tmp_path / "feats.h5")
    assert {"device", "dtype", "batch_tiles", "torch", "pillow", "ended", "seconds"} <= entry.keys()


# --------------------------------------------------------------------------------------------------- what was cut off


def test_a_touched_picture_of_an_unfinished_npy_shard_is_compared_by_its_bytes(tmp_path):
    """Its digest lies in the unfinished shard's own file, not yet in the published index."""
    folder, output = tmp_path / "pictures", Output(str(tmp_path / "feats"), Format.NPY)
    paths = make_pictures(folder, 3)
    first = extract(folder, "-o", output.path, *DTYPE, "--max-tiles", 1)
    assert first.returncode == 0
    (finished,) = output.finished()
    table = finished.stored.table
    digests, checksums = finished.backend.commit_records(finished.path)
    images = {key: open_features(output.path)[os.fsdecode(key)] for key in table.keys}
    rows = [
        commit.ImageRows(
            row, digests[row].tobytes(), {"pooled": [image.pooled[None]], "visual_tokens": [image.visual_tokens]}
        )
        for row, image in enumerate(images.values())
    ]
    # The same shard again, as a run that was killed after two of three images leaves it.
    again = Output(str(tmp_path / "again"), Format.NPY)
    again.prepare()
    attributes = {name: value for name, value in finished.stored.attributes.items() if name != "index_digest"}
    shape = helpers.FeatureShape(helpers.Tokens.VISUAL, 256, 256, 64, helpers.StoreDtype.FLOAT16, tile_pooled=False)
    pending = table.with_status(np.zeros(3, np.uint8))
    create_shard(again.backend, again.partial_path(0), helpers.NewShard(pending, shape, attributes))
    with contextlib.closing(ShardWriter(again.backend, again.partial_path(0), pending)) as writer:
        for image in rows[:2]:
            writer.write(image)
        writer.checkpoint()
    stored_digests, stored_checksums = again.backend.commit_records(again.partial_path(0))
    assert np.array_equal(stored_digests[:2], digests[:2])
    assert np.array_equal(stored_checksums[:2], checksums[:2])
    for path in paths:
        os.utime(path)
    result = extract(folder, "-o", again.path, "--json", *DTYPE, "--max-tiles", 1)
    assert result.returncode == 0, result.stderr
    features = open_features(again.path)
    assert all(np.array_equal(features[os.fsdecode(key)].pooled, image.pooled) for key, image in images.items())


@pytest.mark.parametrize("shard_format", list(Format))
def test_a_shard_for_which_there_is_no_room_leaves_nothing_behind(tmp_path, shard_format, monkeypatch):
    def full(path: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(commit, "reserve", full)
    output = Output(str(tmp_path / "feats"), shard_format)
    output.prepare()
    with pytest.raises(NoSpaceError):
        create_shard(output.backend, output.partial_path(0), helpers.make_shard(helpers.make_table([(1, 1, 0)])))
    assert os.listdir(output.path) == []


class SlowDecoder:
    """One picture, then no other until that one is committed."""

    tile_size, tiles, busy_seconds, pids = SIDE, 1, 0.0, (1,)

    def __init__(self, writer: ShardWriter, committed: list[bool]) -> None:
        self._writer = writer
        self._committed = committed

    def run(self, jobs, stopped):
        for job in jobs:
            yield DecodedImage(job.row, np.full((1, SIDE, SIDE, 3), 7, np.uint8), bytes(32), lambda: None)
            wait_until(lambda row=job.row: self._writer.status[row] != Status.PENDING)  # type: ignore[misc]
            self._committed.append(bool(self._writer.status[job.row] == Status.DONE))


def test_slow_decoding_does_not_hold_back_what_could_be_committed(tmp_path, monkeypatch):
    """A batch that takes minutes to fill goes off before it is full."""
    monkeypatch.setattr(filling, "LAG_SECONDS", 0.05)
    monkeypatch.setattr(filling, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(storing, "CHECKPOINT_SECONDS", 0.05)
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    shard = Shard([tmp_path / "a.png"], Output(str(tmp_path / "feats"), Format.NPY))
    committed: list[bool] = []
    with contextlib.closing(ShardWriter(shard.output.backend, shard.output.partial_path(0), shard.new.table)) as writer:
        sink = ShardSink(writer, SkipLog(shard.output.skipped_path), shard.new.table.keys)
        job = EncodeJob(shard.new.table.keys, shard.jobs, sink, EncodeRules(helpers.RECIPE))
        stop = type("Stop", (), {"signal": 0})()
        EncodeLoop(job, SlowDecoder(writer, committed), Encoder(64), stop, lambda _: None).run()
    assert committed == [True]


# ------------------------------------------------------------------------------------------------------ surroundings


def test_a_folder_that_cannot_be_read_is_listed_when_nothing_else_is_to_do(tmp_path, pictures, monkeypatch):
    output = tmp_path / "feats.h5"
    assert extract(pictures, "-o", output).returncode == 0
    scandir, closed = os.scandir, os.fsencode(pictures / "closed")
    os.mkdir(closed)

    def refusing(path):
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(walk_module.os, "scandir", refusing)
    assert isinstance(discover([str(pictures)], helpers_options()).unreadable_folders[0], FolderProblem)
    for _ in range(2):
        assert extract(pictures, "-o", output).returncode == 3
        (entry,) = read_skip_log(f"{output}.skipped.jsonl")
        assert os.fsencode(entry["key"]) == closed


def helpers_options():
    from internvit_cli.sources import DiscoverOptions

    return DiscoverOptions()


@pytest.mark.parametrize(("hard", "bound"), [(resource.RLIM_INFINITY, 4 << 30), (2 << 30, 2 << 30), (8 << 30, 4 << 30)])
def test_a_worker_respects_a_tighter_limit_of_the_shell(monkeypatch, hard, bound):
    """Raising a hard limit is not allowed, and no worker would start."""
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    workers._limit_memory(4 << 30)
    assert limits == [(bound, bound)]


@pytest.mark.parametrize("name", ["feats.h5", "feats"])
def test_a_signal_while_a_damaged_output_is_replaced_is_a_stop_like_any_other(tmp_path, name):
    """The old output stays damaged until the new one is complete: nothing but `--overwrite` may read past that."""
    folder, output = tmp_path / "pictures", tmp_path / name
    make_pictures(folder, 3)
    assert extract(folder, "-o", output, *DTYPE).returncode == 0
    index = output if output.is_file() else output / "shard-00000.images.jsonl"
    index.write_bytes(index.read_bytes()[:2000])
    make_pictures(folder, 12, seed=1)
    options = (folder, "-o", output, "--overwrite", "--batch-size", 4, "--max-tiles", 4, *DTYPE)
    for _ in range(2):
        ended = Moment(SUBMIT, 2).run("SIGINT", "extract", "--model", "tiny-random", *options)
        assert ended.returncode == 130, ended.stderr
        assert "error" not in ended.stderr
    assert extract(*options).returncode == 0
    assert len(open_features(output)) == 12
