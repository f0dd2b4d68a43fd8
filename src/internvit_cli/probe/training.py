"""Train a head with AdamW, for as many steps as its images need."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    Batch = TypeVar("Batch")

LEAST_STEPS = 400
"""Steps of training at least; more epochs are made for few images."""
LEAST_EPOCHS = 10
LEARNING_RATE = 1e-3
WARM_UP = 0.1
"""The share of steps in which the learning rate rises."""


def epochs_for(batches: int) -> int:
    """Return the number of epochs for so many batches each."""
    return max(LEAST_EPOCHS, math.ceil(LEAST_STEPS / batches))


def fit(
    head: nn.Module,
    batches: Sequence[Batch],
    loss_of: Callable[[Batch], Tensor],
    weight_decay: float,
    on_step: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Train a head, and leave it in evaluation mode.

    Args:
        head: The parameters to train.
        batches: The batches of all epochs, one per step.
        loss_of: Returns the loss of the head on a batch, a scalar.
        weight_decay: The decay of AdamW.
        on_step: Called with the number of steps made, and of all steps.
    """
    steps = len(batches)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    head.train()
    for step, batch in enumerate(batches, 1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        on_step(step, steps)
    head.eval()


def _rate(step: int, steps: int) -> float:
    warm = max(1, int(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
