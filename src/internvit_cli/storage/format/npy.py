"""Store a shard as .npy files, for users who map arrays into memory.

While it is filled, the shard is a folder, `shard-00000.partial/`, with one fixed-size file per dataset. Publishing
moves the feature arrays to `shard-00000.pooled.npy` and so on, and writes the index to `shard-00000.images.jsonl` and
the attributes to `shard-00000.json`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from internvit_cli.config import Format, Status
from internvit_cli.errors import RESTORE_OR_OVERWRITE, OutputError, one_line
from internvit_cli.plan.table import COLUMN_DTYPES, ImageTable
from internvit_cli.runtime.untrusted import NotRegularError, lines_of, opened, parse_json, read_bounded
from internvit_cli.storage.durable import create, read_exactly, rename_durably, sync_path, write_file
from internvit_cli.storage.format.layout import (
    ALIGNMENT,
    ATTRIBUTES_BYTES,
    CRC32,
    DIGEST,
    FEATURE_DATASETS,
    POOLED,
    RUN_LOG,
    RUN_LOG_BYTES,
    STATUS,
    DatasetSpec,
    Extent,
    NewShard,
    Outline,
    StoredShard,
    check_format,
    crc_order,
    feature_datasets,
    feature_name,
    parse_run_log,
    stored_recipe,
)
from internvit_cli.storage.format.soundness import (
    check_attributes,
    check_datasets,
    check_lengths,
    check_shard,
    check_statuses,
    damaged,
    expected_features,
    expected_records,
)
from internvit_cli.storage.output_names import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from internvit_cli.config import Recipe

KIND = Format.NPY
SUFFIX = ""
LOG_BYTES = 8192
"""Bytes for the log in the attributes: room for at least eight starts."""
COMMIT_DATASETS = (STATUS, DIGEST, CRC32, RUN_LOG)
INDEX_FILE = "images.jsonl"
ATTRIBUTES_FILE = "attributes.json"
ATTRIBUTES_BLOCK = 4096
ATTRIBUTES_FILE_BYTES = 2 * ATTRIBUTES_BYTES
"""Quotes in an attribute take two bytes in the file; the log of starts is small."""
LINES_BLOCK = 1 << 20
DIGEST_BYTES = 32
CRC_BYTES = 4
SUFFIX_HEAD, STATUS_PLACES = len(b', "status": 12, "digest": "'), [12, 13]
"""Length of the text between a line's columns and its digest, and the places of the status's two digits in it."""
HEADER = re.compile(
    rb".{10}{'descr': '([|][ui]1|<u[24]|<f[24])', 'fortran_order': False, 'shape': \((\d{1,18}(?:, \d{1,18})*)",
    re.DOTALL,
)


def build(folder: str, shard: NewShard) -> None:
    """Write the index and every array's header; rows take no disk space yet."""
    os.mkdir(folder)
    write_file(os.path.join(folder, ATTRIBUTES_FILE), _pad(shard.complete_attributes))
    write_file(os.path.join(folder, INDEX_FILE), b"".join(_planned_lines(shard.table)))
    for spec in shard.datasets:
        _lay_out(_dataset_path(folder, spec.name), spec)


def planned_bytes(shard: NewShard) -> int:
    """Return the size of the published files, without the log of starts in the attributes."""
    arrays = sum(ALIGNMENT + spec.nbytes for spec in shard.features.row_datasets(len(shard.table), shard.table.tiles))
    return arrays + int(index_bytes(shard.table).sum()) + len(_pad(shard.complete_attributes))


def index_bytes(table: ImageTable) -> NDArray[Any]:
    """Return the length of each image's line in the published index, [n] int64, without writing a million lines."""
    blank = ImageTable.build([b""], np.zeros(1, np.uint8), {name: np.zeros(1, np.int64) for name in COLUMN_DTYPES})
    line = next(_finished_lines(blank, np.zeros((1, 32), np.uint8), np.zeros(1, np.uint32)))
    lengths = np.fromiter((len(json.dumps(os.fsdecode(key))) for key in table.keys), np.int64, len(table))
    lengths += len(line) - len('""') - len(COLUMN_DTYPES)
    for name in COLUMN_DTYPES:
        lengths += _decimal_length(getattr(table, name))
    return lengths


def _decimal_length(numbers: NDArray[Any]) -> NDArray[Any]:
    """Return the number of characters of integers in JSON, [n] int64."""
    magnitude = np.abs(numbers).astype(np.uint64)
    powers = np.array([10**exponent for exponent in range(1, 20)], np.uint64)
    lengths: NDArray[Any] = 1 + np.searchsorted(powers, magnitude, side="right") + (numbers < 0)
    return lengths


def extents(path: str) -> dict[str, Extent]:
    """Return the places of each dataset's rows by name: all of an unfinished shard, features of a published one."""
    with _damage(path):
        recipe, _ = check_attributes(_attributes(path), path)
        return {name: extent for name, extent in _arrays(path, recipe).items() if extent.spec.nbytes}


def read(path: str) -> StoredShard:
    """Read the index and attributes of an unfinished or published shard."""
    with _damage(path):
        attributes = _attributes(path)
        recipe, _ = check_attributes(attributes, path)
        arrays = _arrays(path, recipe)
        table, _, _ = _read_lines(path)
        check_lengths([arrays[POOLED].spec.shape[0]], len(table), path)
        if (tiles := _tiles(arrays)) not in (None, table.tiles):
            raise ValueError(f"its arrays hold {tiles:,} tiles, but its images have {table.tiles:,}")
        if _is_filled(path):
            table = table.with_status(_read_array(arrays[STATUS]))
        return StoredShard(table, attributes, {name: extent.spec for name, extent in arrays.items()})


def outline(path: str) -> Outline:
    """Read what `info` shows of a published shard, from the fixed-width end of every line of its index."""
    with _damage(path):
        attributes = _attributes(path)
        recipe, _ = check_attributes(attributes, path)
        arrays = _arrays(path, recipe)
        with _opened(_beside(path, INDEX_FILE)) as file:
            status = _last_columns(file)
        if status is not None:
            check_lengths([arrays[POOLED].spec.shape[0]], len(status), path)
            check_statuses(status, path)
            return Outline(attributes, len(status), status, _tiles(arrays))
    stored = read(path)  # lines are damaged, or another program wrote them
    check_shard(stored, path)
    return Outline(attributes, len(stored.table), stored.table.status, stored.table.tiles)


def publish(partial: str, final: str) -> None:
    """Move the arrays to their names and write the index beside them.

    `partial` keeps the records of each image until the manifest names the shard, so that a crash in between loses
    nothing: publishing again finishes it.
    """
    table = read(partial).table
    digests, checksums = commit_records(partial)
    attributes = _attributes(partial)
    attributes[RUN_LOG] = run_log(partial)
    lines = _finished_lines(table, digests, checksums)
    write_file(f"{final}.{INDEX_FILE}", b"".join(lines))
    write_file(f"{final}.json", _pad(attributes))
    for name in feature_datasets(stored_recipe(attributes, partial)):
        source = _dataset_path(partial, name)
        if os.path.exists(source):
            sync_path(source)
            rename_durably(source, f"{final}.{name}.npy")


def run_log(path: str) -> list[dict[str, Any]]:
    """Return one entry per start that wrote to the shard, oldest first."""
    with _damage(path):
        if _is_filled(path):
            recipe, _ = check_attributes(_attributes(path), path)
            return parse_run_log(_read_array(_arrays(path, recipe)[RUN_LOG]).tobytes())
        entries = _read_attributes(path).get(RUN_LOG)
    return _newest(entries) if isinstance(entries, list) else []


def _newest(entries: list[Any]) -> list[dict[str, Any]]:
    """Return the last entries of a log that fit into an unfinished shard; copying a log syncs each entry."""
    kept: list[dict[str, Any]] = []
    room = RUN_LOG_BYTES
    for entry in reversed(entries):
        if isinstance(entry, dict):
            room -= len(json.dumps(entry)) + 1
            if room < 0:
                break
            kept.append(entry)
    return kept[::-1]


def final_paths(final: str) -> list[str]:
    """Return the files of a published shard."""
    with _damage(final):
        arrays = feature_datasets(stored_recipe(_attributes(final), final))
    names = [_beside(final, ATTRIBUTES_FILE), _beside(final, INDEX_FILE)]
    return names + [path for name in arrays if os.path.exists(path := _dataset_path(final, name))]


def commit_records(path: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read the digests, uint8 [n, 32], and CRCs, uint32 [n], of an unfinished or published shard."""
    with _damage(path):
        if _is_filled(path):
            recipe, _ = check_attributes(_attributes(path), path)
            arrays = _arrays(path, recipe)
            return _read_array(arrays[DIGEST]), _read_array(arrays[CRC32])
        _, digests, checksums = _read_lines(path)
        return digests, checksums


@contextmanager
def _damage(path: str) -> Iterator[None]:
    """Turn all errors of damaged files into one error that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise OutputError(f"{os.fsdecode(error.filename or path)} is not there", RESTORE_OR_OVERWRITE) from error
    except OSError as error:
        name = os.fsdecode(error.filename or path)
        raise OutputError(f"cannot read {name}: {error.strerror}", "check its type and its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise damaged(path, one_line(str(error))) from error


def _attributes(path: str) -> dict[str, Any]:
    """Return the checked attributes of one of our shards, without the log of starts."""
    attributes = _read_attributes(path)
    attributes.pop(RUN_LOG, None)
    check_format(attributes, path)
    return attributes


def _read_attributes(path: str) -> dict[str, Any]:
    attributes = parse_json(read_bounded(_beside(path, ATTRIBUTES_FILE), ATTRIBUTES_FILE_BYTES, follow_links=False))
    if not isinstance(attributes, dict):
        raise ValueError("its attributes are not a JSON object")  # noqa: TRY004 - damage, not a mistake of the caller
    return attributes


def _is_filled(path: str) -> bool:
    """Return whether a shard is an unfinished folder.

    Raises:
        NotRegularError: It is a link to a folder, which may be anywhere.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise NotRegularError(path, mode)
    return stat.S_ISDIR(mode)


def _opened(path: str) -> AbstractContextManager[BinaryIO]:
    """Open a file of a shard but never a link, which could lead out of the folder of the shard."""
    return opened(path, follow_links=False)


def _beside(path: str, name: str) -> str:
    """Return the path of a shard's file: inside the folder while it is filled, prefixed by its name when published."""
    if _is_filled(path):
        return os.path.join(path, name)
    return f"{path}.json" if name == ATTRIBUTES_FILE else f"{path}.{name}"


def _dataset_path(path: str, name: str) -> str:
    return _beside(path, f"{name.removeprefix('image/')}.npy")


def _header(spec: DatasetSpec) -> bytes:
    """Return the .npy header, version 1.0, padded so that rows start at `ALIGNMENT`."""
    fields = f"{{'descr': '{spec.dtype}', 'fortran_order': False, 'shape': {spec.shape!r}, }}"
    return b"\x93NUMPY\x01\x00" + (ALIGNMENT - 10).to_bytes(2, "little") + fields.encode().ljust(ALIGNMENT - 11) + b"\n"


def _lay_out(path: str, spec: DatasetSpec) -> None:
    with create(path) as file:
        file.write(_header(spec))
        file.truncate(ALIGNMENT + spec.nbytes)


def _arrays(path: str, recipe: Recipe) -> dict[str, Extent]:
    """Return the arrays of a shard, including those without rows, after checking shapes and types with the recipe.

    Publishing may have been interrupted after some arrays were moved to their names.

    Raises:
        OutputError: One is missing, unexpected, or of the wrong shape or type.
    """
    found: dict[str, Extent] = {}
    names = dict.fromkeys((*FEATURE_DATASETS, *feature_datasets(recipe)))
    for name in (*(COMMIT_DATASETS if _is_filled(path) else ()), *names):
        file = _dataset_path(path, name)
        if not os.path.lexists(file) and path.endswith(PARTIAL):
            file = _dataset_path(path.removesuffix(PARTIAL), name)
        if os.path.lexists(file):
            found[name] = _read_header(file, name)
    if POOLED not in found:
        raise ValueError(f"{POOLED} is missing")
    images, tiles = found[POOLED].spec.shape[0], _tiles(found) or 0
    expected = expected_features(recipe, images, tiles)
    if _is_filled(path):
        expected |= expected_records(images)
    check_datasets({name: extent.spec for name, extent in found.items()}, expected, recipe, path)
    return found


def _tiles(arrays: Mapping[str, Extent]) -> int | None:
    """Return the number of tiles that arrays have rows for; None if none of them has one row per tile."""
    per_tile = (name for name in crc_order(arrays) if feature_name(name).is_per_tile)
    return next((arrays[name].spec.shape[0] for name in per_tile), None)


def _read_header(path: str, name: str) -> Extent:
    """Return the place of an array; its header must equal the bytes that `_header` writes, and its size must match."""
    with _opened(path) as file:
        header = file.read(ALIGNMENT)
        size = os.fstat(file.fileno()).st_size
    match = HEADER.match(header)
    if match is not None:
        shape = tuple(int(length) for length in match[2].split(b", "))
        spec = DatasetSpec(name, shape, match[1].decode())
        if header == _header(spec) and size == ALIGNMENT + spec.nbytes:
            return Extent(path, ALIGNMENT, spec)
    raise OutputError(f"{path} is not a sound .npy file of internvit", RESTORE_OR_OVERWRITE)


def _read_array(extent: Extent) -> NDArray[Any]:
    spec = extent.spec
    with _opened(extent.path) as file:
        data = read_exactly(file.fileno(), spec.nbytes, extent.offset, extent.path)
    return np.frombuffer(data, spec.dtype).reshape(spec.shape)


def _pad(attributes: dict[str, Any]) -> bytes:
    """Return JSON padded with blanks to a whole block, so that its size can be planned."""
    text = json.dumps(attributes, indent=1).encode()
    return text.ljust(-(-len(text) // ATTRIBUTES_BLOCK) * ATTRIBUTES_BLOCK - 1) + b"\n"


def _planned_lines(table: ImageTable) -> Iterator[bytes]:
    columns = [getattr(table, name).tolist() for name in COLUMN_DTYPES]
    for key, *values in zip(table.keys, *columns, strict=True):
        entry = {"key": os.fsdecode(key)} | dict(zip(COLUMN_DTYPES, values, strict=True))
        yield json.dumps(entry, ensure_ascii=True).encode() + b"\n"


def _finished_lines(table: ImageTable, digests: NDArray[Any], checksums: NDArray[Any]) -> Iterator[bytes]:
    for line, status, digest, checksum in zip(
        _planned_lines(table), table.status.tolist(), digests, checksums.tolist(), strict=True
    ):
        yield line.removesuffix(b"}\n") + _finished_suffix(status, digest.tobytes(), checksum)


def _finished_suffix(status: int, digest: bytes, checksum: int) -> bytes:
    """Return the end of a line, of fixed width, so that the size of the file is known before the first image."""
    return f', "status": {status:2d}, "digest": "{digest.hex()}", "crc32": "{checksum:08x}"}}\n'.encode()


def _read_lines(path: str) -> tuple[ImageTable, NDArray[Any], NDArray[Any]]:
    """Read the index with digests, uint8 [n, 32], and CRCs, uint32 [n], which are zeros in an unfinished shard.

    Lines are parsed one at a time, because a million parsed lines would take some gigabytes.
    """
    keys: list[bytes] = []
    status, checksums, digests = array("q"), array("Q"), bytearray()
    columns = {name: array("q") for name in COLUMN_DTYPES}
    with _opened(_beside(path, INDEX_FILE)) as file:
        for number, line in enumerate(lines_of(file), 1):
            try:
                entry = parse_json(line)
                keys.append(os.fsencode(entry["key"]))
                for name, column in columns.items():
                    column.append(entry[name])
                is_finished = "status" in entry
                status.append(entry["status"] if is_finished else Status.PENDING)
                checksums.append(int.from_bytes(_hex(entry["crc32"], CRC_BYTES), "big") if is_finished else 0)
                digests += _hex(entry["digest"], DIGEST_BYTES) if is_finished else bytes(DIGEST_BYTES)
            except (KeyError, TypeError, ValueError, OverflowError) as error:  # noqa: PERF203 - the message names the line
                raise ValueError(f"line {number:,} of {INDEX_FILE} does not describe an image") from error
    typed = {name: _fitting(column, COLUMN_DTYPES[name], name) for name, column in columns.items()}
    table = ImageTable.build(keys, _fitting(status, "|u1", "status"), typed)
    return table, np.frombuffer(digests, np.uint8).reshape(len(keys), DIGEST_BYTES), np.array(checksums, np.uint32)


def _hex(text: str, count: int) -> bytes:
    """Parse hex digits as this program writes them.

    Raises:
        ValueError: There are fewer or more digits, or something is between them.
    """
    value = bytes.fromhex(text)
    if value.hex() != text or len(value) != count:
        raise ValueError
    return value


def _fitting(column: array[int], dtype: str, name: str) -> NDArray[Any]:
    """Convert a column to its type, and refuse numbers that do not fit, which numpy would truncate silently."""
    numbers = np.array(column, np.int64)
    bounds = np.iinfo(dtype)
    if len(numbers) and not bounds.min <= int(numbers.min()) <= int(numbers.max()) <= bounds.max:
        raise ValueError(f"an image has a {name} that is out of range")
    typed: NDArray[Any] = numbers.astype(dtype)
    return typed


def _last_columns(file: BinaryIO) -> NDArray[Any] | None:
    """Return the statuses, uint8 [n], of a published index; None if its lines do not end as ours do.

    A million lines are 300 MB; parsing them takes thirty times as long as finding their ends.
    """
    found, rest = [np.empty(0, np.uint8)], b""
    while block := file.read(LINES_BLOCK):
        data = np.frombuffer(rest + block, np.uint8)
        ends = np.flatnonzero(data == ord("\n")) + 1
        statuses = _statuses_before(data, ends) if len(ends) else None
        if statuses is None:
            return None
        found.append(statuses)
        rest = data[ends[-1] :].tobytes()
    return None if rest else np.concatenate(found)


def _statuses_before(data: NDArray[Any], ends: NDArray[Any]) -> NDArray[Any] | None:
    """Return the statuses, uint8 [k], of the lines that end there; None if one does not end in `_finished_suffix`."""
    suffix = np.frombuffer(_finished_suffix(0, bytes(32), 0), np.uint8)
    starts = ends - len(suffix)
    if starts[0] < 0:
        return None
    head = data[starts[:, None] + np.arange(SUFFIX_HEAD)]
    tens, ones = (np.where(head[:, place] == ord(" "), 0, head[:, place] - ord("0")) for place in STATUS_PLACES)
    head[:, STATUS_PLACES] = suffix[STATUS_PLACES]
    is_ours = (head == suffix[:SUFFIX_HEAD]).all() and (tens <= 9).all() and (ones <= 9).all()
    statuses: NDArray[Any] = (10 * tens + ones).astype(np.uint8)
    return statuses if is_ours else None
