"""Sources that hold no files of pictures, refused before anything is done: URLs, archives, tables, videos."""

from __future__ import annotations

import os
import re

from internvit_cli.errors import UsageError, one_line
from internvit_cli.sources import kinds
from internvit_cli.sources.extensions import looks_like_picture
from internvit_cli.sources.kinds import Kind, kind_of
from internvit_cli.sources.signatures import first_bytes, is_picture, kind_by_bytes

_URL = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]+)://")
_FETCHING = {
    b"http": "download what it names, such as with wget, and name the folder",
    b"s3": "copy it first, such as with: aws s3 sync URL FOLDER, or mount it with mount-s3",
    b"gs": "copy it first, such as with: gcloud storage rsync -r URL FOLDER, or mount it with gcsfuse",
    b"hf": "download it first: hf download --repo-type dataset NAME --local-dir FOLDER",
    b"file": "give the path alone",
}
_FETCHING |= {b"https": _FETCHING[b"http"], b"ftp": _FETCHING[b"http"], b"s3a": _FETCHING[b"s3"]}
_REMEDIES: dict[Kind, str] = {
    kinds.VIDEO: "take frames out of it, such as with: ffmpeg -i VIDEO -vf fps=1 frames/%06d.jpg",
    kinds.DOCUMENT: "render its pages, such as with: pdftoppm -r 150 -png DOCUMENT.pdf page",
    kinds.ARCHIVE: "unpack it, and name the folder",
    kinds.PACKED: "write its pictures to files first, and name their folder",
    kinds.ARRAYS: "internvit info says what a feature file holds; sources are the pictures",
    kinds.TABLE: "give the paths alone, one a line, to --files-from",
    kinds.TEXT: "if it is a list of paths, give it to --files-from",
}
"""What to do with a file of a kind that is refused, in the singular."""
_OUTPUT_MARK = b'"internvit-features"'
_MANIFEST = b"manifest.json"


def refuse_url(source: bytes) -> None:
    """Refuse a source that is a URL.

    Raises:
        UsageError: it is one.
    """
    if url := _URL.match(source):
        scheme = url[1].lower()
        hint = _FETCHING.get(scheme, "copy what it names to a folder, or mount it, and name the folder")
        raise UsageError(f"{one_line(source)} is a URL, and sources are folders and files", hint)


def refuse_container(path: bytes, *, is_alone: bool) -> None:
    """Refuse a file that is named outright and holds pictures, or the names of pictures, without being one.

    Args:
        path: the file.
        is_alone: whether no other source is given; else it may be one of all that lies in a folder.

    Raises:
        UsageError: it is one, by its bytes, or by its extension where they tell nothing.
    """
    name = os.path.basename(path)
    if looks_like_picture(name):
        return
    first = first_bytes(path)
    kind = kind_by_bytes(first) or kind_of(name.rpartition(b".")[2].lower())
    if kind in _REMEDIES and not is_picture(first, name):
        folder = (
            f"; or name the folder ({one_line(os.path.dirname(path) or b'.')}), whose pictures are found by extension"
        )
        raise UsageError(
            f"{one_line(path)} is {kind.name}, not a picture", _REMEDIES[kind] + ("" if is_alone else folder)
        )


def refuse_output(folder: bytes) -> None:
    """Refuse a folder without pictures that is an output of this program.

    Raises:
        UsageError: it is one.
    """
    if _OUTPUT_MARK in first_bytes(os.path.join(folder, _MANIFEST)):
        raise UsageError(
            f"{one_line(folder)} is a folder of features, and holds no pictures",
            f"internvit info {one_line(folder)} says what it holds; sources are the pictures",
        )
