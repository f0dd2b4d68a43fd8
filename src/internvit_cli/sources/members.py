"""Address pictures that are members of archives, and open them as files are opened.

A member's address takes the place of a path: the path of the archive, NUL, where its bytes lie, NUL, its name. No path
of a file holds a NUL, so an address is never taken for one, and whatever handles paths as bytes handles addresses too.
"""

from __future__ import annotations

import errno
import io
import os
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.runtime import untrusted

if TYPE_CHECKING:
    from typing import Any, BinaryIO

STORED, DEFLATED = 0, 8
"""Compression methods of zip, by its numbers."""
LARGEST_INFLATED = 1 << 30
"""Bytes of the largest compressed member that is read."""
MOST_INFLATION = 200
"""Times that a member may grow when it is inflated; pictures hardly grow at all."""
INFLATED_AT_ONCE = 1 << 20
"""Stored bytes of a compressed member that are read and inflated at once."""
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_NUL = b"\0"


class FileStatus(NamedTuple):
    """The size and time by which a change is noticed; for a member, the time is that of its archive."""

    st_size: int
    st_mtime_ns: int


class Member(NamedTuple):
    """Where a member lies in its archive."""

    archive: bytes
    """The path of the archive."""
    name: bytes
    offset: int
    """In a tar archive, where its bytes begin; in a zip archive, where its local header does."""
    size: int
    """Its size in bytes."""
    stored_size: int = -1
    """Its size in a zip archive, where it may be compressed; -1 in a tar archive."""
    method: int = STORED

    @property
    def address(self) -> bytes:
        """What stands for it in place of a path."""
        place = b"%d:%d:%d:%d" % (self.offset, self.size, self.stored_size, self.method)
        return _NUL.join((self.archive, place, self.name))


class MemberError(OSError):
    """A member cannot be read; `strerror` says why."""

    def __init__(self, number: int, words: str) -> None:
        super().__init__(number, words)


class OpenFile(NamedTuple):
    """An open file, or the part of one that a member is; the receiver closes the descriptor."""

    descriptor: int
    status: FileStatus
    start: int = 0
    """Where the bytes begin."""
    is_member: bool = False

    def stream(self) -> BinaryIO:
        """Return the bytes as a stream from their start; the descriptor stays open."""
        return io.BufferedReader(Window(self.descriptor, self.start, self.status.st_size))

    def status_now(self) -> FileStatus:
        """Return the current size and time; the size of a member stays as it is."""
        status = os.fstat(self.descriptor)
        return FileStatus(self.status.st_size if self.is_member else status.st_size, status.st_mtime_ns)


class Window(io.RawIOBase):
    """A part of an open file as a stream."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor = descriptor
        self._start = start
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position, which may lie beyond the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as fit into a buffer."""
        wanted = min(len(buffer), max(0, self._size - self._at))
        count = os.preadv(self._descriptor, [memoryview(buffer)[:wanted]], self._start + self._at) if wanted else 0
        self._at += count
        return count


def as_member(path: bytes) -> Member | None:
    """Return the member that an address stands for; None for the path of a file."""
    archive, nul, rest = path.partition(_NUL)
    if not nul:
        return None
    place, _, name = rest.partition(_NUL)
    try:
        offset, size, stored_size, method = map(int, place.split(b":"))
    except ValueError:
        return None  # a path that no file has
    return Member(archive, name, offset, size, stored_size, method)


def shown(path: bytes) -> bytes:
    """Return a path as messages show it; for an address, the member below its archive."""
    member = as_member(path)
    return path if member is None else member.archive + b"/" + member.name


def status_of(path: bytes) -> FileStatus:
    """Return size and time of a file or a member.

    Raises:
        OSError: There is no such file, or no such archive.
    """
    member = as_member(path)
    if member is None:
        status = os.stat(_of_file(path))
        return FileStatus(status.st_size, status.st_mtime_ns)
    return FileStatus(member.size, os.stat(member.archive).st_mtime_ns)


def exists(path: bytes) -> bool:
    """Return whether a file or link exists, or the archive of a member."""
    member = as_member(path)
    if member is None:
        return _NUL not in path and os.path.lexists(path)
    return os.path.lexists(member.archive)


def open_place(path: bytes) -> OpenFile:
    """Open a regular file or a member, without ever waiting and without opening anything else.

    Raises:
        NotRegularError: The file, or the archive, is something else.
        MemberError: The member is compressed in a way that is not read, too large, or damaged.
        OSError: It cannot be opened.
    """
    member = as_member(path)
    found = untrusted.open_regular(path if member is None else member.archive)
    status = FileStatus(found.status.st_size, found.status.st_mtime_ns)
    if member is None:
        return OpenFile(found.descriptor, status)
    try:
        return _open_member(member, found.descriptor, status)
    except BaseException:
        os.close(found.descriptor)
        raise


def _open_member(member: Member, descriptor: int, archive: FileStatus) -> OpenFile:
    start = member.offset if member.stored_size < 0 else _data_of_zip(member, descriptor, archive.st_size)
    status = FileStatus(member.size, archive.st_mtime_ns)
    stored = member.size if member.stored_size < 0 else member.stored_size
    if start + stored > archive.st_size:
        raise MemberError(errno.EOVERFLOW, "its archive ends before it")
    if member.method == STORED:
        return OpenFile(descriptor, status, start, is_member=True)
    in_memory = _in_memory(_inflated(member, descriptor, start), archive.st_mtime_ns)
    os.close(descriptor)
    return OpenFile(in_memory, status, is_member=True)


def _data_of_zip(member: Member, descriptor: int, archive_size: int) -> int:
    """Return where the bytes of a zip archive's member begin, after its local header."""
    is_inside = 0 <= member.offset <= archive_size
    header = os.pread(descriptor, _LOCAL_HEADER.size, member.offset) if is_inside else b""
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise MemberError(errno.EOVERFLOW, "its archive is damaged: there is no header where it should be")
    *_, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    return member.offset + _LOCAL_HEADER.size + int(name_size) + int(extra_size)


def _inflated(member: Member, descriptor: int, start: int) -> bytearray:
    """Inflate a member in memory bounded by its size, however many bytes its archive claims to store for it."""
    inflater, inflated = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
    position, end = start, start + member.stored_size
    try:
        while position < end and not inflater.eof and len(inflated) <= member.size:
            data = os.pread(descriptor, min(INFLATED_AT_ONCE, end - position), position)
            if not data:
                break
            position += len(data)
            inflated += inflater.decompress(data, member.size + 1 - len(inflated))
    except zlib.error as error:
        raise MemberError(errno.EOVERFLOW, f"its archive is damaged: {error}") from error
    if len(inflated) != member.size:
        raise MemberError(errno.EOVERFLOW, "its archive is damaged: its size is not the recorded one")
    return inflated


def _in_memory(data: bytearray, modified_ns: int) -> int:
    """Return the descriptor of an anonymous file with this content and time."""
    import tempfile

    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("internvit-member")
    else:
        descriptor, name = tempfile.mkstemp(prefix="internvit-member")
        os.unlink(name)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.utime(descriptor, ns=(modified_ns, modified_ns))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _of_file(path: bytes) -> bytes:
    if _NUL in path:
        raise OSError(errno.EINVAL, "its name holds a NUL byte", path)
    return path
