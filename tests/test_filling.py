"""A shard is filled: batches across images, what a value too large or a NaN costs, and what a stop leaves behind."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import storage_helpers as helpers
from filling_helpers import (
    CLAMPED,
    NOT_A_NUMBER,
    RULE,
    SIDE,
    TOO_LARGE,
    Encoder,
    Pending,
    Shard,
    Stop,
    features_of,
)
from forking import PATIENCE
from PIL import Image

from internvit_cli.config import Format, Skipped, Status, Tokens
from internvit_cli.errors import DeviceError, ExitCode, InternvitError, NoSpaceError
from internvit_cli.extract import writer_thread
from internvit_cli.storage.output import Output
from internvit_cli.storage.skipped import SkipLog, read_skip_log
from internvit_cli.storage.write.commit import ShardWriter, create_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from internvit_cli.decode.decoder import DecodeJob


@pytest.fixture
def output(tmp_path) -> Output:
    return Output(str(tmp_path / "feats"), Format.NPY)


@pytest.fixture
def plain_pictures(tmp_path) -> Callable[[Sequence[int]], list[Path]]:
    """Pictures of one tile and one color each, by the red of it."""

    def make(colors: Sequence[int]) -> list[Path]:
        paths = []
        for number, red in enumerate(colors):
            paths.append(tmp_path / f"{number:03d}.png")
            Image.new("RGB", (SIDE, SIDE), (red, number % 256, 7)).save(paths[-1])
        return paths

    return make


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> list[Path]:
    """Pictures of noise, of one to seven tiles."""
    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(1)
    paths = []
    for number in range(12):
        width, height = (int(n) for n in rng.integers(20, 130, 2))
        paths.append(folder / f"{number:03d}.png")
        Image.fromarray(rng.integers(0, 240, (height, width, 3), np.uint8)).save(paths[-1])
    return paths


# ------------------------------------------------------------------------------------------------------ what is stored


@pytest.mark.parametrize("batch_tiles", [1, 3, 16])
def test_batches_across_images_change_no_value(noise, tmp_path, batch_tiles):
    """However tiles fall into batches, each image has its own features, its last tile's vector for the whole."""
    shard = Shard(noise, Output(str(tmp_path / "feats"), Format.H5), tile_pooled=True)
    encoder = Encoder(batch_tiles)
    filled = shard.fill(encoder)
    tiles = shard.new.table.tiles
    assert tiles > 30
    assert sum(encoder.sizes) == filled.tally.tiles == tiles
    assert encoder.sizes[:-1] == [batch_tiles] * (len(encoder.sizes) - 1), "only the last batch may be short"
    assert (filled.tally.images, filled.tally.skipped) == (12, 0)
    plain = shard.publish()
    offset = plain.arrays["image/tile_offset"].tolist()
    for row, job in enumerate(shard.jobs):
        (expected,) = features_of(decode(job)).layers
        mine = slice(offset[row], offset[row + 1])
        assert np.array_equal(plain.arrays["visual_tokens"][mine], expected.tokens)
        assert np.array_equal(plain.arrays["tile_pooled"][mine], expected.pooled)
        assert np.array_equal(plain.arrays["pooled"][row], expected.pooled[-1])


def decode(job: DecodeJob) -> NDArray[Any]:
    from internvit_cli.decode.pictures import decode_tiles
    from internvit_cli.plan.tiling import tile_count

    out = np.empty((tile_count(job.grid, thumbnail=True), SIDE, SIDE, 3), np.uint8)
    decode_tiles(job.path, job.header, job.grid, RULE, out)
    return out


def test_without_a_thumbnail_the_vector_is_the_mean_over_the_tiles(noise, output):
    shard = Shard(noise, output)
    shard.fill(Encoder(4), pool_all_tiles=True)
    pooled = shard.publish().arrays["pooled"]
    for row, job in enumerate(shard.jobs):
        assert np.array_equal(pooled[row], features_of(decode(job)).layers[0].pooled.mean(axis=0, dtype=np.float32))


# ---------------------------------------------------------------------------------------------- values that do not fit


def test_a_value_too_large_at_the_very_beginning_ends_the_run(plain_pictures, output):
    """The stored type is wrong for this model: better to hear it now than of every picture."""
    shard = Shard(plain_pictures([TOO_LARGE, 1, 2]), output)
    with pytest.raises(InternvitError, match=r"000\.png.*too large") as caught:
        shard.fill(Encoder(1))
    assert "bfloat16" in caught.value.hint
    assert caught.value.exit_code == ExitCode.CANNOT_RUN
    assert shard.status[0] == Status.PENDING


def test_a_later_value_too_large_skips_its_picture(plain_pictures, output):
    shard = Shard(plain_pictures([1, TOO_LARGE, 2]), output)
    filled = shard.fill(Encoder(2))
    assert (filled.tally.images, filled.tally.skipped) == (2, 1)
    assert shard.status == [Status.DONE, Status.OVERFLOW, Status.DONE]
    assert [(e["key"], e["reason"]) for e in read_skip_log(output.skipped_path)] == [("001.png", "overflow")]
    assert np.isnan(shard.publish().arrays["pooled"][1]).all()


def test_a_value_too_large_does_not_end_a_run_that_goes_on(plain_pictures, output):
    """Interrupted and continued, a shard is what it would have been: the first picture of a resume is not the first."""
    shard = Shard(plain_pictures([1, TOO_LARGE, 2]), output)
    writer = ShardWriter(output.backend, output.partial_path(0), shard.new.table)
    writer.write(helpers.random_image(shard.new, 0))
    writer.checkpoint()
    writer.close()
    assert shard.status == [Status.DONE, Status.PENDING, Status.PENDING]
    shard.fill(Encoder(1))
    assert shard.status == [Status.DONE, Status.OVERFLOW, Status.DONE]


def test_nor_one_in_the_second_shard_of_a_folder(plain_pictures, output):
    shard = Shard(plain_pictures([TOO_LARGE, 1]), output)
    shard.fill(Encoder(1), is_begun=True)
    assert shard.status == [Status.OVERFLOW, Status.DONE]


def test_what_is_not_a_number_is_always_skipped(plain_pictures, output):
    """Also at the very beginning: no other type would hold it."""
    shard = Shard(plain_pictures([NOT_A_NUMBER, 1, NOT_A_NUMBER]), output)
    shard.fill(Encoder(1))
    assert shard.status == [Status.OVERFLOW, Status.DONE, Status.OVERFLOW]
    entries = read_skip_log(output.skipped_path)
    assert [entry["key"] for entry in entries] == ["000.png", "002.png"]
    assert {entry["message"] for entry in entries} == {"a feature is not a number"}


def test_clamped_values_are_stored_and_counted(plain_pictures, output):
    shard = Shard(plain_pictures([CLAMPED, 1, CLAMPED]), output)
    assert shard.fill(Encoder(2)).clamped == 2
    assert shard.status == [Status.DONE] * 3


# ------------------------------------------------------------------------------------------------- failures and stops


def test_strict_ends_at_the_first_picture_that_cannot_be_used_and_leaves_it_pending(plain_pictures, output):
    paths = plain_pictures([1, 2, 3, 4])
    shard = Shard(paths, output)
    paths[2].unlink()
    with pytest.raises(InternvitError, match=r"002\.png: vanished"):
        shard.fill(Encoder(1), strict=True)
    assert shard.status[2] == Status.PENDING
    assert set(shard.status) <= {Status.PENDING, Status.DONE}
    assert not os.path.exists(output.skipped_path)


def test_a_picture_that_cannot_be_decoded_disturbs_no_other(plain_pictures, output):
    paths = plain_pictures([1, 2, 3, 4])
    shard = Shard(paths, output)
    paths[0].unlink()
    paths[2].write_bytes(b"something else")
    filled = shard.fill(Encoder(3))
    assert shard.status == [Status.VANISHED, Status.DONE, Status.CHANGED, Status.DONE]
    assert (filled.tally.images, filled.tally.skipped) == (2, 2)
    assert [entry["reason"] for entry in read_skip_log(output.skipped_path)] == ["vanished", "changed"]


def test_a_stop_commits_what_is_finished_and_a_second_run_does_the_rest(noise, tmp_path):
    """Cut anywhere, the shard ends up bit for bit as if it had never been."""
    whole = Shard(noise, Output(str(tmp_path / "whole")))
    whole.fill(Encoder(4))
    expected = whole.publish()
    shard = Shard(noise, Output(str(tmp_path / "cut")))
    counts = []
    for _ in range(20):
        stop, before = Stop(), sum(shard.status)

        def stop_soon(progress: Any, stop: Stop = stop) -> None:
            stop.signal = 2 if progress.images >= 2 else 0

        filled = shard.fill(Encoder(4), stop=stop, on_progress=stop_soon)
        assert sum(shard.status) - before == filled.tally.images
        counts.append(filled.tally.images)
        if Status.PENDING not in shard.status:
            break
    assert len(counts) > 2, "the stop came too late to show anything"
    helpers.assert_same_shard(shard.publish(), expected)


def test_when_the_device_fails_what_was_encoded_is_kept(plain_pictures, output):
    shard = Shard(plain_pictures(range(20)), output)
    with pytest.raises(DeviceError):
        shard.fill(Encoder(2, fail_after=6))
    done = shard.status.count(Status.DONE)
    assert 2 <= done < 20
    shard.fill(Encoder(2))
    assert shard.status == [Status.DONE] * 20


def test_when_the_disk_fills_up_the_run_ends_and_does_not_hang(plain_pictures, output, monkeypatch):
    """The writer is a thread of its own; its error comes out, and no image is done that is not on the disk."""
    shard = Shard(plain_pictures(range(60)), output)
    real, left = os.pwrite, [40]

    def fill_up(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", fill_up)
        with pytest.raises(NoSpaceError):
            shard.fill(Encoder(2))
    assert shard.status == [Status.PENDING] * 60
    shard.fill(Encoder(2))
    assert shard.status == [Status.DONE] * 60


def test_a_row_that_cannot_be_written_loses_no_commit_that_has_begun(plain_pictures, output, monkeypatch):
    """And when the sink is closed, no thread holds the shard's files any more: their numbers may be others' by then."""
    shard = Shard(plain_pictures(range(2)), output)
    table = output.partial().stored.table
    writer = ShardWriter(output.backend, output.partial_path(0), table)
    is_syncing, may_end = threading.Event(), threading.Event()
    real_sync = os.fdatasync

    def slow_sync(descriptor: int) -> None:
        is_syncing.set()
        may_end.wait(PATIENCE)
        real_sync(descriptor)

    def full(_: Any) -> Any:
        threading.Timer(0.2, may_end.set).start()  # so that close has to wait for the commit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fdatasync", slow_sync)
    monkeypatch.setattr(writer_thread, "CHECKPOINT_BYTES", 1)
    sink = writer_thread.ShardSink(writer, SkipLog(output.skipped_path), table.keys)
    sink.put(helpers.random_image(shard.new, 0))
    assert is_syncing.wait(PATIENCE)
    sink._rows._write = full
    sink.put(helpers.random_image(shard.new, 1))
    with pytest.raises(OSError, match="No space left"):
        sink.close()
    assert shard.status == [Status.DONE, Status.PENDING]
    assert not {thread.name for thread in threading.enumerate()} & {"sink", "rows_0", "commit_0"}
    writer.close()


def test_reasons_are_on_the_disk_before_the_statuses(plain_pictures, output, monkeypatch):
    """A status that says skipped always has its line."""
    paths = plain_pictures([1, 2])
    shard = Shard(paths, output)
    paths[1].unlink()

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(SkipLog, "append", fail)
        with pytest.raises(OSError, match="Input/output"):
            shard.fill(Encoder(1))
    assert shard.status[1] == Status.PENDING


def test_shards_without_tokens_are_filled(plain_pictures, tmp_path):
    output = Output(str(tmp_path / "feats.h5"))
    paths = plain_pictures([1, 2])
    shard = Shard(paths, output)
    os.unlink(output.partial_path(0))
    shard.new = helpers.make_shard(shard.new.table, tokens=Tokens.NONE)
    create_shard(output.backend, output.partial_path(0), shard.new)

    class WithoutTokens(Encoder):
        def submit(self, tiles: Sequence[NDArray[Any]], placed: Sequence[Any]) -> Any:
            features = super().submit(tiles, placed).features
            layers = tuple(replace(layer, tokens=None) for layer in features.layers)
            return Pending(replace(features, layers=layers))

    shard.fill(WithoutTokens(4))
    pooled = shard.publish().arrays["pooled"]
    assert np.array_equal(pooled, np.concatenate([features_of(decode(job)).layers[0].pooled for job in shard.jobs]))


def test_skipped_is_a_value():
    """Comparable and hashable, as what crosses processes and modules should be."""
    assert Skipped(Status.TRUNCATED, "a", "b") == Skipped(Status.TRUNCATED, "a", "b")
    assert len({Skipped(Status.TRUNCATED, "a", "b"), Skipped(Status.TRUNCATED, "a", "b")}) == 1
