"""Which names look like pictures: the extensions of all formats that Pillow reads without extra programs."""

from __future__ import annotations

EXTENSIONS = frozenset(
    b"""
    apng avif avifs blp bmp bw cur dcx dds dib fit fits flc fli ftc ftu gbr gif icb icns ico j2c j2k jfif jp2 jpc
    jpe jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm psd pxr qoi ras rgb rgba sgi tga tif tiff vda vst webp
    xbm xpm
    """.split()
)
"""Lower case, without the dot. Not EPS and WMF, which start other programs, nor containers that Pillow only names."""


def looks_like_picture(name: bytes) -> bool:
    """Whether a file name has one of the extensions, in any case; a name that is only an extension has none."""
    stem, _, extension = name.rpartition(b".")
    return extension.lower() in EXTENSIONS and stem.strip(b".") != b""
