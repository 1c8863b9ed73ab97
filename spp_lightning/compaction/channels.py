"""Which channels of a network's tensors are read at all, and a network without the others.

A channel whose columns are pruned in every layer that reads it need not be computed: its filter
goes, and its place in the norms and additions on the way. Layers that add or join tensors tie
their channels together; the ties make classes of tensors that keep the same channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from spp_lightning.compaction.tracing import (
    Node,
    as_clamp,
    cat_operands,
    is_channelwise,
    module_of,
    shape_of,
)

__all__ = ["absorb_constants", "fold_batch_norms", "remove_channels", "set_module", "times_called"]


def fold_batch_norms(graph: fx.GraphModule) -> None:
    """Compute every batch norm that follows a convolution in that convolution's weights.

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
    """Take channels that are the same number everywhere out of the convolutions that read them.

    A pruned filter leaves its bias, the same number at every pixel, and often 0 behind a ReLU.
    Where a convolution reads nothing but that number, which padding would break up unless it is 0,
    its share goes into the bias, and the columns become 0.

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
    changed = _like(conv, conv.in_channels, conv.out_channels, 1, bias=True)
    bias = 0 if conv.bias is None else conv.bias
    changed.weight.copy_(conv.weight)
    assert changed.bias is not None
    changed.bias.copy_(bias + (conv.weight.sum((2, 3)) * numbers).sum(1))
    changed.weight[:, constant] = 0
    set_module(graph, str(node.target), changed)
    return changed


def remove_channels(graph: fx.GraphModule) -> dict[str, int]:
    """Remove every channel that no layer reads.

    Args:
        graph: A traced network, changed in place; its modules are replaced, not changed.

    Returns:
        Removed output channels, by name of the convolution.
    """
    kept = _kept_channels(graph)
    removed = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            module = module_of(graph, node)
            if node not in kept or module is None:
                continue
            after = kept[node]
            if type(module) is nn.BatchNorm2d:
                set_module(graph, str(node.target), _slice_norm(module, after))
            elif type(module) is nn.Conv2d and _is_depthwise(module):
                count = int(after.sum())
                smaller = _like(module, count, count, count, module.bias is not None)
                _copy(smaller, module, after, None)
                set_module(graph, str(node.target), smaller)
            elif type(module) is nn.Conv2d and module.groups == 1:
                before = kept.get(node.args[0])
                if before is None:
                    before = after.new_ones(module.in_channels)
                if bool(before.all()) and bool(after.all()):
                    continue
                sizes = int(before.sum()), int(after.sum())
                smaller = _like(module, *sizes, 1, module.bias is not None)
                _copy(smaller, module, after, before)
                set_module(graph, str(node.target), smaller)
                if sizes[1] < module.out_channels:
                    removed[str(node.target)] = module.out_channels - sizes[1]
    graph.recompile()
    return removed


def _kept_channels(graph: fx.GraphModule) -> dict[Node, Tensor]:
    """Per 4-d tensor, which of its channels some layer reads; ``(channels,)``, bool."""
    nodes = [node for node in graph.graph.nodes if len(shape_of(node) or ()) == 4]
    parent = {node: node for node in nodes}

    def root(node: Node) -> Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    cats: list[tuple[Node, list[Node]]] = []
    free: set[Node] = set()  # nodes that can do with fewer output channels
    for node in nodes:
        module = module_of(graph, node)
        once = module is None or times_called(graph, node.target) == 1
        parts = cat_operands(node)
        if parts is not None:
            cats.append((node, parts))
            free.add(node)
        elif once and type(module) is nn.Conv2d and module.groups == 1:
            free.add(node)
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
            used = module.weight.detach().abs().amax((0, 2, 3)) != 0
            masks[root(node.args[0])] |= used.cpu()
        elif node not in free:
            for operand in node.all_input_nodes:
                if operand in parent:
                    masks[root(operand)][:] = True
    for mask in masks.values():
        if not mask.any():
            mask[0] = True  # a tensor must have a channel
    _spread_through_cats(cats, masks, root)
    return {node: masks[root(node)] for node in nodes}


def _spread_through_cats(
    cats: list[tuple[Node, list[Node]]], masks: dict[Node, Tensor], root: object
) -> None:
    changed = True
    while changed:
        changed = False
        for node, parts in cats:
            whole = masks[root(node)]  # type: ignore[operator]
            start = 0
            for part in parts:
                mask = masks[root(part)]  # type: ignore[operator]
                view = whole[start : start + len(mask)]
                if not torch.equal(view, mask):
                    view |= mask
                    mask |= view
                    changed = True
                start += len(mask)


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def times_called(graph: fx.GraphModule, target: object) -> int:
    """How often a layer is called, or one of its tensors is read by itself."""
    return sum(
        (node.op == "call_module" and node.target == target)
        or (node.op == "get_attr" and str(node.target).startswith(f"{target}."))
        for node in graph.graph.nodes
    )


def set_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another one of a network."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _like(conv: nn.Conv2d, channels: int, filters: int, groups: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        channels,
        filters,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups,
        bias,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
    ).train(conv.training)


def _copy(to: nn.Conv2d, conv: nn.Conv2d, filters: Tensor, channels: Tensor | None) -> None:
    weight = conv.weight[filters.to(conv.weight.device)]
    to.weight.copy_(weight if channels is None else weight[:, channels.to(weight.device)])
    if to.bias is not None and conv.bias is not None:
        to.bias.copy_(conv.bias[filters.to(conv.bias.device)])


def _slice_norm(norm: nn.BatchNorm2d, kept: Tensor) -> nn.BatchNorm2d:
    smaller = nn.BatchNorm2d(
        int(kept.sum()), norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    ).train(norm.training)
    for name, value in norm.state_dict().items():
        own = smaller.state_dict()[name]
        own.copy_(value[kept.to(value.device)] if value.dim() else value)
    return smaller.to(next(iter(norm.state_dict().values())).device)
