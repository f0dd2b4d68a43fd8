"""Refuse sources that are not picture files, such as URLs, archives, tables and videos."""

from __future__ import annotations

import os
import re

from internvit_cli.errors import UsageError, one_line
from internvit_cli.sources import kinds
from internvit_cli.sources.extensions import looks_like_picture
from internvit_cli.sources.kinds import Kind, kind_by_extension
from internvit_cli.sources.signatures import first_bytes, is_picture, kind_by_bytes

_URL = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]+)://")
_FETCHING = {
    b"http": "download the files, for example with wget, and name their folder",
    b"s3": "copy it first, for example with: aws s3 sync URL FOLDER, or mount it with mount-s3",
    b"gs": "copy it first, for example with: gcloud storage rsync -r URL FOLDER, or mount it with gcsfuse",
    b"hf": "download it first: hf download --repo-type dataset NAME --local-dir FOLDER",
    b"file": "give only the path",
}
_FETCHING |= {b"https": _FETCHING[b"http"], b"ftp": _FETCHING[b"http"], b"s3a": _FETCHING[b"s3"]}
_REMEDIES: dict[Kind, str] = {
    kinds.VIDEO: "extract frames from it, for example with: ffmpeg -i VIDEO -vf fps=1 frames/%06d.jpg",
    kinds.DOCUMENT: "render its pages, for example with: pdftoppm -r 150 -png DOCUMENT.pdf page",
    kinds.ARCHIVE: "unpack it, and name the folder; .tar and .zip archives are read as they are",
    kinds.PACKED: "write its pictures to files first, and name their folder",
    kinds.ARRAYS: "name the pictures; internvit info shows what a feature file holds",
    kinds.TABLE: "give only the paths, one per line, to --files-from",
    kinds.TEXT: "if it is a list of paths, give it to --files-from",
}
"""What to do with a single file of each refused kind."""
_OUTPUT_MARK = b'"internvit-features"'
_MANIFEST = b"manifest.json"


def refuse_url(source: bytes) -> None:
    """Refuse a source that is a URL.

    Raises:
        UsageError: it is one.
    """
    if url := _URL.match(source):
        scheme = url[1].lower()
        hint = _FETCHING.get(scheme, "copy the files to a folder or mount them, and name the folder")
        raise UsageError(f"{one_line(source)} is a URL, and sources are folders and files", hint)


def refuse_container(path: bytes, *, is_alone: bool) -> None:
    """Refuse a named file that is not a picture but contains pictures, or the paths of pictures.

    Args:
        path: The path of the file.
        is_alone: Whether no other source is given; otherwise a shell may have listed all files of a folder.

    Raises:
        UsageError: The file is refused because of its first bytes, or of its extension if they are not known.
    """
    name = os.path.basename(path)
    if looks_like_picture(name) or not os.path.isfile(path):  # opening a pipe or a broken link reports what it is
        return
    first = first_bytes(path)
    kind = kind_by_bytes(first) or kind_by_extension(name.rpartition(b".")[2].lower())
    if kind in _REMEDIES and not is_picture(first, name):
        folder = (
            f"; or name the folder ({one_line(os.path.dirname(path) or b'.')}), whose pictures are found by extension"
        )
        raise UsageError(
            f"{one_line(path)} is {kind.name}, not a picture", _REMEDIES[kind] + ("" if is_alone else folder)
        )


def refuse_output(folder: bytes) -> None:
    """Refuse a folder without pictures that is an output of internvit.

    Raises:
        UsageError: The folder is an output.
    """
    if _OUTPUT_MARK in first_bytes(os.path.join(folder, _MANIFEST)):
        raise UsageError(
            f"{one_line(folder)} is a folder of features without pictures",
            f"name the pictures; internvit info {one_line(folder)} shows what it holds",
        )
