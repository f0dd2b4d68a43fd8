"""Keys by name, by pattern and by what became of their images: `internvit ls`, and the commands that take keys."""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import storage_helpers as helpers
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import Result, internvit

from internvit_cli import UnknownKeyError, open_features
from internvit_cli.cli.ls import STATUSES
from internvit_cli.commands.ls import ImageListing, ListOptions
from internvit_cli.config import Format, Skipped, Status
from internvit_cli.storage.output import Output
from internvit_cli.storage.read.wanted_keys import find_wanted, key_pattern

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from internvit_cli.storage.format.layout import NewShard

KEYS = (b"2023/b.jpg", b"2024/a.jpg", b"2024/may/c.jpg", b"2024/may/d.png", b"e.jpg", b"f1.jpg", b"f[1].jpg")
BAD = {1: Skipped(Status.TRUNCATED, "", ""), 3: Skipped(Status.TIMEOUT, "", "")}
KINDS = ["feats.h5", "feats"]


def shard_of(keys: Sequence[bytes], **options: Any) -> NewShard:
    return helpers.make_shard(helpers.make_table([(2, 1, 1)] * len(keys), sorted(keys), **options))


@pytest.fixture(params=KINDS)
def output(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Seven images, two of them skipped."""
    path = tmp_path / request.param
    helpers.make_output(path, shard_of(KEYS), Format.NPY if path.suffix == "" else None, BAD)
    return str(path)


def listed(*arguments: object) -> list[str]:
    result = internvit("ls", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def refused(result: Result, *words: str) -> None:
    assert result.returncode == 2
    for word in words:
        assert word in result.stderr, result.stderr


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("pattern", "fitting"),
    [
        ("*", [b"e.jpg", b"f1.jpg", b"f[1].jpg"]),
        ("**", list(KEYS)),
        ("2024/*", [b"2024/a.jpg"]),
        ("2024/**", [b"2024/a.jpg", b"2024/may/c.jpg", b"2024/may/d.png"]),
        ("**/*.jpg", [key for key in KEYS if key.endswith(b".jpg")]),
        ("202?/?.jpg", [b"2023/b.jpg", b"2024/a.jpg"]),
        ("202[!4]/*", [b"2023/b.jpg"]),
        ("202[3-4]/[ab].jpg", [b"2023/b.jpg", b"2024/a.jpg"]),
        ("**/may/**", [b"2024/may/c.jpg", b"2024/may/d.png"]),
        ("f[1].jpg", [b"f[1].jpg"]),  # a key with such characters means itself
        ("f[1-2].jpg", [b"f1.jpg"]),
        ("f[[]1].jpg", [b"f[1].jpg"]),
        ("e.jpg", [b"e.jpg"]),
    ],
)
def test_a_pattern_means_the_same_to_every_command(output: str, pattern: str, fitting: list[bytes]) -> None:
    names = [os.fsdecode(key) for key in fitting]
    assert listed(output, pattern) == names
    assert list(open_features(output).matching(pattern)) == names
    exported = internvit("export", output, f"{output}.csv", "--key", pattern, "--json")
    assert exported.returncode == 0, exported.stderr
    assert sum(json.loads(exported.stdout)["images"].values()) == len(names)


def fits_part_by_part(parts: list[str], pattern: list[str]) -> bool:
    """What the patterns mean, said in another way."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return (
            bool(parts)
            if len(pattern) == 1
            else any(fits_part_by_part(parts[at:], pattern[1:]) for at in range(len(parts)))
        )
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and fits_part_by_part(parts[1:], pattern[1:])


names = st.text("ab-.!]\n\udcff☃", min_size=1, max_size=4)
pieces = st.sampled_from(
    ["**", "*", "?", "[a-b]", "[!a]", "[]", "[", "]", "[]]", "a*", "*b", "?*?", "[b-a]", "[!b-a]", "-"]
)


@given(st.lists(names, min_size=1, max_size=4), st.lists(pieces | names, min_size=1, max_size=4))
def test_patterns_mean_what_they_say(parts: list[str], pattern: list[str]) -> None:
    expected = fits_part_by_part(parts, pattern)
    assert (key_pattern("/".join(pattern)).fullmatch("/".join(parts)) is not None) == expected


def test_a_pattern_of_many_stars_takes_no_time() -> None:
    assert key_pattern("*" * 5000 + "b").fullmatch("a" * 200) is None


def test_words_give_each_image_once_in_their_own_order() -> None:
    keys = [b"a", b"b", b"c"]
    assert find_wanted(["c", "*", "a"], keys, dict(zip(keys, range(3), strict=True)).get, "x") == [2, 0, 1]


@pytest.mark.parametrize(
    ("word", "error", "hint"),
    [
        ("*.png", "no key of {} matches '*.png'", "* does not match a slash: did you mean '**/*.png'?"),
        ("2025/*", "no key of {} matches '2025/*'", "internvit ls {} lists the keys"),
        ("2024/b.jpg", "{} has no image '2024/b.jpg'", "did you mean '2023/b.jpg'"),
        ("2024", "{} has no image '2024'", "it is a folder: 2024/** means all that is in it"),
        ("zzzzzz", "{} has no image 'zzzzzz'", "internvit ls {} lists the keys"),
    ],
)
def test_a_word_that_means_no_image_is_refused_by_every_command_with_what_may_have_been_meant(
    output: str, word: str, error: str, hint: str
) -> None:
    calls = (
        ("ls", output, word),
        ("show", output, word),
        ("search", output, "--key", word),
        ("export", output, f"{output}.csv", "--key", word),
    )
    for call in calls:
        refused(internvit(*call), f"error: {error.format(output)}\n", f"hint: {hint.format(output)}")
    with pytest.raises(UnknownKeyError):
        open_features(output).matching(word)


def test_what_other_words_mean_is_listed_before_a_word_that_means_nothing_is_refused(output: str) -> None:
    result = internvit("ls", output, "zz*", "e.jpg")
    assert result.stdout == "e.jpg\n"
    refused(result, "matches 'zz*'")


def test_a_word_whose_images_have_another_status_is_known(output: str) -> None:
    assert listed(output, "e.jpg", "--status", "pending") == []


@pytest.mark.parametrize("command", ["show", "search"])
def test_a_pattern_that_means_too_many_images_is_refused_and_names_may_be_as_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("internvit_cli.viz.show.MOST_IMAGES", 3)
    monkeypatch.setattr("internvit_cli.similarity.search.MOST_QUERIES", 3)
    path = str(tmp_path / "feats.h5")
    helpers.make_output(path, shard_of([b"%d.jpg" % number for number in range(5)]))
    keys = [f"{number}.jpg" for number in range(5)]
    flag = ["--key"] if command == "search" else []
    refused(internvit(command, path, *flag, "*.jpg"), "5 images of", "3 are the most", "internvit ls")
    elsewhere = ["-o", tmp_path / "pngs", "--map", "tiles"] if command == "show" else []
    by_name = internvit(command, path, *(word for key in keys for word in (*flag, key)), *elsewhere)
    assert by_name.returncode == 0, by_name.stderr


def test_show_draws_what_a_pattern_means_and_names_what_has_no_features(tmp_path: Path) -> None:
    path = str(tmp_path / "feats.h5")
    helpers.make_output(path, shard_of(KEYS), None, BAD)
    result = internvit("show", path, "2024/**", "-o", tmp_path / "pngs", "--map", "tiles", "--json")
    facts = json.loads(result.stdout)
    assert result.returncode == 3
    assert [image["key"] for image in facts["images"]] == ["2024/may/c.jpg"]
    assert facts["skipped"] == ["2024/a.jpg", "2024/may/d.png"]


def test_keys_of_a_list_are_no_patterns(output: str, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("*\n")
    refused(internvit("export", output, f"{output}.csv", "--keys-from", tmp_path / "keys.txt"), "has no image '*'")


# ----------------------------------------------------------------------------------------------------------- statuses


@pytest.mark.parametrize(
    ("wanted", "keys"),
    [
        (["done"], ["2023/b.jpg", "2024/may/c.jpg", "e.jpg", "f1.jpg", "f[1].jpg"]),
        (["skipped"], ["2024/a.jpg", "2024/may/d.png"]),
        (["truncated"], ["2024/a.jpg"]),
        (["timeout,truncated"], ["2024/a.jpg", "2024/may/d.png"]),
        (["timeout", "truncated"], ["2024/a.jpg", "2024/may/d.png"]),
        (["pending"], []),
    ],
)
def test_images_are_chosen_by_what_became_of_them(output: str, wanted: list[str], keys: list[str]) -> None:
    flags = [word for status in wanted for word in ("--status", status)]
    assert sorted(listed(output, *flags)) == keys
    assert sorted(listed(output, "**/a.jpg", *flags)) == [key for key in keys if key == "2024/a.jpg"]


def test_every_reason_is_a_status_and_a_misspelt_one_is_answered_with_the_nearest(output: str) -> None:
    assert {status.word for status in Status} | {"skipped"} == set(STATUSES)
    refused(internvit("ls", output, "--status", "trunkated"), "--status is 'trunkated', not one of", "mean truncated?")


def test_a_long_listing_has_status_grid_and_tiles(output: str) -> None:
    lines = [line.split(maxsplit=3) for line in listed(output, "-l", "2024/a.jpg", "e.jpg")]
    assert lines == [["truncated", "2x1", "3", "2024/a.jpg"], ["done", "2x1", "3", "e.jpg"]]


def test_json_holds_the_same_in_one_object_with_what_went_wrong_at_its_end(output: str) -> None:
    facts = json.loads(internvit("ls", output, "e.jpg", "--json").stdout)
    assert facts == {
        "path": output,
        "images": [{"key": "e.jpg", "status": "done", "columns": 2, "rows": 1, "tiles": 3}],
        "count": 1,
        "exit_code": 0,
        "error": None,
    }
    result = internvit("ls", output, "e.jpg", "zz*", "--json")
    facts = json.loads(result.stdout)
    assert facts["count"] == 1 and facts["exit_code"] == result.returncode == 2 and "'zz*'" in facts["error"]
    assert json.loads(internvit("ls", output, "--status", "pending", "--json").stdout)["images"] == []


def test_info_shows_the_keys_where_they_are_asked_for(output: str) -> None:
    assert "e.jpg" not in internvit("info", output).stdout
    assert internvit("info", output, "--keys").stdout.endswith(internvit("ls", "-l", output).stdout)
    keys = json.loads(internvit("info", output, "--keys", "--json").stdout)["keys"]
    assert [image["key"] for image in keys] == list(open_features(output))


# ------------------------------------------------------------------------------------------------ unfinished, and names


@pytest.mark.parametrize("kind", KINDS)
def test_of_an_unfinished_output_all_images_are_listed_by_the_name_that_it_will_have(tmp_path: Path, kind: str) -> None:
    output = Output(str(tmp_path / kind), None if kind.endswith(".h5") else Format.NPY)
    output.prepare()
    shard = shard_of(KEYS)
    helpers.create_shard(output.backend, output.partial_path(0), shard)
    writer = helpers.ShardWriter(output.backend, output.partial_path(0), shard.table)
    writer.write(helpers.random_image(shard, 0))
    writer.skip(1, BAD[1])
    writer.checkpoint()
    writer.close()
    assert listed(output.path) == [os.fsdecode(key) for key in sorted(KEYS)]
    assert listed(output.path, "--status", "done,truncated") == ["2023/b.jpg", "2024/a.jpg"]
    assert listed(output.path, "--status", "pending", "2024/**") == ["2024/may/c.jpg", "2024/may/d.png"]


@pytest.mark.parametrize("kind", KINDS)
def test_of_an_output_that_grows_each_key_is_listed_once_with_what_readers_get(tmp_path: Path, kind: str) -> None:
    path, wanted = tmp_path / kind, None if kind.endswith(".h5") else Format.NPY
    helpers.make_output(path, shard_of([b"a.jpg", b"b.jpg"]), wanted)
    output = Output(str(path), wanted)
    partial = output.partial_path(1) if wanted else output.path + ".partial"
    helpers.create_shard(output.backend, partial, shard_of([b"b.jpg", b"c.jpg"]))
    assert listed(path) == ["a.jpg", "b.jpg", "c.jpg"]
    assert listed(path, "--status", "pending") == ["c.jpg"]
    assert list(open_features(path)) == ["a.jpg", "b.jpg"]


def test_an_unfinished_output_of_another_recipe_has_no_part_in_the_finished_one(tmp_path: Path) -> None:
    path = str(tmp_path / "feats.h5")
    helpers.make_output(path, shard_of([b"a.jpg"]))
    other = helpers.make_shard(helpers.make_table([(1, 1, 0)], [b"z.jpg"]), max_tiles=2)
    helpers.create_shard(Output(path).backend, path + ".partial", other)
    assert listed(path) == ["a.jpg"]
    assert listed(path + ".partial") == ["z.jpg"]


def test_superseded_rows_are_not_listed(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "feats"), Format.NPY)
    helpers.make_output(output.path, shard_of([b"a.jpg", b"b.jpg"]), Format.NPY)
    later = shard_of([b"b.jpg"])
    helpers.fill_partial(output, later, {0: Skipped(Status.TRUNCATED, "", "")})
    helpers.publish(output, later, {"shard-00000": ["b.jpg"]})
    assert listed(output.path) == ["a.jpg", "b.jpg"]
    assert listed(output.path, "--status", "done") == ["a.jpg"]
    assert listed(output.path, "--status", "skipped") == ["b.jpg"]


@pytest.fixture
def awkward(tmp_path: Path) -> str:
    path = str(tmp_path / "feats.h5")
    helpers.make_output(path, shard_of(helpers.AWKWARD_KEYS))
    return path


def bytes_of(*arguments: str) -> bytes:
    result = subprocess.run([sys.executable, "-m", "internvit_cli", *arguments], capture_output=True, check=True)
    return result.stdout


def test_names_come_out_as_the_bytes_that_they_are_and_go_into_export_again(awkward: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(bytes_of("ls", "-0", awkward))
    assert sorted((tmp_path / "keys").read_bytes().split(b"\0")[:-1]) == sorted(helpers.AWKWARD_KEYS)
    result = internvit("export", awkward, tmp_path / "new.h5", "--keys-from", tmp_path / "keys", "-0")
    assert result.returncode == 0, result.stderr
    assert list(open_features(tmp_path / "new.h5")) == list(open_features(awkward))


def test_json_has_names_that_are_not_utf_8_as_python_reads_them(awkward: str) -> None:
    facts = json.loads(bytes_of("ls", "--json", awkward))
    assert sorted(os.fsencode(image["key"]) for image in facts["images"]) == sorted(helpers.AWKWARD_KEYS)


def test_a_terminal_gets_no_control_characters(awkward: str) -> None:
    import pty

    master, slave = pty.openpty()
    subprocess.run([sys.executable, "-m", "internvit_cli", "ls", awkward], stdout=slave, check=True)
    os.close(slave)
    shown = os.read(master, 65536)
    assert b"\x1b" not in shown and b"line\\nbreak\\r.jpg" in shown
    assert len(shown.splitlines()) == len(helpers.AWKWARD_KEYS)


def test_a_reader_that_has_seen_enough_ends_the_listing(tmp_path: Path) -> None:
    path = str(tmp_path / "feats.h5")
    helpers.make_output(
        path, shard_of([b"%06d.jpg" % number for number in range(10_000)]), None, {0: BAD[1]}
    )  # more than a pipe holds
    code = f"{sys.executable} -m internvit_cli ls {path} | head -n 2"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {code}"], capture_output=True, text=True)
    assert result.stdout == "000000.jpg\n000001.jpg\n" and result.stderr == ""


def test_shards_are_read_one_after_another_while_the_listing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internvit_cli.storage.read.places import ShardPlace

    path = tmp_path / "feats"
    for number in range(3):
        helpers.make_output(path, shard_of([b"%d.jpg" % number]), Format.NPY)
    read: list[str] = []
    load = ShardPlace.load
    monkeypatch.setattr(ShardPlace, "load", lambda place: (read.append(place.path), load(place))[1])
    images = iter(ImageListing(ListOptions(str(path))))
    for number in range(3):
        assert next(images).key == b"%d.jpg" % number
        assert len(read) == number + 1
