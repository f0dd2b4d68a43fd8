"""Explain a list of which no file exists: it may be a table, URLs, or paths relative to another folder."""

from __future__ import annotations

import csv
import json
import os
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from internvit_cli.errors import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

LOOKED_AT = 100
"""Number of lines that are examined."""
_TABLES = {".csv": "a table (csv)", ".tsv": "a table (tsv)"}
_JSON = (".json", ".jsonl", ".ndjson")


class _Separator(NamedTuple):
    """The separator between the columns of a table."""

    character: str
    name: str
    option: str
    """Of cut."""


_SEPARATORS = (
    _Separator("\t", "tabs", ""),
    _Separator(",", "commas", " -d,"),
    _Separator(";", "semicolons", " -d';'"),
    _Separator("|", "bars", " -d'|'"),
    _Separator(" ", "spaces", " -d' '"),
)


@dataclass(frozen=True, slots=True)
class MissingList:
    """The message and the hint for a list of which no file exists."""

    message: str
    hint: str


def explain_missing(lines: Sequence[bytes], name: str, root: bytes) -> MissingList:
    """Explain why no file of a list exists.

    Args:
        lines: The first `LOOKED_AT` lines, at least one.
        name: The path of the list; empty for standard input.
        root: The folder to which its paths were taken to be relative.
    """
    told = f"the list {one_line(name) if name else 'on standard input'} names no file that exists"
    if all(b"://" in line for line in lines):
        return MissingList(f"{told}: it names URLs", _how_to_list_urls(lines, name))
    beside = os.path.dirname(os.path.abspath(os.fsencode(name))) if name else root
    for folder in (root, beside):
        if _any_there(lines, folder):
            return MissingList(f"{told}: its paths are relative to another folder", f"add{_root_option(folder, root)}")
        if hint := how_to_cut(lines, name, folder, root):
            return MissingList(f"{told}: it is a table", hint)
    relative = f"paths are relative to {one_line(root)}; --root names another folder"
    if shape := _foreign_paths(lines):
        return MissingList(f"{told}: {shape[0]}", f"{shape[1]}; {relative}")
    if table := _looks_like(lines, name):
        return MissingList(f"{told}: it looks like {table}", f"list only the paths, one per line; {relative}")
    return MissingList(told, relative)


def _how_to_list_urls(lines: Sequence[bytes], name: str) -> str:
    if all(line.startswith(b"file://") for line in lines):
        return f"list paths, not URLs: sed 's|^file://||' {_shown(name)}"
    return "download the files first, and list their paths"


def _foreign_paths(lines: Sequence[bytes]) -> tuple[str, str] | None:
    """Explain paths that only shells or other systems understand; return None for others."""
    if all(line.startswith(b"~/") for line in lines):
        return "only a shell expands ~", "write the full path of the folder"
    if all(b"\\" in line and b"/" not in line for line in lines):
        return "it has Windows paths", "write / instead of \\"
    return None


def how_to_cut(lines: Sequence[bytes], name: str, folder: bytes, root: bytes) -> str:
    """Return a hint on how to extract the column of paths from a table; empty if there is none.

    Args:
        lines: Its first lines, at least one.
        name: Its path; empty for standard input.
        folder: The folder to which its paths may be relative.
        root: The folder to which they are taken to be relative.
    """
    command = _cutting(lines, folder)
    if not command:
        return ""
    listing = command.replace("LIST", _shown(name))
    return f"extract the column of paths: {listing} | internvit extract -{_root_option(folder, root)} ..."


def _shown(name: str) -> str:
    return shlex.quote(name) if name else "LIST"


def _root_option(folder: bytes, root: bytes) -> str:
    return "" if folder == root else f" --root {shlex.quote(os.fsdecode(folder))}"


def _any_there(paths: Iterable[bytes], folder: bytes) -> bool:
    return any(path and b"\0" not in path and os.path.lexists(os.path.join(folder, path)) for path in paths)


def _cutting(lines: Sequence[bytes], folder: bytes) -> str:
    """Return the command that extracts the paths from a table called LIST; empty if no column has paths."""
    for field, values in _fields(lines).items():
        if _any_there(values, folder):
            return f"jq -r {shlex.quote('.' + field)} LIST"
    for separator in _SEPARATORS:
        for number, (head, *cells) in enumerate(_columns(lines, separator.character), 1):
            if _any_there([head], folder):
                return f"cut{separator.option} -f{number} LIST"
            if _any_there(cells, folder):
                return f"tail -n +2 LIST | cut{separator.option} -f{number}"
    return ""


def _columns(lines: Sequence[bytes], separator: str) -> Iterator[list[bytes]]:
    """Yield the columns of a table; none if there is only one."""
    try:
        rows = list(csv.reader(map(os.fsdecode, lines), delimiter=separator))
    except csv.Error:
        return
    width = min(map(len, rows))
    for column in range(width if width > 1 else 0):
        yield [os.fsencode(row[column]) for row in rows]


def _fields(lines: Sequence[bytes]) -> dict[str, list[bytes]]:
    """Return the texts of lines with JSON objects, by field."""
    found: dict[str, list[bytes]] = {}
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        for field, text in value.items() if isinstance(value, dict) else ():
            if isinstance(text, str):
                found.setdefault(field, []).append(text.encode("utf-8", "replace"))
    return found


def _looks_like(lines: Sequence[bytes], name: str) -> str:
    """Return the kind of table that the name or the lines suggest; empty for none."""
    extension = os.path.splitext(name)[1].lower()
    if extension in _JSON or lines[0].lstrip()[:1] in {b"{", b"["}:
        return "JSON"
    if extension in _TABLES:
        return _TABLES[extension]
    parting = (one for one in _SEPARATORS[:-1] if all(one.character.encode() in line for line in lines))
    return next((f"a table with columns separated by {one.name}" for one in parting), "")
