"""Convolutions replaced by compact layers, where those are faster."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, fx, nn

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.graph.fuse import fused_after
from spp_lightning.compaction.graph.gates import gate_layers
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.query import module_of, set_module, shape_of, times_called
from spp_lightning.compaction.kernels.cpu import cost
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.spec import ConvSpec
from spp_lightning.compaction.timing import interleaved_ms

__all__ = [
    "IN_GATE",
    "Decision",
    "decide",
    "decision_of",
    "has_hooks",
    "note_decision",
    "replace_convolutions",
    "replace_one_by_one",
]

IN_GATE = "part of a gate, which is one call"  # a reason

_DECISION = "_compact_decision"  # a layer's attribute

_ROUNDS = 5  # of a measurement: there is one per layer

# Share of kept columns from which on a layer on a GPU stays dense: there is no cost model for GPUs.
_MOST_ON_GPU = 0.5


class Decision(NamedTuple):
    """Whether a layer is compact, and why.

    Attributes:
        is_compact: The decision.
        dense_us: Microseconds of the dense layer and its epilogue for the example; None without a
            cost model for the device.
        compact_us: Microseconds of the compact layer, likewise.
        measured: Whether both were measured, or estimated by the cost model.
        reason: Why, in words.
    """

    is_compact: bool
    dense_us: float | None
    compact_us: float | None
    measured: bool
    reason: str


def decision_of(module: nn.Module) -> Decision | None:
    """The decision about a layer of a compact network, if there was one."""
    decision: Decision | None = module.__dict__.get(_DECISION)
    return decision


def note_decision(decision: Decision, *modules: nn.Module) -> None:
    """Keep the decision about a layer, in its dense and compact form, for :func:`decision_of`."""
    for module in modules:
        module.__dict__[_DECISION] = decision


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody registered a forward hook."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def replace_one_by_one(model: nn.Module, below: Sequence[str] = ("",)) -> list[str]:
    """Replace the pruned convolutions of a network that isn't traced.

    Args:
        model: The network, changed in place. Its parts that are compact are left as they are.
        below: Names of the modules inside of which layers are replaced.

    Returns:
        The names of the layers.
    """
    made: dict[nn.Module, ColumnConv2d] = {}  # a layer of two names stays one layer
    names = []
    compact = [
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, CompactNetwork)
    ]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or has_hooks(module) or name.startswith(tuple(compact)):
            continue
        if not any(name.startswith(f"{place}." if place else "") for place in below):
            continue
        if _replaceable(module, name) and _is_pruned(module):
            if module not in made:
                made[module] = ColumnConv2d.of(module)
            set_module(model, name, made[module])
            names.append(name)
    return names


def replace_convolutions(graph: fx.GraphModule, tune: bool = False) -> dict[str, Decision]:
    """Replace the convolutions of a graph that are faster compact, each with its epilogue.

    Args:
        graph: The traced network. Its nodes know the shapes that they have for the example.
        tune: Whether layers are measured on their device, or estimated by the cost model.

    Returns:
        The decisions by name of the layers for which there was a choice.
    """
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    gates = gate_layers(graph)
    decisions: dict[str, Decision] = {}
    for node in list(graph.graph.nodes):
        conv, name = module_of(graph, node), str(node.target)
        if node not in order or not _replaceable(conv, name):
            continue
        if len(node.args) != 1 or node.kwargs:
            continue
        fused = fused_after(graph, node)
        layer = ColumnConv2d.of(conv, fused.epilogue).train(conv.training)
        shape, residual = shape_of(node.args[0]), fused.residual is not None
        assert shape is not None
        in_gate = name in gates and _runs_gates(conv.weight)
        if tune and not in_gate:
            decision = _measure(conv, layer, shape, residual)
        else:
            decision = decide(layer.spec, len(layer.columns), shape, conv.weight, residual)
        if in_gate:
            decision = decision._replace(is_compact=True, reason=IN_GATE)
        decisions[name] = decision
        note_decision(decision, conv, layer)
        if not decision.is_compact:
            continue
        calls = [x for x in graph.graph.nodes if x.op == "call_module" and x.target == node.target]
        if times_called(graph, name) > 1:  # another call has another epilogue
            if _is_pruned(conv) and len(calls) == times_called(graph, name):
                set_module(graph, name, ColumnConv2d.of(conv).train(conv.training))
            continue
        end = fused.end
        set_module(graph, name, layer)
        arguments = (node.args[0],) if fused.residual is None else (node.args[0], fused.residual)
        with graph.graph.inserting_after(end):
            call = graph.graph.call_module(name, arguments)
        call.meta = dict(end.meta)
        end.replace_all_uses_with(call)
        for old in (*reversed(fused.nodes), node):
            graph.graph.erase_node(old)
            order.pop(old, None)
    graph.graph.lint()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return decisions


def _replaceable(module: nn.Module | None, name: str) -> TypeGuard[nn.Conv2d]:
    if type(module) is not nn.Conv2d:
        return False
    try:
        Geometry.of(module)
    except ValueError as error:
        if _is_pruned(module):
            warnings.warn(
                f"The layer {name} has pruned columns, but stays dense: {error}", stacklevel=4
            )
        return False
    return True


def _runs_gates(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype == torch.float32 and is_available()


def _is_pruned(conv: nn.Conv2d) -> bool:
    return bool((conv.weight.detach().flatten(1).abs().amax(0) == 0).any())


def decide(
    spec: ConvSpec, kept: int, shape: tuple[int, ...], like: Tensor, residual: bool
) -> Decision:
    """Whether a layer is to be compact, without a clock.

    Args:
        spec: The convolution and its epilogue.
        kept: Kept columns.
        shape: Of the input, ``(B, C, H, W)``.
        like: A tensor of the layer's device and dtype.
        residual: Whether another tensor is added to the convolution's output.
    """
    every = spec.geometry.num_columns
    if spec.geometry.is_depthwise and (like.dtype != torch.float32 or not like.is_cpu):
        reason = "depthwise: there are kernels for float32 on CPUs only"
        return Decision(False, None, None, False, reason)
    if like.is_cuda:
        reason = f"a rule for GPUs: compact if at most {_MOST_ON_GPU:.0%} of the columns are kept"
        return Decision(kept <= _MOST_ON_GPU * every, None, None, False, reason)
    if like.dtype == torch.float64 or not is_available():
        reason = "no CPU kernel: compact if columns are pruned"
        return Decision(kept < every, None, None, False, reason)
    sizes = (shape, like.dtype, torch.get_num_threads(), residual)
    dense_us = cost.dense_us(spec, *sizes)
    compact_us = cost.layer_us(spec, kept, *sizes)
    return Decision(compact_us < dense_us, dense_us, compact_us, False, "cost model")


def _measure(
    conv: nn.Conv2d, layer: ColumnConv2d, shape: tuple[int, ...], residual: bool
) -> Decision:
    x = torch.zeros(shape, dtype=conv.weight.dtype, device=conv.weight.device)
    with torch.no_grad():
        added = torch.zeros_like(conv(x)) if residual else None
        layer.tune(x, added)
        dense_ms, compact_ms = interleaved_ms(
            [lambda: layer.epilogue(conv(x), added), lambda: layer(x, added)], _ROUNDS, turn=0
        )
    return Decision(compact_ms < dense_ms, 1e3 * dense_ms, 1e3 * compact_ms, True, "measured")
