"""Options come from the command line, the environment and a file, in this order, and say where they came from."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from run_helpers import extract, internvit, make_pictures, summary_of

from internvit_cli.api.settings import extract_options
from internvit_cli.cli.app import COMMANDS, run
from internvit_cli.cli.declarations import REGISTERED, Parameter
from internvit_cli.cli.settings import is_on_command_line, variable_of
from internvit_cli.errors import UsageError

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
    assert found["max-tiles"] == (5, f"{config}, line 1") and found["model"] == ("tiny-random", f"{config}, line 3")
    assert found["pool"] == ("cls+mean", f"{config}, line 5") and found["thumbnail"] == (False, f"{config}, line 6")
    monkeypatch.setenv("INTERNVIT_MAX_TILES", "3")
    monkeypatch.setenv("INTERNVIT_THUMBNAIL", "1")
    found = settings("extract", "x", "--config", config)
    assert found["max-tiles"] == (3, "INTERNVIT_MAX_TILES") and found["thumbnail"] == (True, "INTERNVIT_THUMBNAIL")
    assert settings("extract", "x", "--config", config, "--max-tiles", 2)["max-tiles"] == (2, "command line")
    monkeypatch.setenv("INTERNVIT_CONFIG", str(config))
    assert settings("plan", "x")["pool"] == ("cls", f"{config}, line 2"), "a table is for one command only"


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
    keys = set(REGISTERED[command].by_key)
    for name in keys:
        assert variable_of(name).startswith("INTERNVIT_") and "-" not in variable_of(name)
    assert {"json", "debug"} <= keys


@pytest.mark.parametrize(
    ("text", "complaint", "hint"),
    [
        ("max-tile = 3", "line 1: max-tile is no option", "did you mean max-tiles?"),
        ("[extrat]\nmax-tiles = 3", "line 1: extrat is no command", "did you mean extract?"),
        ("[info]\nmax-tiles = 3", "line 2: max-tiles is no option of internvit info", ""),
        ("max-tiles = ", "not TOML", "docs/cli.md"),
        ("\x00", "not TOML", ""),
        ("\n# a comment\nmax-tiles = 'many'", "line 3: max-tiles is 'many', not a whole number from 1 to 1,000", ""),
        ('pool = "meen"', "line 1: pool is 'meen', not one of mean, cls, cls+mean", "did you mean mean?"),
        ('[extract]\nrelocate = [\n "a=b",\n "c"\n]', "line 2: relocate is 'c', not OLD=NEW", "--relocate"),
        ("max-tiles = 3\nmax_tiles = 4", "line 2: max_tiles is set twice", "keep one spelling"),
        ("workers = 1979-05-27", "line 1: workers is 1979-05-27, not a number or a text", ""),
        ("quiet = 2", "line 1: quiet is '2', not true or false", ""),
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


# ------------------------------------------------------------------------------------------------- where it went wrong

NONSENSE = {
    "max-tiles": ("abc", "a whole number from 1 to 1,000"),
    "min-tiles": ("0", "a whole number from 1 to 1,000"),
    "workers": ("1.5", "a whole number from 1 to 512"),
    "max-pixels": ("-1", "a whole number of at least 1"),
    "decode-timeout": ("nan", "a number from 0.1 to 86,400"),
    "tokens": ("visal", "one of visual, patch, projected, none"),
    "layer": ("last", "auto, a whole number, or several separated by commas"),
    "batch-size": ("0", "auto or a number of tiles from 1 to 65,536"),
    "shard-size": ("hh", "a size"),
    "worker-memory": ("1k", "a size of at least 512MiB"),
    "relocate": ("3", "OLD=NEW"),
    "devices": ("0,0", "a list of different devices"),
    "background": ("blurple", "a color"),
    "allow-skipped": ("101%", "a number or a percentage"),
}


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command line that means nothing is answered with."""
    assert run(["extract", "x", "-o", "f.h5", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert not said.out
    assert [line.partition(":")[0] for line in said.err.splitlines()] == ["error", "hint"]
    return said.err


@pytest.mark.parametrize("key", NONSENSE)
def test_an_error_names_the_place_of_the_value_the_value_and_what_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    value, expected = NONSENSE[key]
    said = f"is '{value}', not {expected}\n"
    assert complaint(capsys, f"--{key}", value).startswith(f"error: --{key} {said}")
    file = tmp_path / "c.toml"
    file.write_text(f"[extract]\n{key} = {json.dumps([value] if key == 'relocate' else value)}\n")
    assert complaint(capsys, "--config", file).startswith(f"error: {file}, line 2: {key} {said}")
    monkeypatch.setenv(variable_of(key), value)
    assert complaint(capsys).startswith(f"error: variable {variable_of(key)} {said}")


def is_checked(option: Parameter) -> bool:
    takes_any_name = option.key == "devices"
    return bool(option.parser or option.choices or option.kind in (int, float)) and not takes_any_name


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, option) for name, command in REGISTERED.items() for option in command.options if is_checked(option)],
    ids=lambda part: getattr(part, "key", part),
)
def test_every_option_that_does_not_take_any_text_says_what_it_takes_instead(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, option: Parameter
) -> None:
    monkeypatch.setenv(variable_of(option.key), "=")
    arguments = ["x" for argument in REGISTERED[command].arguments]
    assert run([command, *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"error: variable {variable_of(option.key)} is '=', not ")
    assert [line.partition(":")[0] for line in said[1:]] == ["hint"]


@pytest.mark.parametrize(
    ("word", "near"),
    [("visal", "visual"), ("PATHC", "patch"), ("projceted", "projected"), ("nonne", "none")],
)
def test_a_misspelt_word_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str], word: str, near: str) -> None:
    assert f"hint: did you mean {near}?" in complaint(capsys, "--tokens", word)


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["extrct", "x"], "internvit has no command extrct", "did you mean extract?"),
        (["zzz"], "internvit has no command zzz", "internvit --help lists the commands"),
        (["extract", "--max-tile", "3"], "internvit extract has no option --max-tile", "did you mean --max-tiles?"),
        (["extract", "--no-thumbnal"], "internvit extract has no option --no-thumbnal", "did you mean --no-thumbnail?"),
        (["extract", "-z"], "internvit extract has no option -z", ""),
        (["--vresion"], "internvit has no option --vresion", "did you mean --version?"),
        (["extract", "--max-tiles"], "--max-tiles lacks its value", "give --max-tiles N"),
        (["extract", "--dry-run=yes"], "--dry-run takes no value", "give --dry-run alone"),
        (["info"], "OUT is missing", "internvit info [OPTIONS] OUT"),
        (["info", "a", "b"], "one argument too many: b", "internvit info [OPTIONS] OUT"),
        (["export", "a"], "NEW is missing", "internvit export [OPTIONS] OUT NEW"),
        (["merge", "-o", "b.h5"], "OUT is missing", "internvit merge [OPTIONS] OUT... -o NEW"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_explained_in_our_words(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str, hint: str
) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}\n") and f"hint: {hint}" in said


def test_an_error_about_several_options_tells_which_of_them_stand_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERNVIT_MIN_TILES", "5")
    said = complaint(capsys, "--max-tiles", 3)
    assert "--min-tiles 5 is above --max-tiles 3" in said
    assert "--min-tiles is from INTERNVIT_MIN_TILES" in said and "--max-tiles is from" not in said
    (tmp_path / "c.toml").write_text("max-tiles = 3")
    assert f"--max-tiles is from {tmp_path}/c.toml, line 1" in complaint(capsys, "--config", tmp_path / "c.toml")


def test_an_error_about_a_value_tells_where_it_stands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERNVIT_MODEL", "/nowhere/at-all")
    assert run(["plan", __file__]) == 1
    assert "; /nowhere/at-all is from INTERNVIT_MODEL\n" in capsys.readouterr().err


def test_a_misspelt_variable_is_told_and_the_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERNVIT_MAXTILES", "3")
    monkeypatch.setenv("INTERNVIT_OUTPUT", "f.h5")  # an option of other commands is no mistake
    assert run(["models"]) == 0
    assert capsys.readouterr().err == (
        "note: the variable INTERNVIT_MAXTILES sets nothing: no option has that name; "
        "did you mean INTERNVIT_MAX_TILES?\n"
    )


def test_a_variable_for_an_option_that_may_be_repeated_holds_words_as_a_shell_has_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INTERNVIT_RELOCATE", "'/a b=/c' /d=/e")
    assert run(["extract", "x", "--print-config"]) == 0
    assert 'relocate = ["/a b=/c", "/d=/e"]  # INTERNVIT_RELOCATE' in capsys.readouterr().out
    monkeypatch.setenv("INTERNVIT_RELOCATE", "'/a")
    assert complaint(capsys).startswith('error: variable INTERNVIT_RELOCATE is "\'/a": No closing quotation\n')


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("fp32", "float32"),
        ("float", "float32"),
        ("BF16", "bfloat16"),
        ("torch.float16", "float16"),
    ],
)
def test_types_have_short_names_wherever_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, name: str
) -> None:
    (tmp_path / "c.toml").write_text(f'dtype = "{word}"')
    monkeypatch.setenv("INTERNVIT_STORE_DTYPE", word)
    monkeypatch.setattr("internvit_cli.cli.extract.show_plan", lambda options, **_: asked.append(options) or 0)
    asked: list[Any] = []
    assert run(["extract", "x", "-o", "f.h5", "--dry-run", "--config", str(tmp_path / "c.toml")]) == 0
    monkeypatch.delenv("INTERNVIT_STORE_DTYPE")
    assert run(["extract", "x", "-o", "f.h5", "--dry-run", "--dtype", word, "--store-dtype", word]) == 0
    from_python = extract_options("tiny-random", {"dtype": word, "store_dtype": word})
    for options in (*asked, from_python):
        assert (options.run.dtype.value, options.store.store_dtype.value) == (name, name)


def test_a_misspelt_short_name_of_a_type_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean fp16?" in complaint(capsys, "--dtype", "fp61")


def test_a_misspelt_word_in_python_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        extract_options("tiny-random", {"tokens": "visal"})
    assert caught.value.hint == "did you mean visual?"


def test_a_command_can_tell_what_was_typed_from_what_a_variable_or_a_file_says_to_all_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[bool, bool]] = []

    def look(*_: object, **__: object) -> int:
        asked.append((is_on_command_line("max_tiles"), is_on_command_line("min_tiles")))
        return 0

    monkeypatch.setattr("internvit_cli.cli.extract.show_plan", look)
    monkeypatch.setenv("INTERNVIT_MIN_TILES", "2")
    assert run(["extract", "x", "-o", "f.h5", "--dry-run", "--max-tiles", "3"]) == 0
    assert asked == [(True, False)]
