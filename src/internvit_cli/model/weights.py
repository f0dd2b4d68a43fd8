"""Choose the files that hold the weights of a checkpoint, or refuse with what it holds instead."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from internvit_cli.errors import ModelError
from internvit_cli.model.files import INDEX_FILE, SINGLE_FILE, WEIGHTS_SUFFIX, FolderFiles, HubFiles
from internvit_cli.model.json_files import MAX_INDEX_BYTES, check_tensor_name, read_json, short_repr
from internvit_cli.model.safetensors_header import StoredTensor, read_safetensors_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from internvit_cli.model.files import CheckpointFiles

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

MOST_NAMED = 6
"""Largest number of file names in a message."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\..+)?\.safetensors")
_INDEX = re.compile(r".+\.safetensors\.index(\..+)?\.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FOREIGN_WEIGHTS = {
    ".gguf": "GGUF weights, which are for llama.cpp and mostly quantized",
    ".onnx": "an ONNX graph, which does not keep the names of tensors",
    ".msgpack": "Flax weights",
    ".h5": "TensorFlow weights",
    ".tflite": "TensorFlow Lite weights",
    ".engine": "a TensorRT engine",
    ".mlpackage": "a Core ML model",
}
"""Names of other formats of weights by file extension."""

CONVERT_HINT = (
    "if you trust them, convert them: "
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.contiguous() for k, v in torch.load('IN', weights_only=True).items()}, 'model.safetensors')\""
)


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """A set of weights: the name of every tensor, and its file."""

    tensors: Mapping[str, str]
    """File names by name of tensor."""
    note: str = ""
    """A note for the user on the choice; empty if it was obvious."""


def choose_weights(files: CheckpointFiles, wanted: str | None = None) -> WeightFiles:
    """Find the set of weights of a checkpoint.

    Args:
        files: The files of the checkpoint.
        wanted: The file of weights or index that the user named; None if the user named none.

    Raises:
        ModelError: There are no weights, or several sets of which none is preferred.
    """
    if wanted is not None:
        return WeightFiles(_tensors_of(files, wanted))
    names = files.names()
    if INDEX_FILE in names and SINGLE_FILE in names:
        return _one_of_both(files, names)
    for name in (INDEX_FILE, SINGLE_FILE):
        if name in names:
            return _all_but_named(files, names, name)
    others = sorted(name for name in names if name.endswith(WEIGHTS_SUFFIX) and name != ADAPTER_WEIGHTS)
    indexes = sorted(name for name in names if _INDEX.fullmatch(name))
    if len(indexes) == 1:
        return WeightFiles(_tensors_of(files, indexes[0]), f"the weights are those of {indexes[0]}")
    if others and not indexes:
        return _by_other_names(files, others)
    if indexes:
        raise _several(files, indexes)
    raise _no_weights(files, names)


def is_set_of_weights(name: str) -> bool:
    """Return whether a file name is that of a whole set of weights or of an index."""
    return bool(_INDEX.fullmatch(name)) or (name.endswith(WEIGHTS_SUFFIX) and not _SHARD.fullmatch(name))


def _one_of_both(files: CheckpointFiles, names: frozenset[str]) -> WeightFiles:
    """Choose between a whole file and an index if a folder holds both."""
    tensors = _tensors_of(files, INDEX_FILE)
    shards = set(tensors.values())
    if shards == {SINGLE_FILE}:
        return WeightFiles(tensors)
    missing = sorted(shards - names)
    if missing:
        note = f"{INDEX_FILE} names {_listed(missing)}, which {_are(missing)} not there: {SINGLE_FILE} is used alone"
        return WeightFiles(_tensors_of(files, SINGLE_FILE), note)
    raise ModelError(
        f"{files.where}: two sets of weights: {SINGLE_FILE}, and {_listed(sorted(shards))} of {INDEX_FILE}",
        f"delete the older set, or name one: --model {_named(files, SINGLE_FILE)} or --model "
        f"{_named(files, INDEX_FILE)}",
    )


def _all_but_named(files: CheckpointFiles, names: frozenset[str], chosen: str) -> WeightFiles:
    """Use the weights with a standard name, and note which others are ignored, such as an adapter or an older set."""
    tensors = _tensors_of(files, chosen)
    unread = sorted(name for name in names.difference(tensors.values()) if name.endswith(WEIGHTS_SUFFIX))
    if not unread:
        return WeightFiles(tensors)
    return WeightFiles(tensors, f"the weights are those of {chosen}: {_listed(unread)} {_are(unread)} not read")


def _by_other_names(files: CheckpointFiles, others: list[str]) -> WeightFiles:
    """Use weights without a standard name: all shards of one set, or the only file."""
    shards = [match for name in others if (match := _SHARD.fullmatch(name))]
    sets = {(match["stem"], match["count"], match["variant"]) for match in shards}
    if len(shards) == len(others) and len(sets) == 1:
        stem, count, variant = sets.pop()
        return _without_index(files, [f"{stem}-{n:05}-of-{count}{variant or ''}{WEIGHTS_SUFFIX}" for n in _to(count)])
    if len(others) > 1:
        raise _several(files, others)
    return WeightFiles(_tensors_of(files, others[0]), f"the weights are those of {others[0]}")


def _to(count: str) -> range:
    return range(1, min(int(count), 9999) + 1)


def _without_index(files: CheckpointFiles, shards: list[str]) -> WeightFiles:
    missing = [name for name in shards if name not in files.names()]
    if missing:
        raise ModelError(
            f"{files.where}: {_listed(missing)} of {len(shards)} shards {_are(missing)} missing",
            "download the model again",
        )
    tensors: dict[str, str] = {}
    for shard in shards:
        for name in _tensors_of(files, shard):
            if name in tensors:
                raise ModelError(f"{files.where}: tensor {name!r} is in {tensors[name]} and in {shard}")
            tensors[name] = shard
    return WeightFiles(tensors)


def _several(files: CheckpointFiles, names: list[str]) -> ModelError:
    return ModelError(
        f"{files.where}: there is no {SINGLE_FILE}, and several other files could hold the weights: {_listed(names)}",
        f"name one: --model {_named(files, names[0])}",
    )


def _no_weights(files: CheckpointFiles, names: frozenset[str]) -> ModelError:
    if ADAPTER_CONFIG in names or ADAPTER_WEIGHTS in names:
        return adapter_refusal(files)
    if other := other_weights_error(files.where, names):
        return other
    if isinstance(files, HubFiles) and files.offline:
        return files.missing(SINGLE_FILE)
    return ModelError(
        f"{files.where}: there is no {SINGLE_FILE} and no {INDEX_FILE}", "name the folder of a complete checkpoint"
    )


def other_weights_error(where: str, names: Iterable[str]) -> ModelError | None:
    """Return the error for weights in other formats than safetensors; None if there are none."""
    ordered = sorted(names)
    for name in ordered:
        if name.endswith(PICKLES) and not name.startswith("training_args"):
            return pickle_refusal(where, name)
    for name in ordered:
        if kind := FOREIGN_WEIGHTS.get(os.path.splitext(name)[1].lower()):
            return foreign_refusal(where, name, kind)
    return None


def adapter_refusal(files: CheckpointFiles) -> ModelError:
    """Return the error for a folder that holds a LoRA adapter without its model."""
    path = files.find(ADAPTER_CONFIG)
    base = read_json(path).get("base_model_name_or_path") if path else None
    of = f" of {base[:200]}" if isinstance(base, str) and base else ""
    return ModelError(
        f"{files.where}: a LoRA adapter{of}, not a model",
        "merge it into its model first (peft's merge_and_unload), save the merged model, and name its folder",
    )


def pickle_refusal(where: str, name: str) -> ModelError:
    """Return the error for pickle weights, which may run code."""
    return ModelError(f"{where}: only pickle weights ({name}), which can run code when they are opened", CONVERT_HINT)


def foreign_refusal(where: str, name: str, kind: str) -> ModelError:
    """Return the error for weights in the format of another tool."""
    return ModelError(f"{where}: {name} is {kind}", "name a checkpoint in safetensors")


def read_stored(files: CheckpointFiles, weights: WeightFiles, wanted: Iterable[str]) -> dict[str, StoredTensor]:
    """Locate some tensors, opening only the files that hold them.

    Args:
        files: The files of the checkpoint.
        weights: Its set of weights.
        wanted: The names of tensors.

    Raises:
        ModelError: A file is missing or broken, or does not hold what its index says.
    """
    found: dict[str, StoredTensor] = {}
    for shard in sorted({weights.tensors[name] for name in wanted}):
        header = read_safetensors_header(files.need(shard))
        found |= {name: header[name] for name in header if weights.tensors.get(name) == shard}
    for name in wanted:
        if name not in found:
            raise ModelError(
                f"{files.where}: tensor {name!r} is not in {weights.tensors[name]}, although the index says so",
                "download the model again",
            )
    return found


def _tensors_of(files: CheckpointFiles, name: str) -> dict[str, str]:
    """Return the files of tensors by name, from an index or from the header of a file that holds all of them."""
    path = files.need(name)
    if not name.endswith(".json"):
        return dict.fromkeys(read_safetensors_header(path), name)
    tensors = read_json(path, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise ModelError(f"{path}: weight_map is missing")
    for tensor, shard in tensors.items():
        check_tensor_name(tensor, path)
        if not isinstance(shard, str) or os.path.basename(shard) != shard or not shard.endswith(WEIGHTS_SUFFIX):
            raise ModelError(
                f"{path}: tensor {tensor!r} is listed in {short_repr(shard)}, which is not a shard beside the index"
            )
    return tensors


def _named(files: CheckpointFiles, name: str) -> str:
    """Return the value of --model that selects a file."""
    if isinstance(files, FolderFiles):
        return os.path.join(files.folder, name)
    return f"hf://{files.where}/{name}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
