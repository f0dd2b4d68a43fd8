"""Options come from the command line, the environment and a file, in this order, and say where they came from."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from run_helpers import extract, internvit, make_pictures, summary_of

from internvit_cli.cli.app import COMMANDS
from internvit_cli.cli.settings import _known, variable_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from pathlib import Path


def settings(*arguments: object) -> dict[str, tuple[Any, str]]:
    """Value and source of each option, as --print-config gives them."""
    result = internvit(*arguments, "--print-config")
    assert result.returncode == 0, result.stderr
    values = tomllib.loads(result.stdout)
    sources = dict(line.partition(" = ")[::2] for line in result.stdout.splitlines() if " = " in line)
    return {name: (value, sources[name].rpartition("# ")[2]) for name, value in values.items()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "internvit.toml"
    path.write_text(
        'max_tiles = 5\npool = "cls"\nmodel = "tiny-random"\n[extract]\npool = "cls+mean"\nthumbnail = false\n'
    )
    return path


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings("extract", "x")["max-tiles"] == (12, "default")
    found = settings("extract", "x", "--config", config)
    assert found["max-tiles"] == (5, "file") and found["model"] == ("tiny-random", "file")
    assert found["pool"] == ("cls+mean", "file") and found["thumbnail"] == (False, "file")
    monkeypatch.setenv("INTERNVIT_MAX_TILES", "3")
    monkeypatch.setenv("INTERNVIT_THUMBNAIL", "1")
    found = settings("extract", "x", "--config", config)
    assert found["max-tiles"] == (3, "environment") and found["thumbnail"] == (True, "environment")
    assert settings("extract", "x", "--config", config, "--max-tiles", 2)["max-tiles"] == (2, "commandline")
    monkeypatch.setenv("INTERNVIT_CONFIG", str(config))
    assert settings("plan", "x")["pool"] == ("cls", "file"), "a table is for one command only"


def test_what_is_printed_can_be_used_as_a_file(tmp_path: Path, config: Path) -> None:
    printed = internvit("extract", "x", "--config", config, "--relocate", "/a=/b", "--print-config").stdout
    (tmp_path / "again.toml").write_text(printed)
    first = {name: value for name, (value, _) in settings("extract", "x", "--config", config).items()}
    again = {name: value for name, (value, _) in settings("extract", "x", "--config", tmp_path / "again.toml").items()}
    assert again == first | {"relocate": ["/a=/b"]}


def test_a_run_takes_its_options_from_a_file(tmp_path: Path, config: Path) -> None:
    make_pictures(tmp_path / "pictures", 2)
    config.write_text(config.read_text() + f'output = "{tmp_path}/f.h5"\njson = true\nallow-skipped = 3\n')
    result = internvit("extract", tmp_path / "pictures", "--config", config)
    assert result.returncode == 0, result.stderr
    assert summary_of(result)["done"] == 2
    refused = extract(tmp_path / "pictures", "-o", tmp_path / "f.h5")
    assert refused.returncode == 5 and "max_tiles was 5, is now 12" in refused.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_has_a_variable_and_a_place_in_a_file(command: str) -> None:
    assert _known[command], command
    for name in _known[command]:
        assert variable_of(name).startswith("INTERNVIT_") and "-" not in variable_of(name)
    assert {"json", "debug"} <= _known[command]


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("max-tile = 3", "max-tile is no option", "did you mean max-tiles?"),
        ("[extrat]\nmax-tiles = 3", "extrat is no option", "did you mean extract?"),
        ("[info]\nmax-tiles = 3", "max-tiles is no option", ""),
        ("max-tiles = ", "not TOML", "docs/cli.md"),
        ("\x00", "not TOML", ""),
        ('max-tiles = "many"', "'--max-tiles'", ""),
        ('pool = "best"', "'best'", ""),
    ],
)
def test_a_file_that_says_nothing_sensible_is_a_usage_error(
    tmp_path: Path, text: str, complaint: str, hint: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    result = internvit("extract", "x", "-o", tmp_path / "f.h5", "--config", path)
    assert result.returncode == 2
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["error", "hint"]
    assert complaint in result.stderr and hint in result.stderr


@pytest.mark.parametrize("place", ["variable", "file"])
def test_errors_are_json_too_wherever_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    arguments: list[object] = ["extract", tmp_path / "nowhere", "-o", tmp_path / "f.h5", "--model", "tiny-random"]
    if place == "variable":
        monkeypatch.setenv("INTERNVIT_JSON", "true")
    else:
        (tmp_path / "c.toml").write_text("json = true")
        arguments += ["--config", tmp_path / "c.toml"]
    result = internvit(*arguments)
    assert summary_of(result)["exit_code"] == result.returncode == 2


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    result = internvit("info", "x.h5", "--config", tmp_path / "nowhere.toml")
    assert result.returncode == 2 and "No such file" in result.stderr


def test_a_bad_variable_is_a_usage_error(tmp_path: Path) -> None:
    import os

    environment = os.environ | {"INTERNVIT_MAX_TILES": "many"}
    command = [sys.executable, "-m", "internvit_cli", "extract", str(tmp_path), "-o", str(tmp_path / "f.h5")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "'--max-tiles'" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("line", ["max-tiles = true", 'output = ["a", "b"]', 'relocate = "a=b"'])
def test_a_value_of_another_kind_is_refused_with_the_file(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.toml").write_text(line + "\n")
    result = internvit("extract", "x", "-o", tmp_path / "f.h5", "--config", tmp_path / "c.toml")
    assert result.returncode == 2
    assert "c.toml" in result.stderr and line.split(maxsplit=1)[0] in result.stderr


def test_an_error_is_json_where_a_variable_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVIT_JSON", "1")
    result = internvit("extract", "x", "-o", "f.h5", "--store-dtype", "int4")
    assert json.loads(result.stdout)["exit_code"] == result.returncode == 2
