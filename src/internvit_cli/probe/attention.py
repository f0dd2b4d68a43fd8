"""Classify by attention over an image's tokens: the official attention-pooling block, and a cheaper one.

Source of the official block: `AttentionPoolingBlock` in OpenGVLab/InternVL, classification/models/intern_vit_6b.py: the
query is the mean of the tokens; query, keys and values have a LayerNorm each; cross-attention with the model's heads;
no residual; BatchNorm and a linear layer. The cheap one has learned queries, each of which weighs the tokens for its
own part of the channels, and no projections.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from internvit_cli.probe.training import epochs_for, fit

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

QUERIES = 32
BATCH = 64
WEIGHT_DECAY = 0.05


class AttentionPooling(nn.Module):
    """The official block: one query per image, which is the mean of its tokens.

    With a single query, keys and values need not be projected token by token: the query is carried through the weights
    of norm and projection of the keys, and the weighted sum of tokens through those of the values. Biases of the keys
    add the same number to all scores of a head, which softmax takes away. Both orders give the same function, and what
    is done with single tokens has no weights.
    """

    def __init__(self, width: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.head = _classifier(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return class scores [B,classes] for tokens [B,T,C]."""
        count, _, width = tokens.shape
        heads, size = self.heads, width // self.heads
        q = self.q(self.norm_q(tokens.mean(dim=1))).view(count, heads, size)
        normed = _normed(tokens)
        query = torch.einsum("bhd,hdc->bhc", q, self.k.weight.view(heads, size, width)) * self.norm_k.weight
        scores = torch.einsum("bhc,btc->bht", query, normed) / math.sqrt(size)
        pooled = torch.einsum("bht,btc->bhc", scores.softmax(dim=-1), normed)
        pooled = pooled * self.norm_v.weight + self.norm_v.bias
        values = torch.einsum("bhc,hdc->bhd", pooled, self.v.weight.view(heads, size, width))
        of_classes: Tensor = self.head(self.proj(values.reshape(count, width) + self.v.bias))
        return of_classes


class QueryPooling(nn.Module):
    """Learned queries that each pool one part of the channels."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.count = math.gcd(QUERIES, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.queries = nn.Parameter(torch.randn(self.count, width) * 0.02)
        self.head = _classifier(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return class scores [B,classes] for tokens [B,T,C]."""
        count, length, width = tokens.shape
        normed = _normed(tokens)
        weights = (
            torch.einsum("qc,btc->bqt", self.queries * self.norm.weight, normed).div(math.sqrt(width)).softmax(dim=-1)
        )
        pooled = torch.einsum("bqt,btqc->bqc", weights, normed.view(count, length, self.count, -1))
        of_classes: Tensor = self.head(pooled.reshape(count, width) * self.norm.weight + self.norm.bias)
        return of_classes


def _normed(tokens: Tensor) -> Tensor:
    """Return tokens with mean 0 and variance 1 each, which is a LayerNorm before its weights."""
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)


def _classifier(width: int, classes: int) -> nn.Sequential:
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=1e-6), linear)


def heads_for(hidden_size: int) -> int:
    """Return the number of heads of the InternViT with this hidden size: 25 for the 6B, and 64 channels each else."""
    if hidden_size == 3200:
        return 25
    return next(heads for heads in range(max(1, hidden_size // 64), 0, -1) if hidden_size % heads == 0)


def train(
    head: nn.Module,
    tokens: Callable[[NDArray[np.int64]], Tensor],
    labels: NDArray[np.int64],
    seed: int,
    on_step: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Train a head, and leave it in evaluation mode.

    Args:
        head: Takes tokens [B,T,C] to class scores.
        tokens: Reads the tokens of some training images, [B,T,C] float32 on the head's device.
        labels: Class numbers of the training images, [n], n at least 2.
        seed: Decides the order of images.
        on_step: Called with the number of steps made, and of all steps.
    """
    device = next(head.parameters()).device

    def loss_of(chosen: NDArray[np.int64]) -> Tensor:
        return nn.functional.cross_entropy(head(tokens(chosen)), torch.from_numpy(labels[chosen]).to(device))

    fit(head, _batches(len(labels), seed), loss_of, WEIGHT_DECAY, on_step)


def _batches(count: int, seed: int) -> list[NDArray[np.int64]]:
    """Return the batches of all epochs; all have nearly the same size, because BatchNorm needs more than one image."""
    import numpy as np

    random = np.random.default_rng(seed)
    batches = max(1, count // BATCH)
    return [batch for _ in range(epochs_for(batches)) for batch in np.array_split(random.permutation(count), batches)]


def probabilities(
    head: nn.Module, tokens: Callable[[NDArray[np.int64]], Tensor], count: int, on_image: Callable[[int], None]
) -> NDArray[Any]:
    """Return the probability of each class for `count` images, [count, classes] float32."""
    import numpy as np

    found = []
    with torch.inference_mode():
        for start in range(0, count, BATCH):
            chosen = np.arange(start, min(start + BATCH, count))
            found.append(head(tokens(chosen)).softmax(dim=1).cpu().numpy())
            on_image(int(chosen[-1]) + 1)
    return np.concatenate(found)
