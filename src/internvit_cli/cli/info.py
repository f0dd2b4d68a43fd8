"""`internvit info`: print what a feature file or folder holds."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internvit_cli.cli.console import human_bytes, print_json, print_text, printable_line
from internvit_cli.cli.help import columns, wrap_lines
from internvit_cli.cli.ls import print_images
from internvit_cli.cli.progress import progress
from internvit_cli.cli.unfinished import CONTINUE, found_output
from internvit_cli.errors import ExitCode
from internvit_cli.runtime.words import counted, listed

if TYPE_CHECKING:
    from internvit_cli.model.matching import WeightsMatch

WIDER_THAN_ALL = 10_000
"""Columns of a value; lines are wrapped here because rich would break words."""


def info_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file, a .partial one, or a folder of shards.")],
    keys: Annotated[bool, typer.Option("--keys", help="Show the keys of all images too, as ls --long does.")] = False,
    matches: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Say whether the features come from the weights in this checkpoint, which may be a chat model, or "
            "which tensors differ; exit with 1 if any do.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Show what a feature file or folder holds.

    The command shows the model, the recipe, the images by status, shapes, bytes and the last run. Use internvit ls to
    list and filter keys.

    Example: internvit info feats.h5
    """
    from internvit_cli.commands.info import describe_output
    from internvit_cli.commands.ls import ImageListing, ListOptions

    path = found_output(path)
    facts = describe_output(path)
    match = _match(path, matches, quiet=quiet) if matches is not None else None
    listing = ImageListing(ListOptions(path)) if keys else ()
    code = ExitCode.DONE if match is None or match.matches else ExitCode.CANNOT_RUN
    if json:
        facts |= {"keys": [image.to_json() for image in listing]} if keys else {}
        facts |= {"matches": match.to_json()} if match else {}
        print_json(facts | {"exit_code": int(code), "error": match.summary if match and code else None})
    else:
        _print_tables(facts | {"match": match})
        print_images(listing, long=True)
    return int(code)


def _match(path: str, checkpoint: str, *, quiet: bool) -> WeightsMatch:
    """Compare the weights behind an output with those of a checkpoint."""
    from internvit_cli.model.matching import match_weights
    from internvit_cli.storage.read.reader import open_features

    features = open_features(path)
    with progress(quiet=quiet) as observer:
        return match_weights(features.recipe, features.attributes, checkpoint, observer)


def _print_tables(facts: dict[str, Any]) -> None:
    images = ", ".join(f"{count:,} {word}" for word, count in facts["images"].items())
    rows = {
        "file": facts["path"],
        "model": f"{facts['model']} {facts['model_revision']}".strip(),
        **({"projector": facts["projector"]} if facts["projector"] else {}),
        "images": f"{facts['total_images']:,}: {images}",
        "tiles": f"{facts['tiles']:,}",
        "bytes": f"{facts['bytes']:,} ({human_bytes(facts['bytes'])}) in {counted(facts['shards'], 'shard')}",
        "created by": facts["created_by"],
        **({"unfinished": f"{facts['unfinished']}; {CONTINUE}"} if facts["unfinished"] else {}),
        "recipe": ", ".join(f"{name} {value}" for name, value in facts["recipe"].items() if name != "weights_digest"),
        "weights": facts["recipe"]["weights_digest"],
    }
    if len(facts["layers"]) > 1:
        rows["layers"] = f"{listed(facts['layers'])}; names without a number mean layer {facts['layers'][-1]}"
    for name, dataset in facts["datasets"].items():
        rows[name] = f"{dataset['shape']} {dataset['dtype']}"
    for name, figures in facts["accuracy"].items():
        rows[name.replace("_", " ")] = ", ".join(f"{key} {_short(value)}" for key, value in figures.items())
    if match := facts["match"]:
        rows["matches"] = match.summary
        if match.settings:
            rows["settings"] = f"{match.checkpoint} has {'; '.join(match.settings)}"
    if runs := facts["runs"]:
        last = runs[-1]
        rows["last run"] = f"{last.get('ended')} on {last.get('host')}, {last.get('device')}, {last.get('dtype')}"
    print_text(_laid_out(rows))


def _laid_out(rows: dict[str, str]) -> str:
    """Format names and values in two columns for the terminal; words stay whole, so digests can be copied."""
    from rich.console import Console
    from rich.table import Table

    text = io.StringIO()
    is_terminal = sys.stdout.isatty() or None  # None lets FORCE_COLOR decide
    console = Console(
        file=text, force_terminal=is_terminal, width=WIDER_THAN_ALL, highlight=False, markup=False, emoji=False
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold")
    for name, value in rows.items():
        table.add_row(name, "\n".join(wrap_lines(printable_line(value), columns() - max(map(len, rows)) - 2)))
    console.print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _short(value: object) -> str:
    """Return a number with as many digits as are meaningful."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
