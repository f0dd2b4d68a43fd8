"""Options from the environment and from a file: command line > INTERNVIT_... > --config FILE > default, for every one.

A file is TOML; its keys are the options' names without the dashes in front. Tables hold what is for one command only:

    model = "/data/InternViT-300M-448px-V2_5"
    max-tiles = 6

    [extract]
    output = "/data/feats"
"""

from __future__ import annotations

import difflib
import inspect
import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from internvit_cli.cli.console import fail, one_line, print_line
from internvit_cli.errors import InternvitError, UsageError

PREFIX = "INTERNVIT_"
OWN = ("config", "print_config")
"""Options that say where others come from, and have no place in a file."""

_known: dict[str, set[str]] = {}
"""Names of options by command, such as `max-tiles`, for all commands: one file may serve several."""


def configurable(name: str, command: Callable[..., int]) -> Callable[..., int]:
    """Let a command take its options from a file and from the environment too, and say its errors as they want it."""
    signature = inspect.signature(command, eval_str=True)
    names = {parameter.name: _option_name(parameter) for parameter in signature.parameters.values()}
    options = {key: option for key, option in names.items() if option}
    _known[name] = set(options.values())
    own = list(inspect.signature(_own_options, eval_str=True).parameters.values())

    def wrapper(context: typer.Context, **values: Any) -> int:
        values.pop("config")
        if values.pop("print_config"):
            _print_config(context, options)
            return 0
        try:
            return command(**values)
        except InternvitError as error:
            if values.get("debug"):
                raise
            return fail(error, as_json=bool(values.get("json")))

    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in (*signature.parameters.values(), *own)
        ),
    ]
    wrapper.__doc__ = command.__doc__
    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": int}
    return wrapper


def _option_name(parameter: inspect.Parameter) -> str:
    """The name of a parameter's option in a file, its environment variable set on the way; empty for an argument."""
    info = next(
        (part for part in get_args(parameter.annotation)[1:] if isinstance(part, typer.models.OptionInfo)), None
    )
    if info is None:
        return ""
    declared = (info.default, *(info.param_decls or ()))  # Typer moves the first one to its place later
    long = [part.partition("/")[0] for part in declared if isinstance(part, str) and part.startswith("--")]
    name = (long[0] if long else parameter.name).lstrip("-").replace("_", "-")
    info.envvar, info.show_envvar = variable_of(name), False
    return name


def variable_of(option: str) -> str:
    """The environment variable of an option, such as INTERNVIT_MAX_TILES."""
    return PREFIX + option.upper().replace("-", "_")


def _use_file(context: typer.Context, path: str | None) -> str | None:
    """Make a file's values the defaults of the command's options; called before the others are looked at."""
    if path is not None:
        command = str(context.info_name)
        values = _values_for(command, read_config(path), path)
        by_option = {_name_of(parameter): parameter for parameter in context.command.params}
        for option, value in values.items():
            _check_kind(option, value, by_option[option], path)
        context.default_map = {by_option[option].name: value for option, value in values.items()}
    return path


def _check_kind(option: str, value: Any, parameter: Any, path: str) -> None:
    """Refuse what the command line could not say: true for a number, a list for a single word."""
    if isinstance(value, list) != bool(parameter.multiple or parameter.nargs != 1):
        wanted = "a single value" if isinstance(value, list) else "a list"
    elif isinstance(value, bool) and not parameter.is_flag:
        wanted = "a number or a text"
    else:
        return
    raise UsageError(
        f"--config {one_line(path)}: {option} = {_as_toml(value)}, where {wanted} belongs", "see docs/cli.md"
    )


def _own_options(
    config: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Take options from a TOML file.",
            envvar=f"{PREFIX}CONFIG",
            show_envvar=False,
            is_eager=True,
            callback=_use_file,
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all options and where they come from, and do nothing.")
    ] = False,
) -> None:
    """Options that every command has."""


def read_config(path: str) -> dict[str, Any]:
    """The values of a TOML file.

    Raises:
        UsageError: it cannot be read, or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            values: dict[str, Any] = tomllib.load(file)
            return values
    except OSError as error:
        raise UsageError(f"--config {one_line(path)}: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {one_line(path)}: not TOML: {one_line(str(error))}", "see docs/cli.md") from error


def _values_for(command: str, config: dict[str, Any], path: str) -> dict[str, Any]:
    """What a file says for one command, by option; its own table wins over what stands before the tables.

    Raises:
        UsageError: a key that no command has.
    """
    everywhere = {_spelled(key): value for key, value in config.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in config.items() if isinstance(value, dict)}
    for key in everywhere:
        _check_key(key, set().union(*_known.values()), path)
    for table, values in tables.items():
        _check_key(table, set(_known), path)
        for key in values:
            _check_key(_spelled(key), _known[table], path)
    own = {_spelled(key): value for key, value in tables.get(command, {}).items()}
    return {key: value for key, value in (everywhere | own).items() if key in _known[command]}


def _check_key(key: str, known: set[str], path: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]}?" if close else "keys are the names of options, such as max-tiles"
        raise UsageError(f"--config {one_line(path)}: {one_line(key)!s} is no option", hint)


def _spelled(key: str) -> str:
    return key.replace("_", "-")


def _name_of(parameter: Any) -> str:
    """The name of a parsed command's parameter in a file."""
    long = next((part for part in parameter.opts if part.startswith("--")), parameter.name)
    return _spelled(long.lstrip("-"))


def _print_config(context: typer.Context, options: dict[str, str]) -> None:
    """All options as a file of their own, each with where its value comes from."""
    print_line(f"# options of internvit {context.info_name}; command line > {PREFIX}... > --config FILE > default")
    for key, option in sorted(options.items(), key=lambda item: item[1]):
        source = context.get_parameter_source(key)
        word = source.name.lower().replace("_map", " file").replace("default file", "file") if source else "default"
        value = context.params.get(key)
        print_line(f"# {option} is not set" if value in (None, ()) else f"{option} = {_as_toml(value)}  # {word}")


def _as_toml(value: Any) -> str:
    """A value as TOML: of its basic strings JSON's are a part."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    plain = getattr(value, "value", value)
    return json.dumps(plain, ensure_ascii=True)
