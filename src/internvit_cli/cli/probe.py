"""`internvit probe`: train and test classifiers on stored features."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Annotated

import typer

from internvit_cli.cli.console import print_json, print_line, print_text, say
from internvit_cli.cli.pictures import PicturesFolder
from internvit_cli.cli.progress import progress
from internvit_cli.cli.stored_layer import StoredLayer
from internvit_cli.cli.unfinished import found_output
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.errors import ExitCode, UsageError
from internvit_cli.runtime.words import counted
from internvit_cli.storage.output_names import check_file_name, check_folder_name

if TYPE_CHECKING:
    from internvit_cli.probe.evaluate import ProbeResult

PROBES = ("knn", "linear", "attention")


def probe_list(word: str) -> tuple[str, ...]:
    """Return the probes of a list such as `knn,linear`.

    Raises:
        UnusableWordError: One of them does not exist.
    """
    names = tuple(dict.fromkeys(part.strip() for part in word.split(",")))
    for name in names:
        if name not in PROBES:
            raise UnusableWordError(f"{name!r} is no probe", f"give some of {', '.join(PROBES)}")
    return names


def shot_list(word: str) -> tuple[int, ...]:
    """Return the numbers of a list such as `1,5,10`.

    Raises:
        UnusableWordError: It holds something else.
    """
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) < 100_000 for part in parts):
        raise UnusableWordError("these are no numbers of images", "give numbers such as 1,5,10")
    return tuple(dict.fromkeys(map(int, parts)))


def probe_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards.")],
    test: Annotated[
        str | None,
        typer.Option(metavar="OUT2", help="Test on this output.", show_default="a part of OUT"),
    ] = None,
    labels: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Take labels from the folders of keys (folder), or from a table with the columns key, label and "
            "perhaps split: .csv, .tsv, .jsonl or .parquet.",
        ),
    ] = "folder",
    depth: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Use the Nth folder of a key as its label.")
    ] = 1,
    probe: Annotated[
        tuple[str, ...] | None,
        typer.Option(
            "--probe",
            metavar="LIST",
            help="Run these probes: knn, linear, attention, or several with commas.",
            parser=probe_list,
            show_default="all for which OUT has features",
        ),
    ] = None,
    test_fraction: Annotated[float, typer.Option(metavar="SHARE", help="Test on this share of each class.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Draw the test part and train with this seed.")] = 0,
    shots: Annotated[
        tuple[int, ...] | None,
        typer.Option(
            metavar="LIST",
            help="Also train on N images per class, for each N of a list such as 1,5,10.",
            parser=shot_list,
        ),
    ] = None,
    tries: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Draw the images of --shots N times.")] = 5,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown", help="Leave out labels of images that are not in OUT.")
    ] = False,
    ignore_duplicates: Annotated[
        bool,
        typer.Option(
            "--ignore-duplicates", help="Do not look for copies of pictures, which otherwise come to the same part."
        ),
    ] = False,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write tables, pictures and the trained head here."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results in DIR.")] = False,
    apply: Annotated[
        str | None,
        typer.Option(metavar="HEAD", help="Train nothing; label the images of OUT with this head.safetensors, as CSV."),
    ] = None,
    layer: StoredLayer = None,
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="Train attention on this device: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    pictures_in: PicturesFolder = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with errors.")] = False,  # noqa: ARG001
) -> int:
    """Measure how well images can be classified by their stored features.

    Labels are the first folders of keys, or a table. A part of each class is held back for testing, and copies of a
    picture are kept in one part. Three probes are trained: the nearest images, logistic regression on pooled vectors,
    and attention over tokens, in its official form and in a cheap one. InternViT's features are better than a linear
    probe shows, so look at the gap too.

    Example: internvit probe feats.h5 -o probe
    """
    if output is not None:
        check_folder_name(output, "-o")
    if apply is not None:
        if test is not None or output is not None:
            raise UsageError("--apply trains and tests nothing, so it takes neither --test nor -o", "leave them out")
        check_file_name(apply, (".safetensors",), "--apply", "trained head")
        return _apply(found_output(path), apply, layer, device, as_json=json, quiet=quiet)
    from internvit_cli.probe.evaluate import Probe, ProbeOptions, run_probe
    from internvit_cli.probe.write import check_folder, to_json, write_results

    options = ProbeOptions(
        path=found_output(path),
        test_path=None if test is None else found_output(test),
        labels=labels,
        depth=depth,
        probes=None if probe is None else tuple(map(Probe, probe)),
        test_fraction=test_fraction,
        seed=seed,
        shots=shots or (),
        tries=tries,
        ignore_unknown=ignore_unknown,
        ignore_duplicates=ignore_duplicates,
        device=device,
        layer=layer,
        pictures=pictures_in,
    )
    if output is not None:
        check_folder(output, overwrite=overwrite)
    with progress(quiet=quiet) as observer:
        result = run_probe(options, observer)
        if output is not None:
            write_results(result, output, observer, overwrite=overwrite)
    if json:
        print_json(to_json(result) | {"output": output, "exit_code": int(ExitCode.DONE), "error": None})
    else:
        _print(result)
        if output is not None and not quiet:
            print_line(f"results: {output}")
    return int(ExitCode.DONE)


def _print(result: ProbeResult) -> None:
    from internvit_cli.probe.write import gap

    counts = result.counts
    print_line(
        f"{counted(len(result.classes), 'class', 'classes')} from {result.label_source}: "
        f"{counted(counts.train, 'training image')}, {counted(counts.test, 'test image')}"
    )
    left = {"without a label": counts.unlabelled, "skipped": counts.skipped}
    if told := [f"{count:,} {what}" for what, count in left.items() if count]:
        print_line(f"not used: {', '.join(told)}")
    if counts.unknown:
        print_line(f"{counted(counts.unknown, 'label')} of images that are not in the output left out")
    print_line(f"{'probe':<10} {'accuracy':>9}   95 % interval")
    for score in result.scores:
        chosen = ", ".join(
            f"{name} {value:.3g}" for name, value in score.settings.items() if not isinstance(value, dict)
        )
        low, high = f"{score.accuracy.low:.1%}", f"{score.accuracy.high:.1%}"
        line = f"{score.name:<10} {score.accuracy.value:>9.1%}   {low} to {high}"
        print_line(f"{line}   {chosen}" if chosen else line)
    if (difference := gap(result)) is not None:
        print_line(f"gap: attention is {100 * difference:+.1f} points from linear")
    for one in result.few_shots:
        images = counted(one.shots, "image")
        print_line(
            f"{one.probe:<10} {one.mean:>9.1%}   ± {one.deviation:.1%} with {images} per class, {one.tries} tries"
        )
    for note in result.notes:
        say(f"note: {note}")


def _apply(path: str, head_path: str, layer: int | None, device: str, *, as_json: bool, quiet: bool) -> int:
    from internvit_cli.probe.evaluate import apply_head
    from internvit_cli.probe.heads import read_head

    head = read_head(head_path)
    with progress(quiet=quiet) as observer:
        features, found = apply_head(head, path, layer, device, observer)
    rows = [
        (key, head.classes[number], float(confidence))
        for key, number, confidence in zip(features, found.classes.tolist(), found.confidence, strict=True)
    ]
    if as_json:
        labels = [{"key": key, "label": label, "confidence": round(confidence, 6)} for key, label, confidence in rows]
        facts = {"path": path, "head": head_path, "probe": head.probe, "labels": labels}
        print_json(facts | {"exit_code": int(ExitCode.DONE), "error": None})
        return int(ExitCode.DONE)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("key", "label", "confidence"))
    writer.writerows((key, label, f"{confidence:.4f}") for key, label, confidence in rows)
    print_text(text.getvalue())
    return int(ExitCode.DONE)
