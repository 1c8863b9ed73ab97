"""MACs: the multiply-accumulate operations of a network's layers for one input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spp_lightning.groups import WeightGroups, weight_of
from spp_lightning.layers import is_convolution

__all__ = ["PositionRecorder", "count_macs"]


class PositionRecorder:
    """Notes how many output positions each layer computes for one input.

    A context manager: inside, the first forward pass of each layer is noted.

    Args:
        layers: The layers to watch, by name; their outputs are ``(B, N, *positions)``.

    Attributes:
        positions: Output positions per input, by name, of the layers that have run.
        dense_macs: MACs per input that the layers take with all their weights, likewise.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> with PositionRecorder({"0": net[0]}) as recorder:
    ...     out = net(torch.zeros(2, 3, 10, 10))
    >>> recorder.positions
    {'0': 64}
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._handles: list[Any] = []
        self.positions: dict[str, int] = {}

    def __enter__(self) -> PositionRecorder:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._note(name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    @property
    def dense_macs(self) -> dict[str, int]:  # noqa: D102
        return {
            name: positions * weight_of(self._layers[name]).numel()
            for name, positions in self.positions.items()
        }

    def _note(self, name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            # In a compiled network the hook would become part of the graph and stay in it.
            if not torch.compiler.is_compiling() and isinstance(output, Tensor):
                self.positions.setdefault(name, math.prod(output.shape[2:]))

        return hook


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
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), PositionRecorder(layers) as recorder:
            model(*arguments)
    finally:
        for module, training in modes.items():
            module.training = training
    return {
        name: positions * _kept_weights(layers[name])
        for name, positions in recorder.positions.items()
    }


def _kept_weights(layer: nn.Module) -> int:
    """Weights that are neither in a column of zeros nor in a filter of zeros."""
    weight = weight_of(layer).detach()
    groups = WeightGroups.of(layer).conv_groups if is_convolution(layer) else 1
    nonzero = weight.unflatten(0, (groups, -1)).flatten(2) != 0
    columns, filters = nonzero.any(1).sum(1), nonzero.any(2).sum(1)
    return int((columns * filters).sum())
