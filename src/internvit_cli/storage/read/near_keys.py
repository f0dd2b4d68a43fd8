"""Which keys a mistyped one may have meant: a bounded search, also among millions of keys."""

from __future__ import annotations

import difflib
import os
from bisect import bisect_left
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MOST_SCANNED = 2_000_000
"""Keys looked through for parts of the wanted one; of more, every second, third and so on."""
MOST_COMPARED = 400
"""Keys compared letter by letter, which takes some hundred microseconds each."""
NEIGHBOURS = 30
"""Keys before and after the place where the wanted one would stand in sorted order."""
LEAST_LIKENESS = 0.6
LIKENESS_SPREAD = 0.15
"""What is less like by more than this is not worth a mention."""
LONGEST_KEY = 100
"""Bytes compared, from the end: what tells keys apart is at their end."""


def near_keys(wanted: str, keys: Sequence[bytes], most: int = 3) -> list[str]:
    """The keys most like `wanted`, best first; none when nothing is like it.

    Args:
        wanted: a key that is not among `keys`.
        keys: all keys; where they are sorted, neighbors are found as well.
        most: how many to return.
    """
    target = os.fsencode(wanted)
    candidates = dict.fromkeys((*_neighbors(target, keys), *_sharing_parts(target, keys)))
    likeness = {key: _likeness(target, key) for key in candidates if key != target}
    best = sorted(likeness, key=lambda key: (-likeness[key], key))[:most]
    least = max(LEAST_LIKENESS, likeness[best[0]] - LIKENESS_SPREAD) if best else 0.0
    return [os.fsdecode(key) for key in best if likeness[key] >= least]


def _neighbors(target: bytes, keys: Sequence[bytes]) -> Sequence[bytes]:
    place = bisect_left(keys, target)
    return keys[max(0, place - NEIGHBOURS) : place + NEIGHBOURS]


def _sharing_parts(target: bytes, keys: Sequence[bytes]) -> Iterator[bytes]:
    """Keys that share the file's name or a part of it, rare parts first: one typo leaves one half whole."""
    scanned = keys if len(keys) <= MOST_SCANNED else keys[:: len(keys) // MOST_SCANNED + 1]
    if len(scanned) <= MOST_COMPARED:
        yield from scanned
        return
    text = b"\0".join((b"", *scanned, b""))  # one search over all of them is some ten times as fast as one each
    found = [list(islice(_holding(part, text), MOST_COMPARED)) for part in _parts(target)]
    room = MOST_COMPARED
    for holders in sorted(found, key=len):
        yield from holders[:room]
        room -= len(holders)
        if room <= 0:
            return


def _parts(target: bytes) -> list[bytes]:
    """The file's name, its halves and its quarters, without the extension that many share."""
    name = target.rpartition(b"/")[2]
    stem = name.rpartition(b".")[0] or name
    sizes = (max(2, -(-len(stem) // count)) for count in (1, 2, 4))
    return list(dict.fromkeys([name, *(stem[at : at + size] for size in sizes for at in range(0, len(stem), size))]))


def _holding(part: bytes, text: bytes) -> Iterator[bytes]:
    """The keys of a NUL-separated text that hold a part of a name."""
    place = text.find(part) if part else -1
    while place >= 0:
        end = text.index(b"\0", place)
        yield text[text.rindex(b"\0", 0, place + 1) + 1 : end]
        place = text.find(part, end)


def _likeness(target: bytes, key: bytes) -> float:
    """0 to 1; the same file in another folder, or under a longer path, is as like as can be without being equal."""
    if target.endswith(b"/" + key) or key.endswith(b"/" + target):
        return 1.0
    if target.rpartition(b"/")[2] == key.rpartition(b"/")[2]:
        return 0.99
    one, other = target[-LONGEST_KEY:].lower(), key[-LONGEST_KEY:].lower()
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return min(matcher.ratio(), 0.98) if matcher.quick_ratio() >= LEAST_LIKENESS else 0.0
