"""Keep an approximate index beside an output, with usearch; it is built when needed, and again when it is stale.

`feats.h5.search/` holds the graph (`chosen.usearch`), the space of its vectors (`chosen.npz`), and a file that is
written last (`chosen.json`), with the sizes of both and a digest of the output's contents. `raw` instead of `chosen` is
the index of `--raw`; earlier layers have their number in the name (`chosen-layer-21`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import numpy as np

from internvit_cli.errors import InternvitError, OutputError
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.untrusted import opened, parse_json, read_bounded
from internvit_cli.similarity.nearest import best
from internvit_cli.similarity.similarity_space import MOST_DIRECTIONS, Space
from internvit_cli.storage.durable import (
    create,
    disk_errors,
    folder_for,
    refuse_special,
    remove,
    rename_durably,
    sync_path,
    write_file,
)
from internvit_cli.storage.output_names import PARTIAL

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from numpy.typing import NDArray

    from internvit_cli.storage.read.reader import Features
    from internvit_cli.storage.read.row_index import PooledVectors

FOLDER_SUFFIX = ".search"
INDEX_VERSION = 2
LEAST_CANDIDATES = 100
"""Smallest number of vectors that the graph proposes per query; they are then compared exactly."""
CANDIDATES_PER_HIT = 5
DTYPE = "f16"
CONNECTIVITY = 32
SEARCH_WIDTH = 512
"""Parameters of the graph, whose recall docs/search.md reports: almost all of the ten nearest vectors."""
PARTS = ("usearch", "npz")
FACTS_BYTES = 1 << 20
"""Largest size of an index's facts, or of the headers of its arrays, in bytes."""
SUPERSEDED = ("whitened.json", "whitened.npz", "whitened.usearch")
"""Files of an index of version 1, which is no longer used."""


def contents_digest(features: Features) -> str:
    """Return the SHA-256 of everything that determines an output's vectors, as 64 hex digits.

    CRCs represent the rows, so that no row has to be read.
    """
    hasher = hashlib.sha256()
    for shard in features.shards:
        hasher.update(str(shard.attributes.get("index_digest", "")).encode())
        hasher.update(b"\0".join(sorted(shard.superseded_keys)))
        hasher.update(np.ascontiguousarray(shard.table.status).data)
        hasher.update(np.ascontiguousarray(shard.checksums).data)
    return hasher.hexdigest()


@dataclass(frozen=True)
class AnnIndex:
    """A graph over the embedded vectors of an output."""

    space: Space
    is_new: bool
    """Whether it was just built."""
    folder: str
    """The folder that holds it."""
    _graph: Any

    def nearest(self, vectors: PooledVectors, queries: NDArray[Any], count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the result of `nearest.nearest`, except for vectors that the graph misses; similarities are exact.

        Raises:
            OutputError: The graph names vectors that do not exist.
        """
        wanted = min(len(vectors), max(LEAST_CANDIDATES, CANDIDATES_PER_HIT * count))
        self._graph.expansion_search = max(SEARCH_WIDTH, wanted)
        numbers, similarities = [], []
        for query in queries:
            found = self._graph.search(query, wanted).keys.astype(np.int64)
            if ((found < 0) | (found >= len(vectors))).any():
                raise OutputError(
                    f"the index in {self.folder} names vectors that do not exist",
                    "remove it, so that it is built again",
                )
            scores = self.space.embed(vectors[found]) @ query
            kept_numbers, kept = best(found[None], scores[None], count)
            numbers.append(kept_numbers[0])
            similarities.append(kept[0])
        return np.stack(numbers), np.stack(similarities)


def open_index(
    features: Features,
    vectors: PooledVectors,
    make_space: Callable[[], Space],
    name: str,
    observer: Observer = SILENT,
) -> AnnIndex:
    """Open the index of an output in a space, and build it if it is missing or the output has changed.

    Args:
        features: The output.
        vectors: All its vectors.
        make_space: Fits the space if needed.
        name: The name of the index, such as `chosen`, `raw` or `chosen-layer-21`.
        observer: Receives progress.

    Raises:
        InternvitError: usearch is not installed, or the index cannot be written.
    """
    usearch = _usearch()
    # An index from before the run finished is found too, and built again.
    base = os.path.join(features.path.removesuffix(PARTIAL) + FOLDER_SUFFIX, name)
    digest = contents_digest(features)
    if (space := _stored_space(base, digest, vectors.shape[1])) is not None:
        try:
            graph = usearch.Index.restore(f"{base}.usearch", view=True)
            if graph.ndim == vectors.shape[1] and len(graph) == len(vectors):
                return AnnIndex(space, False, os.path.dirname(base), graph)
        except (RuntimeError, ValueError, OSError, TypeError, AttributeError):
            pass  # a damaged graph is built again, like a missing one
    space = make_space()
    with observer.phase("indexing", "image", len(vectors)) as phase:
        graph = _build(usearch, vectors, space, phase.at)
    with observer.phase("writing the index"):
        _save(base, graph, space, digest)
    return AnnIndex(space, True, os.path.dirname(base), graph)


def _usearch() -> ModuleType:
    try:
        import usearch.index
    except ImportError as error:
        raise InternvitError(
            "--index needs usearch, which is not installed",
            "install it with: pip install 'internvit-cli[search]', or search without --index, which is exact and fast "
            "enough for some hundred thousand images",
        ) from error
    module: ModuleType = usearch.index
    return module


def _build(usearch: ModuleType, vectors: PooledVectors, space: Space, on_progress: Callable[[int], None]) -> Any:
    graph = usearch.Index(ndim=vectors.shape[1], metric="ip", dtype=DTYPE, connectivity=CONNECTIVITY)
    for start, block in vectors.blocks(8 << 20):
        graph.add(np.arange(start, start + len(block), dtype=np.uint64), space.embed(block))
        on_progress(start + len(block))
    return graph


def _save(base: str, graph: Any, space: Space, digest: str) -> None:
    """Write the parts in a temporary folder first, and the file with their sizes last."""
    folder, staging = os.path.dirname(base), f"{base}.tmp"
    if os.path.islink(folder):
        refuse_special(folder)
    with folder_for(base), disk_errors(base):
        remove(f"{base}.json")
        remove(staging)
        os.mkdir(staging)
        try:
            _save_graph(graph, os.path.join(staging, "usearch"))
            with create(os.path.join(staging, "npz")) as file:
                np.savez(file, **space.arrays())  # type: ignore[arg-type]
            for suffix in PARTS:
                sync_path(os.path.join(staging, suffix))
                rename_durably(os.path.join(staging, suffix), f"{base}.{suffix}")
        finally:
            remove(staging)
        for name in SUPERSEDED:
            remove(os.path.join(folder, name))
    facts = {"version": INDEX_VERSION, "contents": digest, "bytes": _sizes(base)} | space.facts()
    facts["directions"] = 0 if space.scales is None else len(space.scales)
    write_file(f"{base}.json", json.dumps(facts, indent=1).encode() + b"\n")


def _save_graph(graph: Any, path: str) -> None:
    """Write a graph; usearch raises a RuntimeError for every error of the disk."""
    try:
        graph.save(path)
    except RuntimeError as error:
        free, needed = shutil.disk_usage(os.path.dirname(path)).free, int(graph.serialized_length)
        raise OSError(errno.ENOSPC if free < needed else errno.EIO, str(error)) from error


def _stored_space(base: str, digest: str, width: int) -> Space | None:
    """Return the space of an up-to-date index; None if it is missing, stale or damaged.

    Args:
        base: The common prefix of its files.
        digest: The digest of the output's contents.
        width: The number of values per vector.
    """
    try:
        facts = parse_json(read_bounded(f"{base}.json", FACTS_BYTES, follow_links=False))
        vouched = facts["version"], facts["contents"], facts["bytes"]
        if vouched != (INDEX_VERSION, digest, _sizes(base)):
            return None
        count = int(facts["directions"])
        if not 0 <= count <= MOST_DIRECTIONS:
            return None
        shapes = {"mean": (width,), "directions": (count, width), "scales": (count,)}
        arrays = _stored_arrays(f"{base}.npz", shapes)
        mean, directions, scales = (arrays.get(name) for name in shapes)
        reason, fitted_on = str(facts.get("space_reason", "")), int(facts.get("fitted_on", 0))
        return Space(str(facts["space"]), reason, mean, directions, scales, fitted_on)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, OverflowError):
        return None


def _stored_arrays(path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Return the float32 arrays of an `.npz` file, without those that it lacks.

    Raises:
        ValueError: An array has another shape or type, or is compressed and might have any size.
    """
    most = sum(4 * math.prod(shape) for shape in shapes.values()) + FACTS_BYTES
    data = io.BytesIO(read_bounded(path, most, follow_links=False))
    with ZipFile(data) as members:
        if any(member.compress_type != ZIP_STORED for member in members.infolist()):
            raise ValueError("its members are compressed")
    with np.load(data, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in shapes if name in arrays}
    if any(array.shape != shapes[name] or array.dtype != np.float32 for name, array in found.items()):
        raise ValueError("its arrays have another shape or type")
    return found


def _sizes(base: str) -> dict[str, int]:
    """Return the sizes of the parts in bytes.

    Raises:
        OSError: A part does not exist, or is not a regular file.
    """
    sizes = {}
    for suffix in PARTS:
        with opened(f"{base}.{suffix}", follow_links=False) as file:
            sizes[suffix] = os.fstat(file.fileno()).st_size
    return sizes
