"""`internvit verify`: check whether an output still holds what was committed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.console import human_bytes, human_seconds, print_json, print_line
from internvit_cli.cli.progress import progress
from internvit_cli.cli.unfinished import found_output
from internvit_cli.errors import UsageError
from internvit_cli.runtime.words import counted

if TYPE_CHECKING:
    from internvit_cli.verify.result import Finding, PictureCheck, ReencodeComparison, VerifyResult

KEYS_SHOWN = 10
"""How many changed or missing pictures are named; --json names all of them."""


def verify_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file, a .partial one, or a folder of shards.")],
    re_extract: Annotated[
        int, typer.Option(min=0, metavar="N", help="Encode N images again, chosen at random, and compare.")
    ] = 0,
    reference: Annotated[
        bool, typer.Option("--reference", help="Encode the same images with the model of transformers too, in float32.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="Take the weights from here.",
            show_default="the model that OUT names",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Use this device for --re-extract: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Choose other images for --re-extract.")] = 0,
    pictures: Annotated[
        bool, typer.Option(help="Compare the pictures that still exist with their recorded digests.")
    ] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Read with N threads.", show_default="one per core")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print only what is wrong.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Check that an output still holds what was committed.

    The command checks counts, the recipe, the CRC of every row, and the digests of the pictures that still exist. It
    writes nothing. If something is wrong, it lists all findings and exits with 1. With --re-extract it encodes a sample
    again, which needs the pictures and the weights.

    Example: internvit verify feats.h5 --re-extract 10
    """
    if reference and not re_extract:
        raise UsageError("--reference needs --re-extract", "say how many images to encode, such as --re-extract 10")
    from internvit_cli.verify.checks import verify
    from internvit_cli.verify.result import VerifyOptions

    options = VerifyOptions(
        path=found_output(path),
        pictures=pictures,
        re_extract=re_extract,
        reference=reference,
        model=model,
        seed=seed,
        device=device,
        threads=threads,
    )
    with progress(quiet=quiet) as observer:
        result = verify(options, observer)
    code = int(result.exit_code)
    if json:
        print_json(result.to_json() | {"exit_code": code, "error": _summary(result) if code else None})
    else:
        print_result(result, quiet=quiet)
    return code


def print_result(result: VerifyResult, *, quiet: bool = False) -> None:
    """Print what was checked, what is wrong, and the result in one line."""
    if not quiet and result.shards:
        _print_checks(result)
    for finding in result.findings:
        print_line(f"wrong: {_words(finding)}")
    if not quiet or result.findings:
        print_line(f"{result.path}: {_summary(result)}")


def _print_checks(result: VerifyResult) -> None:
    images = ", ".join(f"{count:,} {word}" for word, count in result.images.items())
    shards = "" if result.shards == 1 else f" in {counted(result.shards, 'shard')}"
    print_line(
        f"images      {sum(result.images.values()):,}{shards}: {images}" if images else f"images      none{shards}"
    )
    print_line(
        f"rows        {result.rows:,} read and compared with their CRCs: {human_bytes(result.bytes)} "
        f"in {human_seconds(result.seconds)}, {result.rate / 1e9:.2f} GB/s"
    )
    if result.pictures is not None:
        _print_pictures(result.pictures)
    for comparison in result.comparisons:
        _print_comparison(comparison)
    for note in result.notes:
        print_line(f"note: {note}")


def _print_pictures(pictures: PictureCheck) -> None:
    print_line(
        f"pictures    {pictures.unchanged:,} unchanged, {len(pictures.changed):,} changed, "
        f"{len(pictures.missing):,} missing; {human_bytes(pictures.bytes)} read in {human_seconds(pictures.seconds)}"
    )
    for word, keys in (("changed", pictures.changed), ("missing", pictures.missing)):
        for key in keys[:KEYS_SHOWN]:
            print_line(f"note: {key}: the picture is {word}; the row is not affected")
        if len(keys) > KEYS_SHOWN:
            print_line(f"note: {counted(len(keys) - KEYS_SHOWN, 'more picture')} {word} (--json lists them)")


def _print_comparison(comparison: ReencodeComparison) -> None:
    print_line(f"{comparison.check:<11} {counted(comparison.images, 'image')} with {comparison.encoder}")
    equal = (
        "every value is equal bit for bit"
        if comparison.bit_equal == comparison.images
        else f"{comparison.bit_equal:,} equal bit for bit, largest difference {comparison.difference:.3g}"
    )
    print_line(
        f"            {equal}; {comparison.relative:.2g} of the largest value (limit {comparison.relative_limit:.2g}), "
        f"lowest cosine {comparison.cosine:.6f} (limit {comparison.cosine_limit:.6f})"
    )


def _words(finding: Finding) -> str:
    if finding.key is not None:
        return f"{finding.key}: {finding.problem} ({finding.path})"
    return finding.problem if finding.path in finding.problem else f"{finding.path}: {finding.problem}"


def _summary(result: VerifyResult) -> str:
    count = len(result.findings)
    return f"{count:,} {'thing is' if count == 1 else 'things are'} wrong" if count else "everything is right"
