"""`internvit models`: list the models that are known by name."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.console import human_bytes, print_json, print_line
from internvit_cli.errors import ExitCode

if TYPE_CHECKING:
    from internvit_cli.model.known import KnownModelFacts


def models_command(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """List the models that are known by name.

    The table gives the size of the download, the bytes per tile on disk, and whether a run would find the model in the
    hub cache. Any other InternViT, or model that contains one, works too; give its hub id or its folder.
    """
    from internvit_cli.model.known import known_models

    models = known_models()
    if json:
        print_json({"models": [asdict(model) for model in models], "exit_code": int(ExitCode.DONE), "error": None})
    else:
        _print_table(models)
    return int(ExitCode.DONE)


def _print_table(models: list[KnownModelFacts]) -> None:
    """Print one line per model in 80 columns; the publisher, which begins every hub id, is printed once below."""
    print_line(f"{'name':<26}{'short':<9}{'download':>9}{'tokens/tile':>13}{'bytes/tile':>11}  cached")
    for model in models:
        _, _, name = model.name.rpartition("/")
        download = human_bytes(model.download_bytes) if model.download_bytes else "none"
        print_line(
            f"{name:<26}{(model.aliases or ('',))[0]:<9}{download:>9}{f'{model.tokens} x {model.token_size}':>13}"
            f"{human_bytes(model.bytes_per_tile):>11}  {model.cached}"
        )
    print_line()
    print_line(f"published as {publisher_of(models)}/NAME, license {', '.join(licenses_of(models))}")
    print_line("tiny-random has random weights, to try the tool")


def publisher_of(models: list[KnownModelFacts]) -> str:
    """Return the publisher of the models on the hub."""
    return ", ".join(sorted({model.name.partition("/")[0] for model in models if "/" in model.name}))


def licenses_of(models: list[KnownModelFacts]) -> list[str]:
    """Return the licenses of the published models."""
    return sorted({model.license for model in models if "/" in model.name})
