"""`internvit diff`: print how two outputs differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.console import fail, print_json, print_line, say
from internvit_cli.cli.progress import progress
from internvit_cli.cli.unfinished import found_output
from internvit_cli.errors import InternvitError
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from internvit_cli.export.compare import CosineStatistics, DiffResult

KEYS_SHOWN = 10
"""How many keys of each kind are listed; --json lists all of them."""


def diff_command(
    one: Annotated[str, typer.Argument(metavar="A", help="A feature file, a .partial one, or a folder of shards.")],
    other: Annotated[str, typer.Argument(metavar="B", help="A feature file or folder to compare it with.")],
    no_tokens: Annotated[bool, typer.Option("--no-tokens", help="Compare vectors only.")] = False,
    worst: Annotated[
        int, typer.Option("-n", "--worst", min=0, max=100_000, help="Name the N images that differ most.")
    ] = 10,
    threshold: Annotated[
        float | None, typer.Option(metavar="COSINE", min=-1, max=1, help="Exit with 1 if any cosine is below this.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Compare two outputs.

    The command compares recipes, keys, statuses, pictures, and the features of each image by their cosine. For two
    models whose vectors differ in width, it gives the alignment of the two sets (linear CKA) instead.

    Example: internvit diff bfloat16.h5 fp8.h5 --threshold 0.999
    """
    from internvit_cli.export.compare import DiffOptions, diff

    with progress(quiet=quiet) as observer:
        found = diff(DiffOptions(found_output(one), found_output(other), not no_tokens, worst, threshold), observer)
    code = found.exit_code
    error = _below(found) if code else None
    if json:
        print_json(found.to_json() | {"exit_code": int(code), "error": error.message if error else None})
    else:
        _print(found)
    return fail(error) if error else int(code)


def _below(found: DiffResult) -> InternvitError:
    if found.pooled is None:
        return InternvitError("there is no cosine to compare with --threshold", "the notes say why")
    return InternvitError(f"a cosine is below {found.threshold:.9g}", "the images are listed above, the worst first")


def _print(found: DiffResult) -> None:
    for name, (mine, its) in found.recipe.items():
        print_line(f"recipe      {name}: {mine} in A, {its} in B")
    _print_keys("only in A", found.only_one)
    _print_keys("only in B", found.only_other)
    _print_keys("status", [f"{key}: {mine} in A, {its} in B" for key, (mine, its) in found.statuses.items()])
    _print_keys("picture", [f"{key}: different files" for key in found.pictures])
    _print_common(found)
    for name, spread in (("vectors", found.pooled), ("tokens", found.tokens)):
        if spread is not None:
            _print_spread(name, spread, found.token_mean if name == "tokens" else None)
    if found.cka is not None:
        print_line(f"alignment   {found.cka:.4f} (linear CKA of the vectors of two models)")
    for note in found.notes:
        say(f"note: {note}")
    if found.is_identical:
        print_line(f"{found.one} and {found.other} are identical in everything that was compared")


def _print_common(found: DiffResult) -> None:
    tokens = "" if found.equal_tokens is None else f", {found.equal_tokens:,} with equal tokens"
    images = counted(found.common, "image")
    print_line(f"common      {images} with features, {found.equal_vectors:,} with equal vectors{tokens}")


def _print_keys(what: str, keys: Sequence[str]) -> None:
    for key in keys[:KEYS_SHOWN]:
        print_line(f"{what:<11} {key}")
    if len(keys) > KEYS_SHOWN:
        print_line(f"{what:<11} {len(keys) - KEYS_SHOWN:,} more (--json lists them)")


def _print_spread(name: str, spread: CosineStatistics, token_mean: float | None) -> None:
    shares = ", ".join(f"{share} {value:.6f}" for share, value in spread.percentiles.items())
    what = "cosine" if token_mean is None else "lowest cosine of an image's tokens"
    print_line(f"{name:<11} {what}: lowest {spread.lowest:.6f}, mean {spread.mean:.6f}, {shares}")
    if token_mean is not None:
        print_line(f"            mean cosine of all tokens {token_mean:.6f}")
    for key, value in spread.worst:
        if value < 1:
            print_line(f"  {value:9.6f}  {key}")
