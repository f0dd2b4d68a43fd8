"""What the documentation says of the code is true."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from run_helpers import extract, internvit, make_pictures

import internvit_cli
from internvit_cli import open_features
from internvit_cli.config import Status
from internvit_cli.sources.extensions import EXTENSIONS
from internvit_cli.sources.rules import DEFAULT_EXCLUDES

ROOT = Path(__file__).resolve().parents[1]
NAMED_TEST = re.compile(r"`(test_\w+\.py)`\s+`(test_\w+)`")


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_promise_has_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert [int(row.split("|")[1]) for row in rows] == list(range(1, 18))
    for row in rows:
        assert NAMED_TEST.search(row), row
    for file, name in NAMED_TEST.findall(text):
        assert name in names_in(file), f"{file} has no {name}"


def python_examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the examples find the outputs that they speak of."""
    folder = tmp_path_factory.mktemp("outputs")
    make_pictures(folder / "imgs", 3)
    for name, dtype in (("feats.h5", "bfloat16"), ("feats", "float16")):
        result = extract(folder / "imgs", "-o", folder / name, "--store-dtype", dtype)
        assert result.returncode == 0, result.stderr
    return folder


COMMAND = re.compile(r"^internvit (.*?)(?:\s+#.*)?$", re.MULTILINE)


def test_every_command_of_the_first_hour_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights where the page takes the real ones."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copytree(ROOT / "examples" / "images", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERNVIT_MODEL", "tiny-random")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    text = (ROOT / "docs" / "first-hour.md").read_text()
    lines = COMMAND.findall("\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)))
    assert len(lines) > 12
    for line in lines:
        result = internvit(*shlex.split(line.replace("/data/InternViT-300M-448px-V2_5", "tiny-random")))
        assert result.returncode == 0, f"{line}: {result.stderr}"
    assert (tmp_path / "pngs" / "street.jpg.show.png").exists() and (tmp_path / "report.html").exists()
    names: dict[str, Any] = {}
    for block in python_examples("docs/first-hour.md"):
        exec(block, names)
    assert list(names["photographs"]) == ["lund.jpg", "portrait.jpg", "street.jpg"]
    assert names["matrix"].shape[0] == 4 and names["image"].status is Status.DONE


def test_the_messages_and_reasons_that_the_first_hour_explains_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "first-hour.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    messages, reasons = re.findall(r"^\| (?:message|reason) \|.*?\n\n", text, re.DOTALL | re.MULTILINE)
    for row in messages.splitlines()[2:-1]:
        for message in re.findall(r"`([^`]+)`", row.split("|")[1]):
            assert message in source, message
    explained = set(
        re.findall(r"`([a-z_]+)`", reasons + text.partition("The other reasons are")[2].partition("\n\n")[0])
    )
    assert {status.word for status in Status if status > Status.DONE} <= explained


def test_the_readme_says_what_a_status_is_and_how_it_prints(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = python_examples("README.md")
    monkeypatch.chdir(outputs)
    names: dict[str, Any] = {}
    exec(block.replace("holiday/beach.jpg", next(iter(open_features("feats.h5")))), names)
    assert names["image"].status is internvit_cli.Status.DONE
    assert (str(Status.DONE), repr(Status.DONE), f"{Status.DONE}") == ("done", "Status.DONE", "done")


def test_the_readers_in_the_description_of_the_format_read(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs)
    from_h5, from_npy = python_examples("docs/format.md")
    names: dict[str, Any] = {}
    exec(from_h5, names)
    image = open_features("feats.h5")[names["keys"][names["row"]]]
    np.testing.assert_array_equal(names["tokens"], image.visual_tokens)
    np.testing.assert_array_equal(names["vector"], image.pooled)
    names = {}
    exec(from_npy, names)
    np.testing.assert_array_equal(names["first"], open_features("feats")[names["images"][0]["key"]].visual_tokens)


def test_the_page_on_sources_has_every_extension_and_everything_that_is_left_out_by_default() -> None:
    text = (ROOT / "docs" / "sources.md").read_text()
    listed = set(re.search(r"in upper or lower case: `([^`]*)`", text)[1].split())  # type: ignore[index]
    assert listed == {extension.decode() for extension in EXTENSIONS}
    for pattern in DEFAULT_EXCLUDES:
        assert f"`{pattern}`" in text, pattern


def test_the_description_of_the_format_has_every_dataset_attribute_and_status(outputs: Path) -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    with h5py.File(outputs / "feats.h5") as file:
        names: list[str] = [*file.attrs]
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    for name in (*names, *json.loads(open_features(outputs / "feats").attributes["recipe"])):
        assert f"`{name}`" in text, name
    for status in Status:
        assert f"{status.value} {status.word}" in text
