"""The help of every command: short where there is much to say, complete where it is asked for, in whole words."""

from __future__ import annotations

import re

import pytest

from internvit_cli.cli.app import run
from internvit_cli.cli.declarations import REGISTERED, Parameter
from internvit_cli.cli.help import MOST_OPTIONS
from internvit_cli.cli.settings import OWN

COMMANDS = list(REGISTERED)
ALL = [(name, parameter) for name, command in REGISTERED.items() for parameter in (*command.parameters, *OWN)]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def show(*arguments: str, columns: int = 80) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        assert run(list(arguments)) == 0
        said = capsys.readouterr()
        assert not said.err
        return said.out

    return show


def names_in(text: str) -> set[str]:
    """The options that a help lists."""
    rows = re.findall(r"^  (-\S.*|    --\S.*)$", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"(?:^|, )(--?[\w-]+)", row.strip())}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_short_help_has_at_most_fifteen_options_and_says_where_the_others_are(shown, command: str) -> None:
    declared = REGISTERED[command]
    text = shown(command, "--help")
    listed = [option for option in declared.options if option.long in names_in(text)]
    assert len(listed) <= MOST_OPTIONS
    hidden = len(declared.options) - len(listed)
    assert (f"internvit {command} --help-all lists {hidden} more option" in text) == bool(hidden)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_whole_help_has_every_spelling_of_every_option_and_the_short_one_none_that_is_missing_there(
    shown, command: str
) -> None:
    declared = REGISTERED[command]
    everything = names_in(shown(command, "--help-all"))
    spelled = {name for option in declared.options for name in (*option.spellings, option.negative) if name}
    assert spelled <= everything
    assert names_in(shown(command, "-h")) <= everything | {"--help-all"}


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_no_word_is_broken_and_no_line_is_too_long(shown, command: str, columns: int) -> None:
    text = shown(*([command, "--help-all"] if command else ["--help"]), columns=columns)
    assert max(map(len, text.splitlines())) <= columns
    flat = " ".join(text.split())
    for parameter in REGISTERED[command].parameters if command else ():
        assert " ".join(parameter.help.split()) in flat, parameter.name
        assert all(word in flat.split() or f"{word}]" in flat for word in parameter.default_text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_what_must_be_given_is_marked_and_refused_without_a_value(
    shown, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    declared = REGISTERED[command]
    flat = " ".join(shown(command, "--help").split())
    required = [parameter for parameter in declared.parameters if declared.is_required(parameter)]
    for parameter in declared.parameters:
        assert (f"{parameter.help} [required]" in flat) == (parameter in required)
    usage = re.search(r"Usage: (.*?)\n\n", shown(command, "--help"), re.DOTALL)
    assert usage is not None
    for missing in required:
        words = [w for p in required if p is not missing for w in ([] if p.is_argument else [p.long]) + ["there.h5"]]
        assert run([command, *words]) != 0, missing.name
        assert capsys.readouterr().err.startswith("error: ")


def test_what_is_marked_essential_or_required_exists() -> None:
    for command in REGISTERED.values():
        names = {parameter.name for parameter in command.parameters}
        assert {*command.essential, *command.required} <= names
        assert len(command.options) <= MOST_OPTIONS or command.essential


@pytest.mark.parametrize(("command", "parameter"), ALL, ids=lambda part: getattr(part, "name", part))
def test_a_help_text_is_a_sentence_that_says_what_the_option_does(command: str, parameter: Parameter) -> None:
    text = parameter.help
    assert text.endswith(".") and text[0].isupper(), text
    assert len(text.split()) >= 3, text
    assert "default:" not in text and "may be repeated" not in text, "the help adds these itself, in one form"
    if not parameter.is_argument:
        first = text.split()[0].rstrip(",")
        assert first not in {
            "Of",
            "That",
            "Those",
            "Another",
            "A",
            "An",
            "The",
            "For",
            "No",
            "Which",
            "Where",
            "How",
        }, text


def test_flags_have_no_value_and_defaults_have_one_form(shown) -> None:
    for command in COMMANDS:
        text = shown(command, "--help-all")
        assert "<bool>" not in text and "(default" not in text
        assert not re.search(r"--json [A-Z]", text)


def test_the_help_of_the_program_has_a_line_for_each_command_and_every_exit_code(shown) -> None:
    text = shown("--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name}  +[A-Z].*\.$", text, re.MULTILINE), f"{name} takes more than a line"
    for code in (0, 1, 2, 3, 4, 5, 6, 75, 130, 138, 143):
        assert re.search(rf"^  {code} ", text, re.MULTILINE)


def test_a_help_is_shown_whatever_variables_hold(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVIT_MAX_TILES", "many")
    monkeypatch.setenv("INTERNVIT_CONFIG", "/nowhere.toml")
    assert "Usage: internvit extract" in shown("extract", "--help")


def test_a_help_needs_nothing_that_is_slow_to_load() -> None:
    import subprocess
    import sys

    code = "import sys; from internvit_cli.cli.app import run; run(['extract', '--help-all']); print('|', *sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"rich", "pydantic", "numpy", "torch", "PIL"} & set(loaded.rpartition("|")[2].split())


def test_a_call_without_a_command_shows_the_help_as_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert capsys.readouterr().out.startswith("Turn folders of pictures into")
