"""`internvit probe`: train and test classifiers on stored features."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internvit_cli.cli.console import print_json, print_line, print_text, say
from internvit_cli.cli.pictures import PicturesFolder
from internvit_cli.cli.progress import progress
from internvit_cli.cli.stored_layer import StoredLayer
from internvit_cli.cli.unfinished import found_output
from internvit_cli.cli.values import UnusableWordError
from internvit_cli.errors import ExitCode, UsageError, one_line
from internvit_cli.runtime.words import counted, did_you_mean
from internvit_cli.storage.output_names import check_file_name, check_folder_name

if TYPE_CHECKING:
    from internvit_cli.probe.evaluate import ProbeResult
    from internvit_cli.probe.segment import SegmentResult

CLASSIFIERS = ("knn", "linear", "attention")
SEGMENTERS = ("linear", "head")
MOST_CLASSES = 40
"""Classes of a segmentation that are listed; per_class.csv lists any number."""


def probe_list(word: str) -> tuple[str, ...]:
    """Return the probes of a list such as `knn,linear`.

    Raises:
        UnusableWordError: One of them does not exist.
    """
    names = tuple(dict.fromkeys(part.strip() for part in word.split(",")))
    known = tuple(dict.fromkeys((*CLASSIFIERS, *SEGMENTERS)))
    for name in names:
        if name not in known:
            raise UnusableWordError(f"a list of {', '.join(known)}", did_you_mean(name, known))
    return names


def shot_list(word: str) -> tuple[int, ...]:
    """Return the numbers of a list such as `1,5,10`.

    Raises:
        UnusableWordError: It holds something else.
    """
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) < 100_000 for part in parts):
        raise UnusableWordError("a list of numbers of images from 1 to 99,999", "give numbers such as 1,5,10")
    return tuple(dict.fromkeys(map(int, parts)))


def probe_command(
    path: Annotated[str, typer.Argument(metavar="OUT", help="A feature file or a folder of shards.")],
    test: Annotated[
        str | None,
        typer.Option(metavar="OUT2", help="Test on this output.", show_default="a part of OUT"),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Take labels from the folders of keys (folder), or from a table with the columns key, label and "
            "perhaps split: .csv, .tsv, .jsonl or .parquet.",
            show_default="folder",
        ),
    ] = None,
    masks: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Segment instead: classify pixels, whose classes are the values of a PNG per image in FOLDER.",
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Use the Nth folder of a key as its label.")
    ] = 1,
    probe: Annotated[
        tuple[str, ...] | None,
        typer.Option(
            "--probe",
            metavar="LIST",
            help="Run these probes: knn, linear, attention, or several with commas; with --masks: linear, head.",
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
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write tables, pictures and, without --masks, the best trained head here.",
        ),
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
    """Measure how well stored features classify images or their pixels.

    Labels are the first folders of keys, or a table. A part of each class is held back for testing, and copies of a
    picture are kept in one part. Three probes are trained: the nearest images, logistic regression on pooled vectors,
    and attention over tokens, in its official form and in a cheap one. InternViT's features are better than a linear
    probe shows, so look at the gap too.

    Example: internvit probe feats.h5 -o probe
    """
    if output is not None:
        check_folder_name(output, "-o")
    if masks is not None:
        others = {"--labels": labels, "--apply": apply, "--shots": shots, "--ignore-unknown": ignore_unknown}
        for name, value in (*others.items(), ("--depth", depth != 1)):
            if value:
                raise UsageError(f"--masks and {name} do not go together", "leave one of them out")
    if apply is not None:
        if test is not None or output is not None:
            raise UsageError("--apply trains and tests nothing, so it takes neither --test nor -o", "leave them out")
        check_file_name(apply, (".safetensors",), "--apply", "trained head")
        return _apply(found_output(path), apply, layer, device, as_json=json, quiet=quiet)
    parts: dict[str, Any] = {
        "path": found_output(path),
        "test_path": None if test is None else found_output(test),
        "test_fraction": test_fraction,
        "seed": seed,
        "ignore_duplicates": ignore_duplicates,
        "device": device,
        "layer": layer,
        "pictures": pictures_in,
    }
    shown = _Destination(output, overwrite=overwrite, as_json=json, quiet=quiet)
    if masks is not None:
        heads = _known(probe, SEGMENTERS, "with") or SEGMENTERS
        return _segment({**parts, "masks": masks, "heads": heads}, shown)
    labelled = {"labels": labels or "folder", "depth": depth, "ignore_unknown": ignore_unknown}
    probes = _known(probe, CLASSIFIERS, "without")
    return _classify({**parts, **labelled, "shots": shots or (), "tries": tries}, probes, shown)


def _known(names: tuple[str, ...] | None, known: tuple[str, ...], when: str) -> tuple[str, ...] | None:
    """Return the probes to run, all of which must exist with or without masks."""
    if unknown := next((name for name in names or () if name not in known), None):
        raise UsageError(f"--probe {unknown} does not exist {when} --masks", f"give some of {', '.join(known)}")
    return names


@dataclass(frozen=True, slots=True)
class _Destination:
    """Where results go."""

    folder: str | None
    overwrite: bool
    as_json: bool
    quiet: bool

    def check(self) -> None:
        """Refuse a folder before anything is trained."""
        from internvit_cli.probe.results_folder import check_folder

        if self.folder is not None:
            check_folder(self.folder, overwrite=self.overwrite)

    def show(self, facts: dict[str, Any], print_table: Callable[[], None]) -> int:
        """Print the results, as JSON or as a table."""
        if self.as_json:
            print_json(facts | {"output": self.folder, "exit_code": int(ExitCode.DONE), "error": None})
            return int(ExitCode.DONE)
        print_table()
        for note in facts["notes"]:
            say(f"note: {note}")
        if self.folder is not None and not self.quiet:
            print_line(f"results: {self.folder}")
        return int(ExitCode.DONE)


def _classify(options: dict[str, Any], probes: tuple[str, ...] | None, shown: _Destination) -> int:
    from internvit_cli.probe.evaluate import Probe, ProbeOptions, run_probe
    from internvit_cli.probe.write import to_json, write_results

    wanted = ProbeOptions(**options, probes=None if probes is None else tuple(map(Probe, probes)))
    shown.check()
    with progress(quiet=shown.quiet) as observer:
        result = run_probe(wanted, observer)
        if shown.folder is not None:
            write_results(result, shown.folder, observer, overwrite=shown.overwrite)
    return shown.show(to_json(result), lambda: _print(result))


def _segment(options: dict[str, Any], shown: _Destination) -> int:
    from internvit_cli.probe.segment import SegmentOptions, run_segmentation
    from internvit_cli.probe.write_segments import to_json, write_results

    wanted = SegmentOptions(**options)
    shown.check()
    with progress(quiet=shown.quiet) as observer:
        result = run_segmentation(wanted, observer)
        if shown.folder is not None:
            write_results(result, shown.folder, observer, overwrite=shown.overwrite)
    return shown.show(to_json(result), lambda: _print_segmentation(result))


def _print(result: ProbeResult) -> None:
    counts = result.counts
    print_line(
        f"{counted(len(result.classes), 'class', 'classes')} from {result.label_source}: "
        f"{counted(counts.train, 'training image')}, {counted(counts.test, 'test image')}"
    )
    _print_unused({"without a label": counts.unlabelled, "skipped": counts.skipped})
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
    if result.gap is not None:
        print_line(f"gap: attention is {100 * result.gap:+.1f} points from linear")
    for one in result.few_shots:
        images = counted(one.shots, "image")
        print_line(
            f"{one.probe:<10} {one.mean:>9.1%}   ± {one.deviation:.1%} with {images} per class, {one.tries} tries"
        )


def _print_segmentation(result: SegmentResult) -> None:
    counts = result.counts
    print_line(
        f"{counted(len(result.classes), 'class', 'classes')} from masks: "
        f"{counted(counts.train, 'training image')}, {counted(counts.test, 'test image')}"
    )
    _print_unused({"without a mask": counts.unlabelled, "with a blank mask": counts.blank, "skipped": counts.skipped})
    print_line(f"{'probe':<10} {'mean IoU':>9}   {'95 % interval':<16}   pixels")
    for score in result.scores:
        interval = f"{score.mean_iou.low:.1%} to {score.mean_iou.high:.1%}"
        pixels = f"{score.counts.pixel_accuracy():.1%}"
        print_line(f"{score.name:<10} {score.mean_iou.value:>9.1%}   {interval:<16}   {pixels:>6}")
    if result.gap is not None:
        print_line(f"gap: head is {100 * result.gap:+.1f} points from linear")
    if len(result.classes) > MOST_CLASSES:
        return
    ious = [score.counts.ious().tolist() for score in result.scores]
    width = max(10, *map(len, result.classes))
    print_line(f"{'class':<{width}} " + " ".join(f"{score.name:>9}" for score in result.scores))
    for place, name in enumerate(result.classes):
        shares = ["" if math.isnan(own[place]) else f"{own[place]:.1%}" for own in ious]
        print_line(f"{one_line(name):<{width}} " + " ".join(f"{share:>9}" for share in shares))


def _print_unused(images: dict[str, int]) -> None:
    if told := [f"{count:,} {what}" for what, count in images.items() if count]:
        print_line(f"not used: {', '.join(told)}")


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
