"""Outputs of an earlier version, finished and killed halfway: today's commands read them and go on with them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from folders import DATA
from PIL import Image
from run_helpers import internvit, state_of, summary_of

from internvit_cli import open_features
from internvit_cli.config import Status

if TYPE_CHECKING:
    from pathlib import Path

    from internvit_cli.storage.read.reader import Features

ARCHIVES = sorted((DATA / "outputs").glob("*.tar.xz"))
"""One for each version; README.md beside them says with which commands they were made."""
MADE_IN = "/tmp/internvit-before/pictures"
"""Where the pictures lay then: the outputs have recorded it."""
OUTPUTS = ("feats.h5", "npy", "h5")
DONE = ["a.png", "b/tall.png", "b/wide.png", "c.jpg", "d.png"]
SKIPPED = {"broken.png": Status.TRUNCATED, "text.jpg": Status.NOT_AN_IMAGE}
COMMITTED = ["a.png", "b/tall.png"]
"""What the killed runs had committed."""
ARRAYS = ("pooled", "tile_pooled", "visual_tokens")

pytestmark = [
    pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.partition(".")[0]),
    pytest.mark.parametrize("name", OUTPUTS),
]


@pytest.fixture
def before(archive: Path, tmp_path: Path) -> Path:
    """The pictures, with the times of modification that the outputs know, and the outputs."""
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path


def rows_of(features: Features, keys: list[str]) -> dict[str, list[np.ndarray]]:
    return {key: [np.array(getattr(features[key], array)) for array in ARRAYS] for key in keys}


def bits_of(features: Features, keys: list[str]) -> dict[str, str]:
    """Digests of the pictures' rows and of their digests."""
    rows = rows_of(features, keys)
    parts = {key: [features[key].digest, *(array.tobytes() for array in rows[key])] for key in keys}
    return {key: hashlib.sha256(b"".join(found)).hexdigest() for key, found in parts.items()}


def go_on(before: Path, output: Path) -> dict[str, Any]:
    """Run the command of then on an output, whose pictures have moved meanwhile; returns its summary."""
    options = ["--format", "h5"] if output.name == "h5" else []
    settings = ["--model", "tiny-random", "--dtype", "float32", "--device", "cpu", "--tile-size", "56"]
    settings += ["--max-tiles", "3", "--tile-pooled", "--relocate", f"{MADE_IN}={before / 'pictures'}"]
    if (before / "options.json").exists():
        settings += json.loads((before / "options.json").read_text())
    result = internvit("extract", before / "pictures", "-o", output, *options, *settings, "--json")
    assert result.returncode == 3, result.stderr  # two pictures are broken
    return summary_of(result)


def facts_of(output: Path) -> dict[str, Any]:
    result = internvit("info", output, "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_a_finished_output_of_an_earlier_version_opens_and_holds(before: Path, name: str) -> None:
    output = before / "finished" / name
    features = open_features(output)
    assert {key: image.status for key, image in features.items()} == dict.fromkeys(DONE, Status.DONE) | SKIPPED
    for key in DONE:
        columns, rows = features[key].grid
        tiles = columns * rows + features[key].has_thumbnail
        pooled, tile_pooled, tokens = rows_of(features, [key])[key]
        assert len(tile_pooled) == len(tokens) == tiles > 0
        assert pooled.shape == tile_pooled.shape[1:] and np.isfinite(tokens).all() and np.ptp(tokens) > 0
    facts = facts_of(output)
    assert facts["images"] == {"done": len(DONE), "truncated": 1, "not_an_image": 1}
    assert facts["recipe"]["tile_size"] == 56 and facts["recipe_digest"] == features.attributes["recipe_digest"]
    for command in ("verify", "ls"):
        result = internvit(command, output)
        assert result.returncode == 0, result.stdout + result.stderr
    sibling = open_features(before / "finished" / next(other for other in OUTPUTS if other != name))
    assert bits_of(features, DONE) == bits_of(sibling, DONE)


def test_nothing_is_encoded_again_of_a_finished_output_of_an_earlier_version(before: Path, name: str) -> None:
    output = before / "finished" / name
    rows = bits_of(open_features(output), DONE)
    assert go_on(before, output)["encoded"] == 0
    assert bits_of(open_features(output), DONE) == rows
    state = state_of(before / "finished")  # of which the run above has changed where the pictures lie
    assert go_on(before, output)["encoded"] == 0
    assert state_of(before / "finished") == state


def test_an_unfinished_output_of_an_earlier_version_is_finished(before: Path, name: str) -> None:
    output = before / "unfinished" / name
    then = open_features(before / "finished" / name)
    unfinished = open_features(facts_of(output)["unfinished"])
    assert [key for key, image in unfinished.items() if image.status is Status.DONE] == COMMITTED
    committed = bits_of(unfinished, COMMITTED)
    assert committed == bits_of(then, COMMITTED)
    assert go_on(before, output)["encoded"] == len(DONE) - len(COMMITTED)
    features = open_features(output)
    assert bits_of(features, COMMITTED) == committed
    assert {key: image.status for key, image in features.items()} == dict.fromkeys(DONE, Status.DONE) | SKIPPED
    assert features.attributes["recipe"] == then.attributes["recipe"]
    assert_close(features, then)
    assert internvit("verify", output).returncode == 0


def test_images_are_added_to_a_finished_output_of_an_earlier_version_and_its_rows_stay(before: Path, name: str) -> None:
    output = before / "finished" / name
    rows = bits_of(open_features(output), DONE)
    with Image.open(before / "pictures" / "d.png") as picture:
        picture.rotate(90, expand=True).save(before / "pictures" / "b" / "added.png")
    assert go_on(before, output)["encoded"] == 1
    features = open_features(output)
    assert features["b/added.png"].status is Status.DONE
    assert bits_of(features, DONE) == rows
    assert len(features) == len(DONE) + len(SKIPPED) + 1
    assert internvit("verify", output).returncode == 0


def test_what_is_encoded_today_is_what_an_earlier_version_encoded(before: Path, name: str) -> None:
    now = before / "now" / name
    now.parent.mkdir()
    assert go_on(before, now)["encoded"] == len(DONE)
    assert_close(open_features(now), open_features(before / "finished" / name))


def assert_close(now: Features, then: Features) -> None:
    """The same values as far as another processor and the stored type give them."""
    is_coarse = then.recipe.store_dtype.is_scaled
    for key, arrays in rows_of(then, DONE).items():
        for array, other in zip(arrays, rows_of(now, DONE)[key], strict=True):
            step = float(np.abs(array).max()) / 127 if is_coarse else 0.0
            atol = 2e-3 + step
            np.testing.assert_allclose(other.astype(np.float32), array.astype(np.float32), atol=atol, err_msg=key)
