"""Patterns mean what git takes them for, names are bytes, and what is excluded is not even listed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvit_cli.errors import UsageError
from internvit_cli.sources.patterns import parse_pattern
from internvit_cli.sources.rules import DEFAULT_EXCLUDES, NOT_INCLUDED, WholePaths, make_rules

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PATHS = [
    b"a.jpg",
    b"b.png",
    b"A.JPG",
    b"x/a.jpg",
    b"x/b.png",
    b"x/y/a.jpg",
    b"x/y/z/a.jpg",
    b"x/y/z/b.png",
    b"y/a.jpg",
    b"xy/a.jpg",
    b"x.y/a.jpg",
    b"thumbs/a.jpg",
    b"x/thumbs/a.jpg",
    b"x/thumbs/keep.jpg",
    b"thumbs",
    b"x/y/thumbs",
    b"-.jpg",
    b"[a].jpg",
    b"a]b.jpg",
    b"star*.jpg",
    b"quest?.jpg",
    b"back\\slash.jpg",
    b"!bang.jpg",
    b"#hash/a.jpg",
    b"0/7.jpg",
    b"caf\xc3\xa9.jpg",
    b"\xff\xfe.jpg",
    b" lead.jpg",
    b".hidden/a.jpg",
    b"a^b.jpg",
    b"new\nline.jpg",
]


def left_out(patterns: Sequence[str], paths: Sequence[bytes] = PATHS) -> set[bytes]:
    rules = WholePaths(make_rules(patterns, defaults=False))
    return {path for path in paths if rules.file(path)}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", folder], check=True, capture_output=True)
    return folder


def left_out_by_git(repository: Path, patterns: Sequence[str], paths: Sequence[bytes] = PATHS) -> set[bytes]:
    exclude = repository / ".git" / "info" / "exclude"
    exclude.parent.mkdir(exist_ok=True)
    # In a file a `#` in front begins a comment, and spaces at the end are dropped: on a command line they are not.
    lines = [os.fsencode("\\" + pattern if pattern.startswith("#") else pattern) for pattern in patterns]
    exclude.write_bytes(b"".join(line + b"\n" for line in lines))
    command: list[str | Path] = ["git", "-C", repository, "check-ignore", "--no-index", "--stdin", "-z"]
    said = subprocess.run(command, input=b"\0".join(paths) + b"\0", capture_output=True, check=False)
    assert said.returncode in (0, 1), said.stderr
    return set(filter(None, said.stdout.split(b"\0")))


@pytest.mark.parametrize(
    "patterns",
    [
        ["*.jpg"],
        ["/a.jpg"],
        ["/*.jpg"],
        ["x"],
        ["x/"],
        ["/x/"],
        ["x/y"],
        ["x/y/"],
        ["y/"],
        ["thumbs"],
        ["thumbs/"],
        ["/thumbs/"],
        ["**/thumbs"],
        ["**/thumbs/"],
        ["thumbs/**"],
        ["x/**"],
        ["x/**/a.jpg"],
        ["**/y/**"],
        ["**"],
        ["**/"],
        ["*"],
        ["*/"],
        ["*/*.jpg"],
        ["x/*"],
        ["x/*/"],
        ["x/*/a.jpg"],
        ["?.jpg"],
        ["x?"],
        ["[ab].*"],
        ["[!a].*"],
        ["[^a].*"],
        ["[a-b].???"],
        ["[[:digit:]]"],
        ["[[:alpha:]].jpg"],
        ["[]a]*.jpg"],
        ["[]-].jpg"],
        ["a[]]b.jpg"],
        ["\\[a\\].jpg"],
        ["star\\*.jpg"],
        ["quest\\?.jpg"],
        ["back\\\\slash.jpg"],
        ["\\!bang.jpg"],
        ["#hash"],
        ["#hash/"],
        ["caf\u00e9.jpg"],
        ["\udcff*"],
        [" lead.jpg"],
        [".*"],
        ["*.jpg", "!a.jpg"],
        ["*.jpg", "!/a.jpg"],
        ["!a.jpg", "*.jpg"],
        ["*.jpg", "!x/", "x/b.png"],
        ["x/*", "!x/y/"],
        ["x/*", "!x/y/", "x/y/z/"],
        ["thumbs/", "!keep.jpg"],
        ["x/thumbs/*", "!x/thumbs/keep.jpg"],
        ["*", "!*/", "!*.png"],
        ["a.jpg", "!a.jpg", "a.jpg"],
        ["x/y/**/a.jpg", "!x/y/z/a.jpg"],
        ["a**.jpg"],
        ["x/**y/a.jpg"],
    ],
    ids=" ".join,
)
def test_a_list_of_patterns_leaves_out_what_git_ignores(repository: Path, patterns: list[str]) -> None:
    assert left_out(patterns) == left_out_by_git(repository, patterns)


@pytest.mark.sweep
@given(st.lists(st.text("ab*?/!x.[]-", min_size=1, max_size=8), min_size=1, max_size=4))
def test_random_patterns_leave_out_what_git_ignores(repository: Path, patterns: list[str]) -> None:
    paths = [b"a", b"b", b"x/a", b"x/b", b"x/x/a", b"a/b/x", b"ab/a.b", b"-", b"x/-/a.x", b"b/b/b/b"]
    try:
        ours = left_out(patterns, paths)
    except UsageError:
        return  # such as an open bracket: git says nothing and takes it for a pattern that fits nothing
    assert ours == left_out_by_git(repository, patterns, paths)


@pytest.mark.parametrize("pattern", ["", "/", "!", "//", "a//b", "./a", "../a", "[a", "a\\", "[z-a]", "[[:digits:]]"])
def test_a_pattern_that_can_fit_nothing_is_a_usage_error_with_a_hint(pattern: str) -> None:
    with pytest.raises(UsageError, match="--exclude") as caught:
        parse_pattern(pattern, "--exclude")
    assert caught.value.hint


@given(st.text(max_size=20).filter(lambda text: "\0" not in text))
def test_any_text_is_a_pattern_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError, UnicodeEncodeError):
        left_out([text])


@given(
    st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"\0/") and name not in (b".", b".."))
)
def test_a_name_of_any_bytes_with_its_wildcards_escaped_fits_itself_alone(name: bytes) -> None:
    pattern = "".join("\\" + letter if letter in "*?[]\\!" else letter for letter in os.fsdecode(name))
    assert left_out([pattern], [name, b"x/" + name, name + b"x", b"x" + name]) == {name, b"x/" + name}


def test_the_pattern_that_decides_is_told() -> None:
    rules = WholePaths(make_rules(["*.png", "thumbs/"], ["2024/"]))
    assert rules.file(b"2024/a.png") == "*.png"
    assert rules.file(b"2024/x/thumbs/y/a.jpg") == "thumbs/"
    assert rules.file(b"2024/@eaDir/a.jpg") == "@eaDir/"
    assert rules.file(b"2023/a.jpg") == NOT_INCLUDED
    assert rules.file(b"2024/a.jpg") == ""


@pytest.mark.parametrize(
    ("includes", "taken"),
    [
        (["*.png"], {b"b.png", b"x/b.png", b"x/y/z/b.png"}),
        (["x/y/"], {b"x/y/a.jpg", b"x/y/z/a.jpg", b"x/y/z/b.png", b"x/y/thumbs"}),
        (["x/y/", "!z/"], {b"x/y/a.jpg", b"x/y/thumbs"}),
        (["/a.jpg", "y/a.jpg"], {b"a.jpg", b"y/a.jpg"}),
    ],
)
def test_with_include_only_what_fits_or_lies_in_a_folder_that_fits_is_taken(
    includes: list[str], taken: set[bytes]
) -> None:
    rules = WholePaths(make_rules((), includes, defaults=False))
    assert {path for path in PATHS if not rules.file(path)} == taken


def test_exclude_wins_over_include() -> None:
    rules = WholePaths(make_rules(["thumbs/"], ["x/"]))
    assert rules.file(b"x/thumbs/a.jpg") == "thumbs/"


@pytest.mark.parametrize("pattern", DEFAULT_EXCLUDES)
def test_what_is_left_out_by_default_is_so_at_any_depth_and_in_any_case(pattern: str) -> None:
    name = os.fsencode(pattern.rstrip("/").replace("*", "1000"))
    below = b"/a.jpg" if pattern.endswith("/") else b""
    rules = WholePaths(make_rules())
    for path in (name + below, b"x/y/" + name.upper() + below, name.lower() + below):
        assert rules.file(path) == pattern
    assert not WholePaths(make_rules(defaults=False)).file(name + below)
    assert not WholePaths(make_rules(["!" + pattern])).file(name + below)


def test_only_files_with_a_dot_in_front_are_asked_about_without_patterns_of_the_user() -> None:
    assert all(pattern.startswith(".") for pattern in DEFAULT_EXCLUDES if not pattern.endswith("/"))
    assert not make_rules().asks_of_every_file


@pytest.mark.parametrize(
    ("include", "is_taken"), [("@eaDir/", True), ("/x/@eaDir", True), ("@EADIR/", False), ("*", False), ("@*/", False)]
)
def test_an_include_that_names_a_default_in_so_many_words_takes_it_back(include: str, is_taken: bool) -> None:
    assert (not WholePaths(make_rules((), [include])).file(b"x/@eaDir/a.jpg")) is is_taken
