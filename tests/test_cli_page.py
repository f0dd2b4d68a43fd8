"""docs/cli.md is what the commands say, and every command line in the documentation could be run."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from internvit_cli.cli.app import COMMANDS, app
from internvit_cli.cli.declarations import REGISTERED
from internvit_cli.cli.settings import variable_of
from internvit_cli.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_BLOCK = re.compile(r"^```sh\n((?:[^`].*\n|\n)*)^```|((?:^    .*\n)+)", re.MULTILINE)
FENCED_SHELL = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
OTHER_BLOCK = re.compile(r"^```(?!sh$)\w+\n.*?^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_commands_say(make_cli: ModuleType) -> None:
    is_current = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.page()
    assert is_current, "docs/cli.md is out of date: run make docs"


def test_the_page_depends_on_no_terminal(make_cli: ModuleType) -> None:
    environment = os.environ | {"COLUMNS": "40", "LANG": "C", "NO_COLOR": "1", "INTERNVIT_MAX_TILES": "3"}
    code = "import runpy; print(runpy.run_path('docs/make_cli.py')['page'](), end='')"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), environment.get("PYTHONPATH", "")])
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert said.stdout.decode("utf-8") == make_cli.page()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_on_the_page_with_its_variable_and_its_key(
    make_cli: ModuleType, command: str
) -> None:
    rows = [line for line in make_cli.page().splitlines() if line.startswith("| `-")]
    for key in REGISTERED[command].by_key:
        assert any(row.endswith(f"| `{variable_of(key)}`, `{key}` |") for row in rows), key


# ------------------------------------------------------------------------------------------------------- command lines


def command_lines(page: Path) -> list[str]:
    """The calls of internvit in a page's shell blocks, as one would type them."""
    text = OTHER_BLOCK.sub("", page.read_text())
    blocks = [fenced or indented for fenced, indented in SHELL_BLOCK.findall(text)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if "[OPTIONS]" not in line]
    return [line.strip() for line in lines if re.search(r"(?:^|[ (/])internvit [a-z-]", line.partition(" # ")[0])]


def arguments_of(line: str) -> list[str]:
    """The words behind `internvit` up to what ends a command in a shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.commenters, lexer.whitespace_split = "#", True
    words = list(lexer)
    start = next(number for number, word in enumerate(words) if re.fullmatch(r"(?:\S*/)?internvit", word))
    found: list[str] = []
    for word in words[start + 1 :]:
        if set(word) <= set("();<>|&"):
            break
        found.append(word)
    return found


def parse(arguments: list[str]) -> Any:
    """Parse as the command would, and run nothing.

    Raises:
        UsageError: it would refuse them.
    """
    import typer

    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    if name.startswith("-"):
        assert name in {"--help", "--version", "--install-completion", "--show-completion"}, name
        return None
    assert name in group.commands, f"there is no command {name}"
    try:
        return group.commands[name].make_context(name, rest)
    except typer.Exit:  # --help, --print-config
        return None


LINES = [(page.name, line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line[:60]}" for page, line in LINES])
def test_a_command_line_in_the_documentation_is_one_that_the_command_takes(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvit_cli.cli.settings.read_config", lambda *_: {})  # the files that pages speak of
    arguments = arguments_of(line)
    parse([re.sub(r"\$\{?\w+(?:\[@\])?\}?", "1", word) for word in arguments])


def test_a_command_line_that_the_command_does_not_take_is_noticed() -> None:
    for line in ("internvit extract x --token none", "internvit info", "internvit extract x --tokens nome"):
        with pytest.raises(UsageError):
            parse(arguments_of(line))
    with pytest.raises(AssertionError):
        parse(arguments_of("flock x internvit extrat y"))


FENCED = [(page.name, block) for page in PAGES for block in FENCED_SHELL.findall(page.read_text())]


@pytest.mark.parametrize(("page", "block"), FENCED, ids=[f"{page}: {block[:40]!r}" for page, block in FENCED])
def test_a_shell_block_is_a_program_that_bash_understands(page: str, block: str) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    result = subprocess.run([bash, "-n"], input=block, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_command_lines_are_found_in_every_kind_of_block() -> None:
    assert len(command_lines(ROOT / "README.md")) >= 3
    assert len(command_lines(ROOT / "docs" / "search.md")) >= 3
