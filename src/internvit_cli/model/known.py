"""Facts about the models that are known by name, for `internvit models`: shapes, bytes, licence, the hub cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

from internvit_cli.config import Pool, Tokens
from internvit_cli.model.card import ModelCard, feature_shapes
from internvit_cli.model.catalog import KNOWN_MODELS, TINY_RANDOM, describe_model, known_card
from internvit_cli.model.checkpoint import INDEX_FILE, SINGLE_FILE, expected_shapes
from internvit_cli.model.hub import cached_file

FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One known model."""

    name: str
    """For --model."""
    aliases: tuple[str, ...]
    parameters: int
    """Of the whole tower."""
    hidden_size: int
    blocks: int
    """That run; the checkpoint may have more."""
    tile_size: int
    """Side of a tile, pixels."""
    tokens: int
    """Visual tokens of a tile."""
    token_size: int
    """Values of a visual token."""
    bytes_per_tile: int
    """Of visual tokens in float16, as `extract` stores them by default."""
    licence: str
    cached: str
    """What the hub cache holds: `weights`, `config`, `no`; `built in` for tiny-random."""


def known_models() -> list[ModelFacts]:
    """All of them; nothing is fetched."""
    published = [_facts(known_card(model), model.aliases, model.licence, _cached(model.repo)) for model in KNOWN_MODELS]
    return [*published, _facts(describe_model(TINY_RANDOM), (), "", "built in")]


def _facts(card: ModelCard, aliases: tuple[str, ...], licence: str, cached: str) -> ModelFacts:
    shapes = feature_shapes(card, Tokens.VISUAL, Pool.MEAN, card.tile_size)
    tower = expected_shapes(card.vision, card.vision.num_layers, None)
    return ModelFacts(
        name=card.name,
        aliases=aliases,
        parameters=sum(map(math.prod, tower.values())),
        hidden_size=card.vision.hidden_size,
        blocks=card.resolve_layer(),
        tile_size=card.tile_size,
        tokens=shapes.tokens,
        token_size=shapes.token_size,
        bytes_per_tile=shapes.tokens * shapes.token_size * FLOAT16_BYTES,
        licence=licence,
        cached=cached,
    )


def _cached(repo: str) -> str:
    if cached_file(repo, SINGLE_FILE) or cached_file(repo, INDEX_FILE):
        return "weights"
    return "config" if cached_file(repo, "config.json") else "no"
