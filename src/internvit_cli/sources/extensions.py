"""Recognize pictures by their names: the extensions of all formats that Pillow reads without extra programs."""

from __future__ import annotations

import re

EXTENSIONS = frozenset(
    b"""
    apng avif avifs blp bmp bw cur dcx dds dib fit fits flc fli ftc ftu gbr gif icb icns ico j2c j2k jfif jp2 jpc
    jpe jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm psd pxr qoi ras rgb rgba sgi tga tif tiff vda vst webp
    xbm xpm
    """.split()
)
"""Extensions in lower case, without the dot. EPS and WMF, which start other programs, are left out."""

NO_EXTENSION = "no extension"
_PLAIN = re.compile(rb"[0-9a-z_~+-]{1,12}")


def looks_like_picture(name: bytes) -> bool:
    """Return whether a file name has one of the extensions, in any case; a name that is only an extension has none."""
    stem, _, extension = name.rpartition(b".")
    return extension.lower() in EXTENSIONS and stem.strip(b".") != b""


def label_of(name: bytes) -> str:
    """Return the label under which a file without a picture's extension is counted.

    The label is the extension in lower case, such as `.heic`; `.jpg?...` for a picture's name followed by the query of
    a URL; or `no extension` for all others, including a name that is only a picture's extension.
    """
    address, question_mark, _ = name.partition(b"?")
    if question_mark and looks_like_picture(address):
        return f".{address.rpartition(b'.')[2].lower().decode()}?..."
    _, dot, extension = name.lower().rpartition(b".")
    if dot and extension not in EXTENSIONS and _PLAIN.fullmatch(extension):
        return f".{extension.decode()}"
    return NO_EXTENSION
