"""Describe other kinds of files by their extensions, and say how to turn them into pictures."""

from __future__ import annotations

import re
from dataclasses import dataclass

from internvit_cli.sources.extensions import EXTENSIONS

_CONVERT = "convert them to JPEG or PNG"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of files that are not taken as pictures."""

    name: str
    """The name in the singular, with its article."""
    plural: str
    extensions: frozenset[bytes]
    """The extensions in lower case, without the dot."""
    remedy: str = ""
    """How to turn them into pictures; empty for files that nobody takes for pictures."""

    @property
    def remedy_for_one(self) -> str:
        """The remedy for one file."""
        singular = {"them": "it", "their": "its"}
        return re.sub(r"\b(?:them|their)\b", lambda found: singular[found[0]], self.remedy)


def _kind(name: str, plural: str, extensions: str, remedy: str = "") -> Kind:
    return Kind(name, plural, frozenset(extensions.encode().split()), remedy)


HEIF = _kind(
    "a HEIF picture",
    "HEIF pictures",
    "heic heics heif heifs hif avci avcs",
    f"{_CONVERT}, for example with heif-convert or ImageMagick",
)
JPEG_XL = _kind("a JPEG XL picture", "JPEG XL pictures", "jxl", f"{_CONVERT}, for example with djxl")
RAW = _kind(
    "a raw photograph",
    "raw photographs",
    "3fr ari arw bay cap cr2 cr3 crw dcr dcs dng drf eip erf fff gpr iiq k25 kdc mdc mef mos mrw nef nrw orf pef ptx "
    "raf raw rw2 rwl rwz sr2 srf srw x3f",
    "develop them to JPEG or TIFF, for example with darktable-cli",
)
DRAWING = _kind(
    "a vector drawing",
    "vector drawings",
    "ai cdr emf eps ps svg svgz wmf",
    "render them to PNG, for example with rsvg-convert or Inkscape",
)
WORK = _kind(
    "a file of an image editor",
    "files of image editors",
    "afphoto clip fig kra ora pdn psb sketch xcf",
    "export them to PNG from their program",
)
RANGE = _kind(
    "a high dynamic range picture",
    "high dynamic range pictures",
    "exr hdr",
    "map them to 8 bits first, for example with ImageMagick",
)
SCIENCE = _kind(
    "a medical or microscope picture",
    "medical or microscope pictures",
    "czi dcm dicom lif mha mhd mrxs nd2 ndpi nii nrrd oib svs vms",
    "export their planes to PNG or TIFF",
)
VIDEO = _kind(
    "a video",
    "videos",
    "3g2 3gp asf avi flv insv lrv m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf ogv vob webm wmv",
    "take frames out of them, for example with: ffmpeg -i VIDEO -vf fps=1 frames/%06d.jpg",
)
DOCUMENT = _kind(
    "a document",
    "documents",
    "djvu doc docx epub odp odt oxps pdf ppt pptx xps",
    "render their pages, for example with: pdftoppm -r 150 -png DOCUMENT.pdf page",
)
ARCHIVE = _kind(
    "an archive",
    "archives",
    "7z ar bz2 cab cbr cbz cpio dmg gz iso lz4 lzma rar tar tbz tbz2 tgz txz tzst xz zip zst",
    "unpack them, and name the folder, or name .tar and .zip archives as sources",
)
PACKED = _kind(
    "a packed dataset",
    "packed datasets",
    "arrow avro beton feather lmdb mdb msgpack orc parquet rec recordio tfrecord tfrecords",
    "write their pictures to files first",
)
ARRAYS = _kind(
    "a file of features or arrays",
    "files of features or arrays",
    "ckpt h5 hdf5 mat npy npz pickle pkl pt pth safetensors",
)
TABLE = _kind("a table", "tables", "csv db json jsonl ndjson sqlite sqlite3 tsv xls xlsx")
TEXT = _kind("a text", "texts", "filelist list lst txt")
SIDE = _kind(
    "a side file",
    "side files",
    "aae bak bib c cfg cmd conf cpp crc css cube dop ds_store exif flac gitattributes gitignore gitkeep h htm html icc "
    "icm ini ipynb js keep lock log lua m4a md md5 mp3 nomedia ogg partial picasa pp3 py rb rst rtf sfv sh sha1 sha256 "
    "srt sum tex toml torrent ts url vtt wav xml xmp yaml yml",
)
KINDS = (
    *(HEIF, JPEG_XL, RAW, DRAWING, WORK, RANGE, SCIENCE, VIDEO, DOCUMENT, ARCHIVE, PACKED),
    *(ARRAYS, TABLE, TEXT, SIDE),
)
"""All kinds, in the order in which they are reported."""

_BY_EXTENSION = {extension: kind for kind in KINDS for extension in kind.extensions}
assert sum(len(kind.extensions) for kind in KINDS) == len(_BY_EXTENSION), "an extension has one kind"
assert not EXTENSIONS & _BY_EXTENSION.keys(), "a supported picture needs no remedy"


def kind_by_extension(extension: bytes) -> Kind | None:
    """Return the kind of files with an extension, lower case and without the dot; None for an unknown one."""
    return _BY_EXTENSION.get(extension)
