"""What lies in the sources and is not taken is counted and told of; drawings of our own and sniffed names are known."""

from __future__ import annotations

import io
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, features
from run_helpers import extract, internvit, make_pictures, state_of, summary_of

from internvit_cli.config import DRAWN_BY
from internvit_cli.errors import NoImagesError
from internvit_cli.sources import DiscoverOptions, Listing, discover
from internvit_cli.sources.extensions import EXTENSIONS, label_of, looks_like_picture
from internvit_cli.sources.find_images import require_images
from internvit_cli.sources.kinds import KINDS, kind_by_extension
from internvit_cli.sources.left_out import MOST_COUNTED, LeftOut
from internvit_cli.sources.signatures import FIRST_BYTES, is_picture, kind_by_bytes
from internvit_cli.viz.draw.png import encode_png

if TYPE_CHECKING:
    from pathlib import Path

MODEL = ("--model", "tiny-random")
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def find(*arguments: object, **options: object) -> Listing:
    return discover([str(argument) for argument in arguments], DiscoverOptions(**options))  # type: ignore[arg-type]


def put(folder: Path, *names: str, data: bytes = b"?") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def picture(image_format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), "teal").save(stream, image_format)
    return stream.getvalue()


def planned(*arguments: object) -> dict[str, Any]:
    result = internvit("plan", *arguments, *MODEL, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def keys(listing: Listing) -> list[str]:
    return [os.fsdecode(key) for key in listing.keys]


# ------------------------------------------------------------------------------------------------------------- counts


def test_what_is_no_picture_by_its_name_is_counted_by_extension_whatever_the_case(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.jpg",
        "1.HEIC",
        "s/2.heic",
        "v.mp4",
        "notes.TXT",
        "README",
        "c.jpg?w=300",
        ".DS_Store",
        ".jpg",
        "x.",
    )
    left_out = find(tmp_path).left_out
    assert left_out.extensions == {
        ".heic": 2,
        ".mp4": 1,
        ".txt": 1,
        "no extension": 3,
        ".jpg?...": 1,
        ".ds_store": 1,
    }
    assert left_out.total == 9


@pytest.mark.parametrize(
    ("name", "label"),
    [
        (b"a.HEIC", ".heic"),
        (b"a.b.Cr2", ".cr2"),
        (b"a", "no extension"),
        (b"a.", "no extension"),
        (b".jpg", "no extension"),
        (b"..png", "no extension"),
        (b".nomedia", ".nomedia"),
        (b"a.jpg?w=300&v=1.2", ".jpg?..."),
        (b"a?b.heic", ".heic"),
        (b"v1.0 final", "no extension"),
        (b"a.jpg_large", ".jpg_large"),
        (b"a.jpg~", ".jpg~"),
        (b"a.\xff\xfe", "no extension"),
        (b"a.\x1b[31m", "no extension"),
        (b"a." + b"x" * 200, "no extension"),
    ],
)
def test_a_name_is_counted_under_a_short_plain_label(name: bytes, label: str) -> None:
    assert not looks_like_picture(name)
    assert label_of(name) == label


def test_names_of_random_letters_do_not_fill_the_memory(tmp_path: Path) -> None:
    put(tmp_path, *(f"f.{number:06x}" for number in range(MOST_COUNTED + 50)))
    left_out = find(tmp_path).left_out
    assert len(left_out.extensions) == MOST_COUNTED + 1
    assert left_out.total == MOST_COUNTED + 50
    told = left_out.to_json()
    assert sum(told["extensions"].values()) + told["other_extensions"] == left_out.total
    assert len(told["extensions"]) == MOST_COUNTED and told["other_extensions"] == 50
    assert f"and {left_out.total - 5:,} others" in left_out.lines[0]


def test_folders_links_to_them_and_pipes_are_no_files_that_were_left_out(tmp_path: Path) -> None:
    put(tmp_path, "in/a.jpg", "out/b.heic")
    os.mkfifo(tmp_path / "in/pipe.heic")
    (tmp_path / "in/folder.heic").mkdir()
    (tmp_path / "in/link.heic").symlink_to(tmp_path / "out")
    (tmp_path / "in/dangling.heic").symlink_to("gone")
    assert find(tmp_path / "in").left_out.total == 0


def test_a_pattern_counts_what_it_fits_and_does_not_take(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "b.heic", "c.txt", "s/d.heic")
    assert find(f"{tmp_path}/*").left_out.extensions == {".heic": 2, ".txt": 1}
    with pytest.raises(NoImagesError, match=r"no picture matches .*: 1 \.heic") as caught:
        find(f"{tmp_path}/*.heic")
    assert "heif-convert" in caught.value.hint


def test_every_kind_has_a_line_with_what_would_make_pictures_of_it_and_side_files_share_one() -> None:
    one_of_each = {f".{min(kind.extensions).decode()}": 2 for kind in KINDS}
    lines = LeftOut(one_of_each).lines
    alarming = [kind for kind in KINDS if kind.remedy]
    for kind, line in zip(alarming, lines, strict=False):
        assert kind.plural in line and kind.remedy in line
    assert lines[len(alarming) :] == ["8 side files (2 .aae, 2 .ckpt, 2 .csv, 2 .filelist)"]


def test_lines_name_the_most_frequent_extensions_first() -> None:
    counts = {".heic": 3000, ".mov": 12, ".mp4": 7, ".avi": 1, "no extension": 2, ".xyz": 5, ".txt": 1, ".json": 9}
    lines = LeftOut(counts, {"@eaDir/": 3, "._*": 1}, drawn=1).lines
    assert lines[0].startswith("3,000 .heic (HEIF pictures are not read")
    assert lines[1].startswith("12 .mov, 7 .mp4, 1 .avi (videos are not read")
    assert lines[2] == "5 .xyz, 2 without an extension (--sniff checks their first bytes)"
    assert lines[3] == "10 side files (9 .json, 1 .txt)"
    assert lines[4] == "1 picture that internvit drew itself"
    assert lines[5] == "4 excluded (3 by @eaDir/, 1 by ._*)"


def test_no_extension_that_is_read_has_a_remedy() -> None:
    assert not [extension for extension in EXTENSIONS if kind_by_extension(extension)]


def test_summary_plan_and_json_tell_of_what_was_left_out_beside_counts_that_reconcile(
    tmp_path: Path,
) -> None:
    mixed = put(tmp_path / "mixed", "a.jpg", "c.jpg?w=300", "n01440764_10026", data=picture("PNG"))
    put(mixed, "IMG_0001.HEIC", data=HEIC)
    put(mixed, "b.jxl", data=b"\xff\n" + bytes(64))
    output = tmp_path / "f.h5"
    expected = {".heic": 1, ".jpg?...": 1, ".jxl": 1, "no extension": 1}
    assert planned(mixed)["left_out"]["extensions"] == expected
    summary = summary_of(extract(mixed, "-o", output, "--json"))
    assert summary["left_out"]["extensions"] == expected and summary["left_out"]["total"] == 4
    assert (summary["found"], summary["done"], summary["skipped"], summary["pending"]) == (1, 1, 0, 0)
    again = extract(mixed, "-o", output)
    assert again.returncode == 0
    for words in ("left out: 1 .heic (HEIF", "left out: 1 .jxl (JPEG XL", "--sniff"):
        assert words in again.stdout
    assert "left out 1 .heic (HEIF" in internvit("plan", mixed, *MODEL).stdout


@pytest.mark.parametrize(
    ("names", "said", "hint"),
    [
        (["1.heic", "2.heic", "3.mp4", "4.txt"], r"2 \.heic, 1 \.mp4, 1 \.txt", "heif-convert"),
        (["1.jxl"], r"1 \.jxl", "djxl"),
        (["1.NEF", "1.xmp"], r"1 \.nef, 1 \.xmp", "darktable"),
        (["1.svg"], r"1 \.svg", "rsvg-convert"),
        (["a.tar.gz"], r"1 \.gz", "unpack"),
        (["a.pdf"], r"1 \.pdf", "pdftoppm"),
        (["a", "b"], "2 without an extension", "--sniff"),
        (["a.txt"], r"1 \.txt", "extension"),
        (["@eaDir/a.jpg"], r"1 excluded \(1 by @eaDir/\)", "--no-default-excludes"),
        ([], "no pictures found in the given sources$", "extension"),
    ],
)
def test_sources_without_pictures_end_with_4_what_they_hold_and_what_would_help(
    tmp_path: Path, names: list[str], said: str, hint: str
) -> None:
    put(tmp_path, *names)
    with pytest.raises(NoImagesError, match=said) as caught:
        require_images(find(tmp_path))
    assert hint in caught.value.hint


def test_a_run_without_pictures_makes_no_output_and_asks_for_no_model(tmp_path: Path) -> None:
    put(tmp_path / "in", "1.heic", data=HEIC)
    result = internvit("extract", tmp_path / "in", "-o", tmp_path / "f.h5", "--model", tmp_path / "no model")
    assert result.returncode == 4
    assert "1 .heic" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# ----------------------------------------------------------------------------------------------------------- sniffing


def test_sniffing_takes_pictures_whatever_their_names(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "n01440764_10026", "c.jpg?w=300", "d.HEIC", "e.txt", "f.bin", data=picture("JPEG"))
    put(tmp_path, "g", "h.heic", data=HEIC)
    put(tmp_path, "notes.txt", "Python", data=b"P1 is where the 3 of us met")
    assert keys(find(tmp_path)) == ["a.jpg"]
    listing = find(tmp_path, sniff=True)
    assert keys(listing) == ["a.jpg", "c.jpg?w=300", "d.HEIC", "e.txt", "f.bin", "n01440764_10026"]
    assert listing.left_out.extensions == {"no extension": 2, ".heic": 1, ".txt": 1}
    assert "not pictures by their first bytes either" in "".join(listing.left_out.lines)
    assert keys(find(f"{tmp_path}/*", sniff=True)) == keys(listing)


def test_sniffing_opens_neither_links_that_lead_out_nor_pipes_nor_what_is_excluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internvit_cli.sources import selection

    put(tmp_path, "in/plain", "in/.git/blob", "in/skip/me", "out/secret", data=picture("PNG"))
    os.mkfifo(tmp_path / "in/pipe")
    for name, target in {"zero": "/dev/zero", "mem": "/proc/self/mem", "out": "../out/secret", "in": "plain"}.items():
        (tmp_path / "in" / name).symlink_to(target)
    opened: list[str] = []
    real = selection.first_bytes
    monkeypatch.setattr(selection, "first_bytes", lambda path: (opened.append(os.path.basename(path)), real(path))[1])
    assert keys(find(tmp_path / "in", sniff=True, exclude=("skip/",))) == ["in", "plain"]
    assert sorted(opened) == [b"in", b"plain"]  # type: ignore[comparison-overlap]
    assert "out" in keys(find(tmp_path / "in", sniff=True, follow_links=True))


@pytest.mark.parametrize("extension", ["nef", "dng", "CR2", "arw", "svs", "ndpi"])
def test_a_preview_inside_a_raw_photograph_is_not_taken_for_the_picture(tmp_path: Path, extension: str) -> None:
    put(tmp_path, f"a.{extension}", "b", data=picture("TIFF"))
    assert keys(find(tmp_path, sniff=True)) == ["b"]


WRITTEN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "ICNS", "DDS", "SGI", "QOI", "AVIF")


@pytest.mark.parametrize("image_format", WRITTEN)
def test_the_first_bytes_of_a_picture_tell_that_it_is_one(image_format: str) -> None:
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    try:
        first = picture(image_format)[:FIRST_BYTES]
    except KeyError:
        pytest.skip(f"this Pillow does not write {image_format}")
    assert is_picture(first, b"a")
    assert kind_by_bytes(first) is None


@pytest.mark.parametrize(
    ("first", "kind"),
    [
        (HEIC, "a HEIF picture"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic", "a HEIF picture"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a raw photograph"),
        (b"II*\0\x10\0\0\0CR\x02\0", "a raw photograph"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL picture"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "a video"),
        (b"\x1aE\xdf\xa3\x01", "a video"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video"),
        (b"%PDF-1.7\n%", "a document"),
        (b"PK\x03\x04\x14\0", "an archive"),
        (b"\x1f\x8b\x08\0", "an archive"),
        (bytes(257) + b"ustar\x0000", "an archive"),
        (b"PAR1\x15\x04", "a packed dataset"),
        (b"\x89HDF\r\n\x1a\n", "a file of features or arrays"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns=', "a vector drawing"),
        (b"%!PS-Adobe-3.0", "a vector drawing"),
    ],
)
def test_the_first_bytes_tell_what_else_a_file_is(first: bytes, kind: str) -> None:
    found = kind_by_bytes(first)
    assert found is not None and found.name == kind
    assert not is_picture(first, b"a")


@pytest.mark.parametrize(
    "text", [b"P1/a.jpg\n", b"Python", b"BMW.jpg\n", b"PAR1/a.jpg\n", b"ORC/b", b"icns/a", b"", b"GIF"]
)
def test_plain_text_is_neither_a_picture_nor_of_a_kind(text: bytes) -> None:
    assert not is_picture(text, b"a")
    assert kind_by_bytes(text) is None


# ---------------------------------------------------------------------------------------------------- our own drawings


def test_a_drawing_says_who_drew_it_in_front_of_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(Image.new("RGB", (300, 200))))
    data = (tmp_path / "a.png").read_bytes()
    assert data.index(b"\0".join(part.encode() for part in DRAWN_BY)) < data.index(b"IDAT")


def test_drawings_of_ours_never_become_input_and_a_run_that_finds_no_more_does_nothing(tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "feats.h5"
    make_pictures(pictures, 3)
    assert extract(pictures, "-o", output, "--json").returncode == 0
    assert internvit("show", output, "part0/000.jpg", "-o", pictures / "figures").returncode == 0
    assert internvit("search", output, "--key", "part0/000.jpg", "--sheet", pictures / "found.png").returncode == 0
    assert internvit("duplicates", output, "--sheet", pictures / "sheet.png").returncode == 0
    drawn = sum(1 for path in pictures.rglob("*.png") if DRAWN_BY[1].encode() in path.read_bytes()[:200])
    assert drawn >= 2
    assert planned(pictures)["left_out"]["own_pictures"] == drawn
    before = state_of(tmp_path)
    again = extract(pictures, "-o", output, "--json")
    summary = summary_of(again)
    assert (again.returncode, summary["found"], summary["done"], summary["encoded"]) == (0, 3, 3, 0)
    assert summary["left_out"]["own_pictures"] == drawn
    assert state_of(tmp_path) == before
    assert f"left out: {drawn} pictures that internvit drew itself" in extract(pictures, "-o", output).stdout


def test_new_pictures_beside_drawings_get_their_rows(tmp_path: Path) -> None:
    """Rows, reasons and counts are those of the pictures, wherever among them the drawings stand."""
    pictures, output = tmp_path / "pictures", tmp_path / "feats"
    paths = make_pictures(pictures, 5)
    for name in ("a.png", "part0/002b.png", "z.png"):
        (pictures / name).write_bytes(encode_png(Image.open(paths[1])))
    (pictures / "part0/001bad.png").write_bytes(b"no picture")
    (pictures / "zz.jpg").symlink_to("/etc/hostname")
    summary = summary_of(extract(pictures, "-o", output, "--json"))
    assert (summary["found"], summary["done"], summary["skipped"]) == (7, 5, 2)
    assert summary["reasons"] == {"not_an_image": 1, "link_outside": 1}
    assert summary["left_out"]["own_pictures"] == 3
    lines = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == {
        "part0/001bad.png": "not_an_image",
        "zz.jpg": "link_outside",
    }


def test_a_drawing_that_takes_the_place_of_a_picture_leaves_its_row_as_one_of_a_deleted_picture(tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "feats.h5"
    paths = make_pictures(pictures, 3)
    assert extract(pictures, "-o", output).returncode == 0
    paths[1].write_bytes(encode_png(Image.new("RGB", (50, 50))))
    summary = summary_of(extract(pictures, "-o", output, "--json"))
    assert (summary["found"], summary["done"], summary["kept"]) == (2, 2, 1)


def test_a_drawing_that_is_named_outright_is_taken_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(Image.new("RGB", (50, 40))))
    for source in ([tmp_path / "a.png"], [tmp_path, tmp_path / "a.png"]):
        plan = planned(*source)
        assert plan["images"] == 1 and plan["left_out"]["own_pictures"] == 0
        assert "because the sources name them" in plan["notes"][0]
    for root in (tmp_path, f"{tmp_path}/*.png"):
        result = internvit("plan", root, *MODEL)
        assert result.returncode == 4
        assert "drew itself" in result.stderr


def test_a_picture_that_another_program_made_of_a_drawing_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(Image.new("RGB", (50, 40))))
    with Image.open(tmp_path / "a.png") as drawing:
        drawing.save(tmp_path / "b.png")
    assert planned(tmp_path)["images"] == 1


# -------------------------------------------------------------------------------------------------------------- junk


def test_what_a_nas_or_a_mac_leaves_beside_pictures_is_no_picture_of_them(tmp_path: Path) -> None:
    put(
        tmp_path,
        "a.jpg",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg",
        ".ipynb_checkpoints/a-checkpoint.jpg",
        data=picture("PNG"),
    )
    nas = put(tmp_path, "._a.jpg", data=b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ")
    plan = planned(nas)
    assert (plan["images"], plan["skipped"]) == (1, 0)
    assert plan["left_out"]["excluded"] == {"._*": 1, ".ipynb_checkpoints/": 1, "@eaDir/": 1}
    assert planned(nas, "--no-default-excludes")["images"] == 4
    assert planned(nas, "--exclude", "!@eaDir/")["images"] == 2
    assert planned(nas, "--include", "/a.jpg")["images"] == 1


@pytest.mark.parametrize("source", ["{}", "{}/**", "{}/*", "NAME={}"])
def test_excluded_folders_are_not_even_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    put(tmp_path, "a/b.jpg", "a/thumbs/t.jpg", "a/@eaDir/t.jpg", "a/deep/thumbs/t/t.jpg", "a/deep/c.jpg")
    listed: list[str] = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(os.fsdecode(path)), real(path))[1])
    found = find(source.format(tmp_path), exclude=("thumbs/",), root=str(tmp_path))
    assert [key.rpartition("/")[2] for key in keys(found)] == ["b.jpg", "c.jpg"]
    assert listed and not [path for path in listed if "thumbs" in path or "@eaDir" in path]
    assert found.left_out.excluded == {"thumbs/": 2, "@eaDir/": 1}


def test_an_excluded_folder_that_cannot_be_listed_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "a.jpg", "lost+found/x")
    real = os.scandir

    def refuse(path: bytes) -> object:
        if b"lost+found" in path:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert not find(tmp_path).unreadable_folders


def test_patterns_are_relative_to_each_folder_and_keys_keep_their_name(tmp_path: Path) -> None:
    put(tmp_path, "x/a/1.jpg", "x/b/a/2.jpg", "y/a/3.jpg", "y/4.jpg")
    listing = find(tmp_path / "x", f"why={tmp_path / 'y'}", exclude=("/a/",))
    assert keys(listing) == ["b/a/2.jpg", "why/4.jpg"]


def test_the_users_patterns_leave_out_files_of_lists_and_of_the_command_line_and_defaults_do_not(
    tmp_path: Path,
) -> None:
    put(tmp_path, "a.jpg", "._a.jpg", "b.png", "@eaDir/c.jpg")
    (tmp_path / "list").write_text("a.jpg\n._a.jpg\nb.png\n@eaDir/c.jpg\n")
    listing = find(tmp_path / "b.png", files_from=str(tmp_path / "list"), root=str(tmp_path), exclude=("*.png",))
    assert keys(listing) == ["._a.jpg", "@eaDir/c.jpg", "a.jpg"]
    assert listing.left_out.excluded == {"*.png": 2}


def test_a_pattern_that_is_the_path_of_a_folder_is_refused_with_what_to_write(tmp_path: Path) -> None:
    put(tmp_path, "a.jpg", "thumbs/b.jpg")
    result = internvit("plan", tmp_path, *MODEL, "--exclude", f"{tmp_path}/thumbs")
    assert result.returncode == 2
    assert "write /thumbs" in result.stderr


@pytest.mark.parametrize("name", ["feats.h5", "feats"])
def test_rows_of_pictures_that_are_excluded_now_are_kept_until_they_are_pruned(tmp_path: Path, name: str) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / name
    make_pictures(pictures, 5)
    options = ("-o", output, "--json", "--exclude", "/part1/")
    assert extract(pictures, "-o", output).returncode == 0
    kept = summary_of(extract(pictures, *options))
    assert (kept["found"], kept["done"], kept["kept"], kept["encoded"]) == (3, 3, 2, 0)
    assert kept["left_out"]["excluded"] == {"/part1/": 1}
    pruned = extract(pictures, *options, "--prune")
    assert pruned.returncode == 0, pruned.stderr
    assert (summary_of(pruned)["done"], summary_of(pruned)["kept"]) == (3, 0)
    back = summary_of(extract(pictures, "-o", output, "--json"))
    assert (back["found"], back["encoded"]) == (5, 2)


def test_excluding_more_than_half_of_the_rows_is_not_pruned_without_a_yes(tmp_path: Path) -> None:
    pictures, output = tmp_path / "pictures", tmp_path / "feats.h5"
    make_pictures(pictures, 5)
    assert extract(pictures, "-o", output).returncode == 0
    result = extract(pictures, "-o", output, "--exclude", "part0/", "--prune")
    assert result.returncode == 1 and "--yes" in result.stderr
    assert extract(pictures, "-o", output, "--exclude", "part0/", "--prune", "--yes").returncode == 0


def test_links_that_were_left_alone_are_told_of_together(tmp_path: Path) -> None:
    put(tmp_path, "in/a.jpg", "out/b.jpg", data=picture("JPEG"))
    for number in range(3):
        (tmp_path / f"in/{number}.jpg").symlink_to("../out/b.jpg")
    (tmp_path / "in/folder").symlink_to("../out")
    plan = planned(tmp_path / "in")
    assert plan["reasons"] == {"link_outside": 3}
    assert any(note.startswith("3 links out of the sources") and "--follow-links" in note for note in plan["notes"])
    assert any(note.startswith("1 link to folders") and "--follow-links" in note for note in plan["notes"])
    listing = find(tmp_path / "in")
    assert all("--follow-links" in skipped.message for skipped in listing.skipped.values())


def test_options_come_from_a_file_too(tmp_path: Path) -> None:
    put(tmp_path / "in", "a.jpg", "b.png", "thumbs/c.jpg", data=picture("JPEG"))
    (tmp_path / "c.toml").write_text('exclude = ["thumbs/", "*.png"]\n')
    assert planned(tmp_path / "in", "--config", tmp_path / "c.toml")["images"] == 1
    shutil.rmtree(tmp_path / "in/thumbs")
