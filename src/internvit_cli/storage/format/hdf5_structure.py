"""Open an HDF5 file that may be hostile, and check that its structure is that of a shard.

HDF5 trusts its files: it follows links and datasets into other files, runs filters that turn kilobytes into gigabytes,
and walks endless groups. So it is used only to read the attributes, and to find the place of each dataset that has one
of our names. Nothing else is opened, and no data is read through it.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

from internvit_cli.config import LONGEST_KEY, StoreDtype
from internvit_cli.errors import RESTORE_OR_OVERWRITE, OutputError, one_line
from internvit_cli.runtime.untrusted import NotRegularError, open_regular
from internvit_cli.storage.durable import read_exactly
from internvit_cli.storage.format.hdf5_strings import COLLECTION_START, PLACE, StringReader, check_collection
from internvit_cli.storage.format.layout import (
    ATTRIBUTES_BYTES,
    FEATURE_DATASETS,
    SHARD_FILE,
    DatasetSpec,
    Extent,
    ForeignFileError,
    UnrecognizedFileError,
    check_format,
    is_tokens,
    unknown_value,
)
from internvit_cli.storage.format.soundness import (
    MOST_ATTRIBUTES,
    ExpectedDataset,
    check_attributes,
    check_datasets,
    damaged,
    expected_columns,
    expected_features,
    expected_records,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray

    from internvit_cli.config import Recipe

SIGNATURE = b"\x89HDF\r\n\x1a\n"
KEYS = "image/key"
TILE_OFFSET = "image/tile_offset"
METADATA_READ_BYTES = ATTRIBUTES_BYTES + (1 << 20)
"""Upper bound of a single read by HDF5 of one of our files, of which the longest is a long attribute."""
ADDRESS_BYTES = (8, 8)
DAMAGE = (
    KeyError,
    ValueError,
    OSError,
    RuntimeError,
    SystemError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)
"""Errors that HDF5 and h5py were observed to raise on damaged files, and similar ones."""


@dataclass(frozen=True)
class Structure:
    """A file with the attributes and datasets of a shard; its data is read by position, and only on request."""

    path: str
    attributes: dict[str, Any]
    recipe: Recipe
    sources: int
    """Number of folders that its pictures came from."""
    extents: dict[str, Extent]
    """Places of the rows of each dataset except the keys, including datasets without rows."""
    images: int
    tiles: int
    _descriptor: int
    _keys_offset: int

    def array(self, name: str) -> NDArray[Any]:
        """Read one dataset."""
        return _read(self._descriptor, self.extents[name])

    @property
    def keys(self) -> StringReader:
        """Return a reader of the keys."""
        return StringReader(self._descriptor, self.path, self._keys_offset, self.images, LONGEST_KEY)


@contextmanager
def open_structure(path: str) -> Iterator[Structure]:
    """Open an HDF5 file and check that its structure is that of a shard.

    Raises:
        ForeignFileError: It is another program's file, or not a file.
        OutputError: It does not exist, cannot be read, is damaged, or has a newer version.
    """
    descriptor = _open(path)
    try:
        size = os.fstat(descriptor).st_size
        _check_signature(path, os.pread(descriptor, len(SIGNATURE), 0))
        try:
            with _hdf5_file(descriptor, size) as file:
                structure = _examine(file, path, descriptor, size)
            yield structure
        except DAMAGE as error:
            if isinstance(error, OSError) and error.strerror:
                raise OutputError(f"cannot read {path}: {error.strerror}", "check the disk") from error
            raise damaged(path, one_line(str(error))) from error
    finally:
        os.close(descriptor)


def _open(path: str) -> int:
    is_member = SHARD_FILE.fullmatch(os.path.basename(path)) is not None
    try:
        return open_regular(path, follow_links=not is_member).descriptor
    except NotRegularError as error:
        raise ForeignFileError(
            f"{path} is {error.kind}, not a feature file", "choose another output, or move that away"
        ) from error
    except FileNotFoundError as error:
        raise OutputError(f"{path} is not there", "check the path") from error
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}", "check its permissions") from error


def _check_signature(path: str, start: bytes) -> None:
    if not start:  # a full disk may leave one of our files empty
        raise OutputError(f"{path} is empty", RESTORE_OR_OVERWRITE)
    if start != SIGNATURE:
        raise UnrecognizedFileError(f"{path} is not an HDF5 file", "choose another output, or move that file away")


class _Metadata(io.RawIOBase):
    """A file as HDF5 reads it; reads that are too large for a structure are refused."""

    def __init__(self, descriptor: int, size: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._size = size
        self._position = 0
        self._checked: set[int] = set()
        self._room = 2 * METADATA_READ_BYTES
        """Bytes of strings that may still be checked; larger than the attributes of a shard."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte offset."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}
        self._position = origin[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer.

        Raises:
            OSError: The file ends before that, or the buffer is too large.
        """
        if len(buffer) > METADATA_READ_BYTES:
            raise OSError(f"a part of its structure has {len(buffer):,} bytes")
        self._check_strings(self._position, len(buffer))
        view = memoryview(buffer).cast("B")
        while view:
            got = os.preadv(self._descriptor, [view], self._position)
            if got == 0:
                raise OSError("its structure extends beyond its end")
            view, self._position = view[got:], self._position + got
        return len(buffer)

    def _check_strings(self, start: int, size: int) -> None:
        """Check collections of strings before HDF5 reads them: it loops forever in a collection with objects of size 0.

        HDF5 may read a collection in parts; the whole collection is checked when its first bytes are read.
        """
        before = max(0, start - len(COLLECTION_START) + 1)
        for found in re.finditer(COLLECTION_START, os.pread(self._descriptor, start + size - before, before)):
            address = before + found.start()
            if address not in self._checked:
                self._checked.add(address)
                self._room -= check_collection(self._descriptor, address, self._room)


@contextmanager
def _hdf5_file(descriptor: int, size: int) -> Iterator[h5py.File]:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, _Metadata(descriptor, size))
    with h5py.File(h5py.h5f.open(b"shard", h5py.h5f.ACC_RDONLY, fapl=access)) as file:
        yield file


def _examine(file: h5py.File, path: str, descriptor: int, size: int) -> Structure:
    attributes = _root_attributes(file, path)
    recipe, sources = check_attributes(attributes, path)
    creation = file.id.get_create_plist()
    if creation.get_userblock() or creation.get_sizes() != ADDRESS_BYTES:
        raise ValueError("its layout is not that of a shard")
    datasets = _Datasets(file.id, size)
    images, keys_offset = datasets.keys()
    extents = datasets.find(expected_columns(images) | expected_records(images), recipe, path)
    tiles = _last_offset(descriptor, extents[TILE_OFFSET])
    expected = expected_features(recipe, images, tiles)
    extents |= datasets.find(expected, recipe, path)
    for name in FEATURE_DATASETS:
        if name not in expected and datasets.has(name):
            raise damaged(path, f"{name} exists, but the recipe does not store it")
    for name in filter(is_tokens, expected):
        _check_type_attribute(datasets.type_attribute(name), name, recipe, attributes, path)
    _check_places(extents.values(), Extent(path, keys_offset, DatasetSpec(KEYS, (images,), PLACE.str)))
    return Structure(path, attributes, recipe, len(sources), extents, images, tiles, descriptor, keys_offset)


class _Datasets:
    """The datasets of an open file that have our names."""

    def __init__(self, file: h5py.h5f.FileID, size: int) -> None:
        self._size = size
        self._groups = {"": h5py.h5g.open(file, b"/")}
        """Groups by the prefix of the names in them."""
        _check_link(self._groups[""], b"image", "image")
        self._groups["image"] = h5py.h5g.open(self._groups[""], b"image")

    def has(self, name: str) -> bool:
        """Return whether anything has the name of a dataset."""
        return _exists(*self._place(name))

    def keys(self) -> tuple[int, int]:
        """Return the number of images, and the byte offset of the references to their keys."""
        dataset = self._open(KEYS)
        if dataset.get_type() != h5py.h5t.py_create(h5py.string_dtype("utf-8"), logical=True):
            raise ValueError(f"{KEYS} holds {_name_of(dataset.get_type())}")
        if dataset.rank != 1:
            raise ValueError(f"{KEYS} has {dataset.rank} dimensions")
        (images,) = dataset.shape
        return images, self._offset(dataset, KEYS, images * PLACE.itemsize)

    def find(self, expected: Mapping[str, ExpectedDataset], recipe: Recipe, path: str) -> dict[str, Extent]:
        """Return the places of datasets.

        Raises:
            OutputError: One is missing, or has another shape or type.
            ValueError: One is not contiguous in this file.
        """
        opened = {name: self._open(name) for name in expected if self.has(name)}
        specs = {name: DatasetSpec(name, one.shape, _dtype_of(one, expected[name])) for name, one in opened.items()}
        check_datasets(specs, expected, recipe, path)
        return {name: Extent(path, self._offset(opened[name], name, spec.nbytes), spec) for name, spec in specs.items()}

    def type_attribute(self, name: str) -> Any:
        """Return the type attribute of a dataset of tokens; None if it has none."""
        dataset = self._open(name)
        return _value(h5py.h5a.open(dataset, b"dtype")) if h5py.h5a.exists(dataset, b"dtype") else None

    def _place(self, name: str) -> tuple[h5py.h5g.GroupID, bytes]:
        group, _, last = name.rpartition("/")
        return self._groups[group], last.encode()

    def _open(self, name: str) -> h5py.h5d.DatasetID:
        """Open a dataset that is stored contiguously in this file, and refuse any other before reading it."""
        group, last = self._place(name)
        _check_link(group, last, name)
        if h5py.h5o.get_info(group, last).type != h5py.h5o.TYPE_DATASET:
            raise ValueError(f"{name} is not a dataset")
        dataset = h5py.h5d.open(group, last)
        if dataset.shape is None:
            raise ValueError(f"{name} has no shape")
        creation = dataset.get_create_plist()
        if creation.get_layout() != h5py.h5d.CONTIGUOUS or creation.get_nfilters():
            raise ValueError(f"{name} is not contiguous")
        if creation.get_external_count():
            raise ValueError(f"{name} is in another file")
        return dataset

    def _offset(self, dataset: h5py.h5d.DatasetID, name: str, nbytes: int) -> int:
        if not nbytes:
            return 0
        offset = dataset.get_offset()
        if offset is None or offset + nbytes > self._size:
            raise ValueError(f"{name} extends beyond the end of the file")
        return int(offset)


def _exists(group: h5py.h5g.GroupID, name: bytes) -> bool:
    return bool(group.links.exists(name))


def _check_link(group: h5py.h5g.GroupID, name: bytes, shown: str) -> None:
    """Refuse links, for example into another file, without following them.

    Raises:
        ValueError: It does not exist, or is a link.
    """
    if not _exists(group, name):
        raise ValueError(f"{shown} is missing")
    if group.links.get_info(name).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"{shown} is a link to something else")


def _dtype_of(dataset: h5py.h5d.DatasetID, wanted: ExpectedDataset) -> str:
    """Return a dataset's little-endian numpy type, or a description of a type that is not a plain number."""
    stored = dataset.get_type()
    if stored == h5py.h5t.py_create(np.dtype(wanted.dtype), logical=True):
        return wanted.dtype
    is_number = isinstance(stored, (h5py.h5t.TypeIntegerID, h5py.h5t.TypeFloatID))
    return str(stored.dtype.str) if is_number else _name_of(stored)


def _name_of(stored: h5py.h5t.TypeID) -> str:
    return type(stored).__name__.removeprefix("Type").removesuffix("ID").lower()


def _check_places(extents: Collection[Extent], keys: Extent) -> None:
    """Refuse overlapping datasets: rows are written without HDF5, which would not notice.

    Raises:
        ValueError: Two of them share bytes.
    """
    ordered = sorted((one for one in (*extents, keys) if one.spec.nbytes), key=lambda extent: extent.offset)
    for extent, following in pairwise(ordered):
        if extent.offset + extent.spec.nbytes > following.offset:
            raise ValueError(f"{extent.spec.name} and {following.spec.name} overlap")


def _last_offset(descriptor: int, offsets: Extent) -> int:
    size = offsets.spec.row_bytes
    data = read_exactly(descriptor, size, offsets.offset + offsets.spec.nbytes - size, offsets.path)
    return int.from_bytes(data, "little")


def _read(descriptor: int, extent: Extent) -> NDArray[Any]:
    data = read_exactly(descriptor, extent.spec.nbytes, extent.offset, extent.path)
    return np.frombuffer(data, extent.spec.dtype).reshape(extent.spec.shape)


# -------------------------------------------------------------------------------------------------------- attributes


class _Unknown(NamedTuple):
    """The value of an attribute whose type none of our attributes has."""

    words: str


def _root_attributes(file: h5py.File, path: str) -> dict[str, Any]:
    """Read the attributes of one of our files.

    Raises:
        ForeignFileError: It is another program's file.
        OutputError: It has a newer version, or attributes that no shard has.
    """
    count = h5py.h5a.get_num_attrs(file.id)
    values: dict[str, Any] = {}
    room = ATTRIBUTES_BYTES
    for index in range(min(count, MOST_ATTRIBUTES)):
        attribute = h5py.h5a.open(file.id, index=index)
        value = values[attribute.name.decode("utf-8", "surrogateescape")] = _value(attribute)
        room -= len(value) if isinstance(value, str) else 0
        if room < 0:
            raise ValueError(f"its attributes have more than {ATTRIBUTES_BYTES:,} bytes")
    known = {name: value for name, value in values.items() if not isinstance(value, _Unknown)}
    check_format(known, path)
    if count > MOST_ATTRIBUTES:
        raise ValueError(f"it has {count:,} attributes")
    for name, value in values.items():
        if isinstance(value, _Unknown):
            raise unknown_value(known, f"attribute {one_line(name, 80)} of {path} is {value.words}")
    return known


def _value(attribute: h5py.h5a.AttrID) -> Any:
    """Return the value of an attribute if it is a single text or number."""
    stored = attribute.get_type()
    if attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
        return _Unknown("not a single value")
    if isinstance(stored, h5py.h5t.TypeStringID) and stored.is_variable_str():
        text = np.empty((), object)
        attribute.read(text, mtype=h5py.h5t.py_create(h5py.string_dtype("utf-8")))
        return bytes(text[()]).decode("utf-8", "surrogateescape")
    if isinstance(stored, h5py.h5t.TypeIntegerID) and stored.get_size() <= 8:
        number = np.empty((), np.int64 if stored.get_sign() else np.uint64)
        attribute.read(number)
        return int(number)
    return _Unknown(f"of type {_name_of(stored)}")


def _check_type_attribute(value: Any, name: str, recipe: Recipe, attributes: Mapping[str, Any], path: str) -> None:
    """Refuse tokens whose type attribute differs from the recipe, because other programs rely on it."""
    wanted = recipe.store_dtype.value
    if value == wanted:
        return
    if isinstance(value, _Unknown):
        raise unknown_value(attributes, f"the type of {name} in {path} is {value.words}")
    if value is not None and value not in {known.value for known in StoreDtype}:
        raise unknown_value(attributes, f"the type of {name} in {path} is {one_line(repr(value), 80)}")
    raise damaged(path, f"{name} says that its type is {value!r}, not {wanted!r}")
