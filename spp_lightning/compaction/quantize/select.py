"""Which layers become int8, and why the others stay float32."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import torch
from torch import fx, nn

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.graph.between import find_gates
from spp_lightning.compaction.graph.query import Node, module_of, shape_of, times_called
from spp_lightning.compaction.graph.replace import has_hooks
from spp_lightning.compaction.graph.steps import steps_of
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear

__all__ = ["FLOAT_KINDS", "float_reasons", "matches"]

FLOAT_KINDS = (ColumnConv2d, ColumnLinear, nn.Conv2d, nn.Linear)

_LEAST_LINEAR = 2**16  # weights of a linear layer: fewer stay in the cache in float32, too


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns, as of a shell, is that of a layer's name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def float_reasons(graph: fx.GraphModule, keep: Sequence[str] = ()) -> dict[str, str]:
    """Why layers stay float32, by name; layers for which there is no reason become int8.

    Args:
        graph: A network whose nodes know their shapes.
        keep: Patterns of the names of layers that stay float32.

    Returns:
        The reason of every convolution and linear layer, empty for those that become int8.
    """
    steps = steps_of(graph.graph)
    gates = {
        str(steps[i].target) for gate in find_gates(steps, graph.get_submodule) for i in gate.layers
    }
    reasons: dict[str, str] = {}
    for node in graph.graph.nodes:
        layer, name = module_of(graph, node), str(node.target)
        if not isinstance(layer, FLOAT_KINDS):
            continue
        reason = _reason(layer, node, gates)
        if not reason and times_called(graph, name) > 1:
            reason = "it is called several times"
        if not reason and matches(name, keep):
            reason = "named by `keep`"
        reasons[name] = reasons.get(name) or reason
    return reasons


def _reason(layer: nn.Module, node: Node, gates: Collection[str]) -> str:
    if type(layer) not in FLOAT_KINDS or has_hooks(layer) or "forward" in vars(layer):
        return "it computes more than its class: it has hooks, or is of a derived class"
    if isinstance(layer, (nn.Linear, ColumnLinear)):
        if len(shape_of(node) or ()) != 2:
            return "its input is no matrix: int8 linear layers are for vectors of features"
        if layer.weight.numel() < _LEAST_LINEAR:
            return f"a linear layer of fewer than {_LEAST_LINEAR:,} weights"
    elif isinstance(layer, nn.Conv2d):
        try:
            geometry = Geometry.of(layer)
        except ValueError as error:
            return f"its padding has no kernels: {error}"
        if geometry.is_depthwise:
            return _DEPTHWISE
    elif isinstance(layer, ColumnConv2d):
        if layer.geometry.is_depthwise:
            return _DEPTHWISE
        if str(node.target) in gates:
            return "part of a gate: its input has one pixel per channel"
    weight = layer.get_parameter("weight").detach()
    if weight.dtype != torch.float32:
        return f"its weights are {weight.dtype}, not float32"
    return "" if bool(weight.any()) else "it keeps no columns"


_DEPTHWISE = "depthwise: there is no int8 kernel"
