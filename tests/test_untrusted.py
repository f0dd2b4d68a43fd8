"""Opening, reading and parsing what somebody else may have made: never a wait, never more memory than a bound."""

from __future__ import annotations

import io
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvit_cli.errors import UsageError
from internvit_cli.extract.changes import sources_to_json
from internvit_cli.runtime import untrusted
from internvit_cli.runtime.untrusted import (
    NotRegularError,
    TooLargeError,
    lines_of,
    open_regular,
    parse_json,
    read_bounded,
)
from internvit_cli.sources import Source
from internvit_cli.storage.format.layout import SOURCES_BYTES, recorded_sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One of everything that a name can stand for."""
    monkeypatch.chdir(tmp_path)  # a socket's path has at most 108 bytes
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name, target in (("link", "file"), ("pipe link", "pipe"), ("nowhere", "gone"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("folder", "a folder"), ("pipe", "a pipe"), ("pipe link", "a pipe"), ("socket", "a socket")],
)
def test_what_is_no_regular_file_is_refused_at_once_by_its_kind(folder: Path, name: str, kind: str) -> None:
    with pytest.raises(NotRegularError) as caught:
        open_regular(str(folder / name))
    assert caught.value.kind == kind
    assert caught.value.strerror == f"it is {kind}, not a file"
    assert caught.value.filename == str(folder / name)


def test_a_device_is_refused_before_it_is_opened() -> None:
    with pytest.raises(NotRegularError, match="a device"):
        read_bounded("/dev/zero", 1 << 20)


@pytest.mark.parametrize("path", ["a\0b", b"/a\0b"])
def test_a_name_that_no_file_can_have_is_an_error_of_the_operating_system(path: str | bytes) -> None:
    """Paths come out of files that others made, and Python has an error of another kind for them."""
    with pytest.raises(OSError, match="NUL"):
        open_regular(path)


def test_a_link_is_followed_unless_it_must_not_be(folder: Path) -> None:
    assert read_bounded(str(folder / "link"), 100) == b"0123456789"
    with pytest.raises(NotRegularError, match="it is a link"):
        read_bounded(str(folder / "link"), 100, follow_links=False)
    assert read_bounded(str(folder / "file"), 100, follow_links=False) == b"0123456789"


@pytest.mark.parametrize(
    ("name", "kind"), [("gone", FileNotFoundError), ("nowhere", FileNotFoundError), ("loop", OSError)]
)
def test_what_is_not_there_is_the_systems_own_error(folder: Path, name: str, kind: type[OSError]) -> None:
    with pytest.raises(kind):
        open_regular(str(folder / name))


def test_a_name_that_changes_hands_between_two_looks_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def swap(path: str, **options: bool) -> os.stat_result:
        result = look(path, **options)
        os.replace(folder / "pipe", folder / "file")
        return result

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(NotRegularError, match="a pipe"):
        open_regular(str(folder / "file"))


def test_a_file_is_read_up_to_its_bound_and_no_further(folder: Path) -> None:
    assert read_bounded(str(folder / "file"), 10) == b"0123456789"
    with pytest.raises(TooLargeError, match="larger than 9 bytes"):
        read_bounded(str(folder / "file"), 9)
    os.truncate(folder / "file", 1 << 40)
    with pytest.raises(TooLargeError):
        read_bounded(str(folder / "file"), 1 << 20)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="files without a size are the Linux kernel's")
def test_a_file_that_tells_no_size_is_bounded_too() -> None:
    assert Path("/proc/self/maps").stat().st_size == 0
    assert read_bounded("/proc/self/maps", 1 << 24)
    with pytest.raises(TooLargeError):
        read_bounded("/proc/self/maps", 100)


@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"."))), st.integers(1, 64), st.booleans())
def test_lines_come_out_as_they_went_in_however_they_fall_into_blocks(
    lines: list[bytes], size: int, is_ended: bool
) -> None:
    text = b"\n".join(lines) + (b"\n" if is_ended else b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrusted, "BLOCK_BYTES", size)
        assert list(lines_of(io.BytesIO(text), 41)) == io.BytesIO(text).readlines()


def test_a_line_without_end_is_refused_after_the_lines_before_it_without_reading_on() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            self.taken += size
            return b"first\n" + b"x" * (size - 6) if self.taken == size else b"x" * size

    file = Endless()
    lines = lines_of(file)  # type: ignore[arg-type]
    assert next(lines) == b"first\n"
    with pytest.raises(ValueError, match="line 2 is longer"):
        next(lines)
    assert file.taken <= 1 << 20


@pytest.mark.parametrize(
    "text", ["[" * 1_000_000, '{"a":' * 1_000_000, "NaN", "-Infinity", "1e999", "1" * 5000, "", "{", b"\xff", b"[1,\0]"]
)
def test_text_that_is_no_json_of_the_standard_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "\\ud800"]}', b'\xef\xbb\xbf{"a": 1}', "7", b'"\xed\xb3\xbf"'])
def test_json_of_the_standard_is_parsed(text: str | bytes) -> None:
    assert parse_json(text) is not None


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize(
    "sources",
    [[], [Source(b"/")], [Source(b"/a b/\xff\xfe", b"name"), Source(b"/c", b"..."), Source(b'/a"\\\n', b"\xf0")]],
)
def test_sources_come_back_as_they_were_stored(sources: list[Source]) -> None:
    assert recorded_sources({"sources": sources_to_json(sources)}, "feats.h5") == sources


def test_more_sources_than_an_output_can_name_are_refused_before_one_is_made() -> None:
    folder = b"/" + b"f" * 200
    count = SOURCES_BYTES // 220 + 1
    with pytest.raises(UsageError, match=r"folders, each a source of its own") as caught:
        sources_to_json([Source(folder + b"%d" % number) for number in range(count)])
    assert "--root" in caught.value.hint
