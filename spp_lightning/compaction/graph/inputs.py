"""A network's inputs: bound to the names of its ``forward``, and taken apart where they nest."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

__all__ = ["bind", "items_of", "propagate"]


def bind(
    model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments of a network by the names that its ``forward`` gives them.

    Raises:
        TypeError: If ``forward`` doesn't take them.

    >>> bind(nn.Linear(2, 3), (torch.zeros(2),))
    {'input': tensor([0., 0.])}
    """
    signature = inspect.signature(inspect.unwrap(type(model).forward))
    bound = signature.bind(model, *inputs, **(named or {}))
    return dict(list(bound.arguments.items())[1:])  # without self


def items_of(value: Any, keys: int | Sequence[Any]) -> tuple[Any, ...]:
    """The items of a list, a tuple or a dict, in the order of ``keys``.

    Args:
        value: An input of a network.
        keys: How many items a list must have; the keys that a dict must have.

    Raises:
        ValueError: If ``value`` isn't of that structure: the network was made for another one.

    >>> items_of({"low": 1, "high": 2}, ("high", "low"))
    (2, 1)
    """
    if isinstance(keys, int):
        if isinstance(value, (list, tuple)) and len(value) == keys:
            return tuple(value)
        wanted = f"a list or a tuple of {keys}"
    else:
        if isinstance(value, dict) and value.keys() == {*keys}:
            return tuple(value[key] for key in keys)
        wanted = f"a dict with the keys {', '.join(map(str, keys))}"
    raise ValueError(f"An input of the network must be {wanted}, as in its example, got {value!r}.")


def propagate(graph: fx.GraphModule, given: Mapping[str, Any]) -> None:
    """Run a graph once, so that its nodes know the shapes of their tensors.

    Args:
        graph: The graph.
        given: Its inputs by name; others have their defaults.
    """
    inputs = [
        given[str(node.target)] if str(node.target) in given else node.args[0]
        for node in graph.graph.nodes
        if node.op == "placeholder"
    ]
    with torch.no_grad():
        ShapeProp(graph).propagate(*inputs)
