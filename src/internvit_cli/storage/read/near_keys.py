"""Suggest keys for a mistyped one, with a limited search that also works among millions of keys."""

from __future__ import annotations

import difflib
import os
from bisect import bisect_left
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOST_SCANNED = 2_000_000
"""Largest number of keys that are searched for parts of the wanted one; of more, an even sample is."""
MOST_COMPARED = 400
"""Largest number of keys compared letter by letter, which takes some hundred microseconds each."""
NEIGHBOURS = 30
"""Number of keys before and after the place of the wanted one in sorted order."""
LEAST_LIKENESS = 0.6
LIKENESS_SPREAD = 0.15
"""Keys whose similarity is lower than the best by more than this are not suggested."""
LONGEST_KEY = 100
"""Bytes that are compared, from the end, which usually identifies a key."""


def near_keys(wanted: str, keys: Sequence[bytes], most: int = 3) -> list[str]:
    """Return the keys most similar to `wanted`, best first; empty if none is similar.

    Args:
        wanted: A key that is not among `keys`.
        keys: All keys; if they are sorted, neighbors are found too.
        most: The largest number of keys to return.
    """
    target = os.fsencode(wanted)
    candidates = dict.fromkeys((*_neighbors(target, keys), *_sharing_parts(target, keys)))
    likeness = {key: _key_similarity(target, key) for key in candidates if key != target}
    best = sorted(likeness, key=lambda key: (-likeness[key], key))[:most]
    least = max(LEAST_LIKENESS, likeness[best[0]] - LIKENESS_SPREAD) if best else 0.0
    return [os.fsdecode(key) for key in best if likeness[key] >= least]


def _neighbors(target: bytes, keys: Sequence[bytes]) -> Sequence[bytes]:
    place = bisect_left(keys, target)
    return keys[max(0, place - NEIGHBOURS) : place + NEIGHBOURS]


def _sharing_parts(target: bytes, keys: Sequence[bytes]) -> Iterator[bytes]:
    """Yield keys that share a part of the file name, rare parts first; a typo leaves one half unchanged."""
    scanned = keys if len(keys) <= MOST_SCANNED else keys[:: len(keys) // MOST_SCANNED + 1]
    if len(scanned) <= MOST_COMPARED:
        yield from scanned
        return
    text = b"\0".join((b"", *scanned, b""))  # a single search is some ten times as fast as one per key
    found = [list(islice(_holding(part, text), MOST_COMPARED)) for part in _parts(target)]
    room = MOST_COMPARED
    for holders in sorted(found, key=len):
        yield from holders[:room]
        room -= len(holders)
        if room <= 0:
            return


def _parts(target: bytes) -> list[bytes]:
    """Return the file name, its halves and its quarters, without the extension."""
    name = target.rpartition(b"/")[2]
    stem = name.rpartition(b".")[0] or name
    sizes = (max(2, -(-len(stem) // count)) for count in (1, 2, 4))
    return list(dict.fromkeys([name, *(stem[at : at + size] for size in sizes for at in range(0, len(stem), size))]))


def _holding(part: bytes, text: bytes) -> Iterator[bytes]:
    """Yield the keys of a NUL-separated text that contain a part of a name."""
    place = text.find(part) if part else -1
    while place >= 0:
        end = text.index(b"\0", place)
        yield text[text.rindex(b"\0", 0, place + 1) + 1 : end]
        place = text.find(part, end)


def _key_similarity(target: bytes, key: bytes) -> float:
    """Return a similarity from 0 to 1, which is highest for the same file name in another folder."""
    if target.endswith(b"/" + key) or key.endswith(b"/" + target):
        return 1.0
    if target.rpartition(b"/")[2] == key.rpartition(b"/")[2]:
        return 0.99
    one, other = target[-LONGEST_KEY:].lower(), key[-LONGEST_KEY:].lower()
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return min(matcher.ratio(), 0.98) if matcher.quick_ratio() >= LEAST_LIKENESS else 0.0
