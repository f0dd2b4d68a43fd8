"""Format the help of commands as plain text: the essential options or all of them, as wide as the terminal.

Words are never broken, so that they can be copied and searched.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from internvit_cli.cli.settings import OWN
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from internvit_cli.cli.declarations import Command, Parameter
    from internvit_cli.errors import ExitCode

MOST_OPTIONS = 15
"""How many options of its own the short help of a command lists."""
WIDEST = 100
"""Largest line length, in columns; longer lines are hard to read."""
WIDEST_NAMES = 26
"""Columns for the names of options; the text of a longer name goes below it."""
LEAST_TEXT = 44
"""Smallest number of columns for texts beside names; in a narrower terminal, texts go below the names."""
BELOW = 8
"""Indentation of texts below names, in columns."""
NO_BREAK = "\N{NO-BREAK SPACE}"
LONGEST_WHOLE = 36
"""Remarks in brackets of up to this many characters are kept on one line."""
ARGUMENTS, GENERAL = "Arguments", "General options"
WITH_NAME, WITHOUT = "  ", "      "
"""Indentation that aligns options without a short name with those that have one."""


def command_help(command: Command, *, everything: bool) -> str:
    """Return the help of one command, with all options or with the essential ones."""
    path = f"internvit {command.name}"
    summary, _, rest = command.description.partition("\n\n")
    is_short = bool(command.essential) and not everything
    shown = [o for o in command.options if not is_short or o.name in command.essential]
    paragraphs = [summary, f"Usage: {command.usage(path)}", *filter(None, rest.split("\n\n"))]
    blocks = ["\n".join(_paragraph(text)) for text in paragraphs]
    blocks += _sections(command, command.arguments, {ARGUMENTS: command.arguments})
    hidden = len(command.options) - len(shown)
    own = [option for option in OWN if option.name != "help_all" or command.essential]
    blocks += _sections(command, [*shown, *own], _by_group(shown) | {GENERAL: own})
    blocks.append("\n".join(_paragraph(_more(path, hidden))))
    return "\n\n".join(blocks)


def root_help(
    summary: str, commands: Mapping[str, Command], options: Sequence[Parameter], codes: Mapping[ExitCode, str]
) -> str:
    """Return the help of the program, with one line per command."""
    width = max(map(len, commands)) + 4
    lines = [
        f"  {name:<{width - 2}}{command.description.partition(chr(10) * 2)[0]}" for name, command in commands.items()
    ]
    exits = [f"  {code:<{width - 2}}{text}" for code, text in codes.items()]
    return "\n\n".join(
        (
            "\n".join(_paragraph(summary)),
            "Usage: internvit COMMAND [OPTIONS] ...",
            "\n".join((_heading("Commands"), *_hanging(lines, width))),
            "\n".join((_heading("Options"), *_rows(None, options))),
            "\n".join((_heading("Exit codes"), *_hanging(exits, width))),
            "\n".join(_paragraph("Run internvit COMMAND --help for the options of a command.")),
        )
    )


def _more(path: str, hidden: int) -> str:
    more = f"{path} --help-all lists {counted(hidden, 'more option')}. " if hidden else ""
    return f"{more}Every option can also be set by a variable, such as INTERNVIT_MODEL, or in a file (--config)."


def _by_group(options: Iterable[Parameter]) -> dict[str, list[Parameter]]:
    groups: dict[str, list[Parameter]] = {}
    for option in options:
        groups.setdefault(option.group, []).append(option)
    return groups


def _sections(command: Command, every: Sequence[Parameter], groups: Mapping[str, Sequence[Parameter]]) -> Iterator[str]:
    """Yield a heading and its rows for each group; all groups align their texts in the same column."""
    width = _name_width(every)
    for group, members in groups.items():
        if members:
            yield "\n".join((_heading(group), *_rows(command, members, width)))


def _rows(command: Command | None, parameters: Sequence[Parameter], width: int | None = None) -> Iterator[str]:
    width = _name_width(parameters) if width is None else width
    is_beside = columns() - width >= LEAST_TEXT
    for parameter in parameters:
        name = _name(parameter)
        lines = wrap_lines(_text(command, parameter), columns() - (width if is_beside else BELOW))
        if is_beside and len(name) + 2 <= width:
            yield _bold(name) + " " * (width - len(name)) + lines.pop(0)
        else:
            yield _bold(name)
        yield from (" " * (width if is_beside else BELOW) + line for line in lines)


def _name(parameter: Parameter) -> str:
    if parameter.is_argument:
        return WITH_NAME + parameter.metavar
    names = sorted(parameter.spellings, key=lambda name: name.startswith("--"))
    names += [parameter.negative] if parameter.negative else []
    return (
        (WITHOUT if names[0].startswith("--") else WITH_NAME)
        + ", ".join(names)
        + (f" {parameter.metavar}" if parameter.metavar else "")
    )


def _name_width(parameters: Sequence[Parameter]) -> int:
    """Return the columns of the longest name and the space after it."""
    return max((len(_name(p)) for p in parameters if len(_name(p)) <= WIDEST_NAMES), default=0) + 2


def _text(command: Command | None, parameter: Parameter) -> str:
    """Return the help of a parameter, followed by its choices and its default."""
    facts: list[str] = []
    if parameter.choices:
        facts.append(", ".join(parameter.choices))
    if parameter.default_text:
        facts.append(f"default: {parameter.default_text}")
    if command is not None and command.is_required(parameter):
        facts.append("required")
    if parameter.is_list and not parameter.is_argument:
        facts.append("may be repeated")
    return " ".join((parameter.help, *(_whole(f"[{fact}]") for fact in facts)))


def _whole(text: str) -> str:
    """Return a short text with spaces that are not wrapped."""
    return text.replace(" ", NO_BREAK) if len(text) <= LONGEST_WHOLE else text


# ------------------------------------------------------------------------------------------------------------- the text


def columns() -> int:
    """Return the line length for this terminal, in columns."""
    return max(20, min(WIDEST, shutil.get_terminal_size().columns))


def _paragraph(text: str) -> list[str]:
    """Return a paragraph as wrapped lines; an indented paragraph is not changed."""
    if text.startswith(" "):
        return text.splitlines()
    return wrap_lines(" ".join(text.split()), columns())


def _hanging(lines: Iterable[str], indent: int) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(
            line, columns(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
        )


def wrap_lines(text: str, width: int) -> list[str]:
    """Return the lines of a text; a word wider than `width` gets a line of its own."""
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines] or [""]


def _heading(text: str) -> str:
    return _bold(f"{text}:")


def _bold(text: str) -> str:
    """Return the text, in bold on a terminal that supports it."""
    indent = text[: len(text) - len(text.lstrip())]
    return f"{indent}\033[1m{text.lstrip()}\033[0m" if _is_colored() else text


def _is_colored() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
