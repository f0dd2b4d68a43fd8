"""Hand visual tokens to transformers' InternVLForConditionalGeneration in place of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from internvit_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChatInputs:
    """What a chat model needs of images: their tokens, and the text that stands for them in the prompt."""

    text: str
    """The placeholders of all images, one per line; a question follows it."""
    image_tokens: Tensor
    """Projected tokens of all tiles, [tiles, T, llm_hidden_size], in the order of the model."""

    @property
    def token_count(self) -> int:
        """The number of `<IMG_CONTEXT>` tokens in the text."""
        return self.image_tokens.shape[0] * self.image_tokens.shape[1]

    @property
    def mm_encoder_outputs(self) -> dict[str, Any]:
        """The argument of this name for `forward` and `generate`, in versions of transformers that have it.

        Every access returns a new object, because `generate` changes what it is given when it expands beams.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return {"image": BaseModelOutputWithPooling(pooler_output=self.image_tokens)}

    def inputs_embeds(self, model: Any, input_ids: Tensor) -> Tensor:
        """Return the embeddings of a prompt with the images in it, for versions without `mm_encoder_outputs`.

        Args:
            model: An InternVLForConditionalGeneration.
            input_ids: The tokens of the prompt, [B, n].

        Returns:
            [B, n, llm_hidden_size] in the type and on the device of the model's embeddings.

        Raises:
            UsageError: The prompt does not have as many placeholders as the images have tokens, or the tokens are not
                as wide as the model's embeddings.
        """
        embeddings: Tensor = model.get_input_embeddings()(input_ids)
        is_image = input_ids == model.config.image_token_id
        if (count := int(is_image.sum())) != self.token_count:
            raise UsageError(
                f"the prompt has {count:,} image tokens, but the images have {self.token_count:,}",
                "tokenize a prompt that contains `text` unchanged",
            )
        width, wanted = self.image_tokens.shape[-1], embeddings.shape[-1]
        if width != wanted:
            raise UsageError(
                f"the images have tokens of {width:,} values, but the language model takes {wanted:,}",
                "name the chat model that is to read them: internvit project OUT NEW --model CHAT",
            )
        values = self.image_tokens.to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None].to(embeddings.device), values)


def joined_inputs(text: str, tokens: Sequence[Tensor]) -> ChatInputs:
    """Return the inputs for images with tokens [tiles, T, llm_hidden_size] each."""
    return ChatInputs(text, torch.cat(list(tokens)))
