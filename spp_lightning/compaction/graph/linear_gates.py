"""Gates of linear layers, written as gates of 1×1 convolutions: these are one call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx, nn

from spp_lightning.compaction.graph.between import averages_planes, multiplies
from spp_lightning.compaction.graph.patterns import is_pointwise
from spp_lightning.compaction.graph.query import (
    Node,
    module_of,
    set_module,
    shape_of,
    single_user,
    times_called,
)
from spp_lightning.compaction.graph.steps import Value, steps_of

__all__ = ["rewrite_linear_gates"]

_RESHAPES = ("flatten", "reshape", "squeeze", "unsqueeze", "view")


class _LinearGate(NamedTuple):
    """Squeeze and excitation by linear layers.

    Attributes:
        x: What is gated.
        pool: The global average pool.
        linears: The two layers.
        reshapes: The nodes that reshape the means to a matrix, and the factors to images.
    """

    x: Node
    pool: Node
    linears: tuple[Node, Node]
    reshapes: tuple[Node, ...]


def rewrite_linear_gates(graph: fx.GraphModule) -> int:
    """Make 1×1 convolutions of the linear layers of gates.

    Args:
        graph: A traced network with the shapes of its tensors, changed in place. The shapes of the
            tensors in the gates are no longer right.

    Returns:
        How many gates were rewritten.
    """
    gates = _find(graph)
    for gate in gates:
        pool = gate.pool
        if len(shape_of(pool) or ()) == 2:
            with graph.graph.inserting_before(pool):
                pool = graph.graph.call_function(torch.mean, (gate.x, (2, 3), True))
            gate.pool.replace_all_uses_with(pool)
        for node in gate.linears:
            linear = module_of(graph, node)
            assert isinstance(linear, nn.Linear)
            set_module(graph, str(node.target), _convolution(linear))
        for node in gate.reshapes:
            node.replace_all_uses_with(node.all_input_nodes[0])
    if gates:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return len(gates)


def _find(graph: fx.GraphModule) -> list[_LinearGate]:
    steps, nodes = steps_of(graph.graph), list(graph.graph.nodes)
    places = {node: Value(position) for position, node in enumerate(nodes)}
    found = []
    for pool, step in zip(nodes, steps, strict=True):
        if not any(averages_planes(step, graph.get_submodule, keeps) for keeps in (True, False)):
            continue
        x, linears, reshapes = pool.args[0] if pool.args else None, list[Node](), list[Node]()
        node = pool
        while (user := single_user(node)) is not None:
            if _is_linear(graph, user):
                linears.append(user)
            elif _reshapes(user, x):
                reshapes.append(user)
            elif not is_pointwise(graph, user):
                break
            node = user
        if user is None or not isinstance(x, Node) or len(linears) != 2:
            continue
        if len(shape_of(node) or ()) != 4:
            continue
        if multiplies(steps[places[user].step], places[x], places[node]):
            found.append(_LinearGate(x, pool, (linears[0], linears[1]), tuple(reshapes)))
    return found


def _is_linear(graph: fx.GraphModule, node: Node) -> bool:
    """Whether a node calls a linear layer, as the only one, with a matrix."""
    is_linear = type(module_of(graph, node)) is nn.Linear
    return is_linear and times_called(graph, node.target) == 1 and len(shape_of(node) or ()) == 2


def _reshapes(node: Node, x: object) -> bool:
    """Whether a node only adds or removes the sides of images of one pixel, or repeats that one."""
    before, after = shape_of(node.args[0]) or (), shape_of(node) or ()
    if node.op == "call_method" and node.target == "expand_as":
        return node.args[1:] == (x,) and before[2:] == (1, 1)
    is_reshape = node.op == "call_method" and node.target in _RESHAPES
    if not is_reshape and node.target not in (torch.flatten, torch.reshape, torch.unsqueeze):
        return False
    lone = all(2 <= len(shape) <= 4 and {*shape[2:]} <= {1} for shape in (before, after))
    return lone and before[:2] == after[:2]


def _convolution(linear: nn.Linear) -> nn.Conv2d:
    conv = nn.Conv2d(
        linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta"
    )
    weight = linear.weight
    conv.weight = nn.Parameter(weight.detach()[:, :, None, None].clone(), weight.requires_grad)
    if linear.bias is not None:
        conv.bias = linear.bias
    return conv.train(linear.training)
