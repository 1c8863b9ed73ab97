"""The loss of a network on a few batches, outside of a training loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

__all__ = ["MOST_MACS", "label_loss", "step_loss"]

# MACs that all the losses of a plan may take; fewer images are used where it would be more.
MOST_MACS = {"cpu": 2e12, "cuda": 1e14}

Loss = Callable[[nn.Module], float]


def step_loss(
    batches: Sequence[Any],
    images: int,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Loss:
    """The mean loss of a LightningModule's ``training_step`` on batches.

    Args:
        batches: The batches, on the module's device.
        images: How many images of all batches are used, at most; at least one of each batch.
        context: Context of the step, such as that of a precision.

    Returns:
        A function of a copy of the module; what the copy logs is dropped.
    """
    batches = _cut(batches, images)

    def loss(module: nn.Module) -> float:
        vars(module)["log"] = vars(module)["log_dict"] = lambda *_, **__: None
        step: Any = module.training_step
        takes_index = len(inspect.signature(step).parameters) > 1
        total = 0.0
        for i, batch in enumerate(batches):
            with torch.no_grad(), context():
                output = step(batch, i) if takes_index else step(batch)
            total += float(output["loss"] if isinstance(output, dict) else output)
        return total / len(batches)

    return loss


def label_loss(batches: Sequence[Any], images: int) -> Loss:
    """The mean cross-entropy of a network on batches of images and labels.

    Args:
        batches: Tuples of images and class numbers, on the network's device.
        images: How many images of all batches are used, at most.

    >>> data = [(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))]
    >>> round(label_loss(data, 1)(nn.Identity()), 4)  # ln 2
    0.6931
    """
    batches = _cut(batches, images)

    def loss(network: nn.Module) -> float:
        with torch.no_grad():
            losses = [float(F.cross_entropy(network(x), labels)) for x, labels, *_ in batches]
        return sum(losses) / len(losses)

    return loss


def _cut(batches: Sequence[Any], images: int) -> list[Any]:
    count = max(images // max(len(batches), 1), 1)

    def first(x: Any) -> Any:
        return x[:count] if isinstance(x, Tensor) and x.dim() else x

    return [tree_map(first, batch) for batch in batches]
