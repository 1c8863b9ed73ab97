"""Passes over the linear layers of a network: norms folded, features removed, layers replaced."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from spp_lightning.compaction.graph.patterns import is_pointwise
from spp_lightning.compaction.graph.query import (
    Node,
    arguments,
    calls,
    linear_like,
    module_of,
    set_module,
    shape_of,
    single_user,
    times_called,
)
from spp_lightning.compaction.graph.replace import Decision, note_decision
from spp_lightning.compaction.layers.column_linear import ColumnLinear
from spp_lightning.compaction.timing import interleaved_ms

__all__ = ["decide_linear", "fold_linear_norms", "remove_features", "replace_linears"]

# Nanoseconds of a multiply-accumulate, of a gathered number, and of a further call of torch, fitted
# to layers of ConvNeXt and LeViT on one core of an AMD EPYC (Zen 3, AVX2).
_PRODUCT, _GATHERED, _CALL = 0.022, 0.65, 4000.0
_MOST_ON_GPU = 0.5  # share of kept columns from which on a layer on a GPU stays dense


def fold_linear_norms(graph: fx.GraphModule) -> None:
    """Fold every batch norm of a linear layer's features into that layer.

    The norm reads the layer's output, or its tokens as one batch, as in LeViT.

    Args:
        graph: A traced network in evaluation mode with the shapes of its tensors, changed in place;
            its modules are replaced, not changed.
    """
    for node in list(graph.graph.nodes):
        linear = module_of(graph, node)
        if type(linear) is not nn.Linear or times_called(graph, node.target) > 1:
            continue
        norm_node, end = _norm_after(graph, node)
        if norm_node is None or end is None:
            continue
        norm: Any = module_of(graph, norm_node)
        with torch.no_grad():
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean * scale
            shift = shift if norm.bias is None else shift + norm.bias
            if linear.bias is not None:
                shift = shift + linear.bias * scale
            folded = linear_like(linear, linear.weight * scale[:, None], shift)
        set_module(graph, str(node.target), folded)
        end.replace_all_uses_with(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def remove_features(graph: fx.GraphModule) -> dict[str, int]:
    """Remove every output feature of a linear layer that the next linear layer doesn't read.

    Between the two may be activations and dropout only.

    Args:
        graph: A traced network with the shapes of its tensors, changed in place; its modules are
            replaced, not changed. The shapes of the tensors in between are no longer right.

    Returns:
        Removed features, by name of the layer.
    """
    removed = {}
    for node in graph.graph.nodes:
        reader = module_of(graph, node)
        if type(reader) is not nn.Linear or times_called(graph, node.target) > 1:
            continue
        before = node.args[0]
        while is_pointwise(graph, before) and single_user(before) is not None:
            before = before.args[0]
        writer = module_of(graph, before)
        if type(writer) is not nn.Linear or single_user(before) is None:
            continue
        read = reader.weight.detach().any(0)
        read[0] = read[0] or not read.any()  # a layer must have a feature
        if times_called(graph, before.target) > 1 or bool(read.all()):
            continue
        bias = None if writer.bias is None else writer.bias[read]
        with torch.no_grad():
            set_module(graph, str(before.target), linear_like(writer, writer.weight[read], bias))
            set_module(
                graph, str(node.target), linear_like(reader, reader.weight[:, read], reader.bias)
            )
        removed[str(before.target)] = int((~read).sum())
    graph.recompile()
    return removed


def replace_linears(graph: fx.GraphModule, tune: bool = False) -> dict[str, Decision]:
    """Replace the linear layers of a graph that are faster compact.

    Args:
        graph: The traced network. Its nodes know the shapes that they have for the example.
        tune: Whether layers are measured on their device, or estimated by the cost model.

    Returns:
        The decisions by name of the layers that have pruned columns.
    """
    decisions: dict[str, Decision] = {}
    for name, (linear, tokens) in _pruned_linears(graph).items():
        layer = ColumnLinear.of(linear)
        decision = _measure(linear, layer, tokens) if tune else decide_linear(layer, tokens)
        decisions[name] = decision
        note_decision(decision, linear, layer)
        if decision.is_compact:
            set_module(graph, name, layer)
    graph.recompile()
    return decisions


def _pruned_linears(graph: fx.GraphModule) -> dict[str, tuple[nn.Linear, int]]:
    """The linear layers with pruned columns, and how many tokens each reads, by name."""
    found: dict[str, tuple[nn.Linear, int]] = {}
    for node in graph.graph.nodes:
        linear, name, shape = module_of(graph, node), str(node.target), shape_of(node)
        if type(linear) is not nn.Linear or shape is None or bool(linear.weight.any(0).all()):
            continue
        calls = sum(x.op == "call_module" and x.target == node.target for x in graph.graph.nodes)
        if times_called(graph, name) == calls:  # else a tensor of it is read by itself
            found.setdefault(name, (linear, math.prod(shape[:-1])))
    return found


def decide_linear(layer: ColumnLinear, tokens: int) -> Decision:
    """Whether a linear layer is to be compact, without a clock.

    Args:
        layer: The compact layer.
        tokens: How many rows its input has.
    """
    kept, every = len(layer.columns), layer.in_features
    if layer.weight.is_cuda:
        reason = f"a rule for GPUs: compact if at most {_MOST_ON_GPU:.0%} of the columns are kept"
        return Decision(kept <= _MOST_ON_GPU * every, None, None, False, reason)
    column = tokens * layer.out_features * _PRODUCT / torch.get_num_threads()
    dense_us = every * column / 1000
    compact_us = (kept * (column + tokens * _GATHERED / torch.get_num_threads()) + _CALL) / 1000
    if layer.weight.dtype != torch.float32:
        return Decision(kept < every, None, None, False, "compact if columns are pruned")
    return Decision(compact_us < dense_us, dense_us, compact_us, False, "cost model")


def _measure(linear: nn.Linear, layer: ColumnLinear, tokens: int) -> Decision:
    weight = linear.weight
    x = torch.zeros(tokens, linear.in_features, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        dense_ms, compact_ms = interleaved_ms([lambda: linear(x), lambda: layer(x)], 5, turn=0)
    return Decision(compact_ms < dense_ms, 1e3 * dense_ms, 1e3 * compact_ms, True, "measured")


def _norm_after(graph: fx.GraphModule, linear: Node) -> tuple[Node | None, Node | None]:
    """The norm that reads a linear layer's features, and the node with the result's shape."""
    users, shape = list(linear.users), shape_of(linear) or ()
    if len(shape) == 2 and len(users) == 1 and _is_norm(graph, users[0]):
        return users[0], users[0]
    flat = next((x for x in users if calls(x, (torch.flatten,), ("flatten",))), None)
    if len(shape) != 3 or flat is None or single_user(flat) is None:
        return None, None
    given = arguments(flat, ("input", "start_dim", "end_dim"))
    norm = next(iter(flat.users))
    if (given.get("start_dim", 0), given.get("end_dim", -1)) not in ((0, 1), (0, -2)):
        return None, None
    if not _is_norm(graph, norm) or single_user(norm) is None:
        return None, None
    end = next(iter(norm.users))
    like = end.op == "call_method" and end.target == "reshape_as" and end.args == (norm, linear)
    if not like or not {*users} <= {flat, end}:
        return None, None
    return norm, end


def _is_norm(graph: fx.GraphModule, node: Node) -> bool:
    norm = module_of(graph, node)
    return (
        type(norm) is nn.BatchNorm1d
        and norm.running_mean is not None
        and len(shape_of(node) or ()) == 2
        and times_called(graph, node.target) == 1
    )
