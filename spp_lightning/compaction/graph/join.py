"""Compact layers that follow each other in a graph, joined to one call, and taken apart again."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from spp_lightning.compaction.graph.query import (
    Node,
    arguments,
    calls,
    module_of,
    single_user,
    times_called,
)
from spp_lightning.compaction.layers.chain import _is_own, column_sequence
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = ["join", "take_apart"]


# Weights of a linear layer that stay in the cache from picture to picture.
_MOST_WEIGHTS = 2**16


def join(graph: fx.GraphModule) -> None:
    """Join layers of a graph of which each is read by the next one only."""
    for node in list(graph.graph.nodes):
        if _layer(graph, node) is None or _previous(graph, node) is not None:
            continue
        row = [node]
        while (after := single_user(row[-1])) is not None and _previous(graph, after) is row[-1]:
            row.append(after)
        _join(graph, row)
    graph.graph.lint()
    graph.delete_all_unused_submodules()  # what flattened is no more
    graph.graph.on_generate_code(_with_quick_look_ups)
    graph.recompile()


_LOOK_UP = re.compile(r"^(\w+) = self\.(\w+)$")
_QUICK = r'\1 = self._modules["\2"] if "\2" in self._modules else self.\2'


def _with_quick_look_ups(
    others: Callable[[list[str]], list[str]] | None,
) -> Callable[[list[str]], list[str]]:
    """Lets a graph's code find its modules at once.

    As attributes they are looked for in every other place first, which takes several times as long.
    """

    def change(lines: list[str]) -> list[str]:
        return [_LOOK_UP.sub(_QUICK, line) for line in (others(lines) if others else lines)]

    return change


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


def _linear_after(graph: fx.GraphModule, node: Node) -> Node | None:
    """The linear layer that reads a layer's output, if nothing else does."""
    flat = single_user(node)
    after = single_user(flat) if flat is not None and _flattens(graph, flat) else None
    linear = module_of(graph, after)
    if (
        after is None
        or type(linear) is not nn.Linear
        or linear.weight.numel() > _MOST_WEIGHTS
        or len(after.args) != 1
        or times_called(graph, str(after.target)) != 1
    ):
        return None
    return after


def _flattens(graph: fx.GraphModule, node: Node) -> bool:
    """Whether a node flattens its input from the second dimension on."""
    module = module_of(graph, node)
    if module is not None:
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    if not calls(node, (torch.flatten,), ("flatten",)):
        return False
    given = arguments(node, ("input", "start_dim", "end_dim"))
    return bool(given.get("start_dim") == 1 and given.get("end_dim", -1) == -1)


def _join(graph: fx.GraphModule, row: list[Node]) -> None:
    first, last = row[0], row[-1]
    linear = _linear_after(graph, last)
    if len(row) == 1 and linear is None:
        return
    residual = last.args[1] if len(last.args) > 1 else None
    nodes = list(graph.graph.nodes)
    within = nodes[nodes.index(first) : nodes.index(last)]
    later = residual in within
    if later and not all(_writes_nothing(graph, node) for node in within):
        # The first layer would read its input behind who may write to it.
        _join(graph, row[:-1])
        return
    with graph.graph.inserting_before(last if later else first):
        layers = [graph.graph.get_attr(str(node.target)) for node in row]
        more: dict[str, Any] = {}
        if linear is not None:
            more["linear"] = graph.graph.get_attr(str(linear.target))
        args = (first.args[0], residual, *layers)
        joined = graph.graph.call_function(column_sequence, args, more)
    end = last if linear is None else linear
    joined.meta = dict(end.meta)
    end.replace_all_uses_with(joined)
    if linear is not None:
        row = [*row, linear.args[0], linear]  # type: ignore[list-item]
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
        linear = node.kwargs.get("linear")
        with graph.graph.inserting_before(node):
            for layer in layers:
                more = (residual,) if layer is layers[-1] and residual is not None else ()
                y = graph.graph.call_module(layer.target, (y, *more))
            if linear is not None:
                y = graph.graph.call_function(torch.flatten, (y, 1))
                y = graph.graph.call_module(linear.target, (y,))
        y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        for old in (node, *layers, *([] if linear is None else [linear])):
            if not old.users:
                graph.graph.erase_node(old)
    graph.graph.lint()
    graph.recompile()
