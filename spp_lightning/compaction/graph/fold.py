"""Batch norms and constant channels, folded into the weights and biases of convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.graph.patterns import as_activation, as_clamp, cat_operands
from spp_lightning.compaction.graph.query import (
    Node,
    convolution_like,
    module_of,
    set_module,
    shape_of,
    times_called,
)

__all__ = ["absorb_constants", "fold_batch_norms"]


def fold_batch_norms(graph: fx.GraphModule) -> None:
    """Fold every batch norm that follows a convolution into that convolution.

    Args:
        graph: A traced network in evaluation mode, changed in place; its modules are replaced,
            not changed.
    """
    for node in list(graph.graph.nodes):
        norm = module_of(graph, node)
        if type(norm) is not nn.BatchNorm2d or norm.running_mean is None:
            continue
        conv_node = node.args[0]
        conv = module_of(graph, conv_node)
        if type(conv) is not nn.Conv2d or len(conv_node.users) != 1:
            continue
        if times_called(graph, conv_node.target) > 1 or times_called(graph, node.target) > 1:
            continue
        folded = nn.utils.fuse_conv_bn_eval(conv, norm)  # a copy
        set_module(graph, str(conv_node.target), folded)
        node.replace_all_uses_with(conv_node)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def absorb_constants(graph: fx.GraphModule) -> None:
    """Move what convolutions compute of constant channels into their biases.

    A pruned filter outputs its bias, the same number at every pixel; a ReLU often makes that 0. A
    convolution that reads such a channel adds the same number to all its outputs. That number goes
    into its bias, and the columns that read the channel become 0. Zero padding would put other
    numbers around the channel, so a padded convolution only does without channels that are 0.

    Args:
        graph: A traced network, changed in place; its modules are replaced, not changed.
    """
    values: dict[Node, Tensor] = {}  # (channels,), NaN where a channel isn't constant
    with torch.no_grad():
        for node in graph.graph.nodes:
            shape = shape_of(node)
            if shape is None or len(shape) != 4:
                continue
            conv = module_of(graph, node)
            if type(conv) is nn.Conv2d:
                known = values.get(node.args[0])
                if known is not None and times_called(graph, node.target) == 1:
                    conv = _without_constants(graph, node, conv, known)
                empty = ~conv.weight.flatten(1).any(1)
                bias = conv.weight.new_zeros(len(empty)) if conv.bias is None else conv.bias
                if empty.any():
                    values[node] = torch.where(empty, bias, math.nan)
                continue
            clamp = as_clamp(graph, node)
            if clamp is not None and node.args[0] in values:
                values[node] = values[node.args[0]].clamp(*clamp)
                continue
            activation = as_activation(graph, node)
            if activation is not None and node.args[0] in values:
                values[node] = Epilogue(activation=activation)(values[node.args[0]])
                continue
            parts = cat_operands(node)
            if parts is not None and any(part in values for part in parts):
                unknown = [torch.full(((shape_of(x) or ())[1],), math.nan) for x in parts]
                pairs = zip(parts, unknown, strict=True)
                device = next(values[x] for x in parts if x in values).device
                values[node] = torch.cat([values.get(x, nan.to(device)) for x, nan in pairs])
    graph.recompile()


def _without_constants(
    graph: fx.GraphModule, node: Node, conv: nn.Conv2d, known: Tensor
) -> nn.Conv2d:
    padded = conv.padding not in ("valid", (0, 0))
    constant = known == 0 if padded else known.isfinite()
    if conv.groups != 1 or conv.padding_mode != "zeros" or not constant.any():
        return conv
    numbers = torch.where(constant, known, 0)
    changed = convolution_like(conv, conv.in_channels, conv.out_channels, 1, bias=True)
    bias = 0 if conv.bias is None else conv.bias
    changed.weight.copy_(conv.weight)
    assert changed.bias is not None
    changed.bias.copy_(bias + (conv.weight.sum((2, 3)) * numbers).sum(1))
    changed.weight[:, constant] = 0
    set_module(graph, str(node.target), changed)
    return changed
