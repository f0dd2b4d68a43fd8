"""A shard as one HDF5 file.

HDF5 makes the file and is closed before the first row: rows are then written at the datasets' byte offsets, so that no
moment of a run leaves a file that HDF5 cannot open.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

import h5py
import numpy as np

from internvit_cli.config import Format, Tokens
from internvit_cli.errors import OutputError, one_line
from internvit_cli.storage.durable import create, memory_file, rename_durably, sync_path, write_all, written_ranges
from internvit_cli.storage.layout import (
    ALIGNMENT,
    CRC32,
    DIGEST,
    RUN_LOG,
    STATUS,
    DatasetSpec,
    Extent,
    ForeignFileError,
    NewShard,
    Outline,
    StoredShard,
    check_format,
    parse_run_log,
)
from internvit_cli.table import COLUMN_DTYPES, ImageTable, tile_offsets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

KEY_BLOCK = 65536
"""Keys written in one call: bounds the memory of their conversion."""

COPY_BLOCK = 1 << 24
INDEX_BYTES, STRUCTURE_BYTES = 160, 1 << 20
"""More than HDF5 takes for the index of an image, beside its key, and for a file's structure."""
KEY_BYTES = 2
"""Times a key's length is more than HDF5 takes for it: keys share blocks of 4096 bytes, of which some are left over."""

KIND = Format.H5
SUFFIX = ".h5"
LOG_BYTES = 0
"""The log is a dataset, with its full size from the start."""
DAMAGE = (KeyError, ValueError, OSError, RuntimeError, TypeError, AttributeError, OverflowError, MemoryError)
"""What reading a damaged file has been seen to raise, and its kin."""
SIGNATURE = b"\x89HDF\r\n\x1a\n"


def build(path: str, shard: NewShard) -> None:
    """Write the index and lay out every dataset; rows take no room on the disk yet."""
    # HDF5 never meets the disk: a file that it could not write it cannot close, and that crashes the process at exit.
    with _laid_out(shard) as source, create(path, buffering=0) as target:
        os.truncate(target.fileno(), os.fstat(source.fileno()).st_size)
        for start, stop in written_ranges(source.fileno()):
            for offset in range(start, stop, COPY_BLOCK):
                write_all(target.fileno(), os.pread(source.fileno(), min(COPY_BLOCK, stop - offset), offset), offset)


def planned_bytes(shard: NewShard) -> int:
    """The exact size of the file: it is laid out in memory, where its unwritten rows take no room."""
    with _laid_out(shard) as file:
        return os.fstat(file.fileno()).st_size


def index_bytes(table: ImageTable) -> NDArray[Any]:
    """More than each image takes beside its rows, [n] int64; the first one also gives every dataset a page."""
    lengths = np.fromiter((len(key) for key in table.keys), np.int64, len(table))
    bounds: NDArray[Any] = INDEX_BYTES + KEY_BYTES * lengths
    return bounds


def _laid_out(shard: NewShard) -> BinaryIO:
    """The whole file in memory, its rows unwritten."""
    file = memory_file()
    try:
        # A limit on the size of files holds in memory too, and is met here, before HDF5 would.
        index = int(index_bytes(shard.table).sum())
        os.truncate(file.fileno(), sum(ALIGNMENT + spec.nbytes for spec in shard.datasets) + index + STRUCTURE_BYTES)
        os.truncate(file.fileno(), 0)
        _write_structure(file, shard)
    except BaseException:
        file.close()
        raise
    return file


def _write_structure(target: BinaryIO, shard: NewShard) -> None:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_alignment(1, ALIGNMENT)
    # The same driver for a real file and for one in memory: HDF5's layout depends on it, and a planned size has
    # to be exact.
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, target)
    with h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, fapl=access)) as file:
        for name, value in shard.complete_attributes.items():
            file.attrs[name] = value
        file.create_group("image")
        # Index first: what is read at every start stays together at the front of the file.
        _write_keys(file, shard.table.keys)
        for name, dtype in (*COLUMN_DTYPES.items(), ("tile_offset", "<u8")):
            column = getattr(shard.table, name)
            _lay_out(file, DatasetSpec(f"image/{name}", column.shape, dtype))
            if len(column):
                file[f"image/{name}"][...] = column
        for spec in shard.datasets:
            _lay_out(file, spec)
        if shard.features.tokens is not Tokens.NONE:
            # numpy and h5py have no bfloat16: the dataset says itself what its bits are.
            file[shard.features.tokens.dataset].attrs["dtype"] = shard.features.store_dtype.value


def extents(path: str) -> dict[str, Extent]:
    """Where each dataset's rows lie, by name, for all that have elements."""
    found: dict[str, Extent] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and name != "image/key" and item.id.get_offset() is not None:
            spec = DatasetSpec(name, item.shape, item.dtype.newbyteorder("<").str)
            found[name] = Extent(path, item.id.get_offset(), spec)

    with _open(path) as file, _damage(path):
        file.visititems(visit)
        _check_places(list(found.values()))
    return found


def _check_places(extents: list[Extent]) -> None:
    """Refuse datasets that lie where none can: rows are written there past HDF5, which would not notice."""
    ordered = sorted(extents, key=lambda extent: extent.offset)
    for extent, following in pairwise(ordered):
        if extent.offset + extent.spec.nbytes > following.offset:
            raise ValueError(f"{extent.spec.name} and {following.spec.name} lie in the same place")


def read(path: str) -> StoredShard:
    """The shard's index and attributes."""
    with _open(path) as file, _damage(path):
        attributes = _attributes(file, path)
        columns = {name: file[f"image/{name}"][...] for name in COLUMN_DTYPES}
        table = ImageTable.build(_read_keys(file["image/key"]), file[STATUS][...], columns)
        # The digest is over the offsets that follow from the columns; these are what other programs go by.
        if not np.array_equal(file["image/tile_offset"][...], table.tile_offset):
            raise ValueError("its tile offsets do not follow from its grids")
        return StoredShard(table, attributes)


def outline(path: str) -> Outline:
    """What `info` tells of the shard: a million keys, which it does not tell, take longer than all else."""
    with _open(path) as file, _damage(path):
        attributes = _attributes(file, path)
        images = len(file["image/key"])
        if any(file[f"image/{name}"].shape != (images,) for name in COLUMN_DTYPES):
            raise ValueError("its columns have different lengths")
        offset = tile_offsets(*(file[f"image/{name}"][...] for name in ("columns", "rows", "thumbnail")))
        if not np.array_equal(file["image/tile_offset"][...], offset):
            raise ValueError("its tile offsets do not follow from its grids")
        return Outline(attributes, images, file[STATUS][...], int(offset[-1]))


def publish(partial: str, final: str) -> None:
    """Give the finished file its name."""
    sync_path(partial)
    rename_durably(partial, final)


def commit_records(path: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Digests, uint8 [n, 32], and CRCs, uint32 [n], of a shard."""
    with _open(path) as file, _damage(path):
        return file[DIGEST][...], file[CRC32][...]


def run_log(path: str) -> list[dict[str, Any]]:
    """One entry a start that wrote to the shard, oldest first."""
    with _open(path) as file, _damage(path):
        return parse_run_log(file[RUN_LOG][...].tobytes())


def final_paths(final: str) -> list[str]:
    """The files that make up a published shard."""
    return [final]


def _attributes(file: h5py.File, path: str) -> dict[str, Any]:
    """The root attributes of a file of ours."""
    attributes = {name: _plain(value) for name, value in file.attrs.items()}
    check_format(attributes, path)
    return attributes


def _open(path: str) -> h5py.File:
    if os.path.exists(path) and not os.path.isfile(path):  # HDF5 would wait for whoever writes to a pipe
        raise ForeignFileError(f"{path} is not a regular file", "choose another output, or move that away")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        failure = error
    try:
        # Some filesystems have no locks. Rows are written past HDF5, under a lock of our own, so its lock
        # matters to nobody.
        return h5py.File(path, "r", locking=False)
    except OSError:
        if not os.path.exists(path):
            raise OutputError(f"{path} is not there", "check the path") from failure
        if not _is_hdf5(path):
            raise ForeignFileError(
                f"{path} is not an HDF5 file", "choose another output, or move that file away"
            ) from failure
        raise OutputError(
            f"{path} is not a readable HDF5 file: {failure}", "restore it, or start anew with --overwrite"
        ) from failure


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turn whatever h5py makes of a damaged file into one error that says what to do."""
    try:
        yield
    except DAMAGE as error:
        raise OutputError(
            f"{path} is not a sound feature file: {one_line(str(error))}", "restore it, or start anew with --overwrite"
        ) from error


def _is_hdf5(path: str) -> bool:
    """Whether a file begins as HDF5 does; an empty one may be what a full disk left of ours."""
    try:
        with open(path, "rb") as file:
            return file.read(len(SIGNATURE)) in {SIGNATURE, b""}
    except OSError:
        return True  # it may well be: it could not be read


def _lay_out(file: h5py.File, spec: DatasetSpec) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(spec.shape)
    kind = h5py.h5t.py_create(np.dtype(spec.dtype), logical=True)
    h5py.h5d.create(file.id, spec.name.encode(), kind, space, creation)


def _write_keys(file: h5py.File, keys: Any) -> None:
    dataset = file.create_dataset("image/key", shape=(len(keys),), dtype=h5py.string_dtype("utf-8"))
    for start in range(0, len(keys), KEY_BLOCK):
        block = keys[start : start + KEY_BLOCK]
        dataset[start : start + len(block)] = np.array(block, dtype=object)


def _read_keys(dataset: h5py.Dataset) -> list[bytes]:
    keys: list[bytes] = []
    for start in range(0, len(dataset), KEY_BLOCK):
        keys.extend(dataset[start : start + KEY_BLOCK].tolist())
    return keys


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
