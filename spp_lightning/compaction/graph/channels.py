"""Channels that no layer reads are removed from a network.

A channel whose columns are pruned in every layer that reads it need not be computed. Its filter is
removed, and its place in the norms and additions in between. An addition ties its tensors together:
they keep the same channels. A concatenation ties each part to its range of the whole. A linear
layer that reads a flattened tensor reads one feature of it per pixel of a channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from spp_lightning.compaction.graph.flatten import flattened_readers, reads_batch_size
from spp_lightning.compaction.graph.patterns import cat_operands, is_channelwise
from spp_lightning.compaction.graph.query import (
    Node,
    convolution_like,
    linear_like,
    module_of,
    set_module,
    shape_of,
    times_called,
)

__all__ = ["remove_channels"]


def remove_channels(graph: fx.GraphModule) -> dict[str, int]:
    """Remove every channel that no layer reads.

    Args:
        graph: A traced network, changed in place; its modules are replaced, not changed.

    Returns:
        Removed output channels, by name of the convolution.
    """
    flattened = flattened_readers(graph)
    kept = _kept_channels(graph, flattened)
    removed = {}
    with torch.no_grad():
        for node, reader in flattened.items():
            channels = kept[node.all_input_nodes[0]]
            if not bool(channels.all()):
                linear = graph.get_submodule(str(reader.target))
                set_module(graph, str(reader.target), _slice_linear(linear, channels))
        for node in graph.graph.nodes:
            module = module_of(graph, node)
            if node not in kept or module is None:
                continue
            after = kept[node]
            if type(module) is nn.BatchNorm2d:
                set_module(graph, str(node.target), _slice_norm(module, after))
            elif type(module) is nn.Conv2d and _is_depthwise(module):
                count = int(after.sum())
                smaller = convolution_like(module, count, count, count, module.bias is not None)
                _copy(smaller, module, after, None)
                set_module(graph, str(node.target), smaller)
            elif type(module) is nn.Conv2d:
                before = kept.get(node.args[0])
                if before is None:
                    before = after.new_ones(module.in_channels)
                if bool(before.all()) and bool(after.all()):
                    continue
                sizes = int(before.sum()), int(after.sum())
                smaller = convolution_like(module, *sizes, module.groups, module.bias is not None)
                _copy(smaller, module, after, before[: module.weight.shape[1]])
                set_module(graph, str(node.target), smaller)
                if sizes[1] < module.out_channels:
                    removed[str(node.target)] = module.out_channels - sizes[1]
    graph.recompile()
    return removed


def _kept_channels(graph: fx.GraphModule, flattened: dict[Node, Node]) -> dict[Node, Tensor]:
    """For each 4-d tensor, which of its channels are read by a layer: ``(channels,)``, bool.

    Args:
        graph: The traced network.
        flattened: The linear layers that read flattened tensors, by the node that flattens.
    """
    nodes = [node for node in graph.graph.nodes if len(shape_of(node) or ()) == 4]
    parent = {node: node for node in nodes}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    cats: list[tuple[Node, list[Node]]] = []
    grouped: list[tuple[Node, int]] = []  # tensors whose channels are those of several groups
    free: set[Node] = set()  # nodes whose output channels can be removed
    for node in nodes:
        module = module_of(graph, node)
        once = module is None or times_called(graph, node.target) == 1
        parts = cat_operands(node)
        if parts is not None:
            cats.append((node, parts))
            free.add(node)
        elif once and type(module) is nn.Conv2d and not _is_depthwise(module):
            free.add(node)
            if module.groups > 1:
                grouped += [(x, module.groups) for x in (node.args[0], node)]
        elif is_channelwise(graph, node) or (
            once
            and (
                type(module) is nn.BatchNorm2d
                or (type(module) is nn.Conv2d and _is_depthwise(module))
            )
        ):
            free.add(node)
            for operand in node.all_input_nodes:
                parent[root(operand)] = root(node)

    masks = {root(node): torch.zeros((shape_of(node) or ())[1], dtype=torch.bool) for node in nodes}
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if node in parent and node not in free:
            masks[root(node)][:] = True
        if node in free and type(module) is nn.Conv2d and not _is_depthwise(module):
            used = (module.weight.detach() != 0).unflatten(0, (module.groups, -1))
            masks[root(node.args[0])] |= used.flatten(3).any(3).any(1).flatten().cpu()
        elif node in flattened:
            weight = graph.get_submodule(str(flattened[node].target)).get_parameter("weight")
            mask = masks[root(node.args[0])]
            mask |= (weight.detach() != 0).any(0).view(len(mask), -1).any(1).cpu()
        elif node not in free and not reads_batch_size(node):
            for operand in node.all_input_nodes:
                if operand in parent:
                    masks[root(operand)][:] = True
    groups = [(masks[root(node)], count) for node, count in grouped if node in parent]
    joined = [(masks[root(node)], [masks[root(x)] for x in nodes]) for node, nodes in cats]
    _spread(joined, groups)
    for mask in masks.values():
        if not mask.any():
            mask[0] = True  # a tensor must have a channel
    _spread(joined, groups)
    return {node: masks[root(node)] for node in nodes}


def _spread(cats: list[tuple[Tensor, list[Tensor]]], grouped: list[tuple[Tensor, int]]) -> None:
    """Keep a channel wherever another one that must go with it is kept, in place.

    Args:
        cats: Which channels are kept of concatenations, and of their parts.
        grouped: Which are kept of tensors that grouped convolutions read or write, and the number
            of groups: each group keeps the same ones.
    """
    changed = True
    while changed:
        changed = False
        for whole, parts in cats:
            start = 0
            for part in parts:
                view = whole[start : start + len(part)]
                changed |= _unite(view, part)
                start += len(part)
        for mask, count in grouped:
            rows = mask.view(count, -1)
            changed |= _unite(rows, rows.any(0).expand_as(rows).clone())


def _unite(first: Tensor, second: Tensor) -> bool:
    """Let both masks keep what either does; whether that changes one."""
    if torch.equal(first, second):
        return False
    first |= second
    second |= first
    return True


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def _copy(to: nn.Conv2d, conv: nn.Conv2d, filters: Tensor, channels: Tensor | None) -> None:
    weight = conv.weight[filters.to(conv.weight.device)]
    to.weight.copy_(weight if channels is None else weight[:, channels.to(weight.device)])
    if to.bias is not None and conv.bias is not None:
        to.bias.copy_(conv.bias[filters.to(conv.bias.device)])


def _slice_linear(linear: Any, kept: Tensor) -> nn.Linear:
    """A linear layer that reads the flattened channels that are kept."""
    features = kept.repeat_interleave(linear.in_features // len(kept)).to(linear.weight.device)
    return linear_like(linear, linear.weight[:, features], linear.bias)


def _slice_norm(norm: nn.BatchNorm2d, kept: Tensor) -> nn.BatchNorm2d:
    smaller = nn.BatchNorm2d(
        int(kept.sum()), norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    ).train(norm.training)
    for name, value in norm.state_dict().items():
        own = smaller.state_dict()[name]
        own.copy_(value[kept.to(value.device)] if value.dim() else value)
    return smaller.to(next(iter(norm.state_dict().values())).device)
