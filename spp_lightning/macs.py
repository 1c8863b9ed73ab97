"""MACs: the multiply-accumulate operations of a network's layers for one input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spp_lightning.groups import WeightGroups, weight_of
from spp_lightning.layers import is_convolution

__all__ = ["count_macs"]


def count_macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    """Multiply-accumulate operations per input of every convolution and linear layer.

    Weights in columns or filters that are 0 throughout don't count: the numbers are those of a
    network that skips them. One MAC is one multiplication and one addition; biases, norms and
    pools aren't counted.

    Args:
        model: The network. It is run once in evaluation mode, and left as it was.
        example_input: An input batch, or a tuple of the positional arguments.

    Returns:
        MACs for one input, by layer name.

    >>> net = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.Flatten(), nn.Linear(80, 10))
    >>> count_macs(net, torch.zeros(1, 6, 4, 4)) == {"0": 5 * 6 * 3 * 3 * 4 * 4, "2": 80 * 10}
    True
    >>> net[0].weight.data[:, :4] = 0
    >>> count_macs(net, torch.zeros(1, 6, 4, 4))["0"]
    1440
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if is_convolution(layer) or isinstance(layer, nn.Linear)
    }
    positions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            positions.setdefault(name, math.prod(output.shape[2:]))

        return hook

    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    try:
        model.eval()
        with torch.no_grad():
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return {name: count * _kept_weights(layers[name]) for name, count in positions.items()}


def _kept_weights(layer: nn.Module) -> int:
    """Weights that are neither in a column of zeros nor in a filter of zeros."""
    weight = weight_of(layer).detach()
    groups = WeightGroups.of(layer).conv_groups if is_convolution(layer) else 1
    nonzero = weight.unflatten(0, (groups, -1)).flatten(2) != 0
    columns, filters = nonzero.any(1).sum(1), nonzero.any(2).sum(1)
    return int((columns * filters).sum())
