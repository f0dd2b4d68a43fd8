"""`internvit report`: the page's data are the output's, nothing from outside runs in it, and a browser can use it."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import storage_helpers as helpers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_helpers import FLOAT32
from run_helpers import extract, internvit

from internvit_cli import open_features
from internvit_cli.config import Projection, Skipped, Status, Tokens
from internvit_cli.errors import InternvitError, UsageError
from internvit_cli.model.caveats import caveats
from internvit_cli.report import pictures, plane, selection
from internvit_cli.report.build import ReportOptions, write_report
from internvit_cli.report.page import as_page, as_script_data
from internvit_cli.runtime.workers import WorkerSpec
from internvit_cli.similarity.similarity_space import RAW, Space, choose_space
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.shard import OpenShard
from internvit_cli.viz import photograph
from internvit_cli.viz.photograph import PictureFile

if TYPE_CHECKING:
    from pathlib import Path


class Scripts(HTMLParser):
    """The elements of a page that can run or hold data, as an HTML parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.is_inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found.append((tag, dict(attrs), ""))
        self.is_inside = True

    def handle_endtag(self, tag):
        self.is_inside = False

    def handle_data(self, text):
        if self.is_inside:
            tag, attributes, so_far = self.found[-1]
            self.found[-1] = tag, attributes, so_far + text

    def of(self, tag):
        return [(attributes, text) for name, attributes, text in self.found if name == tag]


def data_of(path: Path) -> dict[str, Any]:
    (data, _) = Scripts(path.read_text()).of("script")
    assert data[0]["type"] == "application/json"
    return json.loads(data[1])


def report(output: Path, tmp_path: Path, *arguments: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object that the command prints, and the data of its page."""
    result = internvit("report", output, "-o", tmp_path / "page.html", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), data_of(tmp_path / "page.html")


# ------------------------------------------------------------------------------------------------ what the page says


def test_the_page_says_of_the_output_what_is_in_it(report_output, report_page):
    data, features = data_of(report_page), open_features(report_output)
    done = features.done
    assert data["summary"]["images"] == {"done": len(done), "not_an_image": 1, "truncated": 1}
    assert len(data["images"]["keys"]) == len(done) and "large.png" in data["images"]["keys"]
    at = data["images"]["keys"].index("large.png")
    image = features["large.png"]
    assert [data["images"][name][at] for name in ("width", "height", "tiles")] == [768, 512, image.tiles]
    counts = [image.tiles for image in done.values()]
    assert data["histogram"] == [[tiles, counts.count(tiles)] for tiles in sorted(set(counts))]
    assert dict(data["recipe"])["max_tiles"] == "4" and dict(data["recipe"])["thumbnail"] == "yes"
    assert ["pooled", f"{len(features)} x 64", "float32"] in data["datasets"]
    assert ["random weights" in note for note in data["notes"]] == [True]


@pytest.mark.parametrize(
    ("model", "is_random"), [("tiny-random", True), ("OpenGVLab/InternViT-300M-448px", False), ("", False)]
)
def test_random_weights_are_the_only_ones_that_carry_no_meaning(model, is_random):
    features = SimpleNamespace(attributes={"model": model} if model else {})
    assert bool(caveats(features)) is is_random


def test_skipped_images_answer_with_their_reason(report_page):
    skipped = data_of(report_page)["skipped"]
    assert skipped["total"] == 2 and skipped["reasons"] == {"not_an_image": 1, "truncated": 1}
    rows = {row["key"]: row for row in skipped["rows"]}
    assert rows["bad.jpg"]["reason"] == "not_an_image" and "no supported picture format" in rows["bad.jpg"]["message"]
    assert rows["cut.png"]["reason"] == "truncated" and rows["cut.png"]["message"]
    assert not set(rows) & set(data_of(report_page)["images"]["keys"])


def test_the_throughput_is_that_of_the_runs_that_wrote_rows(report_output, report_page):
    (run,) = data_of(report_page)["runs"]
    done = open_features(report_output).done
    assert run["images"] == len(done) and run["tiles"] == sum(image.tiles for image in done.values())
    assert run["seconds"] > 0 and run["device"] == "cpu" and run["bottleneck"].endswith(".")


def test_a_log_of_runs_that_somebody_has_edited_is_shown_as_far_as_it_makes_sense(report_output, tmp_path, monkeypatch):
    runs = [{"images": "many", "seconds": float("nan"), "host": 5, "device": "c\x1bpu"}, {"images": -1, "tiles": True}]
    real = Output(str(report_output)).finished()[0].backend
    monkeypatch.setattr(real, "run_log", lambda path: runs)
    assert report(report_output, tmp_path)[1]["runs"] == [{"device": "c\\x1bpu"}, {}]


def test_neighbors_and_duplicates_are_those_of_the_commands(report_output, report_page):
    data = data_of(report_page)
    keys = data["images"]["keys"]
    row = next(row for row in data["neighbors"]["rows"] if keys[row["image"]].isascii())
    searched = internvit("search", report_output, "--key", keys[row["image"]], "-n", 8, "--json")
    hits = json.loads(searched.stdout)["queries"][0]["hits"]
    assert [cosine for _, cosine in row["hits"]] == pytest.approx([hit["similarity"] for hit in hits], abs=1e-3)
    assert len(data["neighbors"]["rows"]) == 6
    told = json.loads(internvit("duplicates", report_output, "--json").stdout)
    found = data["duplicates"]
    assert {keys[place] for group in found["identical"] for place in group} == {"half.jpg", "same bytes.jpg"}
    similar = [[keys[place] for place, _ in group] for group in found["similar"]]
    shown = [[member["key"] for member in group] for group in told["similar"]]
    assert [len(group) for group in similar] == [len(group) for group in shown]
    assert ["large.png", "half.jpg"] in [group[:2] for group in similar] and found["redundant"] == told["redundant"]


def test_token_maps_have_a_pixel_for_every_token_and_lie_over_their_photograph(report_output, report_page):
    data, features = data_of(report_page), open_features(report_output)
    maps = data["token_maps"]["maps"]
    assert len(maps) == 6
    for entry in maps:
        key = data["images"]["keys"][entry["image"]]
        if not key.isascii() or "\\" in key:
            continue
        drawn = Image.open(io.BytesIO(base64.b64decode(entry["map"])))
        assert drawn.size == features[key].token_map().shape[1::-1]
        photograph = Image.open(io.BytesIO(base64.b64decode(entry["photograph"])))
        assert photograph.width / photograph.height == pytest.approx(
            features[key].width / features[key].height, rel=0.05
        )
        assert entry["box"] == [0, 0, 1, 1] and not entry["problem"]


def test_the_same_command_shows_the_same_images_and_another_seed_others(report_output, tmp_path):
    one, again = report(report_output, tmp_path, "--samples", 3)[1], report(report_output, tmp_path, "--samples", 3)[1]
    other = report(report_output, tmp_path, "--samples", 3, "--seed", 5)[1]
    assert one | {"made": ""} == again | {"made": ""}
    sampled = [[row["image"] for row in data["neighbors"]["rows"]] for data in (one, other)]
    assert sampled[0] != sampled[1]


def burst_of(scenes: int, frames: int) -> np.ndarray:
    """Vectors of several scenes, each seen in many frames, the frames of one scene side by side."""
    chance = np.random.default_rng(0)
    one_per_scene = chance.standard_normal((scenes, 32))
    return (np.repeat(one_per_scene, frames, axis=0) + 0.05 * chance.standard_normal((scenes * frames, 32))) + 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("scenes", "frames"), [(12, 9), (6, 4), (40, 3)])
def test_the_sample_has_one_frame_of_every_scene_before_it_has_a_second_one_of_any(scenes, frames, seed):
    vectors = burst_of(scenes, frames).astype(np.float32)
    space = choose_space(vectors)
    sample = selection._diverse(vectors, space, scenes, np.random.default_rng(seed))
    assert sorted(sample // frames) == list(range(scenes))
    assert np.array_equal(sample, selection._diverse(vectors, space, scenes, np.random.default_rng(seed)))


@pytest.mark.parametrize(("images", "wanted", "got"), [(5, 3, 3), (5, 9, 5), (1, 1, 1), (5, 0, 0), (0, 4, 0)])
def test_a_sample_of_equal_images_has_as_many_as_were_asked_for(images, wanted, got):
    sample = selection._diverse(np.ones((images, 4), np.float32), RAW, wanted, np.random.default_rng(0))
    assert len(sample) == len(set(sample.tolist())) == got


def test_a_sample_of_many_images_looks_at_a_bounded_number_of_vectors(monkeypatch):
    monkeypatch.setattr(selection, "LOOKED_AT_BYTES", 4 * 32 * 50)
    looked_at = []
    monkeypatch.setattr(Space, "embed", lambda _, vectors: looked_at.append(len(vectors)) or vectors)
    assert len(selection._diverse(burst_of(100, 10), RAW, 12, np.random.default_rng(0))) == 12
    assert looked_at == [50]


def test_the_map_is_bounded_and_keeps_what_other_parts_of_the_page_show(report_output, tmp_path):
    told, data = report(report_output, tmp_path, "--points", 1, "--samples", 2)
    named = {place for row in data["neighbors"]["rows"] for place in (row["image"], *(hit for hit, _ in row["hits"]))}
    named |= {place for group in data["duplicates"]["identical"] for place in group}
    assert max(named) < len(data["images"]["keys"]) == told["points"] < data["map"]["of"]


# ------------------------------------------------------------------------------------------------------- the map


def test_places_are_the_first_two_components_of_the_directions(tmp_path):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 60))
    helpers.make_output(tmp_path / "feats.h5", shard)
    vectors = open_features(tmp_path / "feats.h5").vectors()
    found = plane.lay_out(vectors, np.arange(60), Projection.PCA, 0)
    unit = vectors[:] / np.linalg.norm(vectors[:], axis=1, keepdims=True)
    centered = unit - unit.mean(axis=0)
    expected = centered @ np.linalg.svd(centered.astype(np.float64), full_matrices=False)[2][:2].T
    for axis in (0, 1):
        assert abs(np.corrcoef(found.places[:, axis], expected[:, axis])[0, 1]) > 0.9999
    spans = np.ptp(found.places, axis=0) / np.ptp(expected, axis=0)
    assert spans[0] == pytest.approx(spans[1], rel=1e-3), "one scale for both axes"
    assert found.places.min() >= -1e-6 and found.places.max() <= 1 + 1e-6


def test_a_vector_that_is_not_finite_is_an_error_that_names_verify():
    class Vectors:
        shape = (3, 4)

        def __getitem__(self, wanted):
            return np.full((3, 4), np.nan, np.float32)[wanted]

    with pytest.raises(InternvitError, match="not finite") as caught:
        plane.lay_out(Vectors(), np.arange(3), Projection.PCA, 0)
    assert "verify" in caught.value.hint


def test_umap_that_is_not_installed_is_said_before_any_work(report_output, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    result = internvit("report", report_output, "-o", tmp_path / "page.html", "--map", "umap")
    assert result.returncode == 1 and "internvit-cli[umap]" in result.stderr and "umap-learn" in result.stderr
    assert not os.listdir(tmp_path)


@pytest.mark.sweep
def test_umap_lays_images_of_one_kind_together(report_output, tmp_path):
    pytest.importorskip("umap", reason="umap-learn is not installed (extra [umap])")
    centers = 5 * np.eye(3, 30, dtype=np.float32)
    vectors = np.repeat(centers, 20, axis=0) + 0.1 * np.random.default_rng(0).standard_normal((60, 30), np.float32)
    places = plane.lay_out(vectors, np.arange(60), Projection.UMAP, 0).places
    middles = places.reshape(3, 20, 2).mean(axis=1)
    spread = np.linalg.norm(places.reshape(3, 20, 2) - middles[:, None], axis=2).max()
    assert min(np.linalg.norm(middles[a] - middles[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > spread
    with pytest.raises(UsageError, match="3 images are too few"):
        plane.lay_out(vectors, np.arange(3), Projection.UMAP, 0)
    told, data = report(report_output, tmp_path, "--map", "umap")
    assert told["map"] == data["map"]["projection"] == "umap" and data["map"]["explained"] == []


# --------------------------------------------------------------------------------------------------- small pictures


def test_thumbnails_are_small_jpegs_and_no_more_than_were_asked_for(report_output, tmp_path):
    told, data = report(report_output, tmp_path, "--thumbnails", 5, "--thumbnail-size", 40, "--samples", 2)
    small = data["thumbnails"]["pictures"]
    assert told["thumbnails"] == len(small) == 5 and not data["thumbnails"]["problems"]
    assert {row["image"] for row in data["neighbors"]["rows"]} <= set(map(int, small)), (
        "what the page shows comes first"
    )
    for picture in small.values():
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert image.format == "JPEG" and max(image.size) == 40
    assert report(report_output, tmp_path, "--thumbnails", 0, "--samples", 0)[0]["thumbnails"] == 0


def test_pictures_that_are_gone_or_changed_have_no_thumbnail_and_say_why(report_pictures, tmp_path):
    moved = tmp_path / "pictures"
    shutil.copytree(report_pictures / "part-0", moved)
    names = sorted(os.listdir(moved))
    assert extract(moved, "-o", tmp_path / "feats.h5", "--max-tiles", 1, *FLOAT32).returncode == 0
    (moved / names[0]).unlink()
    (moved / names[1]).write_bytes((moved / names[1]).read_bytes() + b"more")
    (moved / names[2]).unlink()
    os.mkfifo(moved / names[2])
    told, data = report(tmp_path / "feats.h5", tmp_path)
    assert set(told["without_thumbnail"]) == set(names[:3])
    problems = {data["images"]["keys"][int(place)]: why for place, why in data["thumbnails"]["problems"].items()}
    assert "No such file" in problems[names[0]] and "changed since" in problems[names[1]]
    assert "not a regular file" in problems[names[2]]
    plain = internvit("report", tmp_path / "feats.h5", "-o", tmp_path / "page.html")
    assert f"note: no thumbnail for {names[0]}" in plain.stderr and plain.returncode == 0
    without = [entry for entry in data["token_maps"]["maps"] if not entry["photograph"]]
    assert len(without) == 3 and all(entry["problem"] and entry["map"] for entry in without)


def test_pictures_that_moved_are_found_in_the_folder_that_is_named(report_output, report_pictures, tmp_path):
    shutil.copytree(report_pictures, tmp_path / "moved")
    elsewhere = write_report(
        ReportOptions(str(report_output), str(tmp_path / "a.html"), pictures=str(tmp_path / "moved"))
    )
    assert not elsewhere.missing
    (tmp_path / "empty").mkdir()
    empty = ("--pictures", tmp_path / "empty")
    told, data = report(report_output, tmp_path, *empty)
    assert told["thumbnails"] == 0 and len(told["without_thumbnail"]) == told["done"]
    assert data["duplicates"]["pictures"]["same"] == data["duplicates"]["pictures"]["different"] == 0
    plain = internvit("report", report_output, "-o", tmp_path / "page.html", *empty)
    assert "--pictures DIR" in plain.stderr


def test_a_picture_whose_digest_is_not_stored_or_not_its_own_is_never_embedded(report_output, tmp_path, monkeypatch):
    """What the maker of a feature file wrote must not make its reader publish whatever lies at some path."""
    secret = tmp_path / "secret.png"
    Image.new("RGB", (96, 64), (1, 2, 3)).save(secret)
    monkeypatch.setattr(OpenShard, "picture", lambda *_: os.fsencode(secret))
    for digest in (bytes(32), b"\1" * 32):
        monkeypatch.setattr(OpenShard, "digest", lambda *_, digest=digest: digest)
        monkeypatch.setattr(OpenShard, "file_size", lambda *_: secret.stat().st_size)
        written = write_report(ReportOptions(str(report_output), str(tmp_path / "page.html")))
        data = data_of(tmp_path / "page.html")
        assert written.thumbnails == 0 and not data["thumbnails"]["pictures"]
        assert not any(entry["photograph"] for entry in data["token_maps"]["maps"])
        words = "SHA-256 is not stored" if digest == bytes(32) else "changed since"
        assert all(words in problem for problem in data["thumbnails"]["problems"].values())
    monkeypatch.setattr(OpenShard, "digest", lambda *_: hashlib.sha256(secret.read_bytes()).digest())
    assert write_report(ReportOptions(str(report_output), str(tmp_path / "page.html"))).thumbnails, "it can be shown"


def deadly():
    """A worker's function that one kind of picture kills."""

    def shrink(wanted):
        if wanted.file.path.endswith(b"/half.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return pictures.small_picture(wanted.file, wanted.side)

    return shrink


def test_a_picture_that_kills_its_worker_costs_its_own_thumbnail(report_output, monkeypatch):
    spec = WorkerSpec("test_report:deadly")
    monkeypatch.setattr(photograph, "WorkerSpec", lambda handler, memory_bytes: spec)
    images = list(open_features(report_output).done.values())
    found = pictures.shrink([pictures.ThumbnailTask(PictureFile.of(image), 50) for image in images], workers=2)
    for image, small in zip(images, found, strict=True):
        assert bool(small.jpeg) == (image.key != "half.jpg")
    lost = found[[image.key for image in images].index("half.jpg")]
    assert "worker_died" in lost.problem and "SIGKILL" in lost.problem


# ------------------------------------------------------------------------------------------------------- safety


def test_names_that_would_be_markup_stay_data(report_output, report_page):
    text = report_page.read_text()
    parsed = Scripts(text)
    assert len(parsed.of("script")) == 2 and "img" not in parsed.tags
    data = data_of(report_page)
    keys = data["images"]["keys"]
    assert "</script><script>/deep.png" in keys and "<img src=x onerror=alert(1)>.png" in keys
    assert "line\\nbreak.png" in keys and "not-utf8-\\udcff.png" in keys and "\\u2028 and \\u202e turned.png" in keys
    assert all(key.isprintable() for key in keys)
    assert text.isprintable() or not {"\u2028", "\u202e"} & set(text)


@given(st.text() | st.sampled_from(["</script>", "<!--", "]]>", "\u2028\u2029", "\udcff", "&lt;", "$data"]))
def test_any_text_comes_back_from_the_page_as_it_went_in(text):
    written = as_script_data({"key": text})
    assert written.isascii() and not set(written) & set("<>&")
    assert json.loads(written) == {"key": text}
    page = as_page(text, {"key": text}).decode()
    assert json.loads(Scripts(page).of("script")[0][1]) == {"key": text}


def test_numbers_that_json_has_not_are_refused_rather_than_written():
    with pytest.raises(ValueError, match="JSON"):
        as_script_data({"x": float("nan")})


def test_the_page_needs_nothing_but_itself_and_its_policy_lets_nothing_else_run(report_page):
    parsed = Scripts(report_page.read_text())
    ((policy, _),) = [entry for entry in parsed.of("meta") if entry[0].get("http-equiv")]
    rules = dict(rule.split(" ", 1) for rule in policy["content"].split("; "))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        content = parsed.of(tag)[-1][1]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert "unsafe" not in policy["content"]
    for _, attributes, _ in parsed.found:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    script = parsed.of("script")[-1][1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(|XMLHttp", script)


# ------------------------------------------------------------------------------------------------ kinds of outputs


def test_a_folder_of_shards_an_unfinished_file_and_one_without_tokens_have_their_page(report_pictures, tmp_path):
    part = report_pictures / "part-1"
    assert extract(part, "-o", tmp_path / "feats", "--tokens", "none", *FLOAT32).returncode == 0
    told, data = report(tmp_path / "feats", tmp_path)
    assert told["token_maps"] == 0 and data["token_maps"] == {"maps": [], "explained": [], "stores_tokens": False}
    assert told["done"] == len(os.listdir(part)) == told["thumbnails"]
    shard = helpers.make_shard(helpers.make_table([(2, 1, 1)] * 5))
    output = Output(str(tmp_path / "begun.h5"))
    output.prepare()
    helpers.create_shard(output.backend, output.partial_path(0), shard)
    writer = helpers.ShardWriter(output.backend, output.partial_path(0), shard.table)
    for row in (1, 3):
        writer.write(helpers.random_image(shard, row))
    writer.checkpoint()
    writer.close()
    told, data = report(tmp_path / "begun.h5.partial", tmp_path)
    assert told["done"] == 2 and "unfinished: 3 images" in told["notes"][-1] and data["notes"] == told["notes"]


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("tokens", [Tokens.VISUAL, Tokens.NONE])
def test_outputs_of_next_to_nothing_have_their_page(tmp_path, done, tokens):
    shard = helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3, helpers.AWKWARD_KEYS[1:4]), tokens)
    bad = Skipped(Status.TRUNCATED, "OSError", "cut short")
    helpers.make_output(tmp_path / "feats.h5", shard, skips=dict.fromkeys(range(done, 3), bad))
    told, data = report(tmp_path / "feats.h5", tmp_path)
    assert (told["done"], told["skipped"], told["points"]) == (done, 3 - done, done)
    assert len(data["images"]["x"]) == done and sum(count for _, count in data["histogram"]) == done
    assert all(0 <= place <= 1 for place in data["images"]["x"] + data["images"]["y"])
    assert len(data["token_maps"]["maps"]) == (done if tokens is Tokens.VISUAL else 0)


def test_only_the_tokens_of_the_sample_are_read(report_output, tmp_path, monkeypatch):
    read, real = [], OpenShard.rows
    monkeypatch.setattr(
        OpenShard, "rows", lambda self, name, start, stop: read.append((name, start)) or real(self, name, start, stop)
    )
    write_report(ReportOptions(str(report_output), str(tmp_path / "page.html"), samples=3))
    assert len({start for name, start in read if name == "visual_tokens"}) == 3


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_names_its_file_and_only_warns_when_quiet(report_output, tmp_path):
    loud = internvit("report", report_output, "-o", tmp_path / "a.html", "--samples", 1, "--thumbnails", 1)
    assert loud.stdout.startswith(f"{tmp_path}/a.html: ") and "1 token map" in loud.stdout
    quiet = internvit("report", report_output, "-o", tmp_path / "a.html", "-q", "--samples", 0, "--thumbnails", 0)
    assert quiet.returncode == 0 and quiet.stdout == ""
    (note,) = quiet.stderr.splitlines()
    assert "random weights" in note
    assert os.listdir(tmp_path) == ["a.html"], "no temporary file is left"


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("page.h5", 2, "ends in .html"),
        ("folder.html", 2, "is a folder"),
        ("nowhere/page.html", 1, "does not exist"),
    ],
)
def test_a_place_where_no_page_can_be_is_refused_before_any_work(report_output, tmp_path, output, code, words):
    (tmp_path / "folder.html").mkdir()
    result = internvit("report", report_output, "-o", tmp_path / output)
    assert result.returncode == code and words in result.stderr + result.stdout and "hint: " in result.stderr
    assert os.listdir(tmp_path) == ["folder.html"]


def test_an_error_leaves_the_page_of_an_earlier_run_as_it_was(tmp_path):
    (tmp_path / "page.html").write_text("earlier")
    result = internvit("report", tmp_path / "nothing.h5", "-o", tmp_path / "page.html", "--json")
    assert result.returncode == 1 and "not there" in json.loads(result.stdout)["error"]
    (tmp_path / "feats.h5").write_bytes(b"damaged" * 100)
    assert internvit("report", tmp_path / "feats.h5", "-o", tmp_path / "page.html").returncode == 1
    assert (tmp_path / "page.html").read_text() == "earlier"


def test_a_full_disk_costs_neither_the_earlier_page_nor_more_room(report_output, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("earlier")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = internvit("report", report_output, "-o", tmp_path / "page.html", "--samples", 0, "--thumbnails", 0)
    assert result.returncode == 6 and "no room" in result.stderr
    assert os.listdir(tmp_path) == ["page.html"] and (tmp_path / "page.html").read_text() == "earlier"


def test_reporting_needs_no_torch(report_output, tmp_path):
    code = (
        "import sys; from internvit_cli.cli.app import run; assert run(sys.argv[1:]) == 0;"
        "assert 'torch' not in sys.modules and 'umap' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, "report", str(report_output), "-o", str(tmp_path / "page.html")], check=True
    )
