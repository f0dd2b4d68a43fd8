"""Describe the options and arguments of a command, as the signature of its function declares them.

Parsing, settings, help, completion and docs/cli.md all read these records, so that they agree and do not depend on the
version of Typer. A declaration is Typer's own: `Annotated[int, typer.Option("-n", "--count", min=1, help="...")] = 10`.
These fields are used: names, help, metavar, min, max, parser, show_default (a text in place of the default's value),
rich_help_panel (the group in the help) and autocompletion.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OPTIONS = "Options"
"""The group of options that declare no group."""
METAVARS: dict[type, str] = {str: "TEXT", int: "N", float: "X"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option or argument of a command."""

    name: str
    """The keyword of the command's function, such as `max_tiles`."""
    kind: type
    """The type of one value: bool, int, float, str, an Enum, or what `parser` returns."""
    is_list: bool
    default: Any
    """`inspect.Parameter.empty` if the argument is required."""
    spellings: tuple[str, ...] = ()
    """The spellings on the command line, such as `-o` and `--output`; empty for an argument."""
    negative: str = ""
    """The option that turns a flag off, such as `--no-thumbnail`."""
    metavar: str = ""
    help: str = ""
    group: str = OPTIONS
    least: float | None = None
    most: float | None = None
    shown_default: str = ""
    """The text shown instead of the default, such as `4GiB`."""
    parser: Callable[[str], Any] | None = None
    complete: Callable[..., Any] | None = None

    @property
    def has_default(self) -> bool:
        """Whether the parameter may be left out."""
        return self.default is not inspect.Parameter.empty

    @property
    def is_argument(self) -> bool:
        """Whether the parameter is positional."""
        return not self.spellings

    @property
    def is_flag(self) -> bool:
        """Whether the option takes no value."""
        return self.kind is bool

    @property
    def long(self) -> str:
        """The spelling that messages use, such as `--max-tiles`; the metavar of an argument."""
        return next((name for name in self.spellings if name.startswith("--")), self.metavar)

    @property
    def key(self) -> str:
        """The name in a configuration file, such as `max-tiles`; empty for an argument."""
        return "" if self.is_argument else self.long.removeprefix("--")

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of an Enum; empty for other types."""
        return tuple(str(member.value) for member in self.kind) if issubclass(self.kind, Enum) else ()

    @property
    def default_text(self) -> str:
        """The default as a user would type it; empty if there is none, or if the flag is off by default."""
        if self.shown_default:
            return self.shown_default
        if not self.has_default or self.is_list or self.default in (None, ""):
            return ""
        if self.is_flag:
            return (self.long if self.default else self.negative) if self.negative else ""
        if isinstance(self.default, Enum):
            return str(self.default.value)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its function and its parameters."""

    name: str
    run: Callable[..., int]
    parameters: tuple[Parameter, ...]
    essential: tuple[str, ...] = ()
    """Names of the options that the short help lists; empty for all options."""
    required: tuple[str, ...] = ()
    """Names of parameters that are required although the signature has a default."""
    by_key: dict[str, Parameter] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_key", {option.key: option for option in self.options})

    @property
    def arguments(self) -> list[Parameter]:
        """The positional parameters."""
        return [parameter for parameter in self.parameters if parameter.is_argument]

    @property
    def options(self) -> list[Parameter]:
        """The parameters that are options."""
        return [parameter for parameter in self.parameters if not parameter.is_argument]

    @property
    def description(self) -> str:
        """The description of the command, which is its docstring."""
        return inspect.cleandoc(self.run.__doc__ or "")

    def is_required(self, parameter: Parameter) -> bool:
        """Return whether a parameter has to be given."""
        return not parameter.has_default or parameter.name in self.required

    def usage(self, path: str) -> str:
        """Return the usage line, such as `internvit extract [OPTIONS] SOURCES... -o OUT`."""
        words = [path, "[OPTIONS]"]
        words += [p.metavar if self.is_required(p) else f"[{p.metavar}]" for p in self.arguments]
        words += [f"{option.spellings[0]} {option.metavar}" for option in self.options if self.is_required(option)]
        return " ".join(words)


REGISTERED: dict[str, Command] = {}
"""All commands by name; they share one configuration file and one environment."""


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """Return the parameters that the signature of a function declares, in order."""
    return [_parameter(parameter) for parameter in inspect.signature(function, eval_str=True).parameters.values()]


def _parameter(parameter: inspect.Parameter) -> Parameter:
    annotation, *rest = get_args(parameter.annotation)
    info: Any = next(part for part in rest if isinstance(part, typer.models.ParameterInfo))
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    kind = kinds[0] if type(None) in get_args(annotation) else annotation
    is_list = get_origin(kind) is list
    value: Any = get_args(kind)[0] if is_list else kind
    spellings, negative = _spellings(parameter.name, info, is_flag=value is bool)
    return Parameter(
        name=parameter.name,
        kind=value if isinstance(value, type) else object,
        is_list=is_list,
        default=parameter.default,
        spellings=spellings,
        negative=negative,
        metavar=_metavar(parameter.name, info, value, is_list=is_list),
        help=info.help or "",
        group=info.rich_help_panel or OPTIONS,
        least=info.min,
        most=info.max,
        shown_default=info.show_default if isinstance(info.show_default, str) else "",
        parser=info.parser,
        complete=info.autocompletion,
    )


def _spellings(name: str, info: Any, *, is_flag: bool) -> tuple[tuple[str, ...], str]:
    """Return the names of an option, and the name that turns it off (empty if there is none)."""
    if isinstance(info, typer.models.ArgumentInfo):
        return (), ""
    declared = [part for part in (info.default, *(info.param_decls or ())) if isinstance(part, str)]
    long = name.replace("_", "-")
    declared = declared or [f"--{long}/--no-{long}" if is_flag else f"--{long}"]
    pairs = [part.partition("/") for part in declared]
    return tuple(on for on, _, _ in pairs), next((off for _, _, off in pairs if off), "")


def _metavar(name: str, info: Any, kind: type, *, is_list: bool) -> str:
    if kind is bool:
        return ""
    if info.metavar:
        return str(info.metavar)
    if isinstance(info, typer.models.ArgumentInfo):
        return name.upper() + ("..." if is_list else "")
    return METAVARS.get(kind, name.upper().replace("_", "-"))


def as_typer_function(name: str, parameters: Iterable[Parameter], summary: str) -> Callable[..., None]:
    """Return a function whose signature declares a command with text values to Typer; it is never called."""

    def command(**_: Any) -> None:
        raise AssertionError

    signature = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, annotation=_in_words(one), default=None)
        for one in parameters
    ]
    command.__name__ = name
    command.__doc__ = summary
    command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in signature}
    return command


def _in_words(parameter: Parameter) -> Any:
    """Return the annotation of a parameter with text values, or of a flag."""
    kind: Any = bool if parameter.is_flag else list[str] if parameter.is_list else str
    complete = parameter.complete
    if complete is None and parameter.choices:
        complete = _completes(parameter.choices)
    common: dict[str, Any] = {"help": parameter.help, "metavar": parameter.metavar or None, "autocompletion": complete}
    info: Any
    if parameter.is_argument:
        info = typer.Argument(**common)
    else:
        first, *others = parameter.spellings
        info = typer.Option(*others, f"{first}/{parameter.negative}" if parameter.negative else first, **common)
    return Annotated[kind | None, info]


def _completes(words: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete
