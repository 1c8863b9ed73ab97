"""Which linear layers read flattened images, or the means of their planes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from spp_lightning.compaction.graph.steps import Step, Value, users_of

__all__ = ["MOST_WEIGHTS", "FlatLinear", "find_heads", "flattens"]

MOST_WEIGHTS = 2**16  # of a linear layer: they stay in the cache from image to image


class FlatLinear(NamedTuple):
    """A linear layer, and the flattening before it, if there is one.

    Attributes:
        x: What is flattened.
        result: Position of the linear layer's step, where the call stands.
        replaced: Positions of the steps that the call replaces.
    """

    x: Value
    result: int
    replaced: tuple[int, ...]


def find_heads(
    steps: Sequence[Step],
    layer_of: Callable[[str], nn.Module],
    means: Collection[int],
    others: Collection[int],
) -> tuple[FlatLinear, ...]:
    """The linear layers of a network that read flattened images, or means, and have few weights.

    Args:
        steps: The network.
        layer_of: The layer of a name.
        means: Positions of the global pools whose result is ``(B, C)``.
        others: Positions of steps that other calls replace.
    """
    users, found = users_of(steps), []
    for position, step in enumerate(steps):
        module = layer_of(str(step.target)) if step.kind == "layer" else None
        if position in others or type(module) is not nn.Linear or step.kwargs:
            continue
        if module.weight.numel() > MOST_WEIGHTS or len(step.args) != 1:
            continue
        x = step.args[0]
        if not isinstance(x, Value):
            continue
        before = steps[x.step]
        if x.step in means:
            found.append(FlatLinear(x, position, (position,)))
            continue
        flat = layer_of(str(before.target)) if before.kind == "layer" else None
        single = users[x.step] == [position] and x.step not in others
        if single and flattens(before, flat) and before.args and isinstance(before.args[0], Value):
            found.append(FlatLinear(before.args[0], position, (x.step, position)))
    return tuple(found)


def flattens(step: Step, module: nn.Module | None) -> bool:
    """Whether a step flattens its argument from the second dimension on.

    Args:
        step: The step.
        module: The layer that it calls, if it is one.
    """
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if (step.kind, step.target) not in (("function", torch.flatten), ("method", "flatten")):
        return False
    given: dict[str, Any] = dict(
        zip(("input", "start_dim", "end_dim"), step.args, strict=False), **step.kwargs
    )
    return bool(given.get("start_dim") == 1 and given.get("end_dim", -1) == -1)
