"""The shell completes commands, options, words and keys, through the protocol that its script uses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import storage_helpers as helpers
from forking import PATIENCE

from internvit_cli.cli import completion
from internvit_cli.config import ComputeDtype, Format

if TYPE_CHECKING:
    from pathlib import Path

SHELLS = ("bash", "zsh", "fish")


def internvit_for_shell(**variables: str) -> str:
    """What the command prints when a shell's script calls it."""
    result = subprocess.run(
        [sys.executable, "-m", "internvit_cli"],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=PATIENCE,
    )
    assert result.stderr == ""
    return result.stdout


def complete(line: str, shell: str = "bash") -> list[str]:
    """What a shell is offered for the last word of a line."""
    words = line.split(" ")
    said = internvit_for_shell(
        _INTERNVIT_COMPLETE=f"complete_{shell}",
        COMP_WORDS=line,
        COMP_CWORD=str(len(words) - 1),
        _TYPER_COMPLETE_ARGS=line,
        _TYPER_COMPLETE_FISH_ACTION="get-args",
    )
    return said.splitlines()


def test_the_beginning_of_an_option_is_completed_in_bash() -> None:
    assert complete("internvit extract --dt") == ["--dtype"]


def test_the_beginning_of_an_option_is_completed_in_zsh_and_fish_with_its_help() -> None:
    assert '"--dtype":"Compute in this type."' in complete("internvit extract --dt", "zsh")[0]
    assert complete("internvit extract --dt", "fish") == ["--dtype\tCompute in this type."]


def test_commands_and_words_of_options_are_completed() -> None:
    assert complete("internvit ext") == ["extract"]
    assert complete("internvit extract imgs --dtype ") == [dtype.value for dtype in ComputeDtype]
    assert complete("internvit extract imgs --store-dtype b") == ["bfloat16"]


def test_a_configuration_that_cannot_be_read_does_not_stop_completion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERNVIT_CONFIG", str(tmp_path / "nowhere.toml"))
    assert complete("internvit extract --dt") == ["--dtype"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell_calls_back(shell: str) -> None:
    script = internvit_for_shell(_INTERNVIT_COMPLETE=f"source_{shell}")
    assert f"_INTERNVIT_COMPLETE=complete_{shell}" in script and "internvit" in script


def test_bash_completes_with_the_script_that_is_printed(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    command = tmp_path / "internvit"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m internvit_cli "$@"\n')
    command.chmod(0o755)
    (tmp_path / "script").write_text(internvit_for_shell(_INTERNVIT_COMPLETE="source_bash"))
    pressed = (
        f"PATH={tmp_path}:$PATH; source {tmp_path}/script; COMP_WORDS=(internvit extract --dt); COMP_CWORD=2;"
        "_internvit_completion internvit; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    result = subprocess.run([bash, "--norc", "-c", pressed], capture_output=True, text=True)
    assert result.stdout == "--dtype\n", result.stderr


def test_keys_of_the_output_are_completed_but_for_those_that_a_shell_would_take_apart(tmp_path: Path) -> None:
    keys = [b"a/cat.jpg", b"a/dog.jpg", b"b/cat.jpg", b"b/my cat.jpg"]
    table = helpers.make_table([(1, 1, 0)] * 4, keys)
    helpers.make_output(tmp_path / "f.h5", helpers.make_shard(table))
    helpers.make_output(tmp_path / "feats", helpers.make_shard(table), Format.NPY)
    for output in (tmp_path / "f.h5", tmp_path / "feats"):
        assert complete(f"internvit show {output} a/") == ["a/cat.jpg", "a/dog.jpg"]
        assert complete(f"internvit show {output} a/dog.jpg b") == ["b/cat.jpg"]


def test_nothing_is_proposed_for_an_output_that_is_too_large_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        params = {"path": str(tmp_path / "f.h5")}  # noqa: RUF012

    assert completion.complete_keys(Context(), "") == []  # type: ignore[arg-type]
    helpers.make_output(tmp_path / "f.h5", helpers.make_shard(helpers.make_table([(1, 1, 0)] * 3)))
    assert len(completion.complete_keys(Context(), "")) == 3  # type: ignore[arg-type]
    monkeypatch.setattr(completion, "MOST_IMAGES", 2)
    assert completion.complete_keys(Context(), "") == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shell", "place"),
    [
        ("bash", ".bash_completions/internvit.sh"),
        ("zsh", ".zfunc/_internvit"),
        ("fish", ".config/fish/completions/internvit.fish"),
    ],
)
def test_completion_is_installed_into_the_home_folder(tmp_path: Path, shell: str, place: str) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "internvit_cli", "--install-completion", shell]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert f"_INTERNVIT_COMPLETE=complete_{shell}" in (tmp_path / place).read_text()
