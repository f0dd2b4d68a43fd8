"""Project stored visual tokens into another output, without pictures, for `internvit project`.

The new output holds the images of the old one. It is written with the commit protocol of `extract`, so the same command
continues it after an interruption, and later projects only images that are new or changed in the old output.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from internvit_cli.config import StoreDtype, Tokens
from internvit_cli.errors import InternvitError, ModelError, StoppedError, UsageError
from internvit_cli.export.destination import refuse_overlap
from internvit_cli.export.projected_shards import ProjectedShards, ProjectionPlan
from internvit_cli.export.selection import select_all_rows
from internvit_cli.extract.shard_plan import CREATED_BY
from internvit_cli.model.accuracy import measured_attributes
from internvit_cli.model.matching import ALLOW_MISMATCH, match_weights, mismatch_error
from internvit_cli.model.projector import open_projector
from internvit_cli.plan.table import count_statuses
from internvit_cli.runtime.observer import SILENT, Observer
from internvit_cli.runtime.signals import Interruption
from internvit_cli.runtime.words import listed
from internvit_cli.storage.durable import unsynced_folder
from internvit_cli.storage.format.layout import PROJECTOR, PROJECTOR_TOWER
from internvit_cli.storage.lock import exclusive
from internvit_cli.storage.output import Output
from internvit_cli.storage.output_names import check_features_name

if TYPE_CHECKING:
    from internvit_cli.config import Format, Recipe
    from internvit_cli.export.selection import RowSelection
    from internvit_cli.model.projector import OpenProjector
    from internvit_cli.runtime.signals import StopRequest


@dataclass(frozen=True, slots=True)
class ProjectOptions:
    """The options of `internvit project`."""

    source: str
    """The output with visual tokens."""
    output: str
    model: str
    """A chat model, or a file with a projector."""
    format: Format | None = None
    shard_bytes: int | None = None
    store_dtype: StoreDtype | None = None
    """The type of projected tokens; None means that of the visual tokens, or float16 if that is a scaled type."""
    device: str = "auto"
    threads: int | None = None
    allow_mismatch: bool = False
    """Whether to project tokens of another tower than that with which the projector was trained."""
    overwrite: bool = False
    lock: bool = True


@dataclass(frozen=True, slots=True)
class ProjectResult:
    """What a projection came to."""

    source: str
    output: str
    projector: str
    images: dict[str, int]
    """All images of the output by status."""
    projected: int
    """The number of images that this command projected."""
    tiles: int
    """The number of their tiles."""
    skipped: int
    """The number of images whose projected tokens do not fit into their type."""
    token_size: int
    """The number of values of a projected token."""
    seconds: float
    notes: tuple[str, ...]
    stopped_by: int = 0
    """The signal that stopped it; 0 if it is complete."""

    def to_json(self) -> dict[str, Any]:
        """Return the flat object of `--json`."""
        return asdict(self)


def project(options: ProjectOptions, stop: StopRequest, observer: Observer = SILENT) -> ProjectResult:
    """Bring an output of projected tokens up to date with an output of visual tokens.

    Args:
        options: What to project, by which projector, and where to.
        stop: Checked between blocks; what is finished by then is committed.
        observer: Receives progress.

    Raises:
        StoppedError: A signal came before there was anything to finish.
        ModelError: There is no such projector, or it was trained for another tower and that was not allowed.
        OtherRecipeError: The output exists with another recipe.
        UsageError: The tokens do not fit the projector, or the options contradict each other.
        InternvitError: A row is damaged, or the disk or the device failed; what was committed is kept.
    """
    started = time.monotonic()
    check_features_name(options.output)
    output = Output(options.output, options.format)
    if output.is_file and options.shard_bytes is not None:
        raise UsageError(
            f"--shard-size: {options.output} is one file, and has no shards", "leave it out, or name a folder"
        )
    refuse_overlap(options.source, output.path)
    try:
        with exclusive(output.path, enabled=options.lock):
            with observer.phase("reading the output"):
                selection = select_all_rows(options.source)
            plan, notes = _prepare(options, selection, observer)
            shards = ProjectedShards(plan, output, stop, observer)
            try:
                output.prepare()
                shards.bring_up_to_date()
            except BaseException:
                with suppress(OSError, InternvitError):
                    output.withdraw()
                raise
            unsynced = unsynced_folder(output.folder)
            return ProjectResult(
                source=options.source,
                output=options.output,
                projector=plan.projector.name,
                images={status.word: count for status, count in count_statuses(shards.statuses()).items()},
                projected=shards.projected,
                tiles=shards.tiles,
                skipped=shards.skipped,
                token_size=plan.shape.channels,
                seconds=time.monotonic() - started,
                notes=(*notes, *([unsynced] if unsynced else [])),
                stopped_by=stop.signal or 0,
            )
    except Interruption:
        raise StoppedError("stopped before anything was projected") from None


def _prepare(
    options: ProjectOptions, selection: RowSelection, observer: Observer
) -> tuple[ProjectionPlan, tuple[str, ...]]:
    """Check that the tokens are those that the projector takes, and make the recipe; return notes for the user too."""
    source = selection.recipe
    _check_tokens(selection, options.source)
    projector = open_projector(options.model, observer)
    if projector.token_size != selection.shape.channels:
        raise UsageError(
            f"the projector of {options.model} takes tokens of {projector.token_size:,} values, but those of "
            f"{options.source} have {selection.shape.channels:,}",
            "name the chat model whose tower made the tokens",
        )
    tower_digest, notes = _check_tower(options, selection, projector, observer)
    recipe = replace(
        source,
        tokens=Tokens.PROJECTED,
        store_dtype=_store_dtype(options, source),
        token_order=projector.card.token_order if projector.card else source.token_order,
        projector_digest=projector.tensors.digest(observer),
        projected_from=source.store_dtype,
    )
    shape = replace(
        selection.shape, tokens=recipe.tokens, channels=projector.projected_size, store_dtype=recipe.store_dtype
    )
    own = {
        "recipe": recipe.to_json(),
        "recipe_digest": recipe.digest,
        "created_by": CREATED_BY,
        PROJECTOR: projector.name,
        "projector_revision": projector.revision,
        PROJECTOR_TOWER: tower_digest,
    }
    stored = selection.attributes()
    due = measured_attributes(recipe)
    kept = {name: value for name, value in stored.items() if not name.endswith("_error") or name in due}
    plan = ProjectionPlan(
        selection=selection,
        projector=projector,
        recipe=recipe,
        shape=shape,
        attributes=kept | own,
        shard_bytes=options.shard_bytes,
        device=options.device,
        threads=options.threads,
        overwrite=options.overwrite,
    )
    return plan, notes


def _check_tokens(selection: RowSelection, path: str) -> None:
    """Refuse an output without visual tokens, or with several layers.

    Raises:
        UsageError: The output is one of these.
    """
    recipe = selection.recipe
    if recipe.tokens is not Tokens.VISUAL:
        what = "no tokens" if recipe.tokens is Tokens.NONE else f"{recipe.tokens.value} tokens"
        raise UsageError(
            f"a projector takes visual tokens, and {path} holds {what}", "extract with --tokens visual, the default"
        )
    if recipe.earlier_layers:
        raise UsageError(
            f"{path} holds the layers {listed(recipe.layers)}, and a projector was trained on one",
            f"internvit export {path} one.h5 --layer {recipe.layer}, then project one.h5",
        )


def _store_dtype(options: ProjectOptions, source: Recipe) -> StoreDtype:
    wanted = options.store_dtype or source.store_dtype
    if not wanted.is_scaled:
        return wanted
    if options.store_dtype is None:
        return StoreDtype.FLOAT16
    raise UsageError(
        f"--store-dtype {wanted.value}: projected tokens are stored unscaled", "choose float16, bfloat16 or float32"
    )


def _check_tower(
    options: ProjectOptions, selection: RowSelection, projector: OpenProjector, observer: Observer
) -> tuple[str, tuple[str, ...]]:
    """Compare the tower behind the tokens with that of the chat model, which trained its projector on its own.

    Returns:
        The digest of the chat model's tower, empty if the projector came alone; and notes for the user.

    Raises:
        ModelError: They differ, and that was not allowed.
    """
    if projector.card is None:
        return "", (f"{options.model} holds a projector alone: nothing says whether it was trained for these tokens",)
    match = match_weights(selection.recipe, selection.attributes(), options.model, observer)
    settings = tuple(setting for setting in match.settings if not setting.startswith("token order"))
    if match.matches and not settings:
        return match.digest, ()
    if match.matches:
        what = f"{options.model} has {'; '.join(settings)}"
        error = ModelError(what, f"extract again as the model does; or {ALLOW_MISMATCH} if that is what you want")
    else:
        error = mismatch_error(match)
    if not options.allow_mismatch:
        raise error
    return match.digest or "none", (f"{ALLOW_MISMATCH}: {error.message}",)
