"""Pictures in tar and zip archives are read where they lie, and get the promises that files get."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from run_helpers import Result, extract, internvit, make_pictures, summary_of

from internvit_cli import open_features
from internvit_cli.config import LONGEST_KEY, Skipped, Status
from internvit_cli.errors import UsageError
from internvit_cli.sources.archives import ArchiveIndex, index_of, member_address
from internvit_cli.sources.discover import discover
from internvit_cli.sources.files import open_or_skip, open_picture
from internvit_cli.sources.interface import DiscoverOptions
from internvit_cli.sources.members import Member, as_member, exists, shown, status_of

QUICK = ("--max-tiles", "2", "--tile-size", "56")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in folders, one of which cannot be read, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("folder") / "imgs"
    paths = make_pictures(folder, 8, seed=5)
    (folder / "cut.png").write_bytes(paths[1].read_bytes()[:200])
    (folder / "notes.txt").write_text("no picture")
    (folder / "__MACOSX").mkdir()
    shutil.copy(paths[0], folder / "__MACOSX" / "._a.jpg")
    return folder


def make_tar(path: Path, folder: Path, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        archive.add(folder, ".")
    return path


def make_zip(path: Path, folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


FORMS = {
    "pax.tar": make_tar,
    "gnu.tar": lambda path, folder: make_tar(path, folder, tarfile.GNU_FORMAT),
    "ustar.tar": lambda path, folder: make_tar(path, folder, tarfile.USTAR_FORMAT),
    "deflated.zip": make_zip,
    "stored.zip": lambda path, folder: make_zip(path, folder, zipfile.ZIP_STORED),
}


def content(address: bytes) -> bytes | Skipped:
    opened = open_or_skip(address)
    if isinstance(opened, Skipped):
        return opened
    with os.fdopen(opened.descriptor, "rb", buffering=0):
        return opened.stream().read()


# ------------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("name", FORMS)
def test_an_archive_gives_what_its_folder_gives(folder: Path, tmp_path: Path, name: str) -> None:
    archive = FORMS[name](tmp_path / name, folder)
    plain = extract(folder, "-o", tmp_path / "plain.h5", *QUICK, "--json")
    packed = extract(archive, "-o", tmp_path / "packed.h5", *QUICK, "--json")
    assert plain.returncode == packed.returncode == 3, packed.stderr
    one, other = summary_of(plain), summary_of(packed)
    for fact in ("found", "done", "skipped", "tiles", "reasons", "left_out"):
        assert one[fact] == other[fact], fact
    features, members = open_features(tmp_path / "plain.h5"), open_features(tmp_path / "packed.h5")
    assert [f"{name}/{key}" for key in features] == list(members)
    for key in features.done:
        image, member = features[key], members[f"{name}/{key}"]
        np.testing.assert_array_equal(image.visual_tokens, member.visual_tokens)
        assert (image.digest, image.file_size) == (member.digest, member.file_size)
        assert member.path == f"{archive}/{key}"
    assert "nothing new to do" in extract(archive, "-o", tmp_path / "packed.h5", *QUICK).stdout


@pytest.mark.parametrize("name", ["pax.tar", "deflated.zip"])
def test_archives_that_change_are_noticed_and_what_is_the_same_is_kept(folder: Path, tmp_path: Path, name: str) -> None:
    archive, output = FORMS[name](tmp_path / name, folder), tmp_path / "feats"
    assert extract(archive, "-o", output, *QUICK).returncode == 3
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    make_pictures(more / "new", 2, seed=9)
    changed = min(more.rglob("part0/*.png"))
    Image.new("RGB", (50, 40), "red").save(changed)
    archive.unlink()
    FORMS[name](archive, more)
    summary = summary_of(extract(archive, "-o", output, *QUICK, "--json"))
    assert (summary["encoded"], summary["done"]) == (3, 10), "two new ones, and the one that changed"
    assert open_features(output)[f"{name}/{changed.relative_to(more)}"].width == 50
    archive.unlink()
    missing = extract(archive, "-o", output, *QUICK)
    assert missing.returncode == 2 and "no such file" in missing.stderr


def test_archives_folders_and_files_mix_and_keys_begin_with_names(folder: Path, tmp_path: Path) -> None:
    first, second = make_tar(tmp_path / "a.tar", folder), make_zip(tmp_path / "b.zip", folder)
    result = extract(f"{tmp_path}/*.tar", f"more={second}", folder, "-o", tmp_path / "f.h5", *QUICK, "--json")
    assert result.returncode == 3, result.stderr
    keys = list(open_features(tmp_path / "f.h5"))
    assert len(keys) == 27 and {key.split("/")[0] for key in keys} == {"a.tar", "more", "part0", "part1", "cut.png"}
    both = extract(first, first, "-o", tmp_path / "g.h5", *QUICK, "--json")
    assert summary_of(both)["found"] == 9, "an archive that is named twice counts once"


def test_what_reads_pictures_again_reads_members(folder: Path, tmp_path: Path) -> None:
    archive, output = make_tar(tmp_path / "a.tar", folder), tmp_path / "f.h5"
    assert extract(archive, "-o", output, *QUICK).returncode == 3

    def run(*arguments: object) -> Result:
        result = internvit(*arguments)
        assert result.returncode == 0, result.stderr
        return result

    verified = json.loads(run("verify", output, "--json").stdout)
    assert verified["findings"] == []
    run("verify", output, "--re-extract", "3", "--model", "tiny-random")
    key = next(iter(open_features(output).done))
    shown_ = run("show", output, key, "-o", tmp_path / "shown")
    assert str(archive) not in shown_.stderr, "no note says that the photograph cannot be read"
    run("duplicates", output, "--sheet", tmp_path / "sheet.png")
    rows = json.loads(run("search", output, "--key", key, "--json").stdout)
    assert "\0" not in json.dumps(rows) and rows["queries"][0]["hits"]
    run("report", output, "-o", tmp_path / "report.html")
    run("export", output, tmp_path / "index.csv")
    assert f"{archive}/" in (tmp_path / "index.csv").read_text() and "\0" not in (tmp_path / "index.csv").read_text()


def test_patterns_and_default_excludes_hold_for_members(folder: Path, tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "a.tar", folder)
    found = discover([str(archive)], DiscoverOptions(exclude=("part0/",)))
    assert found.keys and all(key.startswith((b"a.tar/part1/", b"a.tar/cut")) for key in found.keys)
    assert found.left_out.total > 4
    every = discover([str(archive)], DiscoverOptions(default_excludes=False))
    assert any(b"__MACOSX" in key for key in every.keys)
    rooted = discover([str(archive)], DiscoverOptions(root=str(tmp_path.parent)))
    assert rooted.keys[0].startswith(f"{tmp_path.name}/a.tar/".encode())


# ---------------------------------------------------------------------------------------------------------------- tar

NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/\n"), min_size=1, max_size=120)
    .filter(lambda name: name.strip(".") and not name.endswith("/"))
    .map(lambda name: f"{'d' * (len(name) % 90)}/{name}.png"),
    min_size=1,
    max_size=8,
)


@given(NAMES, st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]), st.integers(0, 3000))
def test_members_are_where_tarfile_finds_them(names: list[str], form: int, size: int) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = size + number
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
    with temporary(stream.getvalue()) as path:
        index = index_of(path)
        with tarfile.open(os.fsdecode(path)) as reference:
            expected = {
                os.path.normpath(info.name).encode("utf-8", "surrogateescape"): (info.offset_data, info.size)
                for info in reference
            }
        assert {name: place[:2] for name, place in index.members.items()} == expected
        assert not index.problem and index.repeated == len(names) - len(set(names))


class temporary:
    """A file with a content that no other test had; its path is given as bytes."""

    count = 0

    def __init__(self, data: bytes, suffix: str = ".tar") -> None:
        self.data, self.suffix = data, suffix

    def __enter__(self) -> bytes:
        temporary.count += 1
        self.path = Path(f"/tmp/internvit-test-{os.getpid()}-{temporary.count}{self.suffix}")
        self.path.write_bytes(self.data)
        return os.fsencode(self.path)

    def __exit__(self, *_: object) -> None:
        self.path.unlink()


def tar_bytes(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def info_of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_links_folders_and_devices_are_no_pictures_and_a_hard_link_is_its_file() -> None:
    data = tar_bytes(
        [
            (info_of("a.png"), b"first"),
            (info_of("hard.png", tarfile.LNKTYPE, "a.png"), b""),
            (info_of("soft.png", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (info_of("pipe.png", tarfile.FIFOTYPE), b""),
            (info_of("d.png", tarfile.DIRTYPE), b""),
            (info_of("../out.png"), b"outside"),
            (info_of("/abs.png"), b"absolute"),
            (info_of("./x//y.png"), b"normal"),
        ]
    )
    with temporary(data) as path:
        found = {name: content(member_address(path, name)) for name in index_of(path).members}
    assert found == {b"a.png": b"first", b"hard.png": b"first", b"abs.png": b"absolute", b"x/y.png": b"normal"}


def test_of_two_members_of_one_name_the_later_counts_and_the_user_is_told(tmp_path: Path) -> None:
    pictures = []
    for color in ("red", "blue"):
        stream = io.BytesIO()
        Image.new("RGB", (20, 20), color).save(stream, "PNG")
        pictures.append((info_of("a.png"), stream.getvalue()))
    (tmp_path / "a.tar").write_bytes(tar_bytes(pictures))
    found = discover([str(tmp_path / "a.tar")], DiscoverOptions())
    assert found.keys == [b"a.tar/a.png"] and "1 member replaced" in found.notes[0]
    with open_picture(found.path(0)) as opened:  # type: ignore[union-attr]
        assert Image.open(opened.stream()).getpixel((0, 0)) == (0, 0, 255)
    assert "replaced by later ones" in extract(tmp_path / "a.tar", "-o", tmp_path / "f.h5", *QUICK).stderr


def test_headers_of_v7_and_numbers_in_binary_are_read() -> None:
    block = bytearray(tarfile.TarInfo("old.png").tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"%011o\0" % 5
    block[257:500] = bytes(243)  # v7 has neither magic nor prefix
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + sum(block[156:]) + 8 * 32)
    large = info_of("large.png")
    large.size = 3
    binary = bytearray(large.tobuf(tarfile.GNU_FORMAT))
    binary[124:136] = b"\x80" + (3).to_bytes(11, "big")
    binary[148:156] = b"%06o\0 " % (sum(binary[:148]) + sum(binary[156:]) + 8 * 32)
    data = bytes(block) + b"hello".ljust(512, b"\0") + bytes(binary) + b"abc".ljust(512, b"\0") + bytes(1024)
    with temporary(data) as path:
        found = {name: content(member_address(path, name)) for name in index_of(path).members}
    assert found == {b"old.png": b"hello", b"large.png": b"abc"}


@pytest.mark.skipif(shutil.which("tar") is None, reason="tar is not installed")
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_sparse_member_is_one_skipped_image_and_the_next_is_read(tmp_path: Path, form: str) -> None:
    import subprocess

    with (tmp_path / "a.png").open("wb") as file:
        for hole in range(40):
            file.seek(hole << 20)
            file.write(b"x" * 4096)
    make_pictures(tmp_path / "b", 1)
    line = ["tar", "--sparse", f"--format={form}", "-cf", "s.tar", "a.png", "b"]
    subprocess.run(line, cwd=tmp_path, check=True)
    index = index_of(os.fsencode(tmp_path / "s.tar"))
    assert list(index.refused) == [b"a.png"] and "sparse" in index.refused[b"a.png"].message
    result = extract(tmp_path / "s.tar", "-o", tmp_path / "f.h5", *QUICK, "--json")
    assert summary_of(result)["reasons"] == {"unsupported": 1} and summary_of(result)["done"] == 1


@pytest.mark.parametrize("cut", [100, 512, 700, 1000, 2500])
def test_what_lies_before_the_end_of_a_truncated_tar_is_read(cut: int, folder: Path, tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", folder).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        last = archive.getmembers()[-1]
    end = last.offset_data + last.size
    (tmp_path / "a.tar").write_bytes(whole[: end - min(cut, end - 1)])
    index = index_of(os.fsencode(tmp_path / "a.tar"))
    assert index.problem
    result = extract(tmp_path / "a.tar", "-o", tmp_path / "f.h5", *QUICK, "--json")
    assert result.returncode == 3 and summary_of(result)["done"] >= 5
    assert "damaged archive" in (tmp_path / "f.h5.skipped.jsonl").read_text()


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_damage_anywhere_is_never_more_than_a_problem(seed: int, changes: int) -> None:
    chance = random.Random(seed)
    members = [(info_of(f"{'n' * (60 * number)}{number}.png"), bytes(700 * number)) for number in range(5)]
    data = bytearray(tar_bytes(members, chance.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])))
    for _ in range(changes):
        data[chance.randrange(len(data))] = chance.randrange(256)
    with temporary(bytes(data)) as path:
        index = index_of(path)
        assert isinstance(index, ArchiveIndex)
        for name in index.members:
            found = content(member_address(path, name))
            assert isinstance(found, Skipped) or len(found) == index.members[name][1]


def with_size(data: bytes, size: bytes) -> bytes:
    """Return a tar archive with another size in its first header, and the sum of that header."""
    header = bytearray(data[:512])
    header[124:136] = size.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize("size", [b"-0000001000", b"-1", b"0o10", b"1_0", b"+10", b"99", b"\x80" + b"\xff" * 11])
def test_a_size_that_is_no_octal_number_ends_the_list_and_never_leads_back(size: bytes) -> None:
    with temporary(with_size(tar_bytes([(info_of("a.png"), b"picture")]), size)) as path:
        index = index_of(path)
        assert index.problem and not index.members


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 20, "-1", "1_0", ""])
def test_a_size_in_a_pax_header_that_is_no_size_ends_the_list(size: str) -> None:
    info = info_of("a.png")
    info.pax_headers = {"size": size}
    with temporary(tar_bytes([(info, b"picture")])) as path:
        index = index_of(path)
        assert index.problem and not index.members


def test_a_tar_that_was_cut_between_members_is_damaged_and_an_empty_file_is_no_archive(tmp_path: Path) -> None:
    whole = tar_bytes([(info_of("a.png"), bytes(512)), (info_of("b.png"), bytes(512))])
    with temporary(whole[:1024]) as path:
        assert list(index_of(path).members) == [b"a.png"] and "without a mark of the end" in index_of(path).problem
    with temporary(b"") as path:
        assert index_of(path).problem == "it is empty"
    with temporary(bytes(10240)) as path:
        assert not index_of(path).problem and not index_of(path).members


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_members_whose_paths_lead_out_are_left_out_and_counted(suffix: str, tmp_path: Path) -> None:
    names = ["../a.png", "x/../../b.png", "c.png"]
    make = zip_bytes(dict.fromkeys(names, b"")) if suffix == ".zip" else tar_bytes([(info_of(n), b"") for n in names])
    with temporary(make, suffix) as path:
        index = index_of(path)
        assert list(index.members) == [b"c.png"] and index.outside == 2 and "2 members left out" in index.notes[0]


def test_keys_that_are_too_long_for_an_output_are_left_out_and_told(tmp_path: Path) -> None:
    names = ["a.png", "b" * (LONGEST_KEY - len("s.tar/.png")) + ".png", "c" * LONGEST_KEY + ".png"]
    (tmp_path / "s.tar").write_bytes(tar_bytes([(info_of(name), b"") for name in names]))
    (tmp_path / "list.txt").write_text("d.png\n" + "e/" * LONGEST_KEY + "f.png\n")
    options = DiscoverOptions(files_from=str(tmp_path / "list.txt"), root=str(tmp_path))
    listing = discover([str(tmp_path / "s.tar")], options)
    assert len(listing) == 3 and max(map(len, listing.keys)) == LONGEST_KEY
    assert "2 pictures left out, because the key is longer than 16,384 bytes" in listing.notes[-1]


def test_two_archives_of_one_name_are_refused_with_the_name_of_the_archive(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "s.tar").write_bytes(tar_bytes([(info_of("in/a.png"), place.encode())]))
    paths = [str(tmp_path / place / "s.tar") for place in ("x", "y")]
    with pytest.raises(UsageError) as found:
        discover(paths, DiscoverOptions())
    assert f"NAME={paths[1]}," in found.value.hint
    assert discover([f"A={paths[0]}", f"B={paths[1]}"], DiscoverOptions()).keys == [b"A/in/a.png", b"B/in/a.png"]


def test_pipes_and_broken_links_named_like_archives_are_skipped_for_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "broken.zip").symlink_to("nowhere.zip")
    for name, status in (("pipe.tar", Status.NOT_REGULAR), ("broken.zip", Status.VANISHED)):
        listing = discover([str(tmp_path / name)], DiscoverOptions())
        found = open_or_skip(listing.path(0))
        assert isinstance(found, Skipped) and found.status is status, found


def test_a_file_that_is_no_archive_is_one_error(tmp_path: Path) -> None:
    for name in ("a.tar", "a.zip"):
        (tmp_path / name).write_bytes(b"no archive" * 100)
        result = extract(tmp_path / name, "-o", tmp_path / "f.h5")
        assert result.returncode in (1, 2) and result.stderr.startswith("error: "), result.stderr
        assert name in result.stderr and not (tmp_path / "f.h5").exists()
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    packed = extract(tmp_path / "a.tar.gz", "-o", tmp_path / "f.h5")
    assert packed.returncode == 2 and "unpack it" in packed.stderr


# ---------------------------------------------------------------------------------------------------------------- zip


def zip_bytes(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


@given(st.dictionaries(st.from_regex(r"[a-zäß漢 ]{1,20}\.png", fullmatch=True), st.binary(max_size=3000), max_size=5))
def test_members_of_a_zip_are_what_zipfile_reads(members: dict[str, bytes]) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with temporary(zip_bytes(members, method), ".zip") as path:
            found = {name.decode(): content(member_address(path, name)) for name in index_of(path).members}
            assert found == members


def test_bombs_other_methods_and_secrets_are_skipped_with_their_reason(tmp_path: Path) -> None:
    bomb = zip_bytes({"bomb.png": bytes(50 << 20)})
    other = zip_bytes({"other.png": b"data"}, zipfile.ZIP_BZIP2)
    secret = bytearray(zip_bytes({"secret.png": b"data"}))
    for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        secret[secret.index(signature) + at] |= 1
    for data, status in ((bomb, Status.TOO_LARGE), (other, Status.UNSUPPORTED), (bytes(secret), Status.UNSUPPORTED)):
        with temporary(data, ".zip") as path:
            (refused,) = index_of(path).refused.values()
            assert refused.status is status


def test_a_member_whose_size_is_a_lie_is_damaged() -> None:
    data = bytearray(zip_bytes({"a.png": b"x" * 3000}))
    at = data.index(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<L", 2000)
    with temporary(bytes(data), ".zip") as path:
        found = content(member_address(path, b"a.png"))
    assert isinstance(found, Skipped) and found.status is Status.TRUNCATED and "damaged" in found.message


# ---------------------------------------------------------------------------------------------------------- addresses


@given(
    st.binary(min_size=1).filter(lambda text: b"\0" not in text),
    st.binary().filter(lambda text: b"\0" not in text),
    st.tuples(*[st.integers(0, 2**40)] * 2),
)
def test_an_address_is_read_back_and_no_path_is_one(archive: bytes, name: bytes, place: tuple[int, int]) -> None:
    member = Member(archive, name, *place)
    assert as_member(member.address) == member and as_member(archive) is None
    assert shown(member.address) == archive + b"/" + name and shown(archive) == archive


def test_a_member_that_is_gone_has_vanished(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([(info_of("a.png"), b"x")]))
    archive = os.fsencode(tmp_path / "a.tar")
    address = member_address(archive, b"a.png")
    assert status_of(address).st_size == 1 and exists(address)
    assert not exists(member_address(archive, b"b.png"))
    (tmp_path / "a.tar").unlink()
    found: Any = content(address)
    assert found.status is Status.VANISHED and not exists(address)
    assert content(b"x\0y").status is Status.UNREADABLE  # type: ignore[union-attr]


def central_entry_with(data: bytes, name: bytes, extra: bytes, offset: int) -> bytes:
    """Return a zip archive of one member whose directory has another name, extra field and offset."""
    start = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = bytearray(data[start : start + 46])
    entry[28:32] = struct.pack("<HH", len(name), len(extra))
    entry[42:46] = struct.pack("<L", offset)
    tail = bytearray(data[end:])
    tail[12:16] = struct.pack("<L", len(entry) + len(name) + len(extra))
    return data[:start] + bytes(entry) + name + extra + bytes(tail)


@pytest.mark.parametrize("offset", [2**64 - 2, 2**63, 2**62, 1000])
def test_a_zip_member_at_an_impossible_place_is_one_skipped_image(offset: int) -> None:
    extra = struct.pack("<HHQ", 1, 8, offset)
    with temporary(central_entry_with(zip_bytes({"a.png": b"abc"}), b"a.png", extra, 2**32 - 1), ".zip") as path:
        assert isinstance(content(member_address(path, b"a.png")), Skipped)


def test_a_name_in_an_extra_field_is_as_readable_as_one_in_the_directory() -> None:
    name = "写.png".encode()
    extra = struct.pack("<HHBL", 0x7075, 5 + len(name), 1, zlib.crc32(b"__.png")) + name
    with temporary(central_entry_with(zip_bytes({"__.png": b"abc"}), b"__.png", extra, 0), ".zip") as path:
        (found,) = index_of(path).members  # newer versions of Python read the field
        assert found in (b"__.png", name) and content(member_address(path, found)) == b"abc"


def test_inflating_takes_no_more_memory_than_the_member(tmp_path: Path) -> None:
    data = zip_bytes({"a.png": b"abc" * 1000})
    with temporary(data, ".zip") as path:
        claimed = Member(path, b"a.png", *index_of(path).members[b"a.png"])._replace(stored_size=1 << 42)
        os.truncate(path, 1 << 43)
        tracemalloc.start()
        assert content(claimed.address) == b"abc" * 1000
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        tracemalloc.stop()


def test_a_member_that_finds_no_room_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with temporary(zip_bytes({"a.png": b"x" * 3000}), ".zip") as path:
        address = member_address(path, b"a.png")
        before = len(os.listdir("/proc/self/fd"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            found: Any = content(address)
        assert found.status is Status.UNREADABLE and "space" in found.message
        assert len(os.listdir("/proc/self/fd")) == before
