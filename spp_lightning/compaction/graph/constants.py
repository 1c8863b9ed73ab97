"""What follows from a network's own tensors alone, whatever its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from spp_lightning.compaction.graph.query import Node, free_name

__all__ = ["compute_constants", "own_values", "source_of"]

_RANDOM = ("bernoulli", "dropout", "multinomial", "normal", "poisson", "rand")
_MOST_NUMBERS = 2**20  # of a tensor that is kept in the place of its computation


def own_values(graph: fx.GraphModule) -> dict[Node, Any]:
    """The values of the nodes that follow from the network's own tensors alone.

    Args:
        graph: A traced network in evaluation mode.
    """
    values: dict[Node, Any] = {}
    with torch.no_grad():
        for node in graph.graph.nodes:
            if node.op == "get_attr":
                parent, _, last = str(node.target).rpartition(".")
                values[node] = getattr(graph.get_submodule(parent), last)
            elif _is_constant(node, values):
                values[node] = _evaluate(node, values)
    return values


def compute_constants(graph: fx.GraphModule) -> None:
    """Keep what follows from the network's own tensors, in the place of computing it every time.

    Attention biases by relative position (LeViT, Swin) are gathered from a small table. A tensor
    of more than a million numbers is computed as before, since it would make files large.

    Args:
        graph: A traced network in evaluation mode, changed in place. What is kept isn't trained.
    """
    values = own_values(graph)
    for node in [x for x in values if x.op != "get_attr"]:
        value = values[node]
        if not isinstance(value, Tensor) or value.numel() > _MOST_NUMBERS:
            continue
        if all(user in values for user in node.users):
            continue  # what is computed of it is kept
        name = free_name(graph, f"{source_of(node)}_value")
        parent, _, last = name.rpartition(".")
        graph.get_submodule(parent).register_buffer(last, value.detach().clone().contiguous())
        with graph.graph.inserting_before(node):
            kept = graph.graph.get_attr(name)
        kept.meta = dict(node.meta)
        node.replace_all_uses_with(kept)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


def source_of(node: Node) -> str:
    """The name of one of the network's own tensors that a node's value follows from."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _is_constant(node: Node, values: dict[Node, Any]) -> bool:
    if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
        return False
    name = getattr(node.target, "__name__", str(node.target))
    return not any(word in name for word in _RANDOM) and all(
        x in values for x in node.all_input_nodes
    )


def _evaluate(node: Node, values: dict[Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]
