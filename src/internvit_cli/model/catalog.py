"""Which models there are, and how a name becomes a ModelCard: a directory, an alias, a hub id, or tiny-random.

Reads JSON only: neither weights nor torch.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from internvit_cli.config import DEFAULT_MODEL, TokenOrder
from internvit_cli.errors import InternvitError, ModelError, UsageError
from internvit_cli.model.card import IMAGENET_MEAN, IMAGENET_STD, ModelCard, VisionConfig, card_from_json
from internvit_cli.model.hub import HubUnavailableError, fetch, resolve_commit

if TYPE_CHECKING:
    from collections.abc import Mapping

TINY_RANDOM = "tiny-random"
"""The model that is built in memory: for trying the tool, never for features of worth."""

OFFLINE_HINT = f"pass the directory of a checkpoint as --model, or try the tool with --model {TINY_RANDOM}"

MAX_JSON_BYTES = 16 << 20
"""More than any config of a real model; bounds what a hostile one can cost."""

_300M = VisionConfig(1024, 24, 16, 4096, 448, 14, qkv_bias=True, qk_norm=False, norm="layer_norm", eps=1e-6)
_6B = VisionConfig(3200, 45, 25, 12800, 448, 14, qkv_bias=False, qk_norm=True, norm="rms_norm", eps=1e-6)
_6B_48 = VisionConfig(3200, 48, 25, 12800, 448, 14, qkv_bias=False, qk_norm=True, norm="rms_norm", eps=1e-6)
_6B_224 = VisionConfig(3200, 48, 25, 12800, 224, 14, qkv_bias=False, qk_norm=True, norm="rms_norm", eps=1e-6)
_TINY = VisionConfig(64, 2, 2, 256, 448, 14, qkv_bias=True, qk_norm=False, norm="layer_norm", eps=1e-6)


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published encoder whose shape is known without asking the hub."""

    repo: str
    """Its hub id."""
    aliases: tuple[str, ...]
    """Short names, besides the last part of the hub id."""
    vision: VisionConfig
    licence: str = "MIT"
    """As its page on the hub says."""


KNOWN_MODELS = (
    KnownModel(DEFAULT_MODEL, ("300m", "300m-v2_5"), _300M),
    KnownModel("OpenGVLab/InternViT-300M-448px", ("300m-v1",), _300M),
    KnownModel("OpenGVLab/InternViT-6B-448px-V2_5", ("6b", "6b-v2_5"), _6B),
    KnownModel("OpenGVLab/InternViT-6B-448px-V1-5", ("6b-v1-5",), _6B),
    KnownModel("OpenGVLab/InternViT-6B-448px-V1-2", ("6b-v1-2",), _6B),
    KnownModel("OpenGVLab/InternViT-6B-448px-V1-0", ("6b-v1-0",), _6B_48),
    KnownModel("OpenGVLab/InternViT-6B-224px", ("6b-224px",), _6B_224),
)

_BY_NAME: Mapping[str, KnownModel] = {
    name.casefold(): model
    for model in KNOWN_MODELS
    for name in (model.repo, model.repo.rpartition("/")[2], *model.aliases)
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./-]{0,254}", re.ASCII)


def describe_model(
    name: str, *, revision: str | None = None, offline: bool = False, allow_catalog: bool = False
) -> ModelCard:
    """The card of a model, from its JSON files.

    Args:
        name: tiny-random, a directory, an alias (any case), or a hub id.
        revision: branch, tag or commit on the hub; None is the main branch.
        offline: use only what the hub cache holds, as the variable HF_HUB_OFFLINE does.
        allow_catalog: when a known model's files can't be had, answer from the catalogue (origin `catalog`), which is
            enough to plan with.

    Raises:
        ModelError: no such model, no network, or a config that is not an InternViT's.
        UsageError: a revision of something that is not on the hub.
    """
    if name == TINY_RANDOM:
        _refuse_revision(revision, "is built in memory")
        return _known_card(TINY_RANDOM, _TINY, "memory")
    known = _BY_NAME.get(name.casefold())
    if os.path.isdir(name) and (known is None or os.path.exists(os.path.join(name, "config.json"))):
        _refuse_revision(revision, "is a directory")
        return _directory_card(name)
    if known is None:
        _check_hub_id(name)
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"--revision {revision!r}: not a branch, tag or commit", "give a name such as main")
    repo = name if known is None else known.repo
    try:
        return _hub_card(repo, revision, offline=offline)
    except HubUnavailableError as error:
        if known is not None and allow_catalog and revision is None:
            return _known_card(repo, known.vision, "catalog")
        raise ModelError(error.message, error.hint or OFFLINE_HINT) from error


def hub_name(name: str) -> str | None:
    """The hub id that a model's name stands for; None for tiny-random and for directories."""
    if name == TINY_RANDOM or os.path.isdir(name):
        return None
    known = _BY_NAME.get(name.casefold())
    return name if known is None else known.repo


def known_card(model: KnownModel) -> ModelCard:
    """The card of a known model, from the catalogue alone."""
    return _known_card(model.repo, model.vision, "catalog")


def _known_card(name: str, vision: VisionConfig, origin: Any) -> ModelCard:
    return ModelCard(
        name=name,
        origin=origin,
        directory=None,
        revision=None,
        vision=vision,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        select_layer=None,
        token_order=TokenOrder.V2,
        projector_size=None,
        tile_size=vision.image_size,
    )


def _refuse_revision(revision: str | None, because: str) -> None:
    if revision is not None:
        raise UsageError(f"--revision {revision}: the model {because} and has no revisions", "leave out --revision")


def _directory_card(directory: str) -> ModelCard:
    config = read_json(os.path.join(directory, "config.json"))
    preprocessor_path = os.path.join(directory, "preprocessor_config.json")
    preprocessor = read_json(preprocessor_path) if os.path.exists(preprocessor_path) else None
    try:
        return card_from_json(config, preprocessor, name=directory, origin="directory", directory=directory)
    except InternvitError as error:
        raise _within(directory, error) from error


def _hub_card(repo: str, revision: str | None, *, offline: bool) -> ModelCard:
    commit = resolve_commit(repo, revision, offline=offline)
    path = fetch(repo, commit, "config.json", offline=offline)
    if path is None:
        raise ModelError(f"{repo}: there is no config.json", "name the repository of an InternViT or InternVL model")
    preprocessor_path = fetch(repo, commit, "preprocessor_config.json", offline=offline)
    preprocessor = None if preprocessor_path is None else read_json(preprocessor_path)
    try:
        return card_from_json(read_json(path), preprocessor, name=repo, origin="hub", revision=commit)
    except InternvitError as error:
        raise _within(repo, error) from error


def _within(place: str, error: InternvitError) -> InternvitError:
    """The same complaint, saying which checkpoint it is about."""
    message = error.message if error.message.startswith(place) else f"{place}: {error.message}"
    return type(error)(message, error.hint)


def _check_hub_id(name: str) -> None:
    if name.lower().endswith((".pth", ".pt", ".bin", ".safetensors")):
        raise ModelError(f"{name}: a model is a directory with config.json, not one weights file", OFFLINE_HINT)
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ModelError(f"{name}: there is no such model directory", OFFLINE_HINT)
    if _HUB_ID.fullmatch(name) and ".." not in name and "--" not in name and not name.endswith(".git"):
        return
    close = difflib.get_close_matches(name.casefold(), [*_BY_NAME, TINY_RANDOM], n=2, cutoff=0.5)
    suggestion = f"did you mean {' or '.join(close)}? " if close else ""
    raise ModelError(
        f"{name!r}: not a directory, a known model, or a hub id such as {DEFAULT_MODEL}", suggestion + OFFLINE_HINT
    )


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file of at most 16 MB.

    Raises:
        ModelError: the file can't be read, or is not a JSON object.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        if len(text) > MAX_JSON_BYTES:
            raise ModelError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MB")
        value = json.loads(text)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}", "name the directory of a checkpoint") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value
