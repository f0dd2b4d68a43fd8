"""Adapt Typer's commands: Typer splits and completes the command line, the values, errors and help are our own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from internvit_cli.cli.console import print_line, print_text, printable_line, say
from internvit_cli.cli.declarations import REGISTERED, Command, Parameter, as_typer_function, parameters_of
from internvit_cli.cli.help import command_help, root_help
from internvit_cli.cli.settings import OWN, Settings, is_on, print_settings, resolve, unknown_variables
from internvit_cli.errors import ExitCode, InternvitError, UsageError
from internvit_cli.runtime.words import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Base class of Typer's usage errors; the module that defines it differs between versions."""
EXIT_CODES = {
    ExitCode.DONE: "everything is done, or there is nothing new to do",
    ExitCode.CANNOT_RUN: "the command cannot run, or something is wrong; for extract, no image could be used",
    ExitCode.USAGE: "the command line, a variable or a configuration file is wrong",
    ExitCode.SKIPPED: "finished, with skipped images (extract --allow-skipped makes that a 0)",
    ExitCode.NO_IMAGES: "no images were found",
    ExitCode.OTHER_RECIPE: "the output exists with another recipe or another root",
    ExitCode.NO_SPACE: "there is not enough disk space",
    ExitCode.LOCKED: "another run holds the output; try again later",
    ExitCode.SIGHUP: "stopped by SIGHUP, for example because the terminal was closed; the same command continues",
    ExitCode.SIGINT: "stopped by SIGINT; the same command continues",
    ExitCode.SIGUSR1: "stopped by SIGUSR1; the same command continues",
    ExitCode.SIGTERM: "stopped by SIGTERM; the same command continues",
}


@dataclass(slots=True)
class CommandCall:
    """What is known about the command line when it fails."""

    as_json: bool = False
    debug: bool = False


def add_command(
    app: typer.Typer,
    name: str,
    run: Callable[..., int],
    *,
    essential: tuple[str, ...] = (),
    required: tuple[str, ...] = (),
) -> None:
    """Register a function as a command of the program.

    Args:
        app: The program.
        name: Name of the command.
        run: Runs the command and returns the exit code; its signature declares the parameters.
        essential: Names of the options that the short help lists; empty for all.
        required: Names of parameters that are required although they have a default.
    """
    command = Command(name, run, tuple(parameters_of(run)), essential, required)
    REGISTERED[name] = command

    class Own(_Command):
        declared = command

    summary = command.description.partition("\n\n")[0]
    app.command(name, cls=Own, help=summary, add_help_option=False)(
        as_typer_function(name, (*command.parameters, *OWN), summary)
    )


class _Command(TyperCommand):
    """A Typer command that resolves values from all places and prints our own help."""

    declared: Command

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Split the command line, and resolve the values of all parameters.

        Raises:
            UsageError: The command line, a variable or the configuration file is invalid.
        """
        if ctx.resilient_parsing:  # the shell asks for completions
            return list(super().parse_args(ctx, args))
        typed, rest = split(self, ctx, args, (*self.declared.parameters, *OWN))
        if typed.get("help_") or typed.get("help_all"):
            print_text(command_help(self.declared, everything=bool(typed.get("help_all"))))
            raise typer.Exit
        if rest:
            raise UsageError(f"one argument too many: {printable_line(rest[0])}", self.declared.usage(ctx.command_path))
        call: CommandCall = ctx.ensure_object(CommandCall)
        call.as_json, call.debug = is_on("json", typed), is_on("debug", typed)
        for note in unknown_variables():
            say(f"note: {note}")
        settings = resolve(self.declared, typed)
        call.as_json, call.debug = bool(settings.values.get("json")), bool(settings.values.get("debug"))
        if typed.get("print_config"):
            for line in print_settings(settings):
                print_line(line)
            raise typer.Exit
        ctx.obj = settings
        return []

    def invoke(self, ctx: Any) -> int:
        """Run the command.

        Raises:
            InternvitError: The command fails. The hint says where the values that the message names come from.
        """
        settings: Settings = ctx.obj
        try:
            with settings.in_use():
                return self.declared.run(**settings.values)
        except InternvitError as error:
            settings.explain(error)
            raise


def root_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    install_completion: Annotated[
        bool, typer.Option("--install-completion", help="Install completion for the current shell.")
    ] = False,
    show_completion: Annotated[
        bool, typer.Option("--show-completion", help="Print the completion script of the current shell.")
    ] = False,
    help_: Annotated[bool, typer.Option("-h", "--help", help="Show this help.")] = False,
) -> None:
    """Declare the options of the program itself."""


ROOT_OPTIONS = tuple(parameters_of(root_options))
TYPERS_OWN = ("install_completion", "show_completion")
"""Options of the program that Typer adds and handles."""


class Group(TyperGroup):
    """A Typer group that prints our own help and errors."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Split the command line into options of the program, the command, and the arguments of the command.

        Raises:
            UsageError: The program has no such option.
        """
        if ctx.resilient_parsing:
            return list(super().parse_args(ctx, args))
        typed, rest = split(self, ctx, args, ROOT_OPTIONS)
        if any(typed.get(name) for name in TYPERS_OWN):
            return list(super().parse_args(ctx, args))
        if typed.get("version"):
            from internvit_cli import __version__

            print_line(f"internvit {__version__}")
            raise typer.Exit
        if typed.get("help_") or not rest:
            print_text(root_help(str(self.help), REGISTERED, ROOT_OPTIONS, EXIT_CODES))
            raise typer.Exit(ExitCode.DONE if typed.get("help_") else ExitCode.USAGE)
        ctx.args = rest
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the named command.

        Raises:
            UsageError: There is no command of that name; the hint names the most similar one.
        """
        name, *rest = ctx.args
        command: Any = self.commands.get(name)
        if command is None:
            hint = did_you_mean(name, self.commands) or "internvit --help lists the commands"
            raise UsageError(f"internvit has no command {printable_line(name)}", hint)
        with command.make_context(name, rest, parent=ctx) as own:
            return command.invoke(own)


def split(
    command: Any, ctx: Any, args: Sequence[str], parameters: Iterable[Parameter]
) -> tuple[dict[str, Any], list[str]]:
    """Return the text, texts or flag given for each parameter, and the arguments that are left over.

    Raises:
        UsageError: An option is unknown, or lacks its value.
    """
    by_name = {parameter.name: parameter for parameter in parameters}
    try:
        typed, rest, _ = command.make_parser(ctx).parse_args(list(args))
    except USAGE_ERROR as error:
        raise _in_our_words(error, ctx.command_path, by_name.values()) from None
    words = {name: list(value) if isinstance(value, tuple) else value for name, value in typed.items()}
    given = {
        name: value for name, value in words.items() if isinstance(value, str | bool) or (value and name in by_name)
    }
    return {name: value for name, value in given.items() if name in by_name}, rest


def _in_our_words(error: Any, path: str, parameters: Iterable[Parameter]) -> UsageError:
    """Convert Typer's usage error into a `UsageError` with our own message and hint."""
    spelled = str(getattr(error, "option_name", "") or "")
    names = {name: one for one in parameters for name in (*one.spellings, one.negative) if name}
    where_to_look = f"{path} --help lists the options"
    if not spelled:
        return UsageError(str(error.format_message()), where_to_look)
    option = names.get(spelled)
    if option is None:
        return UsageError(
            f"{path} has no option {printable_line(spelled)}", did_you_mean(spelled, names) or where_to_look
        )
    if option.is_flag:
        alone = f"{option.long} or {option.negative}" if option.negative else f"{spelled} alone"
        return UsageError(f"{spelled} takes no value", f"give {alone}")
    return UsageError(f"{spelled} lacks its value", f"give {spelled} {option.metavar}")
