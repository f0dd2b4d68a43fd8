"""Write docs/cli.md from the commands themselves: `make docs`, after any change of a command or an option.

Everything comes from our own declarations, not from what Typer or a terminal makes of them, so that the page depends on
no version of Typer and on no width.
"""

from __future__ import annotations

import inspect
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_origin

import typer

from internvit_cli.cli import settings
from internvit_cli.cli.app import COMMANDS
from internvit_cli.cli.arguments import build_options
from internvit_cli.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = Path(__file__).with_name("cli.md")
SHARED = "extract"
"""The command that lists the options which others share with it."""
TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: ""}
EXIT_CODES = {
    ExitCode.DONE: "everything done, or nothing new to do",
    ExitCode.CANNOT_RUN: "cannot run, or something is wrong; `extract`: not one image could be used",
    ExitCode.USAGE: "the command line, a variable or a configuration file is wrong",
    ExitCode.SKIPPED: "finished, with skipped images (`extract --allow-skipped` makes that a 0)",
    ExitCode.NO_IMAGES: "no images found",
    ExitCode.OTHER_RECIPE: "the output exists with another recipe or another root",
    ExitCode.NO_SPACE: "not enough disk space",
    ExitCode.LOCKED: "another run holds the output; try later",
    ExitCode.SIGINT: "stopped by SIGINT; the same command continues",
    ExitCode.SIGUSR1: "stopped by SIGUSR1; the same command continues",
    ExitCode.SIGTERM: "stopped by SIGTERM; the same command continues",
}
HEAD = """# Every command and option

*Written by `make docs` from the commands themselves; `internvit COMMAND --help` shows the same.*

An option's value comes from the command line, else from its variable `INTERNVIT_...`, else from a file, else it is the
default. `--print-config` shows all values, and where each comes from, as such a file. The file is TOML, named by
`--config FILE` or `INTERNVIT_CONFIG`; its keys are the options' names without the dashes in front. What stands before
the tables is for every command that has such an option; a table is for one command, and wins:

```toml
model = "/data/InternViT-300M-448px-V2_5"
max-tiles = 6
thumbnail = false                # --no-thumbnail

[extract]
output = "/data/feats"
relocate = ["/mnt/old=/mnt/new"] # options that may be repeated are lists
```

Flags are `true` or `false` there, and `1` or `0` in variables. A key that is no option is an error that names the
nearest one.
"""
COMPLETION = """## Completion

`internvit --install-completion` installs it for the shell that calls it (bash from 4.4 on, zsh, fish), and
`--show-completion` prints it. It completes commands, options, words such as `bfloat16`, and for `internvit show` the
keys of an output of up to 100,000 images. Where the shell cannot be told from its process, name it outright:

```sh
_INTERNVIT_COMPLETE=source_bash internvit > /etc/bash_completion.d/internvit
_INTERNVIT_COMPLETE=source_zsh internvit > /usr/local/share/zsh/site-functions/_internvit
_INTERNVIT_COMPLETE=source_fish internvit > ~/.config/fish/completions/internvit.fish
```
"""


class Option(NamedTuple):
    """One parameter of a command, as its declaration has it."""

    parameter: inspect.Parameter
    info: Any
    """Typer's `OptionInfo` or `ArgumentInfo`."""
    kind: Any
    """The type of one value."""
    is_list: bool

    @property
    def is_argument(self) -> bool:
        """Whether it goes by its place."""
        return isinstance(self.info, typer.models.ArgumentInfo)

    @property
    def names(self) -> list[str]:
        """Spellings on the command line, such as `-o`, `--output`."""
        declared = [part for part in (self.info.default, *(self.info.param_decls or ())) if isinstance(part, str)]
        if declared:
            return declared
        name = self.parameter.name.replace("_", "-")
        return [f"--{name}/--no-{name}" if self.kind is bool else f"--{name}"]

    @property
    def key(self) -> str:
        """Its name in a file."""
        long = next(name for name in self.names if name.startswith("--"))
        return long.partition("/")[0].removeprefix("--")


def options_of(command: Callable[..., Any]) -> list[Option]:
    """The parameters of a command, in order."""
    found = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        annotation, *rest = get_args(parameter.annotation)
        info = next(part for part in rest if isinstance(part, typer.models.ParameterInfo))
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)] if not_none(annotation) else []
        kind = kinds[0] if kinds else annotation
        is_list = get_origin(kind) is list
        found.append(Option(parameter, info, get_args(kind)[0] if is_list else kind, is_list))
    return found


def not_none(annotation: Any) -> bool:
    """Whether an annotation is one of several types, None among them."""
    return type(None) in get_args(annotation)


def value_of(option: Option) -> str:
    """What may follow an option: its words, or what they stand for and the limits."""
    if option.info.metavar:
        return f"`{option.info.metavar}`"
    if isinstance(option.kind, type) and issubclass(option.kind, Enum):
        return ", ".join(f"`{member.value}`" for member in option.kind)
    least, most = option.info.min, option.info.max
    limits = f" {least:,} to {most:,}" if None not in (least, most) else f" from {least:,}" if least is not None else ""
    return f"{TYPES.get(option.kind, option.kind.__name__.upper())}{limits}"


def default_of(option: Option) -> str:
    """The default, as it would be written; nothing where the help says what happens without."""
    value = option.parameter.default
    if value is inspect.Parameter.empty or value is None or value == "":
        return ""
    if option.kind is bool:
        pair = [name for name in option.names if "/" in name]
        return f"`{pair[0].split('/')[0 if value else 1]}`" if pair else ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


def option_row(option: Option) -> str:
    """One row of a table of options."""
    names = ", ".join(f"`{name}`" for part in option.names for name in part.split("/"))
    is_own = option.parameter.name in settings.OWN
    place = "" if option.key == "print-config" else f"`{settings.variable_of(option.key)}`"
    place += "" if is_own else f", `{option.key}`"
    text = option.info.help + (" May be repeated." if option.is_list and "repeated" not in option.info.help else "")
    return f"| {names} | {escaped(value_of(option))} | {default_of(option)} | {escaped(text)} | {place} |"


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def option_table(options: list[Option]) -> Iterator[str]:
    """The options under the names of their groups."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(option.info.rich_help_panel or "Options", []).append(option)
    for group, members in groups.items():
        yield from ("", f"| {group} | value | default | | variable, key |", "|---|---|---|---|---|")
        yield from map(option_row, members)


def usage(name: str, arguments: list[Option]) -> str:
    """How a command is called."""
    words = []
    for argument in arguments:
        word = argument.info.metavar or argument.parameter.name.upper() + ("..." if argument.is_list else "")
        is_needed = argument.parameter.default is inspect.Parameter.empty
        words.append(word if is_needed else f"[{word}]")
    return " ".join(["internvit", name, "[OPTIONS]", *words])


def section(name: str, command: Callable[..., Any]) -> Iterator[str]:
    """All about one command."""
    listed = options_of(command)
    arguments = [option for option in listed if option.is_argument]
    shared = set(inspect.signature(build_options).parameters)
    is_sharing = name != SHARED and shared <= {option.parameter.name for option in listed}
    options = [
        option for option in listed if not option.is_argument and not (is_sharing and option.parameter.name in shared)
    ]
    yield from (
        f"## internvit {name}",
        "",
        inspect.cleandoc(command.__doc__ or ""),
        "",
        f"    {usage(name, arguments)}",
    )
    if arguments:
        yield from ("", "| argument | |", "|---|---|")
        yield from (
            f"| `{argument.info.metavar or argument.parameter.name.upper()}` | {escaped(argument.info.help)} |"
            for argument in arguments
        )
    if is_sharing:
        groups = dict.fromkeys(option.info.rich_help_panel for option in options_of(build_options))
        named = ", ".join(f"*{group}*" for group in groups if group)
        yield from ("", f"The options of [`internvit {SHARED}`](#internvit-{SHARED}) under {named}, `-o`, and these:")
    yield from option_table(options)
    yield ""


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## Options of every command"]
    lines += [*option_table(options_of(settings._own_options)), "", "`-h`, `--help` shows the help of a command."]
    lines += ["`internvit --version` prints the version.", ""]
    for name, command in COMMANDS.items():
        lines += section(name, command)
    lines += ["## Exit codes", "", "| | |", "|---|---|"]
    lines += [f"| {code.value} | {EXIT_CODES[code]} |" for code in ExitCode]
    lines += ["", COMPLETION]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
