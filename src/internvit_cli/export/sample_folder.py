"""Write features as a folder with one file per image, as vLLM and training code in the style of LLaVA read them.

`index.jsonl` has a line per image with its facts and the name of its file; `export.json` has the recipe and the model.
"""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.config import StoreDtype, Tokens
from internvit_cli.errors import OutputError, UsageError
from internvit_cli.export.facts import image_facts
from internvit_cli.export.file_names import file_name
from internvit_cli.export.targets import EXPORT_FACTS, INDEX, Target
from internvit_cli.export.writer import UnpublishedResult
from internvit_cli.runtime.words import listed
from internvit_cli.storage.durable import create, disk_errors, sync_path, sync_together, write_file
from internvit_cli.storage.format.layout import POOLED, decode_values

if TYPE_CHECKING:
    from typing import BinaryIO

    from numpy.typing import NDArray

    from internvit_cli.export.blocks import RowBlock
    from internvit_cli.export.destination import Destination
    from internvit_cli.export.selection import RowSelection

FILES_AT_ONCE = 64
"""Files that are synced together."""
HEADER_BYTES = 4096
"""An estimate of what a file takes on the disk in addition to its values."""
FLOAT16_LIMIT = 65520.0
"""The smallest magnitude that rounds to infinity in float16."""


class SampleFolderWriter:
    """Writes a selection as a folder of arrays, an index, and the facts about all of them."""

    def __init__(self, selection: RowSelection, destination: Destination, target: Target) -> None:
        """Choose what each file holds: the tokens of an image, or its vector if no tokens are written.

        Raises:
            UsageError: Several layers are selected, or the tokens are not those that vLLM takes.
        """
        self._selection = selection
        self._destination = destination
        self._target = target
        self._tokens = selection.written.tokens
        self._layer = self._only_layer()
        self._dtype = selection.shape.store_dtype
        self._index: BinaryIO | None = None
        self._unsynced: dict[str, BinaryIO] = {}
        if target is Target.VLLM and self._tokens is not Tokens.PROJECTED:
            raise UsageError(
                f"--to vllm needs projected tokens, and {self._what()} would be exported",
                "internvit project OUT NEW --model CHAT projects visual tokens; or extract with --tokens projected",
            )

    def _what(self) -> str:
        return "vectors" if self._tokens is Tokens.NONE else f"{self._tokens.value} tokens"

    def _only_layer(self) -> int:
        kept = self._selection.written_recipe.layers
        layers = [
            layer for layer in kept if self._selection.kept_layers is None or layer in self._selection.kept_layers
        ]
        if len(layers) > 1:
            raise UsageError(
                f"--to {self._target.value} writes one layer, and the output holds {listed(layers)}",
                f"add --layer {layers[-1]}, for example",
            )
        return layers[0]

    def needed_bytes(self) -> int:
        """Return the approximate size of all files in bytes."""
        width = 4 if self._is_widened else 2
        if self._tokens is Tokens.NONE:
            values, width = int(self._selection.is_done.sum()) * self._selection.shape.pooled_width, 4
        else:
            tiles = int(self._selection.table.tile_counts[self._selection.is_done].sum())
            values = tiles * self._selection.shape.tokens_per_tile * self._selection.shape.channels
        return values * width + HEADER_BYTES * len(self._selection)

    @property
    def _is_widened(self) -> bool:
        """Whether tokens are written as float32."""
        kept_in_pt = self._target is Target.PT_FOLDER and self._dtype is StoreDtype.BFLOAT16
        return self._target is not Target.VLLM and self._dtype is not StoreDtype.FLOAT16 and not kept_in_pt

    def begin(self) -> None:
        """Create the folder, and the index in it."""
        folder = self._destination.staged(self._destination.name)
        with disk_errors(folder):
            os.mkdir(folder)
            self._index = create(self._path(INDEX), buffering=1 << 20)

    def add(self, block: RowBlock) -> None:
        """Write a file per image with features, and a line in the index for every image."""
        for number in range(len(block)):
            facts = image_facts(self._selection, block.first + number)
            line = {"key": facts.pop("key"), "file": None, "shape": None, "dtype": None, "token_count": 0, **facts}
            if block.is_done:
                line |= self._write_image(block.first + number, block.image(number))
            assert self._index is not None
            with disk_errors(self._index.name):
                self._index.write(json.dumps(line).encode() + b"\n")

    def finish(self) -> UnpublishedResult:
        """Write the facts about all files, and sync everything."""
        self._sync()
        assert self._index is not None
        with disk_errors(self._index.name):
            self._index.flush()
            os.fsync(self._index.fileno())
        facts = {
            "to": self._target.value,
            "holds": self._what(),
            "layer": self._layer,
            "images": len(self._selection),
            "attributes": self._selection.attributes(len(self._selection) - 1),
        }
        write_file(self._path(EXPORT_FACTS), json.dumps(facts, indent=1).encode() + b"\n")
        sync_path(self._destination.staged(self._destination.name))
        return UnpublishedResult([self._destination.name], notes=self._notes())

    def close(self) -> None:
        """Close the files."""
        for file in (*self._unsynced.values(), *([self._index] if self._index else [])):
            file.close()
        self._unsynced, self._index = {}, None

    # ----------------------------------------------------------------------------------------------------------- files

    def _path(self, name: str) -> str:
        return os.path.join(self._destination.staged(self._destination.name), name)

    def _write_image(self, position: int, arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
        """Write the file of an image, and return what the index says of it."""
        key = self._selection.table.keys[position]
        name = file_name(key, self._target.sample_suffix)
        values = self._values(position, arrays)
        if self._target is Target.PT_FOLDER:
            from internvit_cli.model.tensors import saved_tensor

            data: Any = saved_tensor(values, self._dtype if self._holds_bits(values) else StoreDtype.FLOAT32)
        else:
            data = _npy(values)
        path = self._path(name)
        with disk_errors(path):
            file = self._unsynced[path] = create(path)
            file.write(data)
        if len(self._unsynced) >= FILES_AT_ONCE:
            self._sync()
        tokens = 0 if self._tokens is Tokens.NONE else values.size // values.shape[-1]
        dtype = "bfloat16" if self._holds_bits(values) else values.dtype.name
        return {"file": name, "shape": list(values.shape), "dtype": dtype, "token_count": tokens}

    def _sync(self) -> None:
        for path, file in self._unsynced.items():
            with disk_errors(path):
                file.flush()
        if self._unsynced:
            sync_together({path: file.fileno() for path, file in self._unsynced.items()})
        for file in self._unsynced.values():
            file.close()
        self._unsynced = {}

    # ---------------------------------------------------------------------------------------------------------- values

    def _holds_bits(self, values: NDArray[Any]) -> bool:
        """Return whether an array holds the bits of bfloat16."""
        return values.dtype == np.uint16

    def _values(self, position: int, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
        """Return what the file of an image holds: [d], [tiles, T, C], or [tiles * T, C] for vLLM."""
        if self._tokens is Tokens.NONE:
            return arrays[self._selection.dataset(POOLED, self._layer)]
        stored = arrays[self._selection.dataset(self._tokens.dataset, self._layer)]
        if self._target is Target.PT_FOLDER and self._dtype is StoreDtype.BFLOAT16:
            return stored
        scales = arrays.get(self._selection.dataset(self._tokens.scales_dataset, self._layer))
        values = decode_values(stored, self._dtype, scales)
        return values if self._target is not Target.VLLM else self._for_vllm(position, values)

    def _for_vllm(self, position: int, values: NDArray[Any]) -> NDArray[Any]:
        if self._dtype is not StoreDtype.FLOAT16 and np.abs(values).max(initial=0) >= FLOAT16_LIMIT:
            raise OutputError(
                f"the tokens of {os.fsdecode(self._selection.table.keys[position])!r} do not fit into float16, which "
                "--to vllm writes",
                "export with --to npy-folder, which writes float32",
            )
        return values.astype(np.float16, copy=False).reshape(-1, values.shape[-1])

    def _notes(self) -> list[str]:
        if self._tokens is Tokens.NONE or self._dtype is StoreDtype.FLOAT16:
            return []
        if self._target is Target.VLLM:
            return [f"{self._dtype.value} tokens are rounded to float16"]
        if self._is_widened and self._dtype is not StoreDtype.FLOAT32:
            return [f"{self._dtype.value} tokens are written as float32"]
        return []


def _npy(values: NDArray[Any]) -> bytes:
    """Return an array as the content of a .npy file."""
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()
