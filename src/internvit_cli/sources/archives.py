"""List the members of tar and zip archives by their headers, without unpacking anything.

The headers of a tar archive are read one after the other, and its members are skipped; pax headers and GNU's long names
are followed. Format: pax in POSIX.1-2017, "pax Interchange Format", and "Basic Tar Format" in GNU tar's manual.
"""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from internvit_cli.config import Skipped, Status
from internvit_cli.errors import one_line
from internvit_cli.runtime import untrusted
from internvit_cli.runtime.words import counted
from internvit_cli.sources.members import DEFLATED, LARGEST_INFLATED, MOST_INFLATION, STORED, Member
from internvit_cli.sources.signatures import first_bytes, is_picture

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

SUFFIXES = (b".tar", b".zip", b".cbz")
BLOCK = 512
LONGEST_HEADER = 1 << 20
"""Bytes of the largest pax header or long name that is read."""
LONGEST_SIZE = 20
"""Digits of the largest size that is read; no file is longer."""
_FILES = (b"0", b"\0", b"7")
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes."""
_HARD_LINK, _PAX, _PAX_OF_ALL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"1", b"x", b"g", b"L", b"K", b"S"
_ENCRYPTED = 1
_METHODS = {STORED, DEFLATED}


@dataclass(slots=True)
class ArchiveIndex:
    """The members of an archive that are files."""

    members: dict[bytes, tuple[int, int, int, int]] = field(default_factory=dict)
    """Offset, size, stored size and method by name; see `Member`."""
    refused: dict[bytes, Skipped] = field(default_factory=dict)
    """Why members cannot be read, by name."""
    repeated: int = 0
    """The number of members that a later one of the same name replaces."""
    outside: int = 0
    """The number of members whose path leads out of the archive, or is empty or cut by a NUL."""
    problem: str = ""
    """Why the rest of the archive cannot be listed; empty if all of it was."""

    def add(self, name: bytes, place: tuple[int, int, int, int]) -> None:
        """Add a member; a later one of the same name replaces it, as when the archive is unpacked."""
        self.repeated += name in self.members or name in self.refused
        self.refused.pop(name, None)
        self.members[name] = place

    def refuse(self, name: bytes, skipped: Skipped) -> None:
        """Add a member that cannot be read."""
        self.repeated += name in self.members or name in self.refused
        self.members.pop(name, None)
        self.refused[name] = skipped

    @property
    def notes(self) -> list[str]:
        """What a user should know about the archive."""
        told = {
            "replaced by later ones of the same name": self.repeated,
            "left out, because the path is empty, leads out of the archive, or holds a NUL byte": self.outside,
        }
        return [f"{counted(count, 'member')} {what}" for what, count in told.items() if count]


def is_archive_name(path: bytes) -> bool:
    """Return whether a path has the suffix of an archive whose members are read."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def is_archive(path: bytes) -> bool:
    """Return whether a path is a file with such a suffix, and not a picture that is named so."""
    if not is_archive_name(path) or not os.path.isfile(path):
        return False
    return not is_picture(first_bytes(path), os.path.basename(path))


def member_address(archive: bytes, name: bytes) -> bytes:
    """Return the address of a member; a path that no file has if there is none of that name, or no such archive."""
    try:
        place = index_of(archive).members.get(name)
    except OSError:
        place = None
    return archive + b"/" + name if place is None else Member(archive, name, *place).address


def index_of(archive: bytes) -> ArchiveIndex:
    """Return the members of an archive, which are listed again only if the archive has changed.

    Raises:
        OSError: The archive cannot be opened.
    """
    status = os.stat(archive)
    return _index(archive, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _index(archive: bytes, size: int, modified_ns: int) -> ArchiveIndex:  # noqa: ARG001 - they tell of changes
    with untrusted.opened(archive) as file:
        return _of_tar(file.fileno(), size) if archive.lower().endswith(b".tar") else _of_zip(file)


# ---------------------------------------------------------------------------------------------------------------- tar


def _of_tar(descriptor: int, archive_size: int) -> ArchiveIndex:
    index = ArchiveIndex()
    try:
        for header in _headers(descriptor, archive_size):
            if header.name:
                _add_header(index, header)
            elif header.kind not in _WITHOUT_BYTES:
                index.outside += 1
    except _DamagedError as error:
        index.problem = str(error)
    return index


class _DamagedError(ValueError):
    """The headers cannot be followed any further."""


@dataclass(frozen=True, slots=True)
class _TarHeader:
    name: bytes
    """Empty if it would lead out of the archive."""
    kind: bytes
    offset: int
    """Of its bytes."""
    size: int
    link: bytes
    is_sparse: bool


def _add_header(index: ArchiveIndex, header: _TarHeader) -> None:
    if header.is_sparse:
        index.refuse(header.name, Skipped(Status.UNSUPPORTED, "", "a sparse member of an archive: unpack the archive"))
    elif header.kind in _FILES:
        index.add(header.name, (header.offset, header.size, -1, STORED))
    elif header.kind == _HARD_LINK and (target := index.members.get(_plain(header.link))):
        index.add(header.name, target)


def _headers(descriptor: int, archive_size: int) -> Iterator[_TarHeader]:
    """Yield the headers of members, with what pax headers and GNU's long names say of them.

    Raises:
        _DamagedError: A header is damaged, or the archive ends early.
    """
    position, of_all = 0, dict[bytes, bytes]()
    own: dict[bytes, bytes] = {}
    while position + BLOCK <= archive_size:
        block = os.pread(descriptor, BLOCK, position)
        if not block.strip(b"\0"):
            return  # the end
        _check_sum(block, position)
        kind, size = block[156:157], _number(block[124:136])
        if kind in (_PAX, _PAX_OF_ALL, _GNU_NAME, _GNU_LINK):
            data = _extended(descriptor, position + BLOCK, size, archive_size)
            if kind == _PAX_OF_ALL:
                of_all |= _pax(data)
            else:
                own |= {_GNU_NAME: {b"path": data.rstrip(b"\0")}, _GNU_LINK: {b"linkpath": data.rstrip(b"\0")}}.get(
                    kind
                ) or _pax(data)
            position += BLOCK + _padded(size)
            continue
        facts = of_all | own if of_all or own else {}
        size = _number_of(facts.get(b"size"), size)
        has_bytes = kind not in _WITHOUT_BYTES
        if has_bytes and position + BLOCK + size > archive_size:
            raise _DamagedError("it ends in the middle of a member")
        name = facts.get(b"GNU.sparse.name") or facts.get(b"path") or _name(block)
        is_sparse = kind == _GNU_SPARSE or any(key.startswith(b"GNU.sparse.") for key in facts)
        link = facts.get(b"linkpath") or block[157:257].split(b"\0", 1)[0]
        if not name.endswith(b"/"):  # old programs mark a folder so
            yield _TarHeader(_plain(name), kind, position + BLOCK, size, link, is_sparse)
        extra = _extra_sparse(descriptor, block, position) if kind == _GNU_SPARSE else 0
        position += BLOCK + extra + (_padded(size) if has_bytes else 0)
        own = {}
    where = "in the middle of a header" if position < archive_size else "without a mark of the end"
    raise _DamagedError(f"it ends {where}" if archive_size else "it is empty")


def _check_sum(block: bytes, position: int) -> None:
    try:
        recorded = _number(block[148:156])
    except _DamagedError:
        recorded = -1
    blanks = 8 * ord(" ")  # stand for the sum itself
    unsigned = sum(block) - sum(block[148:156]) + blanks
    if recorded != unsigned and recorded != _signed_sum(block[:148]) + blanks + _signed_sum(block[156:]):
        raise _DamagedError(f"there is no header at byte {position:,}")


def _signed_sum(data: bytes) -> int:
    """Return the sum of bytes as old programs added them."""
    return sum(struct.unpack(f"{len(data)}b", data))


def _number(digits: bytes) -> int:
    """Return a number of a header: octal digits, or binary after a byte of 0x80."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip() or b"0"
    if text.strip(b"01234567"):  # int() also takes signs, underscores and prefixes
        raise _DamagedError("a number of a header is damaged")
    return int(text, 8)


def _number_of(text: bytes | None, otherwise: int) -> int:
    if text is None:
        return otherwise
    if not text.isdigit() or len(text) > LONGEST_SIZE:
        raise _DamagedError("the size in a pax header is damaged")
    return int(text)


def _name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _plain(name: bytes) -> bytes:
    """Return a name without `.` and empty parts; empty if it would lead out of the archive."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    return b"" if b".." in parts or b"\0" in name else b"/".join(parts)


def _extended(descriptor: int, start: int, size: int, archive_size: int) -> bytes:
    if size > LONGEST_HEADER or start + size > archive_size:
        raise _DamagedError("an extended header is too long")
    return os.pread(descriptor, size, start)


def _pax(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header, each `LENGTH KEY=VALUE` and a newline; the length counts all of it."""
    records, at = {}, 0
    while at < len(data) and data[at : at + 1] != b"\0":
        length, _, _ = data[at : at + 20].partition(b" ")
        end = at + int(length) if length.isdigit() else 0
        record = data[at + len(length) + 1 : end]
        key, equals, value = record.partition(b"=")
        if end <= at or end > len(data) or not equals or not value.endswith(b"\n"):
            raise _DamagedError("a pax header is damaged")
        records[key] = value[:-1]
        at = end
    return records


def _extra_sparse(descriptor: int, block: bytes, position: int) -> int:
    """Return the bytes of further maps of holes that follow a header of old GNU tar."""
    extra, more = 0, block[482:483] == b"\1"
    while more:
        extra += BLOCK
        more = os.pread(descriptor, BLOCK, position + extra)[504:505] == b"\1"
    return extra


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


# ---------------------------------------------------------------------------------------------------------------- zip


def _of_zip(file: BinaryIO) -> ArchiveIndex:
    index = ArchiveIndex()
    try:
        with zipfile.ZipFile(file) as opened:
            for info in opened.infolist():
                if info.is_dir():
                    continue
                if name := _zip_name(info):
                    _add_entry(index, name, info)
                else:
                    index.outside += 1
    except (zipfile.BadZipFile, ValueError, EOFError, struct.error, NotImplementedError) as error:
        index.problem = one_line(str(error)) or "it is no zip archive"
    return index


def _zip_name(info: zipfile.ZipInfo) -> bytes:
    """Return the bytes of a name as they are stored, or the UTF-8 of a name that an extra field gives instead."""
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    try:
        return _plain(info.filename.encode(encoding, "surrogateescape"))
    except UnicodeEncodeError:
        return _plain(os.fsencode(info.filename))


def _add_entry(index: ArchiveIndex, name: bytes, info: zipfile.ZipInfo) -> None:
    if refusal := _refusal(info):
        index.refuse(name, refusal)
    else:
        place = info.header_offset, info.file_size, info.compress_size, info.compress_type
        index.add(name, place)


def _refusal(info: zipfile.ZipInfo) -> Skipped | None:
    if info.flag_bits & _ENCRYPTED:
        return Skipped(Status.UNSUPPORTED, "", "an encrypted member of an archive: unpack the archive")
    if info.compress_type not in _METHODS:
        how = f"method {info.compress_type}"
        return Skipped(Status.UNSUPPORTED, "", f"compressed with {how} in its archive: unpack the archive")
    if info.compress_type == DEFLATED:
        bound = min(LARGEST_INFLATED, MOST_INFLATION * (info.compress_size + BLOCK))
        if info.file_size > bound:
            return Skipped(
                Status.TOO_LARGE, "", f"it takes {info.file_size:,} bytes from {info.compress_size:,} in its archive"
            )
    elif info.file_size != info.compress_size:
        return Skipped(Status.TRUNCATED, "", "its sizes in its archive contradict each other")
    return None
