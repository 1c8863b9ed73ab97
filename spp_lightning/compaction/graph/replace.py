"""Convolutions replaced by compact layers, where those are faster."""

from __future__ import annotations

import math
import warnings
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn

from spp_lightning.compaction.epilogue import Clamp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.graph.fuse import Chain, chain_after
from spp_lightning.compaction.graph.query import module_of, set_module, shape_of, times_called
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.timing import interleaved_ms

__all__ = []


_ROUNDS = 5  # of a timing: it is repeated for many layers


_SURELY_FASTER = 0.5  # share of kept weights up to which the dense layer needn't be timed


_SMALL_PLANE = 64  # pixels of an output below which it must be, since vectors aren't full


def _hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _replace_one_by_one(model: nn.Module) -> list[str]:
    made: dict[nn.Module, ColumnConv2d] = {}  # a layer of two names stays one layer
    names = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or _hooks(module):
            continue
        if _replaceable(module, name) and _is_pruned(module):
            if module not in made:
                made[module] = ColumnConv2d.of(module)
            set_module(model, name, made[module])
            names.append(name)
    return names


def _replaceable(module: nn.Module | None, name: str) -> TypeGuard[nn.Conv2d]:
    if type(module) is not nn.Conv2d or module.groups == module.in_channels > 1:
        return False  # the latter is depthwise
    try:
        Geometry.of(module)
    except ValueError as error:
        if _is_pruned(module):
            warnings.warn(
                f"The layer {name} has pruned columns, but stays dense: {error}", stacklevel=4
            )
        return False
    return True


def _is_pruned(conv: nn.Conv2d) -> bool:
    return bool((conv.weight.detach().flatten(1).abs().amax(0) == 0).any())


def _replace_convolutions(graph: fx.GraphModule) -> None:
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        conv = module_of(graph, node)
        if node not in order or not _replaceable(conv, str(node.target)):
            continue
        chain = chain_after(graph, node)
        layer = ColumnConv2d.of(conv, chain.clamp, chain.post).train(conv.training)
        if len(node.args) != 1 or node.kwargs or not _pays(conv, layer, chain):
            continue
        name = str(node.target)
        calls = [x for x in graph.graph.nodes if x.op == "call_module" and x.target == node.target]
        if times_called(graph, name) > 1:  # another call has another chain
            if _is_pruned(conv) and len(calls) == times_called(graph, name):
                set_module(graph, name, ColumnConv2d.of(conv).train(conv.training))
            continue
        end = chain.end
        set_module(graph, name, layer)
        arguments = (node.args[0],) if chain.residual is None else (node.args[0], chain.residual)
        with graph.graph.inserting_after(end):
            fused = graph.graph.call_module(name, arguments)
        fused.meta = dict(end.meta)
        end.replace_all_uses_with(fused)
        for old in (*reversed(chain.nodes), node):
            graph.graph.erase_node(old)
            order.pop(old, None)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()


def _pays(conv: nn.Conv2d, layer: ColumnConv2d, chain: Chain) -> bool:
    """Whether a layer is faster than the dense one with all that follows, by a short timing."""
    share = len(layer.columns) / layer.geometry.num_columns
    fast = conv.weight.is_cuda or (conv.weight.dtype != torch.float64 and is_available())
    shape, out_shape = shape_of(chain.conv.args[0]), shape_of(chain.conv)
    assert shape is not None and out_shape is not None
    small = not conv.weight.is_cuda and math.prod(out_shape[2:]) < _SMALL_PLANE
    if not fast or (share <= _SURELY_FASTER and not small):
        return share < 1
    x = torch.zeros(shape, dtype=conv.weight.dtype, device=conv.weight.device)
    residual = torch.zeros_like(conv(x)) if chain.residual is not None else None

    def dense() -> Tensor:
        y = conv(x)
        if residual is not None:
            y = y + residual
        if chain.clamp != Clamp():
            y = y.clamp_(*chain.clamp)
        for op in chain.post:
            y = op(y)
        return y

    with torch.no_grad():
        dense_ms, compact_ms = interleaved_ms([dense, lambda: layer(x, residual)], _ROUNDS, turn=0)
    return compact_ms < dense_ms
