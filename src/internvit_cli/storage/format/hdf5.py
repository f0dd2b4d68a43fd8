"""Store a shard as one HDF5 file.

HDF5 creates the file and closes it before the first row. Rows are then written at the datasets' byte offsets, so HDF5
can open the file at every moment of a run.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, BinaryIO

import h5py
import numpy as np

from internvit_cli.config import Format
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable, tile_offsets
from internvit_cli.storage.durable import create, memory_file, rename_durably, sync_path, write_all, written_ranges
from internvit_cli.storage.format.hdf5_structure import TILE_OFFSET, open_structure
from internvit_cli.storage.format.layout import (
    ALIGNMENT,
    CRC32,
    DIGEST,
    RUN_LOG,
    STATUS,
    DatasetSpec,
    Extent,
    NewShard,
    Outline,
    StoredShard,
    feature_datasets,
    is_tokens,
    parse_run_log,
)
from internvit_cli.storage.format.soundness import check_columns, check_statuses

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEY_BLOCK = 65536
"""Keys written in one call, which bounds the memory of their conversion."""

COPY_BLOCK = 1 << 24
INDEX_BYTES, STRUCTURE_BYTES = 160, 1 << 20
"""Upper bounds of what HDF5 needs for an image's index without its key, and for a file's structure."""
KEY_BYTES = 2
"""Upper bound of HDF5's bytes per byte of a key: keys share blocks of 4096 bytes, which are not filled completely."""

KIND = Format.H5
SUFFIX = ".h5"
LOG_BYTES = 0
"""The log is a dataset that has its full size from the start."""


def build(path: str, shard: NewShard) -> None:
    """Write the index and lay out every dataset; rows take no disk space yet."""
    # HDF5 never writes to the disk: it cannot close a file that it failed to write, and crashes the process at exit.
    with _laid_out(shard) as source, create(path, buffering=0) as target:
        os.truncate(target.fileno(), os.fstat(source.fileno()).st_size)
        for start, stop in written_ranges(source.fileno()):
            for offset in range(start, stop, COPY_BLOCK):
                write_all(target.fileno(), os.pread(source.fileno(), min(COPY_BLOCK, stop - offset), offset), offset)


def planned_bytes(shard: NewShard) -> int:
    """Return the exact size of the file, which is laid out in memory, where its unwritten rows take no space."""
    with _laid_out(shard) as file:
        return os.fstat(file.fileno()).st_size


def index_bytes(table: ImageTable) -> NDArray[Any]:
    """Return upper bounds of each image's bytes without its rows, [n] int64; the first includes a page per dataset."""
    lengths = np.fromiter((len(key) for key in table.keys), np.int64, len(table))
    bounds: NDArray[Any] = INDEX_BYTES + KEY_BYTES * lengths
    return bounds


def _laid_out(shard: NewShard) -> BinaryIO:
    """Return the whole file in memory, with unwritten rows."""
    file = memory_file()
    try:
        # A limit on file sizes applies in memory too; reach it here, before HDF5 does.
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
    # Real files and files in memory use the same driver: HDF5's layout depends on it, and planned sizes must be
    # exact.
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, target)
    with h5py.File(h5py.h5f.create(b"shard", h5py.h5f.ACC_TRUNC, fapl=access)) as file:
        for name, value in shard.complete_attributes.items():
            _write_attribute(file, name, value)
        file.create_group("image")
        # The index comes first, so that everything that is read at each start is together at the front of the file.
        _write_keys(file, shard.table.keys)
        for name, dtype in (*COLUMN_DTYPES.items(), ("tile_offset", "<u8")):
            column = getattr(shard.table, name)
            _lay_out(file, DatasetSpec(f"image/{name}", column.shape, dtype))
            if len(column):
                file[f"image/{name}"][...] = column
        for spec in shard.datasets:
            _lay_out(file, spec)
        for name in filter(is_tokens, feature_datasets(shard.features)):
            # numpy and h5py have no bfloat16, so the dataset has an attribute that says what its bits are.
            file[name].attrs["dtype"] = shard.features.store_dtype.value


def extents(path: str) -> dict[str, Extent]:
    """Return the places of the rows of each dataset that has elements, by name."""
    with open_structure(path) as structure:
        return {name: extent for name, extent in structure.extents.items() if extent.spec.nbytes}


def read(path: str) -> StoredShard:
    """Read the shard's index and attributes."""
    with open_structure(path) as structure:
        keys = list(structure.keys.strings())
        columns = {name: structure.array(f"image/{name}") for name in COLUMN_DTYPES}
        table = ImageTable.build(keys, structure.array(STATUS), columns)
        # The digest covers offsets that follow from the columns; the stored ones are for other programs.
        if not np.array_equal(structure.array(TILE_OFFSET), table.tile_offset):
            raise ValueError("its tile offsets do not follow from its grids")
        specs = {name: extent.spec for name, extent in structure.extents.items()}
        return StoredShard(table, structure.attributes, specs)


def outline(path: str) -> Outline:
    """Read what `info` shows of the shard; this excludes the keys, of which a million take longest to read."""
    with open_structure(path) as structure:
        for _ in structure.keys.places():
            pass  # the number of images is true, so the following reads are in proportion to the file
        columns = {name: structure.array(f"image/{name}") for name in COLUMN_DTYPES}
        offset = tile_offsets(*(columns[name] for name in ("columns", "rows", "thumbnail")))
        if not np.array_equal(structure.array(TILE_OFFSET), offset):
            raise ValueError("its tile offsets do not follow from its grids")
        status = structure.array(STATUS)
        check_statuses(status, path)
        check_columns(columns, status, structure.recipe, structure.sources, path)
        return Outline(structure.attributes, structure.images, status, structure.tiles)


def publish(partial: str, final: str) -> None:
    """Give the finished file its final name."""
    sync_path(partial)
    rename_durably(partial, final)


def commit_records(path: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read the digests, uint8 [n, 32], and CRCs, uint32 [n], of a shard."""
    with open_structure(path) as structure:
        return structure.array(DIGEST), structure.array(CRC32)


def run_log(path: str) -> list[dict[str, Any]]:
    """Return one entry per start that wrote to the shard, oldest first."""
    with open_structure(path) as structure:
        return parse_run_log(structure.array(RUN_LOG).tobytes())


def final_paths(final: str) -> list[str]:
    """Return the files of a published shard."""
    return [final]


def _write_attribute(file: h5py.File, name: str, value: str | int) -> None:
    if isinstance(value, str):  # as bytes, because the name of a folder need not be UTF-8
        file.attrs.create(name, value.encode("utf-8", "surrogateescape"), dtype=h5py.string_dtype("utf-8"))
    else:
        file.attrs[name] = value


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
