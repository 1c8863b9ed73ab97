"""The float network, brought to the form in which its layers can be quantised one by one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from spp_lightning.compaction.epilogue import Clamp, Epilogue
from spp_lightning.compaction.graph.fold import fold_batch_norms
from spp_lightning.compaction.graph.fuse import fused_after
from spp_lightning.compaction.graph.lift import make_layers
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.patterns import as_clamp
from spp_lightning.compaction.graph.query import (
    Node,
    module_of,
    set_module,
    single_user,
    times_called,
)
from spp_lightning.compaction.graph.to_dense import calls_behind_clamp
from spp_lightning.compaction.graph.uncompiled import graph_of
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear

__all__ = ["ClampedLinear", "arguments_of", "fuse", "prepare"]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class ClampedLinear(nn.Module):
    """A linear layer and the clamp behind it: the float form of a quantised linear layer."""

    def __init__(self, linear: ColumnLinear, clamp: Clamp) -> None:
        super().__init__()
        self.linear, self.clamp = linear, clamp

    def forward(self, x: Tensor) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``."""
        return self.linear(x).clamp(*self.clamp)  # type: ignore[no-any-return]


def arguments_of(batch: Any) -> tuple[Any, ...]:
    """The positional arguments of a network that a batch stands for."""
    return batch if isinstance(batch, tuple) else (batch,)


def prepare(network: CompactNetwork, batch: Any) -> fx.GraphModule:
    """The graph of a copy of a network, its batch norms folded, for inference only.

    Args:
        network: A compact network.
        batch: What it is run with once, so that the nodes know their shapes.
    """
    graph = graph_of(network).eval()
    with torch.no_grad():
        ShapeProp(graph).propagate(*arguments_of(batch))
    make_layers(graph)
    compact = _as_dense_before_norms(graph)
    fold_batch_norms(graph)
    for name in compact:
        conv = graph.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        set_module(graph, name, ColumnConv2d.of(conv).eval())
    for node in list(graph.graph.nodes):
        if type(module_of(graph, node)) in _DROPOUTS:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    return graph


def _as_dense_before_norms(graph: fx.GraphModule) -> list[str]:
    """Make convolutions of compact layers with batch norms behind them; returns their names."""
    names = []
    for node in graph.graph.nodes:
        if type(module_of(graph, node)) is not nn.BatchNorm2d:
            continue
        layer = module_of(graph, node.args[0])
        if isinstance(layer, ColumnConv2d) and layer.epilogue.is_empty:
            name = str(node.args[0].target)
            if times_called(graph, name) == 1 and len(node.args[0].args) == 1:
                set_module(graph, name, layer.to_dense())
                names.append(name)
    return names


def fuse(graph: fx.GraphModule, names: Collection[str]) -> None:
    """Bring layers to the form of int8 layers: with a residual and a clamp, and nothing else.

    What else a compact layer computes becomes nodes behind it. What a dense convolution or a linear
    layer is followed by becomes its epilogue, as far as an int8 layer has it.

    Args:
        graph: The network, changed in place.
        names: Of the layers. Each becomes a :class:`ColumnConv2d` or a :class:`ClampedLinear`.
    """
    # Operations are split off when all are fused: nodes behind a layer have no shapes yet.
    for change in (_fuse_convolution, _fuse_linear, _split):
        for node in list(graph.graph.nodes):
            if node.op == "call_module" and node.target in names:
                change(graph, node)
    graph.graph.lint()
    graph.delete_all_unused_submodules()


def _fuse_convolution(graph: fx.GraphModule, node: Node) -> None:
    layer = module_of(graph, node)
    if isinstance(layer, nn.Conv2d):
        layer = ColumnConv2d.of(layer)
    elif not isinstance(layer, ColumnConv2d) or not layer.epilogue.is_empty or len(node.args) > 1:
        return
    fused, tensors = fused_after(graph, node), (layer.weight, layer.columns, layer.bias)
    made = ColumnConv2d(layer.geometry, *tensors, fused.epilogue).eval()
    set_module(graph, str(node.target), made)
    residual = () if fused.residual is None else (fused.residual,)
    with graph.graph.inserting_after(fused.end):
        call = graph.graph.call_module(str(node.target), (node.args[0], *residual))
    call.meta = dict(fused.end.meta)
    fused.end.replace_all_uses_with(call)
    for old in (*reversed(fused.nodes), node):
        graph.graph.erase_node(old)


def _split(graph: fx.GraphModule, node: Node) -> None:
    layer = module_of(graph, node)
    calls = calls_behind_clamp(layer.epilogue) if isinstance(layer, ColumnConv2d) else []
    if not calls:
        return
    assert isinstance(layer, ColumnConv2d)
    rest = Epilogue(layer.epilogue.clamp)
    plain = ColumnConv2d(layer.geometry, layer.weight, layer.columns, layer.bias, rest).eval()
    set_module(graph, str(node.target), plain)
    users, last = list(node.users), node
    for function, args, kwargs in calls:
        with graph.graph.inserting_after(last):
            last = graph.graph.call_function(function, (last, *args), kwargs)
    for user in users:
        user.replace_input_with(node, last)


def _fuse_linear(graph: fx.GraphModule, node: Node) -> None:
    layer = module_of(graph, node)
    if not isinstance(layer, (nn.Linear, ColumnLinear)):
        return
    compact = layer if isinstance(layer, ColumnLinear) else ColumnLinear.of(layer)
    user, clamp = single_user(node), Clamp()
    if user is not None and (found := as_clamp(graph, user)) is not None:
        clamp = found
        user.replace_all_uses_with(node)
        graph.graph.erase_node(user)
    set_module(graph, str(node.target), ClampedLinear(compact, clamp).eval())
