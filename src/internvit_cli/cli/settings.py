"""Resolve the values of options: command line > INTERNVIT_... variable > --config FILE > default.

The configuration file is TOML. Its keys are the names of options without the leading dashes. A table is for one
command:

    model = "/data/InternViT-300M-448px-V2_5"
    max-tiles = 6

    [extract]
    output = "/data/feats"

Every value is kept with the place that it came from, so that an error names what to correct: an option, a variable, or
a line of the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from internvit_cli.cli.console import printable_line
from internvit_cli.cli.declarations import REGISTERED, Command, Parameter, parameters_of
from internvit_cli.cli.values import TRUE, UnusableWordError, value_of
from internvit_cli.errors import InternvitError, UsageError
from internvit_cli.runtime.words import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PREFIX = "INTERNVIT_"
CONFIG = f"{PREFIX}CONFIG"
MANUAL = "see docs/cli.md"
COMMAND_LINE = "command line"
TELLING = 4
"""Shortest value that counts as named in a message; shorter ones match by accident."""


class GivenValue(NamedTuple):
    """The text given for a parameter, and where it was given."""

    words: bool | str | list[str]
    place: str
    """The place as a message begins: `--max-tiles`, `variable INTERNVIT_MAX_TILES`, `c.toml, line 3: max-tiles`."""
    origin: str
    """The place as --print-config prints it: `command line`, `INTERNVIT_MAX_TILES`, `c.toml, line 3`."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of all parameters of one command."""

    command: Command
    given: Mapping[str, GivenValue]
    """The given values by parameter, without defaults."""
    values: Mapping[str, Any]
    """All values by parameter."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let `is_on_command_line` use these settings while the command runs."""
        before = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(before)

    def explain(self, error: InternvitError) -> None:
        """Extend the hint of an error by the places of the options it names that were not typed."""
        for option in self.command.options:
            given = self.given.get(option.name)
            if given is None or given.origin == COMMAND_LINE:
                continue
            names = [name for name in (*option.spellings, option.negative) if name.startswith("--")]
            if isinstance(given.words, str) and len(given.words) >= TELLING and not given.words.isdecimal():
                names.append(given.words)
            named = next((name for name in names if re.search(rf"{re.escape(name)}(?![\w-])", error.message)), None)
            if named is not None:
                error.hint = f"{error.hint}; {printable_line(named)} is from {given.origin}".removeprefix("; ")


_in_use: ContextVar[Settings | None] = ContextVar("settings", default=None)


def is_on_command_line(parameter: str) -> bool:
    """Return whether a parameter was typed; a variable or a file may be meant for other commands too."""
    settings = _in_use.get()
    given = settings.given.get(parameter) if settings is not None else None
    return settings is None or (given is not None and given.origin == COMMAND_LINE)


def own_options(
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Take options from a TOML file."),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print the values of all options and where each comes from, and exit."),
    ] = False,
    help_: Annotated[bool, typer.Option("-h", "--help", help="Show this help.")] = False,
    help_all: Annotated[bool, typer.Option("--help-all", help="Show the help with all options.")] = False,
) -> None:
    """Declare the options of every command; only --config has a variable, and none has a key in a file."""


OWN = tuple(parameters_of(own_options))


def variable_of(key: str) -> str:
    """Return the environment variable of an option, such as INTERNVIT_MAX_TILES."""
    return PREFIX + key.upper().replace("-", "_")


def resolve(command: Command, typed: Mapping[str, Any]) -> Settings:
    """Resolve the values of a command's parameters from all places.

    Args:
        command: The command whose parameters are resolved.
        typed: The values from the command line by parameter; None for those not given.

    Raises:
        UsageError: A value is invalid; the message names its place.
    """
    given = _given(command, typed)
    values = {}
    for parameter in command.parameters:
        if parameter.name in given:
            values[parameter.name] = _value(parameter, given[parameter.name])
        elif not parameter.has_default:
            raise UsageError(f"{parameter.metavar.rstrip('.')} is missing", command.usage(f"internvit {command.name}"))
        else:
            values[parameter.name] = parameter.default
    return Settings(command, given, values)


def is_on(key: str, typed: Mapping[str, Any]) -> bool:
    """Return whether a flag is given on the command line or by its variable, even if other values are invalid."""
    return bool(typed.get(key)) or os.environ.get(variable_of(key), "").lower() in TRUE


def unknown_variables() -> Iterator[str]:
    """Yield a note for each variable that begins with INTERNVIT_ and belongs to no option."""
    known = {variable_of(key) for command in REGISTERED.values() for key in command.by_key} | {CONFIG}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            guess = did_you_mean(name, known)
            yield f"the variable {printable_line(name)} sets nothing: no option has that name" + (
                guess and f"; {guess}"
            )


def print_settings(settings: Settings) -> Iterator[str]:
    """Yield the lines of a configuration file with all options, each with the place of its value."""
    command = settings.command
    yield f"# options of internvit {command.name}; command line > {PREFIX}... > --config FILE > default"
    for option in sorted(command.options, key=lambda option: option.key):
        given = settings.given.get(option.name)
        if given is not None:
            yield f"{option.key} = {_as_toml(_as_given(option, given))}  # {given.origin}"
        elif option.default in (None, "") or option.is_list:
            yield f"# {option.key} is not set" + (f"; default: {option.shown_default}" if option.shown_default else "")
        else:
            plain = option.kind in (bool, int, float) and not option.shown_default
            yield f"{option.key} = {_as_toml(option.default if plain else option.default_text)}  # default"


# -------------------------------------------------------------------------------------------- resolving one value


def _given(command: Command, typed: Mapping[str, Any]) -> dict[str, GivenValue]:
    """Return for each parameter the value from the first place that has one."""
    given: dict[str, GivenValue] = {}
    path, place = _config_path(typed)
    if path is not None:
        given |= _from_file(command, path, place)
    given |= _from_environment(command)
    for parameter in command.parameters:
        words = typed.get(parameter.name)
        if words is not None:
            given[parameter.name] = GivenValue(words, parameter.long, COMMAND_LINE)
    return given


def _value(parameter: Parameter, given: GivenValue) -> Any:
    """Parse a given value.

    Raises:
        UsageError: The text is not a value of the parameter.
    """
    words = given.words
    if isinstance(words, bool):
        return words
    word = ""
    try:
        if not isinstance(words, str):
            return [value_of(parameter, word := one) for one in words]
        return value_of(parameter, word := words)
    except UnusableWordError as error:
        hint = error.hint or f"{parameter.long}: {parameter.help}"
        raise UsageError(f"{given.place} is {printable_line(word)!r}, not {error.expected}", hint) from None


def _from_environment(command: Command) -> dict[str, GivenValue]:
    found = {}
    for option in command.options:
        variable = variable_of(option.key)
        text = os.environ.get(variable, "")
        if text:
            place = f"variable {variable}"
            found[option.name] = GivenValue(_split(text, place) if option.is_list else text, place, variable)
    return found


def _split(text: str, place: str) -> list[str]:
    """Split the variable of an option that may be repeated into its values, as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UsageError(
            f"{place} is {printable_line(text)!r}: {error}",
            "separate values by spaces, and put values with spaces in quotes",
        ) from None


# ------------------------------------------------------------------------------------------ reading the TOML file


def _config_path(typed: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the configuration file (None if there is none), and the option or variable that names it."""
    if typed.get("config") is not None:
        return typed["config"], "--config"
    return os.environ.get(CONFIG) or None, CONFIG


def _from_file(command: Command, path: str, named_by: str) -> dict[str, GivenValue]:
    """Read the values for one command; its table takes precedence over keys before the first table.

    Raises:
        UsageError: No command has a key, or a value has another type than its option.
    """
    config = read_config(path, named_by)
    lines = LineNumbers(path)
    found: dict[str, GivenValue] = {}
    for table, key, value in _entries(config, lines):
        option = command.by_key.get(key)
        if option is not None and table in ("", command.name):
            where = lines.place(table, key)
            place = f"{where}: {key}"
            found[option.name] = GivenValue(_words(option, value, place), place, where)
    return found


def _entries(config: Mapping[str, Any], lines: LineNumbers) -> Iterator[tuple[str, str, Any]]:
    """Yield the table, the option and the value of each entry, tables last.

    Raises:
        UsageError: No command has a key.
    """
    tables = {name: values for name, values in config.items() if isinstance(values, dict)}
    for name, values in (("", config), *tables.items()):
        spelled = [key.replace("_", "-") for key in values]
        if twice := [key for key in values if "_" in key and spelled.count(key.replace("_", "-")) > 1]:
            raise UsageError(
                f"{lines.place(name, twice[0])}: {printable_line(twice[0])} is set twice", "keep one spelling"
            )
    all_keys = {key for command in REGISTERED.values() for key in command.by_key}
    for key, value in config.items():
        if key not in tables:
            yield "", _known(key, all_keys, "", lines), value
    for name, values in tables.items():
        _known(name, set(REGISTERED), "", lines, "command")
        for key, value in values.items():
            yield name, _known(key, set(REGISTERED[name].by_key), name, lines), value


def _known(key: str, known: set[str], table: str, lines: LineNumbers, what: str = "option") -> str:
    """Return a known key spelled with dashes; raise a `UsageError` for an unknown one."""
    spelled = key.replace("_", "-") if what == "option" else key
    if spelled not in known:
        of = f" of internvit {table}" if table else ""
        hint = did_you_mean(spelled, known) or "keys are the names of options, such as max-tiles"
        raise UsageError(f"{lines.place(table, key)}: {printable_line(key)} is no {what}{of}", hint)
    return spelled


def _words(option: Parameter, value: Any, place: str) -> bool | str | list[str]:
    """Convert a value of the file into what the command line would give.

    Raises:
        UsageError: The option cannot have such a value: true for a number, or a list for a single value.
    """
    if isinstance(value, list) != option.is_list:
        wanted = "a list" if option.is_list else "a single value"
    elif option.is_flag and isinstance(value, bool):
        return value
    elif option.is_list and all(_is_word(one) for one in value):
        return [str(one) for one in value]
    elif not option.is_list and _is_word(value):
        return str(value)
    else:
        wanted = "true or false" if option.is_flag else "a number or a text"
    raise UsageError(f"{place} is {_as_toml(value)}, not {wanted}", MANUAL)


def _is_word(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def read_config(path: str, named_by: str = "--config") -> dict[str, Any]:
    """Read the values of a TOML file.

    Raises:
        UsageError: The file cannot be read, or is not TOML.
    """
    tomllib = _toml()
    try:
        with open(path, "rb") as file:
            values: dict[str, Any] = tomllib.load(file)
            return values
    except OSError as error:
        raise UsageError(f"{named_by} {printable_line(path)}: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{named_by} {printable_line(path)}: not TOML: {printable_line(str(error))}", MANUAL
        ) from error


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib


class LineNumbers:
    """The line numbers of the keys of a file, which is read when the first one is needed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._found: dict[tuple[str, ...], int] | None = None

    def place(self, table: str, key: str) -> str:
        """Return the file and the line, such as `c.toml, line 3`, or only the file if the line is unknown."""
        if self._found is None:
            self._found = self._read()
        names = [(*filter(None, [table]), spelling) for spelling in (key, key.replace("-", "_"))]
        line = next((self._found[name] for name in names if name in self._found), None)
        return printable_line(self._path) + (f", line {line}" if line else "")

    def _read(self) -> dict[tuple[str, ...], int]:
        try:
            with open(self._path, encoding="utf-8") as file:
                return _lines_of_keys(file.read())
        except (OSError, UnicodeDecodeError):
            return {}


def _lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Return the line of each key and table of a TOML text by parsing its statements one by one."""
    toml = _toml()
    found: dict[tuple[str, ...], int] = {}
    header, pending, start = "", "", 1
    for number, line in enumerate(text.splitlines(), 1):
        start = start if pending else number
        pending += line + "\n"
        try:
            values = toml.loads(header + pending)
        except toml.TOMLDecodeError:
            continue  # the next line continues an array or a text
        if line.lstrip().startswith("[") and start == number:
            header = pending
        for name, value in values.items():
            found.setdefault((name,), start)
            if isinstance(value, dict):
                for key in value:
                    found.setdefault((name, key), start)
        pending = ""
    return found


# ------------------------------------------------------------------------------------------ writing the TOML file


def _as_given(option: Parameter, given: GivenValue) -> Any:
    """Return a given value as a value of TOML, with numbers and flags unquoted."""
    words = given.words
    if not isinstance(words, str):
        return words
    if option.is_flag or (option.parser is None and option.kind in (int, float)):
        return value_of(option, words)
    return words


def _as_toml(value: Any) -> str:
    """Format a value as TOML; every JSON string is a basic string of TOML."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return json.dumps(value, ensure_ascii=True)
    except TypeError:  # a TOML date
        return str(value)
