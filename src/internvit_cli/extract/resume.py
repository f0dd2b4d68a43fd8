"""Read what is already at the output, and decide whether a run may continue it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.errors import OutputError
from internvit_cli.recipes import check_same
from internvit_cli.storage.format.layout import ForeignFileError, stored_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from internvit_cli.config import Recipe
    from internvit_cli.storage.output import FinishedShard, Output


@dataclass(frozen=True, slots=True)
class Existing:
    """The shards of an output: complete ones, and the unfinished one of an earlier run."""

    finished: tuple[FinishedShard, ...] = ()
    partial: FinishedShard | None = None
    damage: OutputError | None = None
    """Why the complete shards could not be read; only `--overwrite` can continue then."""

    @property
    def shards(self) -> list[FinishedShard]:
        """All shards, oldest first."""
        return [*self.finished, *([self.partial] if self.partial else [])]

    @property
    def is_absent(self) -> bool:
        """Whether there is no shard, not even a damaged one, so that there is no recipe to compare with."""
        return not self.shards and self.damage is None

    @property
    def attributes(self) -> dict[str, Any] | None:
        """The attributes of the newest shard; None if there is none."""
        return self.shards[-1].stored.attributes if self.shards else None


def load_existing(output: Output, *, overwrite: bool) -> Existing:
    """Read the existing output.

    Raises:
        OutputError: The output is damaged and not to be overwritten, or is not from internvit.
    """
    finished, damage = _load_or_damage(lambda: _complete(output), overwrite=overwrite)
    # An unfinished shard that cannot be read is dropped; finished ones are kept.
    partial, _ = _load_or_damage(lambda: _listed(output.partial()), overwrite=overwrite)
    return Existing(finished, partial[0] if partial else None, damage)


def shards_to_continue(output: Output, existing: Existing, wanted: Recipe, *, overwrite: bool) -> Existing:
    """Return the existing shards that a run with the recipe `wanted` continues.

    With `overwrite`, shards with another recipe are kept until the new output is complete and then replaced, and an
    unfinished shard with another recipe is dropped.

    Raises:
        OtherRecipeError: There is another recipe, and `overwrite` is off.
    """
    if not overwrite:
        for shard in existing.shards:
            check_same(wanted, stored_recipe(shard.stored.attributes, shard.path), shard.path)
        return existing
    if existing.damage or not all(_has_recipe(shard, wanted) for shard in existing.finished):
        output.replace_all()
        existing = Existing((), existing.partial) if output.is_file else load_existing(output, overwrite=True)
    unfit = [shard for shard in existing.shards if not _has_recipe(shard, wanted)]
    if existing.damage or unfit:
        output.discard_partial()
        return Existing(() if existing.damage else tuple(s for s in existing.finished if s not in unfit))
    if output.partial_exists and existing.partial is None:
        output.discard_partial()
    return existing


def _load_or_damage(
    load: Callable[[], list[FinishedShard]], *, overwrite: bool
) -> tuple[tuple[FinishedShard, ...], OutputError | None]:
    try:
        shards = tuple(load())
    except ForeignFileError:
        raise
    except OutputError as error:
        if not overwrite:
            raise
        return (), error
    return shards, None


def _complete(output: Output) -> list[FinishedShard]:
    """Return the complete shards, after reading every manifest, including that of an unfinished replacement."""
    output.next_number()
    return output.finished()


def _listed(shard: FinishedShard | None) -> list[FinishedShard]:
    return [] if shard is None else [shard]


def _has_recipe(shard: FinishedShard, wanted: Recipe) -> bool:
    try:
        return stored_recipe(shard.stored.attributes, shard.path) == wanted
    except OutputError:
        return False
