"""Sources become one sorted listing of keys, whatever lies in them."""

from __future__ import annotations

import io
import os
import socket
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from run_helpers import extract, internvit

from internvit_cli.config import Status
from internvit_cli.errors import NoImagesError, UsageError
from internvit_cli.sources import DiscoverOptions, Listing, discover
from internvit_cli.sources.extensions import EXTENSIONS, looks_like_picture
from internvit_cli.sources.files import readable_formats
from internvit_cli.sources.find_images import require_images
from internvit_cli.sources.lists import read_list
from internvit_cli.sources.selection import FileSelection
from internvit_cli.sources.signatures import is_picture, kind_by_bytes
from internvit_cli.sources.walk import walk

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

file_names = st.binary(min_size=1, max_size=40).filter(lambda name: b"/" not in name and b"\0" not in name)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def find(*arguments: object, stdin: bytes | None = None, **options: object) -> Listing:
    stream = None if stdin is None else io.BytesIO(stdin)
    return discover([str(argument) for argument in arguments], DiscoverOptions(**options), stream)  # type: ignore[arg-type]


def keys(listing: Listing) -> list[str]:
    return [os.fsdecode(key) for key in listing.keys]


def statuses(listing: Listing) -> dict[str, Status]:
    return {os.fsdecode(listing.keys[i]): skipped.status for i, skipped in listing.skipped.items()}


def test_a_folder_is_walked_once_and_sorted_by_bytes(tmp_path: Path) -> None:
    touch(tmp_path, "b.JPG", "a/z.png", "a.webp", "notes.txt", "a/deep/x.Tiff", "noext", ".jpg", "é.jpg")
    listing = find(tmp_path)
    assert keys(listing) == ["a.webp", "a/deep/x.Tiff", "a/z.png", "b.JPG", "é.jpg"]
    assert [listing.path(i) for i in range(len(listing))] == [os.fsencode(tmp_path / key) for key in keys(listing)]
    assert [source.root for source in listing.sources] == [os.fsencode(tmp_path)]


def test_a_folder_without_pictures_gives_an_empty_listing(tmp_path: Path) -> None:
    assert len(find(tmp_path)) == 0


def test_names_of_any_bytes_come_through(tmp_path: Path) -> None:
    odd = [b"caf\xe9.jpg", b"\xff\xfe.jpg", b"new\nline.jpg", b"esc\x1b[31m.jpg", b" lead.jpg", b"-rf.jpg", b"a=b.jpg"]
    for name in odd:
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    assert find(tmp_path).keys == sorted(odd)


def test_a_named_file_is_taken_whatever_its_extension(tmp_path: Path) -> None:
    touch(tmp_path, "scan.dat", "a.jpg")
    assert keys(find(tmp_path / "scan.dat", tmp_path / "a.jpg")) == ["a.jpg", "scan.dat"]


def test_the_key_of_a_file_is_relative_to_the_root(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    listing = find(tmp_path / "x/a.jpg", tmp_path / "y/a.jpg", root=str(tmp_path))
    assert keys(listing) == ["x/a.jpg", "y/a.jpg"]
    assert listing.path(1) == os.fsencode(tmp_path / "y/a.jpg")


def test_a_file_outside_the_root_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    with pytest.raises(UsageError, match=r"a\.jpg") as caught:
        find(tmp_path / "x/a.jpg", root=str(tmp_path / "y"))
    assert "--root" in caught.value.hint


def test_a_root_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--root"):
        find(tmp_path, root=str(tmp_path / "gone"))


def test_what_is_named_twice_appears_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "same").symlink_to(tmp_path)
    listing = find(tmp_path, tmp_path, tmp_path / "a.jpg", tmp_path / "same", f"{tmp_path}/*.jpg")
    assert keys(listing) == ["a.jpg", "b.jpg"]


def test_two_files_with_one_key_are_an_error_that_names_both(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    with pytest.raises(UsageError, match=r"x/a\.jpg and .*y/a\.jpg") as caught:
        find(tmp_path / "x", tmp_path / "y")
    assert f"NAME={tmp_path}/y" in caught.value.hint


def test_a_name_keeps_two_folders_apart(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.jpg", "y/a.jpg")
    listing = find(tmp_path / "x", f"why={tmp_path / 'y'}")
    assert keys(listing) == ["a.jpg", "why/a.jpg"]
    assert [listing.path(i) for i in range(2)] == [os.fsencode(tmp_path / name / "a.jpg") for name in "xy"]
    assert list(listing.source_index) == [0, 1]


def test_a_name_may_collide_with_a_folder_of_the_same_name(tmp_path: Path) -> None:
    touch(tmp_path, "x/why/a.jpg", "y/a.jpg")
    with pytest.raises(UsageError, match="why/a"):
        find(tmp_path / "x", f"why={tmp_path / 'y'}")


@pytest.mark.parametrize("argument", ["gone", "gone.jpg", "name=gone", "..=.", ""])
def test_a_source_that_is_not_there_is_an_error_with_a_hint(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        find(argument)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "star*.jpg"]),
        ("s/*.jpg", ["b.jpg"]),
        ("**/*.jpg", ["a.jpg", "b.jpg", "c.jpg", "star*.jpg"]),
        ("**", ["a.jpg", "b.jpg", "c.jpg", "star*.jpg"]),
        ("s/**/*.jpg", ["b.jpg", "c.jpg"]),
        ("**/t/*.jpg", ["c.jpg"]),
        ("**/**/c.???", ["c.jpg"]),
        ("?/*.jpg", ["b.jpg"]),
        ("s/[!x].jpg", ["b.jpg"]),
        (".*.jpg", [".h.jpg"]),
        ("star*.jpg", ["star*.jpg"]),
        ("star[*].jpg", ["star*.jpg"]),
        ("[s]", ["b.jpg", "t/c.jpg"]),
    ],
)
def test_a_pattern_finds_what_the_shell_would(
    pattern: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a.jpg", ".h.jpg", "s/b.jpg", "s/t/c.jpg", "star*.jpg", "notes.txt", ".hidden/d.jpg")
    monkeypatch.chdir(tmp_path)
    assert keys(find(pattern)) == expected
    assert keys(find(f"{tmp_path}/{pattern}")) == expected


def test_a_name_that_exists_wins_over_its_meaning_as_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "star*.jpg", "starfish.jpg", "a=b/c.jpg")
    assert keys(find(tmp_path / "star*.jpg")) == ["star*.jpg"]
    assert keys(find(tmp_path / "a=b")) == ["c.jpg"]


def test_a_pattern_that_nothing_fits_means_no_images(tmp_path: Path) -> None:
    with pytest.raises(NoImagesError, match="pattern"):
        find(f"{touch(tmp_path, 'a.png')}/*.jpg")


def test_a_list_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_bytes(b"s/b.jpg\r\n\n./a.dat\n" + os.fsencode(tmp_path / "c//d.png"))
    listing = find(files_from="list")
    assert keys(listing) == ["a.dat", "c/d.png", "s/b.jpg"]
    assert listing.path(0) == os.fsencode(tmp_path / "a.dat")


def test_a_list_on_standard_input_is_relative_to_the_root(tmp_path: Path) -> None:
    for listing in (
        find("-", stdin=b"b.jpg\0new\nline.jpg\0", null_separated=True, root=str(tmp_path)),
        find(files_from="-", stdin=b"b.jpg\0new\nline.jpg", null_separated=True, root=str(tmp_path)),
    ):
        assert keys(listing) == ["b.jpg", "new\nline.jpg"]
        assert listing.path(0) == os.fsencode(tmp_path / "b.jpg")


@pytest.mark.parametrize("line", [b"../a.jpg", b"/elsewhere/a.jpg", b"s/../a.jpg", b".", b"/"])
def test_a_line_that_leaves_the_root_is_refused(line: bytes, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find("-", stdin=line, root=str(tmp_path))
    assert "--root" in caught.value.hint


def test_standard_input_is_read_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="once"):
        find("-", stdin=b"a.jpg", files_from="-")


def test_a_list_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    for name in (tmp_path / "gone", tmp_path):
        with pytest.raises(UsageError, match="list"):
            find(files_from=str(name))


def test_nul_bytes_in_a_list_of_lines_suggest_the_option() -> None:
    with pytest.raises(UsageError) as caught:
        find("-", stdin=b"a.jpg\0b.jpg")
    assert "-0" in caught.value.hint


@given(st.lists(file_names))
def test_any_names_survive_a_list_that_ends_them_in_nul(names: list[bytes]) -> None:
    assert list(read_list(io.BytesIO(b"".join(name + b"\0" for name in names)), null_separated=True)) == names


@given(st.lists(file_names.filter(lambda name: b"\n" not in name and not name.endswith(b"\r"))), st.booleans())
def test_names_survive_a_list_of_lines(names: list[bytes], windows: bool) -> None:
    end = b"\r\n" if windows else b"\n"
    first = names[0] + end if names else b""
    assume(not kind_by_bytes(first) and not is_picture(first))  # a name that reads as the start of another file
    assert list(read_list(io.BytesIO(b"".join(name + end for name in names)), null_separated=False)) == names


@given(st.lists(file_names), st.integers(1, 7))
def test_a_list_reads_the_same_in_blocks_of_any_size(names: list[bytes], block: int) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(block)

    assert list(read_list(Trickle(b"\0".join(names)), null_separated=True)) == names


# ----------------------------------------------------------------------------------------------- lists that went wrong


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("null_separated", [False, True])
def test_a_mark_of_utf_8_in_front_of_a_list_is_no_part_of_the_first_name(tmp_path: Path, null_separated: bool) -> None:
    end = b"\0" if null_separated else b"\r\n"
    touch(tmp_path, "a.jpg", "b.jpg")
    for lines in (BOM + b"a.jpg" + end + b"b.jpg" + end, BOM + end + b"a.jpg" + end + b"b.jpg"):
        assert keys(find("-", stdin=lines, root=str(tmp_path), null_separated=null_separated)) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("names", ["a.jpg\r\nb.jpg\r\n", "\u72ac.jpg\n\u732b.jpg\n", "\u72ac\u72ac\u72ac\r\n"])
def test_a_list_in_utf_16_is_refused_by_name(encoding: str, names: str) -> None:
    with pytest.raises(UsageError) as caught:
        find("-", stdin=names.encode(encoding))
    assert "UTF-16" in caught.value.message or encoding != "utf-16"
    assert caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"\x1f\x8b\x08\0rest",
        b"PK\x03\x04rest\n",
        b"PAR1\x15\x04\n",
        b"%PDF-1.4\n",
        b"\x89HDF\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_a_list_that_is_no_text_is_refused_by_what_it_is(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list").write_bytes(data)
    with pytest.raises(UsageError, match="the list is a") as caught:
        find(files_from=str(tmp_path / "list"))
    assert "plain text" in caught.value.hint


def test_quotes_around_a_line_are_no_part_of_it_unless_a_file_is_named_so(tmp_path: Path) -> None:
    touch(tmp_path, "a b.jpg", "'c'.jpg", "'d.jpg'", "d.jpg", 'e"f.jpg')
    lines = b'"a b.jpg"\n\'\'c\'.jpg\'\n\'d.jpg\'\n"e""f.jpg"\n"gone.jpg"\n'
    listing = find("-", stdin=lines, root=str(tmp_path))
    assert set(keys(listing)) == {"a b.jpg", "'c'.jpg", "'d.jpg'", 'e"f.jpg', '"gone.jpg"'}
    exact = find("-", stdin=b'"a b.jpg"\0', root=str(tmp_path), null_separated=True)
    assert keys(exact) == ['"a b.jpg"']


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("path,label\nin/a.jpg,1\n", "a table", "tail -n +2 LIST | cut -d, -f1 | internvit extract -"),
        ("in/a.jpg,1\nin/b.jpg,2\n", "a table", "cut -d, -f1 LIST"),
        ("id;file\n1;in/a.jpg\n", "a table", "tail -n +2 LIST | cut -d';' -f2"),
        ("1\tin/a.jpg\n", "a table", "cut -f2 LIST"),
        ("in/a.jpg 0\nin/b.jpg 1\n", "a table", "cut -d' ' -f1 LIST"),
        ('{"id": 1, "image": "in/a.jpg"}\n', "a table", "jq -r .image LIST"),
        ("x,y\nz,1\n", "like a table", "only the paths"),
        ('{"id": 1, "image": "nowhere.jpg"}\n', "like JSON", "only the paths"),
        ("[\n  1\n]\n", "like JSON", "only the paths"),
        ("https://x.y/a.jpg\nhttps://x.y/b.jpg\n", "URLs", "download"),
        ("gone.jpg\nmy own picture.jpg\n", "names no file", "--root"),
        ("file:///x/b.jpg\n", "URLs", "sed 's|^file://||' LIST"),
        ("~/a.jpg\n~/b.jpg\n", "only a shell expands ~", "write the full path"),
        ("C:\\x\\a.jpg\n", "Windows paths", "write / instead"),
    ],
)
def test_a_list_that_names_no_file_that_is_there_says_what_it_seems_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str, hint: str
) -> None:
    touch(tmp_path, "in/a.jpg")
    (tmp_path / "list").write_text(text)
    monkeypatch.chdir(tmp_path)
    for listing in (find(files_from="list"), find("-", stdin=text.encode())):
        assert listing.is_missing
        (missing,) = listing.missing_lists
        assert what in missing.message and "names no file that exists" in missing.message
    assert hint.replace("LIST", "list") in find(files_from="list").missing_lists[0].hint
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    if "in/a.jpg" in text:
        assert f"--root {tmp_path}" in find(files_from="../list").missing_lists[0].hint


def test_a_list_of_nothing_is_told_from_folders_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("\n\n")
    with pytest.raises(NoImagesError, match=r"the list .*/list is empty") as caught:
        require_images(find(files_from=str(tmp_path / "list")))
    assert "one per line" in caught.value.hint
    with pytest.raises(NoImagesError, match="the list on standard input is empty"):
        require_images(find("-", stdin=b""))
    touch(tmp_path, "in/a.jpg")
    assert keys(require_images(find(str(tmp_path / "in"), files_from=str(tmp_path / "list")))) == ["a.jpg"]


def test_a_source_without_a_name_is_said_to_be_one() -> None:
    with pytest.raises(UsageError, match="no such file or folder: an empty name"):
        find("")
    with pytest.raises(UsageError, match="a=: an empty name is not a folder"):
        find("a=")


def test_a_list_whose_files_lie_beside_it_says_which_root_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "data set/a.jpg", "elsewhere/x")
    (tmp_path / "data set/list").write_text("a.jpg\nb.jpg\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    (missing,) = find(files_from="../data set/list").missing_lists
    assert f"--root '{tmp_path}/data set'" in missing.hint


def test_a_table_of_absolute_paths_is_told_from_paths_outside_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "in/a.jpg", "elsewhere/x")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="the list is a table") as caught:
        find("-", stdin=f"path,label\n{tmp_path}/in/a.jpg,1\n".encode())
    assert "tail -n +2 LIST | cut -d, -f1" in caught.value.hint


def test_a_list_with_one_file_that_is_there_is_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg")
    listing = find("-", stdin=b"path,label\na.jpg,1\nb.jpg\n", root=str(tmp_path))
    assert not listing.missing_lists and len(listing) == 3


def test_beside_other_sources_a_list_of_missing_files_is_a_note(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg")
    listing = find(tmp_path / "in", "-", stdin=b"gone.jpg\n", root=str(tmp_path))
    assert len(listing.missing_lists) == 1 and not listing.is_missing


def test_a_run_over_a_list_of_missing_files_makes_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "in/a.jpg")
    (tmp_path / "list.csv").write_text("path,label\nin/a.jpg,1\n")
    monkeypatch.chdir(tmp_path)
    result = extract("--files-from", "list.csv", "-o", "f.h5")
    assert result.returncode == 1
    assert "it is a table" in result.stderr and "cut -d, -f1" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "list.csv"]


# ------------------------------------------------------------------------------------------- sources that are no files


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("http://a.b/c.jpg", "download"),
        ("https://a.b/*.jpg?w=1", "download"),
        ("s3://bucket/imgs", "aws s3 sync"),
        ("gs://bucket", "gcloud storage"),
        ("hf://datasets/a/b", "hf download"),
        ("azure://x/y", "copy"),
        ("file:///tmp/a.jpg", "only the path"),
        ("HTTPS://A.B", "download"),
    ],
)
def test_a_url_is_refused_with_how_to_get_its_files(url: str, hint: str) -> None:
    for sources in ({"arguments": [url]}, {"arguments": [], "files_from": url}):
        with pytest.raises(UsageError, match="is a URL") as caught:
            find(*sources.pop("arguments"), **sources)
        assert hint in caught.value.hint


def test_what_exists_wins_over_its_meaning_as_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "s3:/bucket/a.jpg")
    monkeypatch.chdir(tmp_path)
    assert keys(find("s3://bucket")) == ["a.jpg"]


@pytest.mark.parametrize(
    ("name", "data", "what", "hint"),
    [
        ("a.docx", b"PK\x03\x04", "an archive", "unpack"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "an archive", "unpack"),
        ("a.tar.gz", b"\x1f\x8b\x08", "an archive", "unpack"),
        ("a.tgz", b"", "an archive", "unpack"),
        ("imgs", b"\x1f\x8b\x08", "an archive", "unpack"),
        ("a.parquet", b"PAR1\x15", "a packed dataset", "to files"),
        ("a.tfrecord", b"x", "a packed dataset", "to files"),
        ("a.csv", b"path,label\n", "a table", "--files-from"),
        ("a.TSV", b"path\tlabel\n", "a table", "--files-from"),
        ("a.jsonl", b"{}", "a table", "--files-from"),
        ("a.json", b"{}", "a table", "--files-from"),
        ("a.pdf", b"%PDF-1.4", "a document", "pdftoppm"),
        ("a.mp4", b"\0\0\0\x18ftypisom", "a video", "ffmpeg"),
        ("a.mov", b"", "a video", "ffmpeg"),
        ("a.txt", b"b.jpg\n", "a text", "--files-from"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "a file of features", "internvit info"),
        ("feats.h5.partial", b"\x89HDF\r\n\x1a\n", "a file of features", "internvit info"),
        ("a.npy", b"\x93NUMPY", "a file of features", "internvit info"),
    ],
)
def test_a_file_that_holds_pictures_or_their_names_is_refused_with_what_to_do(
    tmp_path: Path, name: str, data: bytes, what: str, hint: str
) -> None:
    touch(tmp_path, "b.jpg")
    (tmp_path / name).write_bytes(data)
    for sources in ([tmp_path / name], [tmp_path / "b.jpg", tmp_path / name], [tmp_path, tmp_path / name]):
        with pytest.raises(UsageError, match=f"is {what}") as caught:
            find(*sources)
        assert hint in caught.value.hint
        assert (f"name the folder ({tmp_path})" in caught.value.hint) == (len(sources) > 1)


def test_a_picture_is_taken_though_its_name_says_archive(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.zip", "PNG")
    assert keys(find(tmp_path / "a.zip")) == ["a.zip"]


def test_a_refused_source_makes_no_output_and_asks_for_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    for source in (tmp_path / "a.zip", "https://x.y/a.jpg"):
        for command in (["extract", "-o", tmp_path / "f.h5"], ["plan"]):
            result = internvit(*command, source, "--model", tmp_path / "no model")
            assert result.returncode == 2, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("name", ["feats", "feats.h5"])
def test_an_output_of_ours_is_no_source(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "in/a.png")
    assert extract(tmp_path / "in", "-o", tmp_path / name).returncode == 0
    with pytest.raises(UsageError, match="features") as caught:
        find(tmp_path / name)
    assert "internvit info" in caught.value.hint


def test_pictures_that_lie_in_an_output_are_found(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "internvit-features"}')
    touch(tmp_path, "a.jpg")
    assert keys(find(tmp_path)) == ["a.jpg"]


# --------------------------------------------------------------------------------------------------------------- links


def test_links_to_files_inside_are_followed_and_links_outside_are_not(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "out/b.jpg")
    for name, target in {"l": "a.jpg", "m": "../out/b.jpg", "n": f"{tmp_path}/out/b.jpg", "o": "m.jpg"}.items():
        (tmp_path / "in" / f"{name}.jpg").symlink_to(target)
    (tmp_path / "in/dangling.jpg").symlink_to("../out/gone.jpg")
    listing = find(tmp_path / "in")
    assert keys(listing) == ["a.jpg", "dangling.jpg", "l.jpg", "m.jpg", "n.jpg", "o.jpg"]
    assert statuses(listing) == dict.fromkeys(["dangling.jpg", "m.jpg", "n.jpg", "o.jpg"], Status.LINK_OUTSIDE)
    assert not find(tmp_path / "in", follow_links=True).skipped
    assert not find(tmp_path / "in/m.jpg").skipped


def test_a_link_named_outright_is_read_even_when_its_folder_is_a_source_too(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.jpg", "b.jpg")
    (tmp_path / "in/l.jpg").symlink_to("../b.jpg")
    assert statuses(find(tmp_path / "in", tmp_path / "in/l.jpg")) == {}


def test_a_source_that_is_itself_a_link_holds_its_own_files(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jpg")
    (tmp_path / "real/b.jpg").symlink_to("a.jpg")
    (tmp_path / "named").symlink_to("real")
    listing = find(tmp_path / "named")
    assert keys(listing) == ["a.jpg", "b.jpg"]
    assert not listing.skipped
    assert listing.sources[0].root == os.fsencode(tmp_path / "named")


def test_links_to_folders_are_followed_on_request_and_each_folder_once(tmp_path: Path) -> None:
    touch(tmp_path, "in/a/x.jpg", "out/y.jpg")
    for name, target in {"here": ".", "up": "..", "z": "../out", "m": "../out", "a/back": "../.."}.items():
        (tmp_path / "in" / name).symlink_to(target)
    plain = find(tmp_path / "in")
    assert (keys(plain), plain.unfollowed_links) == (["a/x.jpg"], 5)
    assert keys(find(tmp_path / "in", follow_links=True)) == ["a/back/out/y.jpg", "a/x.jpg"]


def test_pipes_sockets_and_devices_are_marked_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "sock.jpg"))
    for name, target in {
        "zero": "/dev/zero",
        "stdin": "/dev/stdin",
        "mem": "/proc/self/mem",
        "pipe": "fifo.jpg",
    }.items():
        (tmp_path / f"{name}.jpg").symlink_to(target)
    expected = dict.fromkeys(
        ["fifo.jpg", "sock.jpg", "zero.jpg", "stdin.jpg", "mem.jpg", "pipe.jpg"], Status.NOT_REGULAR
    )
    for follow in (False, True):
        assert statuses(find(tmp_path, follow_links=follow)) == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root can list every folder")
def test_a_folder_that_cannot_be_listed_is_a_problem_without_a_row(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "locked/b.jpg")
    (tmp_path / "locked").chmod(0)
    listing = find(tmp_path)
    (tmp_path / "locked").chmod(0o700)
    assert keys(listing) == ["a.jpg"]
    assert [(problem.path, problem.skipped.status) for problem in listing.unreadable_folders] == [
        (os.fsencode(tmp_path / "locked"), Status.UNREADABLE)
    ]


def test_a_folder_that_vanishes_is_a_problem_without_a_row(tmp_path: Path) -> None:
    found = walk(os.fsencode(tmp_path / "gone"), FileSelection(DiscoverOptions()), follow_links=False)
    assert [problem.skipped.status for problem in found.unreadable_folders] == [Status.VANISHED]


def test_the_hostile_tree_is_walked_to_its_end(made: Path) -> None:
    listing = find(made)
    assert {key for key, status in statuses(listing).items() if status is Status.NOT_REGULAR} == {
        f"tree/{name}.jpg" for name in ("devzero", "fifo", "procmem", "sock", "stdin")
    }
    found = set(listing.keys)
    candidates = {os.path.relpath(path, made) for path in _files(made)}
    assert {os.fsdecode(key) for key in found} == {path for path in candidates if looks_like_picture(os.fsencode(path))}
    assert max(key.count(b"/") for key in found) >= 15
    assert b"File name too long" in b"".join(p.skipped.message.encode() for p in listing.unreadable_folders)
    assert find(f"{made}/**/*.jpg", root=str(made)).keys


def _files(folder: Path) -> Iterable[str]:
    for top, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(top, name)
            if not os.path.isdir(path):
                yield path


def test_the_extensions_are_those_that_pillow_reads_by_itself() -> None:
    registered = {
        extension[1:].encode()
        for extension, name in Image.registered_extensions().items()
        if name in (*readable_formats(), "MPO")
    }
    assert registered - EXTENSIONS == set()
    of_absent_formats = {b"avif", b"avifs"} if "AVIF" not in readable_formats() else set()
    assert EXTENSIONS - registered == of_absent_formats


@pytest.mark.sweep
def test_a_hundred_thousand_files_need_little_memory_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    lines = b"".join(b"folder%03d/picture%06d.jpg\n" % (i % 100, i) for i in range(100_000))
    start = time.perf_counter()
    tracemalloc.start()
    listing = find("-", stdin=lines)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    key_bytes = sum(sys.getsizeof(key) for key in listing.keys)
    with capsys.disabled():
        print(
            f"\n100,000 files listed in {time.perf_counter() - start:.2f} s, beyond the keys"
            f" {(held - key_bytes) / 1e5:.0f} bytes a file, {(peak - key_bytes) / 1e5:.0f} at the peak"
        )
    assert (peak - key_bytes - len(lines)) / len(listing) < 300
