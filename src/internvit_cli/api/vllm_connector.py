"""Serve stored tokens to vLLM as its encoder cache, read in place from a feature file or folder.

vLLM loads this module by its name, and it is the only one that imports vLLM:

    vllm serve OpenGVLab/InternVL3-1B-hf --ec-transfer-config '{
        "ec_connector": "FeatureConnector", "ec_role": "ec_consumer",
        "ec_connector_module_path": "internvit_cli.api.vllm_connector",
        "ec_connector_extra_config": {"features": "/data/chat.h5"}}'

A request names each picture by the key of its image, as the uuid of the multi-modal item. For an image that the output
holds, the vision tower does not run; others are encoded as usual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata

from internvit_cli.config import Tokens
from internvit_cli.errors import UsageError
from internvit_cli.storage.read.reader import open_features

if TYPE_CHECKING:
    from torch import Tensor

    from internvit_cli.storage.read.reader import Features

FEATURES = "features"
"""The name of the output's path in `ec_connector_extra_config`."""


class TokensToLoad(ECConnectorMetadata):
    """What the scheduler tells the workers of a step: the keys of images whose tokens they load."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__()
        self.keys = keys


class FeatureConnector(ECConnectorBase):
    """An encoder cache that is filled from an output of projected tokens, and to which nothing is saved."""

    def __init__(self, vllm_config: Any, role: Any) -> None:
        """Open the output.

        Args:
            vllm_config: The configuration of the engine, whose `ec_connector_extra_config` names the output.
            role: Whether this is the connector of the scheduler or of a worker.

        Raises:
            OutputError: There is no output, or it is damaged.
            UsageError: No output is named, or its tokens are not projected tokens.
        """
        super().__init__(vllm_config=vllm_config, role=role)
        path = vllm_config.ec_transfer_config.get_from_extra_config(FEATURES, None)
        if not path:
            raise UsageError(
                f"ec_connector_extra_config names no {FEATURES}", f'add {{"{FEATURES}": "/data/chat.h5"}}, for example'
            )
        self._features: Features = open_features(path)
        if self._features.recipe.tokens is not Tokens.PROJECTED:
            raise UsageError(
                f"{path} holds no projected tokens, which a language model reads",
                f"internvit project {path} chat.h5 --model CHAT",
            )
        self._dtype = vllm_config.model_config.dtype
        self._wanted: dict[str, None] = {}
        """Keys to load in the next step, each once, in order."""

    # --------------------------------------------------------------------------------------------------- the scheduler

    def has_cache_item(self, identifier: str) -> bool:
        """Return whether the output holds the tokens of an image, by its key."""
        image = self._features.get(identifier)
        return image is not None and image.is_done

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """Note that the tokens of a request's item are to be loaded in this step; each image is loaded once."""
        identifier = request.mm_features[index].identifier
        if self.has_cache_item(identifier):
            self._wanted[identifier] = None

    def build_connector_meta(self, scheduler_output: Any) -> TokensToLoad:  # noqa: ARG002 - the noted keys suffice
        """Return what the workers load in this step, and begin the next."""
        keys, self._wanted = list(self._wanted), {}
        return TokensToLoad(keys)

    # ------------------------------------------------------------------------------------------------------ the workers

    def start_load_caches(self, encoder_cache: dict[str, Tensor], **kwargs: Any) -> None:  # noqa: ARG002
        """Load the tokens of this step's images, [tiles * T, llm_hidden_size], onto the device and in the model's type.

        Args:
            encoder_cache: The cache, by identifier; images that it holds are not read again.
            kwargs: Not used.
        """
        from vllm.platforms import current_platform

        for key in self._get_connector_metadata().keys:
            if key not in encoder_cache:
                tokens = self._features[key].chat_tokens().flatten(0, 1)
                encoder_cache[key] = tokens.to(current_platform.device_type, self._dtype)

    def save_caches(self, encoder_cache: dict[str, Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Save nothing: an output changes only through internvit."""
