"""Collect facts about the models that are known by name: shapes, bytes, licenses, and the state of the hub cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from internvit_cli.config import Pool, Tokens
from internvit_cli.errors import InternvitError
from internvit_cli.model.card import ModelCard, feature_shapes
from internvit_cli.model.catalog import describe_model, known_card
from internvit_cli.model.checkpoint import Checkpoint
from internvit_cli.model.files import TINY_RANDOM
from internvit_cli.model.hub_cache import CachedModel
from internvit_cli.model.layouts import expected_shapes
from internvit_cli.model.published import KNOWN_MODELS

FLOAT16_BYTES = 2
PUBLISHED_BYTES = 2
"""Bytes per weight; all models are published in bfloat16."""


@dataclass(frozen=True, slots=True)
class KnownModelFacts:
    """Facts about a known model."""

    name: str
    """For --model."""
    aliases: tuple[str, ...]
    parameters: int
    """The number of parameters of the whole tower."""
    download_bytes: int
    """The approximate size of its weights on the hub in bytes; 0 for tiny-random."""
    hidden_size: int
    blocks: int
    """The number of blocks that run; the checkpoint may have more."""
    tile_size: int
    """The side of a tile in pixels."""
    tokens: int
    """The number of visual tokens per tile."""
    token_size: int
    """The number of values per visual token."""
    bytes_per_tile: int
    """Bytes per tile of visual tokens in float16, as `extract` stores them by default."""
    license: str
    cached: str
    """Whether the model is cached: `yes` if a run needs no network, `partly`, or `no`; `built in` for tiny-random."""


def known_models() -> list[KnownModelFacts]:
    """Return the facts about all known models without fetching anything."""
    published = [
        _facts(known_card(model), model.aliases, model.license, cached_state(model.repo)) for model in KNOWN_MODELS
    ]
    return [*published, _facts(describe_model(TINY_RANDOM), (), "", "built in")]


def cached_state(repo: str) -> str:
    """Return whether a run would find a model in the hub cache: `yes`, `partly` or `no`."""
    try:
        open_offline(repo)
    except InternvitError:
        return "partly" if CachedModel.of(repo).snapshots() else "no"
    return "yes"


def open_offline(name: str) -> Checkpoint:
    """Open the checkpoint that a run would use, without asking the hub and without reading weights.

    Raises:
        InternvitError: A run without network access would fail.
    """
    card = describe_model(name, offline=True)
    return Checkpoint.open(card, layer=card.resolve_layer())


def download_bytes(card: ModelCard) -> int:
    """Return the size of a tower's weights in bytes, in the type in which they are published."""
    return PUBLISHED_BYTES * _parameters(card)


def _parameters(card: ModelCard) -> int:
    return sum(map(math.prod, expected_shapes(card.vision, card.vision.num_layers, None).values()))


def _facts(card: ModelCard, aliases: tuple[str, ...], terms: str, cached: str) -> KnownModelFacts:
    shapes = feature_shapes(card, Tokens.VISUAL, Pool.MEAN, card.tile_size)
    return KnownModelFacts(
        name=card.name,
        aliases=aliases,
        parameters=_parameters(card),
        download_bytes=0 if card.origin == "memory" else download_bytes(card),
        hidden_size=card.vision.hidden_size,
        blocks=card.resolve_layer(),
        tile_size=card.tile_size,
        tokens=shapes.tokens,
        token_size=shapes.token_size,
        bytes_per_tile=shapes.tokens * shapes.token_size * FLOAT16_BYTES,
        license=terms,
        cached=cached,
    )
