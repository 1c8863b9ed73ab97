"""Compact layers that follow each other in a graph, joined to one call, and taken apart again."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as modules

from spp_lightning.compaction.channels import times_called
from spp_lightning.compaction.cpu import Plan
from spp_lightning.compaction.cpu_sequence import Sequence
from spp_lightning.compaction.layer import ColumnConv2d
from spp_lightning.compaction.tracing import Node, module_of, single_user

__all__ = ["column_sequence", "join", "take_apart"]


def column_sequence(x: Tensor, residual: Tensor | None, *layers: ColumnConv2d) -> Tensor:
    """One layer after the other, with one call of the CPU kernels where that computes them all.

    Args:
        x: Input of the first layer, ``(B, C, H, W)`` or ``(C, H, W)``.
        residual: Added to the last layer's convolution, of its shape, or None.
        layers: Two or more, each with as many channels as the one before it has filters.

    Returns:
        The last layer's output, ``(B, N, H', W')`` or ``(N, H', W')``, the same either way.

    Raises:
        ValueError: If a shape doesn't fit.
    """
    if not torch.compiler.is_compiling() and _is_own(layers[0]) and layers[0]._takes_at_once(x):
        sequence = _sequence(x, residual, layers)
        if sequence is not None:
            return sequence.forward(x, residual)
    for layer in layers[:-1]:
        x = layer(x)
    y: Tensor = layers[-1](x) if residual is None else layers[-1](x, residual)
    return y


def _sequence(
    x: Tensor, residual: Tensor | None, layers: tuple[ColumnConv2d, ...]
) -> Sequence | None:
    """The layers as one call, if they all can be."""
    # Whoever put a hook on a layer must see its input and output.
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return None
    plans, last, are_new = list[Plan](), layers[-1], False
    for layer in layers:
        if not _is_own(layer) or layer._forward_hooks or layer._forward_pre_hooks:
            return None
        known = layer._known_plan
        plan = layer._plan_at_once(x, residual if layer is last else None)
        if plan is None or (plans and plans[-1].geometry.filters != plan.geometry.channels):
            return None
        are_new = are_new or known is None or known is not layer._known_plan
        plans.append(plan)
    sequence: Sequence | None = layers[0]._known_sequence
    if sequence is not None and sequence.plans == plans:
        return sequence
    if are_new or x.dtype != torch.float32:  # weights that change at every call aren't worth it
        return None
    layers[0]._known_sequence = Sequence(plans, sequence)
    return layers[0]._known_sequence  # type: ignore[no-any-return]


def _is_own(layer: object) -> TypeGuard[ColumnConv2d]:
    """Whether a layer computes what this package wrote, and nobody put another one in its place."""
    return type(layer) is ColumnConv2d and "forward" not in layer.__dict__


def join(graph: fx.GraphModule) -> None:
    """Join layers of a graph of which each is read by the next one only."""
    for node in list(graph.graph.nodes):
        if _layer(graph, node) is None or _previous(graph, node) is not None:
            continue
        row = [node]
        while (after := single_user(row[-1])) is not None and _previous(graph, after) is row[-1]:
            row.append(after)
        if len(row) > 1:
            _join(graph, row)
    graph.graph.lint()
    graph.recompile()


def _layer(graph: fx.GraphModule, node: Node) -> ColumnConv2d | None:
    layer = module_of(graph, node)
    if not _is_own(layer) or node.kwargs:
        return None
    return layer if times_called(graph, str(node.target)) == 1 else None


def _previous(graph: fx.GraphModule, node: Node) -> Node | None:
    """The layer whose output a layer reads, if they can be one call."""
    layer = _layer(graph, node)
    before = node.args[0] if layer is not None else None
    if (
        layer is None
        or not isinstance(before, fx.Node)
        or single_user(before) is not node
        or _layer(graph, before) is None
        or len(before.args) != 1  # only the last one of a row may add a residual
        or layer.geometry.stride[1] != 1
        or (len(node.args) > 1 and node.args[1] is before)
    ):
        return None
    return before


def _join(graph: fx.GraphModule, row: list[Node]) -> None:
    first, last = row[0], row[-1]
    residual = last.args[1] if len(last.args) > 1 else None
    nodes = list(graph.graph.nodes)
    within = nodes[nodes.index(first) : nodes.index(last)]
    later = residual in within
    if later and not all(_writes_nothing(graph, node) for node in within):
        # The first layer would read its input behind who may write to it.
        if len(row) > 2:
            _join(graph, row[:-1])
        return
    with graph.graph.inserting_before(last if later else first):
        layers = [graph.graph.get_attr(str(node.target)) for node in row]
        joined = graph.graph.call_function(column_sequence, (first.args[0], residual, *layers))
    joined.meta = dict(last.meta)
    last.replace_all_uses_with(joined)
    for node in reversed(row):
        graph.graph.erase_node(node)


def _writes_nothing(graph: fx.GraphModule, node: Node) -> bool:
    module = module_of(graph, node)
    return node.op == "get_attr" or type(module) in (ColumnConv2d, nn.Conv2d, nn.BatchNorm2d)


def take_apart(graph: fx.GraphModule) -> None:
    """Give every layer of a graph its own node again."""
    for node in list(graph.graph.nodes):
        if node.target is not column_sequence:
            continue
        y, residual, *layers = node.args
        with graph.graph.inserting_before(node):
            for layer in layers:
                more = (residual,) if layer is layers[-1] and residual is not None else ()
                y = graph.graph.call_module(layer.target, (y, *more))
        y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        for old in (node, *layers):
            if not old.users:
                graph.graph.erase_node(old)
    graph.graph.lint()
    graph.recompile()
