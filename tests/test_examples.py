"""Every example in the documentation runs, and gives what it says: docstrings, README and docs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shutil
from pathlib import Path

import pytest
from chat_helpers import extract_for, make_chat_model

import internvit_cli
from internvit_cli.cli.app import run

ROOT = Path(__file__).resolve().parents[1]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def modules_with_examples() -> list[str]:
    """Modules of the package whose text holds a prompt; found without importing them."""
    names = ["internvit_cli"]
    names += [module.name for module in pkgutil.walk_packages(internvit_cli.__path__, "internvit_cli.")]
    folder = Path(internvit_cli.__file__).parent
    found = []
    for name in names:
        path = folder.joinpath(*name.split(".")[1:])
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if re.search(r"^\s*>>> ", file.read_text(), re.MULTILINE):
            found.append(name)
    return found


def make_workplace(folder: Path) -> Path:
    """Pictures in imgs/, and their features in feats.h5, in feats/ as arrays, in other formats, and of two layers.

    chat.h5 has projected tokens, for the chat model in tiny-chat.
    """
    arguments = ["--model", "tiny-random", "--dtype", "float32", "--device", "cpu", "-q"]
    for output in (["-o", str(folder / "feats.h5")], ["-o", str(folder / "feats"), "--format", "npy"]):
        assert run(["extract", str(folder / "imgs"), *output, *arguments]) == 0
    assert run(["extract", str(folder / "imgs"), "-o", str(folder / "layers.h5"), "--layer", "-2,-1", *arguments]) == 0
    for suffix in ("parquet", "safetensors", "tar", "csv"):
        assert run(["export", str(folder / "feats.h5"), str(folder / f"feats.{suffix}"), "-q"]) == 0
    chat = make_chat_model(folder / "tiny-chat")
    projected = ("--tokens", "projected", "--store-dtype", "float16")
    extract_for(chat, folder / "chat.h5", *projected, pictures=folder / "imgs")
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples of docstrings find."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(ROOT / "examples" / "images", folder / "imgs")
    return make_workplace(folder)


@pytest.fixture(scope="module")
def pages_workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples of pages find: the README goes on holiday."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(ROOT / "examples" / "images", folder / "imgs")
    (folder / "imgs" / "holiday").mkdir()
    shutil.copy(folder / "imgs" / "lund.jpg", folder / "imgs" / "holiday" / "beach.jpg")
    return make_workplace(folder)


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module_run(workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(name)
    names = {"open_features": internvit_cli.open_features}
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs=names, optionflags=flags)
    assert result.attempted > 0
    assert result.failed == 0, "the report is on standard output"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if PYTHON_BLOCK.search(page.read_text())], ids=lambda p: p.name
)
def test_the_python_of_a_page_runs(pages_workplace: Path, monkeypatch: pytest.MonkeyPatch, page: Path) -> None:
    """One block after another, as one program."""
    monkeypatch.chdir(pages_workplace)
    names: dict[str, object] = {}
    for block in PYTHON_BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)
