"""A picture that exceeded a limit of its run is tried again by a run whose limits admit it, and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from run_helpers import extract, state_of, summary_of

from internvit_cli import open_features
from internvit_cli.config import Limits, Skipped, Status
from internvit_cli.storage.skipped import SkipLog

PIXELS = 90 * 60


@pytest.fixture(params=["feats.h5", "feats"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (90, 60), "red").save(folder / "large.png")
    Image.new("RGB", (30, 20), "green").save(folder / "small.jpg")
    return folder


def listed(output: Path) -> list[dict[str, Any]]:
    path = Path(f"{output}.skipped.jsonl") if output.suffix else output / "skipped.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def relist(output: Path, **facts: object) -> None:
    """Have the list say something else of its one image; a fact that is None is left out."""
    path = Path(f"{output}.skipped.jsonl") if output.suffix else output / "skipped.jsonl"
    (entry,) = listed(output)
    path.write_text(json.dumps({key: value for key, value in (entry | facts).items() if value is not None}) + "\n")


def run(pictures: Path, output: Path, *options: object) -> dict[str, Any]:
    return summary_of(extract(pictures, "-o", output, "--tokens", "none", "--json", *options))


def test_a_higher_pixel_limit_takes_what_it_admits_without_further_options(output: Path, pictures: Path) -> None:
    assert run(pictures, output, "--max-pixels", PIXELS - 1)["reasons"] == {"too_large": 1}
    assert f"{PIXELS:,} pixels, more than --max-pixels {PIXELS - 1}" in listed(output)[0]["message"]
    found = run(pictures, output, "--max-pixels", 1000)
    assert f"1 image over the limit of pixels: --max-pixels {PIXELS} takes it" in found["notes"]
    found = run(pictures, output, "--max-pixels", PIXELS)
    assert (found["encoded"], found["skipped"], found["exit_code"]) == (1, 0, 0)
    assert open_features(output)["large.png"].is_done and not listed(output)


def test_a_limit_that_is_raised_too_little_changes_nothing(output: Path, pictures: Path) -> None:
    run(pictures, output, "--max-pixels", 1000)
    before = state_of(output.parent)
    found = run(pictures, output, "--max-pixels", PIXELS - 1)
    assert (found["encoded"], found["skipped"]) == (0, 1)
    assert state_of(output.parent) == before


@pytest.mark.parametrize(
    ("limit", "above", "options", "is_tried"),
    [
        ("decode_timeout", 599.0, ("--decode-timeout", 600), True),
        ("decode_timeout", 600.0, ("--decode-timeout", 600), False),
        ("decode_timeout", 600.0, ("--worker-memory", "8GiB", "--decode-timeout", 600), False),
        ("worker_memory", 2 << 30, (), True),
        ("worker_memory", 4 << 30, ("--worker-memory", "5GiB"), True),
        ("worker_memory", 4 << 30, ("--decode-timeout", 600), False),
        ("weather", 1, (), False),
        ("max_pixels", "many", (), False),
        (["max_pixels"], 1, (), False),
        ("max_pixels", 10**400, (), False),
    ],
)
def test_each_limit_admits_only_what_it_was_the_reason_for(
    tmp_path: Path, pictures: Path, limit: object, above: object, options: tuple[object, ...], is_tried: bool
) -> None:
    output = tmp_path / "f.h5"
    run(pictures, output, "--max-pixels", PIXELS - 1)
    relist(output, limit=limit, above=above)
    assert run(pictures, output, *options)["encoded"] == is_tried


def test_a_list_without_limits_is_not_guessed_at_and_the_option_that_helps_is_named(
    output: Path, pictures: Path
) -> None:
    run(pictures, output, "--max-pixels", PIXELS - 1)
    relist(output, limit=None, above=None)
    found = run(pictures, output)
    assert found["encoded"] == 0 and "--retry-skipped tries" in " ".join(found["notes"])
    found = run(pictures, output, "--retry-skipped")
    assert found["encoded"] == 1 and "--retry-skipped" not in " ".join(found["notes"])


@pytest.mark.parametrize(
    ("skipped", "limit"),
    [
        (Skipped(Status.TOO_LARGE, "", "", pixels=500), ("max_pixels", 499)),
        (Skipped(Status.TOO_LARGE, "MemoryError", ""), ("worker_memory", 7)),
        (Skipped(Status.WORKER_DIED, "", ""), ("worker_memory", 7)),
        (Skipped(Status.TIMEOUT, "", ""), ("decode_timeout", 3.5)),
        (Skipped(Status.TRUNCATED, "OSError", ""), None),
        (Skipped(Status.UNREADABLE, "OSError", ""), None),
    ],
)
def test_the_list_says_which_limit_a_picture_exceeded(
    tmp_path: Path, skipped: Skipped, limit: tuple[str, float] | None
) -> None:
    path = str(tmp_path / "skipped.jsonl")
    limits = Limits(max_pixels=400, decode_timeout=3.5, worker_memory=7)
    log = SkipLog(path, limits)
    log.append([(b"a.png", skipped)])
    for read in (log, SkipLog(path, limits)):
        assert read.is_limited(b"a.png") == (limit is not None)
        assert not read.is_admitted(b"a.png")
    if limit:
        name, above = limit
        assert SkipLog(path, Limits(**{name: above + 1})).is_admitted(b"a.png")
        assert not SkipLog(path, Limits(**{name: above})).is_admitted(b"a.png")
    log.append([(b"a.png", Skipped(Status.TRUNCATED, "", ""))])
    assert not log.is_limited(b"a.png") and not SkipLog(path).is_limited(b"a.png")


def test_images_are_counted_by_the_limit_that_they_exceeded(tmp_path: Path) -> None:
    log = SkipLog(str(tmp_path / "skipped.jsonl"), Limits(decode_timeout=3.5, worker_memory=7))
    log.append((b"p%d" % pixels, Skipped(Status.TOO_LARGE, "", "", pixels=pixels)) for pixels in (900, 500, 700))
    log.append([(b"t", Skipped(Status.TIMEOUT, "", "")), (b"m", Skipped(Status.TOO_LARGE, "MemoryError", ""))])
    log.append([(b"d", Skipped(Status.TRUNCATED, "", ""))])
    assert log.exceeded_limits(lambda key: key != "p900") == {
        "max_pixels": (2, 699),
        "decode_timeout": (1, 3.5),
        "worker_memory": (1, 7),
    }


def test_the_summary_says_what_takes_pictures_that_exceeded_a_limit(tmp_path: Path, pictures: Path) -> None:
    output = tmp_path / "f.h5"
    run(pictures, output, "--max-pixels", PIXELS - 1)
    for limit, above, words in (
        ("decode_timeout", 600.0, "1 image not decoded within 600 s: a higher --decode-timeout tries it again"),
        (
            "worker_memory",
            5 << 30,
            "1 image not decoded within 5 GiB of memory: a higher --worker-memory tries it again",
        ),
    ):
        relist(output, limit=limit, above=above)
        (note,) = (note for note in run(pictures, output)["notes"] if words in note)
        assert note.endswith("--retry-skipped")
