"""A compact network's steps as a torch.fx graph again, for passes over it. No code is generated."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.steps import OPS, Value, map_values

__all__ = ["graph_of"]


class _Uncompiled(fx.GraphModule):
    """A graph and its modules, that only passes and interpreters read."""

    def recompile(self) -> Any:  # torch.fx would generate Python: a file's network stays data
        return None


def graph_of(network: CompactNetwork) -> fx.GraphModule:
    """The graph of a copy of a compact network.

    :meth:`CompactNetwork.of` makes a network of it again. The graph itself can't be called: run it
    by a ``torch.fx.Interpreter``.

    >>> net = CompactNetwork.of(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    >>> [node.op for node in graph_of(net).graph.nodes]
    ['placeholder', 'call_module', 'call_module', 'output']
    """
    network = copy.deepcopy(network)
    graph = fx.Graph()
    nodes: list[fx.Node] = []

    def convert(value: Any) -> Any:
        return nodes[value.step] if isinstance(value, Value) else value

    for step in network.compact_steps:
        args, kwargs = map_values(step.args, convert), map_values(step.kwargs, convert)
        nodes.append(graph.create_node(OPS[step.kind], step.target, args, kwargs, step.name))
    root = nn.Module()
    root._modules, root._parameters, root._buffers = (
        dict(network._modules),
        dict(network._parameters),
        dict(network._buffers),
    )
    return _Uncompiled(root, graph)
