"""MACs: the multiply-accumulate operations of a network's layers for one input."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.method.computed import effective_weight
from spp_lightning.method.evaluation import in_evaluation
from spp_lightning.method.selection import is_convolution

__all__ = ["count_macs"]


def count_macs(model: nn.Module, example_input: Any) -> dict[str, int]:
    """Multiply-accumulate operations of every convolution and linear layer for an input.

    Weights in columns or filters that are 0 throughout don't count, since a compact network skips
    them. Where a layer computes its weight from others, the computed one counts. One MAC is one
    multiplication and one addition; biases, norms and pools aren't counted.

    Args:
        model: The network. It is run once in evaluation mode, and left as it was.
        example_input: A batch of one input, or a tuple of the positional arguments for one.

    Returns:
        MACs for the input, by name of the layers that it passes; a layer that it passes twice
        counts twice.

    Raises:
        ValueError: If ``example_input`` is None.

    >>> import torch
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
        if is_convolution(layer)
        or isinstance(layer, nn.Linear)
        or (isinstance(layer, _ConvNd) and not layer.transposed)  # parametrized
        or _is_compact(layer)
    }
    positions: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            positions[name] = positions.get(name, 0) + _times_applied(layer, inputs[0], output)

        return hook

    if example_input is None:
        raise ValueError(
            "`example_input` must be an input batch, got None; give one, such as"
            " torch.zeros(1, 3, 32, 32)."
        )
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    with in_evaluation(model), ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(note(name)))
        model(*arguments)
    return {name: count * _kept_weights(layers[name]) for name, count in positions.items()}


def _is_compact(layer: nn.Module) -> bool:
    """Whether a layer stores kept columns only; the classes stand above this module."""
    return "columns" in layer._buffers


def _geometry_of(layer: nn.Module) -> Geometry | None:
    """The convolution of a compact layer, whose class stands above this module; None of others."""
    geometry = getattr(layer, "geometry", None)
    return geometry if isinstance(geometry, Geometry) else None


def _times_applied(layer: nn.Module, x: Tensor, output: Tensor) -> int:
    """How often a convolution or linear layer applies its weight, batch included."""
    if hasattr(layer, "out_features"):
        return math.prod(output.shape[:-1])
    if geometry := _geometry_of(layer):  # whose output may be pooled already
        height, width = x.shape[-2:]
        return (len(x) if x.dim() == 4 else 1) * math.prod(geometry.out_size(height, width))
    dims = len(getattr(layer, "kernel_size", ()))
    if dims:
        batch = output.shape[0] if output.dim() == dims + 2 else 1
        return batch * math.prod(output.shape[-dims:])
    return math.prod(output.shape[:-1])


def _kept_weights(layer: nn.Module) -> int:
    """Weights that are neither in a column of zeros nor in a filter of zeros."""
    if _is_compact(layer):
        stored = layer._buffers.get("weight")  # of an int8 layer
        return int((layer.get_parameter("weight") if stored is None else stored).numel())
    weight = effective_weight(layer)
    if weight is None:  # the layer's forward hands no weight to torch
        weight = layer.get_parameter("weight").detach()
    groups = int(getattr(layer, "groups", 1))
    nonzero = weight.unflatten(0, (groups, -1)).flatten(2) != 0
    columns, filters = nonzero.any(1).sum(1), nonzero.any(2).sum(1)
    return int((columns * filters).sum())
