"""Return the facts about images and datasets that tables, tars and indexes hold beside features."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from internvit_cli.config import Status, StoreDtype
from internvit_cli.plan.table import COLUMN_DTYPES
from internvit_cli.sources.members import shown
from internvit_cli.storage.format.layout import decode_values, is_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from internvit_cli.export.selection import RowSelection
    from internvit_cli.storage.format.layout import DatasetSpec

NUMBERS = tuple(COLUMN_DTYPES)
"""Facts that are whole numbers, in addition to `tiles`."""
BFLOAT16_NOTE = "bfloat16 tokens are stored as their bits in uint16 (--widen stores float32)"
FP8_NOTE = "fp8 tokens are stored as their bits in uint8 (float8 e4m3), beside their scales"


def image_facts(selection: RowSelection, position: int) -> dict[str, Any]:
    """Return the facts about an image.

    Returns:
        `key` with invalid bytes as lone surrogates, `status` as a word, the `reason` of a skipped image, numbers,
        `tiles`, `digest` and `crc32` as hex digits (empty if there are none), and the `path` of the picture.
    """
    table = selection.table
    key, status = table.keys[position], Status(int(table.status[position]))
    is_done = status is Status.DONE
    numbers = {name: int(getattr(table, name)[position]) for name in NUMBERS}
    return {
        "key": os.fsdecode(key),
        "status": status.word,
        "reason": "" if is_done else selection.messages.get(os.fsdecode(key), ""),
        **numbers,
        "tiles": int(table.tile_offset[position + 1]) - int(table.tile_offset[position]),
        "digest": selection.digests[position].tobytes().hex() if is_done else "",
        "crc32": f"{int(selection.checksums[position]):08x}" if is_done else "",
        "path": os.fsdecode(shown(selection.sources[numbers["source"]].path(key))),
    }


def attributes_text(selection: RowSelection) -> str:
    """Return the root attributes, including recipe and sources, as one JSON object in ASCII."""
    return json.dumps(selection.attributes(len(selection) - 1), sort_keys=True)


def as_utf8(name: str) -> str:
    r"""Return a name as valid text, with invalid bytes written as `\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def is_utf8(name: str) -> bool:
    """Return whether a name is valid UTF-8."""
    return os.fsencode(as_utf8(name)) == os.fsencode(name)


def is_bfloat16(selection: RowSelection, name: str) -> bool:
    """Return whether a dataset holds the bits of bfloat16."""
    return is_tokens(name) and selection.shape.store_dtype is StoreDtype.BFLOAT16


def native_type(selection: RowSelection, name: str) -> str | None:
    """Return safetensors' name for a type that numpy lacks; None for other types."""
    types = {StoreDtype.BFLOAT16: "BF16", StoreDtype.FP8: "F8_E4M3"}
    return types.get(selection.shape.store_dtype) if is_tokens(name) else None


def bits_notes(selection: RowSelection, names: Iterable[str], *, widen: bool) -> list[str]:
    """Return notes on tokens that a target stores as bits."""
    if not any(map(is_tokens, names)):
        return []
    dtype = selection.shape.store_dtype
    if dtype is StoreDtype.FP8:
        return [FP8_NOTE]
    return [BFLOAT16_NOTE] if dtype is StoreDtype.BFLOAT16 and not widen else []


def stored_type(selection: RowSelection, name: str, spec: DatasetSpec) -> str:
    """Return the name of a dataset's type: that of the stored tokens, or numpy's name."""
    if is_tokens(name):
        return selection.shape.store_dtype.value
    return {"<f4": "float32", "<f2": "float16"}.get(spec.dtype, spec.dtype)


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """Convert bits of bfloat16 to float32, exactly."""
    return decode_values(array, StoreDtype.BFLOAT16).astype("<f4", copy=False)
