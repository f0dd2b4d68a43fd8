"""Train and test probes on the stored features of labelled images."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from internvit_cli.errors import OutputError, UsageError
from internvit_cli.model.caveats import caveats
from internvit_cli.probe.data import TokenReader, check_tokens
from internvit_cli.probe.labelled import LabelOptions, labelled_parts
from internvit_cli.probe.metrics import Interval, Predictions, accuracy, predictions_of
from internvit_cli.probe.nearest import NEIGHBORS, NearestNeighbors, choose_neighbors
from internvit_cli.probe.split import shots_of, stratified_split
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from internvit_cli.probe.data import Part
    from internvit_cli.probe.heads import TrainedHead
    from internvit_cli.probe.labelled import Counts, LabelledParts
    from internvit_cli.storage.read.reader import Features

HELD_OUT = 0.1
"""The share of the training part that chooses the strength of the linear probe."""
QUERIES_PROBE = "queries"
"""The cheap attention probe, which runs beside the official one."""


class Probe(str, Enum):
    """A way to classify images by their features."""

    KNN = "knn"
    LINEAR = "linear"
    ATTENTION = "attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeOptions(LabelOptions):
    """What to train on what, and how it is tested."""

    probes: tuple[Probe, ...] | None = None
    """None means all for which the output has features."""
    shots: tuple[int, ...] = ()
    """Numbers of training images per class for few-shot tests."""
    tries: int = 5
    """Draws of each few-shot test."""

    def __post_init__(self) -> None:
        LabelOptions.__post_init__(self)
        if any(shots < 1 for shots in self.shots):
            raise UsageError("--shots must be at least 1 each", "give numbers of images per class, such as 1,5,10")


@dataclass(frozen=True, slots=True)
class FewShots:
    """Accuracies with few training images per class."""

    probe: str
    shots: int
    mean: float
    deviation: float
    tries: int


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """What one probe reaches on the test part."""

    name: str
    settings: dict[str, Any]
    """What was chosen for it, such as `k` or `C`."""
    accuracy: Interval
    predictions: Predictions


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """All that was measured."""

    options: ProbeOptions
    classes: tuple[str, ...]
    counts: Counts
    label_source: str
    test: Part
    scores: tuple[ProbeScore, ...]
    few_shots: tuple[FewShots, ...]
    heads: dict[str, TrainedHead] = field(repr=False)
    """Trained classifiers by probe."""
    notes: tuple[str, ...]

    @property
    def best(self) -> ProbeScore:
        """The score with the highest accuracy; the first of equals."""
        return max(self.scores, key=lambda score: score.accuracy.value)

    @property
    def gap(self) -> float | None:
        """By how much the better attention probe is above the linear one; None if either did not run."""
        by_name = {score.name: score.accuracy.value for score in self.scores}
        attention = [by_name[name] for name in (Probe.ATTENTION.value, QUERIES_PROBE) if name in by_name]
        return max(attention) - by_name[Probe.LINEAR.value] if attention and Probe.LINEAR.value in by_name else None


def run_probe(options: ProbeOptions, observer: Observer = SILENT) -> ProbeResult:
    """Train and test all probes.

    Raises:
        OutputError: An output lacks the features that are needed, or is of another recipe.
        UsageError: The labels do not fit the images, or there are too few images.
    """
    features = open_features(options.path, options.layer)
    probes = _probes(options, features)
    split = labelled_parts(options, features, observer)
    trained = _Trainer(options, split, observer)
    for probe in probes:
        trained.run(probe)
    few = tuple(_few_shots(options, split, probes, observer))
    notes = (*split.notes, *caveats(features))
    return ProbeResult(
        options,
        split.classes,
        split.counts,
        split.label_source,
        split.test,
        tuple(trained.scores),
        few,
        trained.heads,
        notes,
    )


def _probes(options: ProbeOptions, features: Features) -> tuple[Probe, ...]:
    """Return the probes to run, and refuse those for which the output lacks features."""
    if options.probes is None:
        try:
            check_tokens(features)
        except (OutputError, UsageError):
            return (Probe.KNN, Probe.LINEAR)
        return tuple(Probe)
    if Probe.ATTENTION in options.probes:
        check_tokens(features)
    return options.probes


# ------------------------------------------------------------------------------------------------------- the probes


class _Trainer:
    """Trains one probe after the other, and keeps scores and heads."""

    def __init__(self, options: ProbeOptions, split: LabelledParts, observer: Observer) -> None:
        self._options = options
        self._split = split
        self._observer = observer
        self._train, self._test = split.train.vectors(), split.test.vectors()
        self.scores: list[ProbeScore] = []
        self.heads: dict[str, TrainedHead] = {}

    def run(self, probe: Probe) -> None:
        """Train and test one probe."""
        if probe is Probe.KNN:
            self._nearest()
        elif probe is Probe.LINEAR:
            self._linear()
        else:
            self._attention()

    def _score(self, name: str, settings: dict[str, Any], probabilities: NDArray[Any]) -> None:
        predictions = predictions_of(probabilities)
        interval = accuracy(predictions.classes == self._split.test.labels, self._options.seed)
        self.scores.append(ProbeScore(name, settings, interval, predictions))

    def _nearest(self) -> None:
        classes, labels = len(self._split.classes), self._split.train.labels
        with self._observer.phase("comparing with the nearest"):
            trained = NearestNeighbors.fit(self._train, labels, classes)
            chosen = choose_neighbors(trained, self._train)
            votes = trained.votes(self._test, tuple(sorted({chosen, *NEIGHBORS})))
            by_k = {k: float((shares.argmax(axis=1) == self._split.test.labels).mean()) for k, shares in votes.items()}
        self._score("knn", {"k": chosen, "accuracy_by_k": by_k}, votes[chosen])

    def _linear(self) -> None:
        from internvit_cli.probe.linear import STRENGTHS, choose_strength, fit_linear

        classes, labels = len(self._split.classes), self._split.train.labels
        random = np.random.default_rng(self._options.seed)
        held_out = stratified_split(labels, np.arange(len(labels)), HELD_OUT, random)
        with self._observer.phase("fitting linear probes", "strength", len(STRENGTHS)) as phase:
            strength = choose_strength(self._train, labels, classes, held_out, phase.at) if held_out.any() else 1.0
            head = fit_linear(self._train, labels, classes, strength)
        self._score("linear", {"C": strength}, head.probabilities(self._test))
        self._keep("linear", head)

    def _attention(self) -> None:
        import torch

        from internvit_cli.encode.devices import find_device
        from internvit_cli.probe.attention import AttentionPooling, QueryPooling, heads_for

        device = find_device(self._options.device)
        reader = TokenReader(self._split.train.features, str(device))
        heads = heads_for(reader.hidden_size)
        classes = len(self._split.classes)
        torch.manual_seed(self._options.seed)
        for name, head in (
            ("attention", AttentionPooling(reader.width, heads, classes)),
            (QUERIES_PROBE, QueryPooling(reader.width, classes)),
        ):
            self._train_head(name, head.to(device), reader)

    def _train_head(self, name: str, head: Any, reader: TokenReader) -> None:
        from internvit_cli.probe.attention import probabilities, train

        labels = self._split.train.labels
        with self._observer.phase(f"training the {name} probe", "step", None) as phase:
            train(head, reader, labels, self._options.seed, phase.at)
        tested = TokenReader(self._split.test.features, reader.device)
        with self._observer.phase(f"testing the {name} probe", "image", len(self._split.test)) as phase:
            found = probabilities(head, tested, len(self._split.test), phase.at)
        self._score(name, {}, found)
        self._keep(name, head.cpu())

    def _keep(self, name: str, model: Any) -> None:
        from internvit_cli.probe.heads import TrainedHead

        features = self._split.train.features
        self.heads[name] = TrainedHead(name, model, self._split.classes, features.recipe, features.layer)


def _few_shots(
    options: ProbeOptions, split: LabelledParts, probes: Sequence[Probe], observer: Observer
) -> Iterable[FewShots]:
    """Train on a few images per class, several times each."""
    if not options.shots:
        return
    from internvit_cli.probe.linear import FEW_SHOT_STRENGTH, fit_linear

    train, test, classes = split.train.vectors(), split.test.vectors(), len(split.classes)
    with observer.phase("few-shot tests", "try", len(options.shots) * options.tries) as phase:
        for place, shots in enumerate(options.shots):
            found: dict[Probe, list[float]] = {probe: [] for probe in (Probe.KNN, Probe.LINEAR) if probe in probes}
            for attempt in range(options.tries):
                random = np.random.default_rng((options.seed, shots, attempt))
                chosen = shots_of(split.train.labels, shots, random)
                vectors, labels = train[chosen], split.train.labels[chosen]
                for probe, shares in found.items():
                    if probe is Probe.KNN:
                        k = min(NEIGHBORS[0], shots)
                        votes = NearestNeighbors.fit(vectors, labels, classes).votes(test, (k,))[k]
                    else:
                        votes = (
                            fit_linear(vectors, labels, classes, FEW_SHOT_STRENGTH).probabilities(test).astype(float)
                        )
                    shares.append(float((votes.argmax(axis=1) == split.test.labels).mean()))
                phase.at(place * options.tries + attempt + 1)
            for probe, shares in found.items():
                yield FewShots(probe.value, shots, float(np.mean(shares)), float(np.std(shares)), options.tries)


# -------------------------------------------------------------------------------------------------- applying a head


def apply_head(
    head: TrainedHead, path: str, layer: int | None, device: str, observer: Observer = SILENT
) -> tuple[Features, Predictions]:
    """Return the images with features of an output, and what a trained head says of each.

    Raises:
        OutputError: The features are of another kind than those of the training.
        UsageError: There are no images with features.
    """
    from internvit_cli.encode.devices import find_device
    from internvit_cli.probe.attention import probabilities
    from internvit_cli.probe.heads import check_features
    from internvit_cli.probe.linear import LinearHead

    features = open_features(path, layer)
    if layer is None and head.layer in features.layers:
        features = open_features(path, head.layer)
    check_features(head, features.recipe, features.layer, path)
    done = features.done
    if not len(done):
        raise UsageError(f"{path} holds no features", "give another output")
    if isinstance(head.model, LinearHead):
        found = [head.model.probabilities(block) for _, block in done.vectors().blocks()]
        return done, predictions_of(np.concatenate(found))
    chosen = find_device(device)
    reader = TokenReader(done, str(chosen))
    with observer.phase("labelling", "image", len(done)) as phase:
        return done, predictions_of(probabilities(head.model.to(chosen), reader, len(done), phase.at))
