"""Build the ModelCard for a name: from JSON files, from the catalog of published models, or from shapes of tensors.

This module reads no weights, and does not import torch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from internvit_cli.config import TokenOrder
from internvit_cli.errors import InternvitError
from internvit_cli.model.card import ModelCard, VisionConfig
from internvit_cli.model.configs import NOTHING, ConfigDescription, describe_config
from internvit_cli.model.files import (
    OFFLINE_HINT,
    RANDOM_WEIGHTS,
    TINY_RANDOM,
    WEIGHTS_SUFFIX,
    FolderFiles,
    HubFiles,
    download_hint,
    locate_on_hub,
)
from internvit_cli.model.hub import HubUnavailableError
from internvit_cli.model.json_files import read_json
from internvit_cli.model.names import parse_model_name
from internvit_cli.model.pixels import (
    PREPROCESSOR_FILE,
    Normalization,
    normalization,
    own_tiling,
    read_processor,
)
from internvit_cli.model.published import KNOWN_MODELS, TIMM_TOWERS, VISION_TINY, KnownModel
from internvit_cli.model.shapes import vision_from_tensors
from internvit_cli.model.weights import (
    ADAPTER_CONFIG,
    adapter_refusal,
    choose_weights,
    other_weights_error,
    read_stored,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from internvit_cli.model.files import CheckpointFiles
    from internvit_cli.model.names import ModelName

__all__ = ["KNOWN_MODELS", "OFFLINE_HINT", "RANDOM_WEIGHTS", "TINY_RANDOM", "describe_model", "known_card"]

CONFIG_FILE = "config.json"


def describe_model(
    name: str, *, revision: str | None = None, offline: bool = False, allow_catalog: bool = False
) -> ModelCard:
    """Return the card of a model.

    Args:
        name: A name for `parse_model_name`.
        revision: A branch, tag or commit on the hub; None means the main branch.
        offline: Whether to use only the hub cache, as with the variable HF_HUB_OFFLINE.
        allow_catalog: Whether to use the catalog (origin `catalog`) if the files of a known model are not available,
            which is enough for planning.

    Raises:
        ModelError: There is no such model, no network, or the config does not describe an InternViT.
        UsageError: A revision is given for a model that is not on the hub.
    """
    named = parse_model_name(name, revision)
    if named.is_built_in:
        return _known_card(TINY_RANDOM, VISION_TINY, "memory")
    if named.directory is not None:
        return _card_of(FolderFiles(named.directory), named)
    assert named.repo is not None
    try:
        files, note = locate_on_hub(named.repo, named.revision, offline=offline)
        card = _card_of(files, named, allow_catalog=allow_catalog)
    except HubUnavailableError as error:
        if named.known is not None and allow_catalog and named.revision is None:
            note = f"{error.message}: its description comes from the catalog of known models"
            return replace(known_card(named.known), notes=(note,))
        raise HubUnavailableError(error.message, error.hint or download_hint(named.repo)) from error
    return replace(card, notes=(*([note] if note else []), *card.notes))


def known_card(model: KnownModel) -> ModelCard:
    """Return the card of a known model from the catalog."""
    return _known_card(model.repo, model.vision, "catalog")


def _known_card(name: str, vision: VisionConfig, origin: Any) -> ModelCard:
    return ModelCard(
        name=name,
        origin=origin,
        directory=None,
        revision=None,
        vision=vision,
        normalization=Normalization(),
        select_layer=None,
        token_order=TokenOrder.V2,
        projector_size=None,
        tile_size=vision.image_size,
    )


def _card_of(files: FolderFiles | HubFiles, named: ModelName, *, allow_catalog: bool = False) -> ModelCard:
    """Return the card of an available checkpoint; every error names the checkpoint."""
    try:
        return _card(files, named, allow_catalog=allow_catalog)
    except InternvitError as error:
        if error.message.startswith(files.where):
            raise
        raise type(error)(f"{files.where}: {error.message}", error.hint) from error


def _card(files: FolderFiles | HubFiles, named: ModelName, *, allow_catalog: bool) -> ModelCard:
    config = _config(files)
    described = NOTHING if config is None else describe_config(config)
    processor, source = _processor(files, config or {}, described)
    notes: tuple[str, ...] = ()
    if isinstance(files, HubFiles) and files.offline and not source and named.known is None:
        notes = (f"no {PREPROCESSOR_FILE} of {files.repo} in the hub cache: pixels are normalized as for ImageNet",)
    vision = described.vision
    if vision is None and allow_catalog and isinstance(files, HubFiles) and not files.has_weights:
        vision = TIMM_TOWERS.get(described.timm)  # enough for planning, without downloading the weights
    if vision is None:
        weights = choose_weights(files, named.weights_file)
        vision, note = vision_from_tensors(read_stored(files, weights, weights.tensors), described.heads, files.where)
        notes = (*notes, note)
    return ModelCard(
        name=files.where,
        origin="directory" if isinstance(files, FolderFiles) else "hub",
        directory=files.folder if isinstance(files, FolderFiles) else None,
        revision=None if isinstance(files, FolderFiles) else files.commit,
        vision=vision,
        normalization=normalization(processor, source),
        select_layer=described.select_layer,
        token_order=described.token_order,
        projector_size=described.projector_size,
        tile_size=described.tile_size or vision.image_size,
        weights_file=named.weights_file,
        own_tiling=own_tiling(config or {}, processor),
        offline="" if isinstance(files, FolderFiles) else files.offline,
        notes=notes,
    )


def _config(files: FolderFiles | HubFiles) -> dict[str, Any] | None:
    """Return the config.json of a checkpoint; None if there are only weights."""
    path = files.find(CONFIG_FILE)
    if path is None and not files.lacks(CONFIG_FILE):
        path = files.need(CONFIG_FILE)
    if path is not None:
        return read_json(path)
    names = files.names()
    if ADAPTER_CONFIG in names:
        raise adapter_refusal(files)
    if any(name.endswith(WEIGHTS_SUFFIX) for name in names):
        return None
    raise other_weights_error(files.where, names) or files.lacking(CONFIG_FILE)


def _processor(
    files: CheckpointFiles, config: Mapping[str, Any], described: ConfigDescription
) -> tuple[Mapping[str, Any], str]:
    """Return the settings of a checkpoint's image processor, and the file that holds them."""
    if not described.timm:
        return read_processor(files)
    own = config.get("pretrained_cfg")
    if not isinstance(own, dict):
        return {}, ""
    return {"image_mean": own.get("mean"), "image_std": own.get("std")}, "config.json: pretrained_cfg"
