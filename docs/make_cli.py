"""Write docs/cli.md from the commands themselves: `make docs`, after any change of a command or an option.

Everything comes from our own declarations, not from what Typer or a terminal makes of them, so that the page depends on
no version of Typer and on no width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from internvit_cli.cli import settings
from internvit_cli.cli.app import COMMANDS
from internvit_cli.cli.arguments import shared_parameters
from internvit_cli.cli.command import EXIT_CODES
from internvit_cli.cli.declarations import OPTIONS, REGISTERED, Command, Parameter
from internvit_cli.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = Path(__file__).with_name("cli.md")
SHARED = "extract"
"""The command that lists the options which others share with it."""
HEAD = """# Every command and option

*Written by `make docs` from the commands themselves; `internvit COMMAND --help-all` shows the same.*

The value of an option comes from the command line, otherwise from its variable `INTERNVIT_...`, otherwise from a
configuration file, otherwise it is the default. `--print-config` shows all values, each with the place that it comes
from, as such a file. The file is TOML; `--config FILE` or `INTERNVIT_CONFIG` names it. Its keys are the names of the
options without the leading dashes. Keys before the first table are for every command that has such an option. A table
is for one command, and wins:

```toml
model = "/data/InternViT-300M-448px-V2_5"
max-tiles = 6
thumbnail = false                # --no-thumbnail

[extract]
output = "/data/feats"
relocate = ["/mnt/old=/mnt/new"] # options that may be repeated are lists
```

Flags are `true` or `false` in a file, and `1` or `0` in a variable. A variable for an option that may be repeated holds
values separated by spaces, quoted as in a shell. Types of numbers have short names too: `bf16`, `fp16` or `half`,
`fp32` or `float`.

An error names the place of the value that it complains about: the option, the variable, or the line of the file. A key
that no option has is an error that names the nearest one. A variable that begins with `INTERNVIT_` and belongs to no
option is reported in a note.
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


def value_of(option: Parameter) -> str:
    """What may follow an option: its words, or what they stand for and the limits."""
    if option.choices:
        return ", ".join(f"`{word}`" for word in option.choices)
    least, most = option.least, option.most
    limits = f" {least:,} to {most:,}" if most is not None else f" from {least:,}" if least is not None else ""
    return f"`{option.metavar}`{limits}" if option.metavar else ""


def default_of(option: Parameter) -> str:
    """The default, as code where it could be typed."""
    text = option.default_text
    return text if not text or " " in text else f"`{text}`"


def option_row(command: Command | None, option: Parameter) -> str:
    """One row of a table of options."""
    names = ", ".join(f"`{name}`" for name in (*option.spellings, option.negative) if name)
    is_own = option in settings.OWN
    place = "" if is_own and option.key != "config" else f"`{settings.variable_of(option.key)}`"
    place += "" if is_own else f", `{option.key}`"
    text = option.help + (" May be repeated." if option.is_list else "")
    text += " **Required.**" if command is not None and command.is_required(option) else ""
    return f"| {names} | {escaped(value_of(option))} | {default_of(option)} | {escaped(text)} | {place} |"


def escaped(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def option_table(command: Command | None, options: Iterable[Parameter]) -> Iterator[str]:
    """The options under the names of their groups."""
    groups: dict[str, list[Parameter]] = {}
    for option in options:
        groups.setdefault(option.group, []).append(option)
    for group, members in groups.items():
        yield from ("", f"| {group} | value | default | | variable, key |", "|---|---|---|---|---|")
        yield from (option_row(command, option) for option in members)


def section(command: Command) -> Iterator[str]:
    """All about one command."""
    shared = {parameter.name for parameter in shared_parameters()}
    names = {parameter.name for parameter in command.parameters}
    is_sharing = command.name != SHARED and shared <= names
    options = [option for option in command.options if not (is_sharing and option.name in shared)]
    yield from (
        f"## internvit {command.name}",
        "",
        command.description,
        "",
        f"    {command.usage(f'internvit {command.name}')}",
    )
    if command.arguments:
        yield from ("", "| argument | |", "|---|---|")
        yield from (f"| `{argument.metavar}` | {escaped(argument.help)} |" for argument in command.arguments)
    if is_sharing:
        groups = dict.fromkeys(option.group for option in command.options if option.name in shared)
        named = ", ".join(f"*{group}*" for group in groups if group != OPTIONS)
        yield from ("", f"The options of [`internvit {SHARED}`](#internvit-{SHARED}) under {named}, `-o`, and these:")
    yield from option_table(command, options)
    yield ""


def page() -> str:
    """The whole page."""
    lines = [HEAD, "## Options of every command"]
    lines += [*option_table(None, settings.OWN), "", "`internvit --version` prints the version.", ""]
    for name in COMMANDS:
        lines += section(REGISTERED[name])
    lines += ["## Exit codes", "", "| | |", "|---|---|"]
    lines += [f"| {code.value} | {EXIT_CODES[code]} |" for code in ExitCode]
    lines += ["", COMPLETION]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
