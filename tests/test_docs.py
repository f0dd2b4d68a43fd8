"""What the documentation says of the code is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED_TEST = re.compile(r"`(test_\w+\.py)`\s+`(test_\w+)`")


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_has_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 17))
    for row in rows:
        assert NAMED_TEST.search(row), row
    for file, name in NAMED_TEST.findall(text):
        assert name in names_in(file), f"{file} has no {name}"
