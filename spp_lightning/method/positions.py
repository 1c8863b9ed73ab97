"""How often the layers of a network apply their weights, found by running it once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from spp_lightning.method.evaluation import in_evaluation

__all__ = ["positions_of"]


def positions_of(
    model: nn.Module, layers: Mapping[str, nn.Module], example_input: Any
) -> dict[str, int]:
    """Output positions that layers compute per sample: pixels, or tokens.

    Args:
        model: The network. It is run once in evaluation mode, and left as it was.
        layers: Convolutions and linear layers of it, by name.
        example_input: What the network takes, or a tuple of the positional arguments, or a dict of
            the keyword arguments, as Lightning reads ``example_input_array``.

    Returns:
        Positions by name; 0 for a layer that isn't called.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 2))
    >>> positions_of(net, {"0": net[0], "2": net[2]}, torch.zeros(5, 3, 4, 4))
    {'0': 4, '2': 1}
    """
    found = dict.fromkeys(layers, 0)

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            kernel_dims = len(getattr(layer, "kernel_size", ()))
            sizes = output.shape[-kernel_dims:] if kernel_dims else output.shape[1:-1]
            found[name] += math.prod(sizes)

        return hook

    device = next((x.device for x in model.parameters()), torch.device("cpu"))
    example = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, example_input)
    named = example if isinstance(example, dict) else {}
    inputs = () if named else example if isinstance(example, tuple) else (example,)
    with in_evaluation(model), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(note(name)))
        model(*inputs, **named)
    return found
