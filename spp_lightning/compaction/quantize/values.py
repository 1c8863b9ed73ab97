"""Which values between the steps of a network are uint8, and which of them share a scale."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from spp_lightning.compaction.graph.patterns import as_plane_op
from spp_lightning.compaction.graph.query import Node, arguments, calls, module_of

__all__ = ["Domain", "domains", "moved"]

_MOVING_METHODS = (
    *("flatten", "view", "reshape", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"),
    *("chunk", "split", "unbind", "unflatten", "narrow", "flip", "clone"),
)
_MOVING_FUNCTIONS = (
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze),
    *(torch.unsqueeze, torch.chunk, torch.split, torch.unbind, operator.getitem),
    *(torch.narrow, torch.flip, F.pixel_shuffle, torch.pixel_shuffle),
)
_MOVING_MODULES = (nn.Flatten, nn.Identity, nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle)
_ASKING = ("size", "dim", "ndimension", "numel")  # methods that read no numbers


class Domain(NamedTuple):
    """Values that are uint8 with one scale.

    Attributes:
        roots: The nodes that compute the values: int8 layers, and float ones behind which a
            quantisation is inserted. Other values of the domain are moved or chosen from them.
        readers: The int8 layers that read them, each with the places of its arguments.
        is_inner: Whether the values are uint8 wherever they are read. If not, the network goes on
            with the float numbers, and only the readers see uint8.
    """

    roots: tuple[Node, ...]
    readers: tuple[tuple[Node, int], ...]
    is_inner: bool


def domains(graph: fx.GraphModule, names: Collection[str]) -> list[Domain]:
    """Split the values that int8 layers read into domains.

    Operations that move numbers or choose the largest (reshapes, slices, concatenations, max pools)
    compute uint8 of uint8 with the same scale, so what they read and write is one group. A group is
    uint8 as a whole if int8 layers only read it in the end. Otherwise it stays float, and what int8
    layers read of it is quantised for them.

    Args:
        graph: The network; its int8 layers read what they compute with as positional arguments.
        names: Of the layers that become int8.
    """
    groups: dict[Node, list[Node]] = {}
    for node in graph.graph.nodes:
        groups[node] = [node]
        for source in moved(graph, node):
            _join(groups, groups[source], groups[node])
    found = []
    for group in {id(group): group for group in groups.values()}.values():
        readers = [
            (user, place)
            for node in group
            for user in node.users
            if _is_layer(user, names)
            for place, argument in enumerate(user.args)
            if argument is node
        ]
        if not readers:
            continue
        inner = all(
            _is_layer(user, names) or node in moved(graph, user) or _asks(user)
            for node in group
            for user in node.users
        )
        roots = tuple(node for node in group if not moved(graph, node))
        if inner and all(_is_float32(root) for root in roots):
            found.append(Domain(roots, tuple(readers), True))
            continue
        for node in dict.fromkeys(user.args[place] for user, place in readers):
            own = tuple(x for x in readers if x[0].args[x[1]] is node)
            found.append(Domain((node,), own, False))  # type: ignore[arg-type]
    return found


def _join(groups: dict[Node, list[Node]], first: list[Node], second: list[Node]) -> None:
    if first is second:
        return
    first.extend(second)
    for node in second:
        groups[node] = first


def moved(graph: fx.GraphModule, node: Node) -> tuple[Node, ...]:
    """The nodes whose numbers a node moves, or chooses from; none if it computes others.

    Args:
        graph: The network.
        node: One of its nodes.
    """
    module = module_of(graph, node)
    if calls(node, (torch.cat, torch.concat), ()):
        parts = arguments(node, ("tensors", "dim")).get("tensors")
        return _nodes(parts if isinstance(parts, (list, tuple)) else ())
    plane_op = as_plane_op(graph, node)
    moves = (
        type(module) in _MOVING_MODULES
        or calls(node, _MOVING_FUNCTIONS, _MOVING_METHODS)
        or (plane_op is not None and plane_op.kind == "max_pool")
    )
    if not moves or not node.args or _asks_of(node.args[0]):
        return ()
    return _nodes(node.args[:1])


def _nodes(values: Iterable[object]) -> tuple[Node, ...]:
    return tuple(x for x in values if isinstance(x, fx.Node))


def _asks(node: Node) -> bool:
    """Whether a node reads the shape of a tensor, and not its numbers."""
    if node.op == "call_method":
        return node.target in _ASKING
    return node.target is getattr and node.args[1] in ("shape", "ndim")


def _asks_of(value: object) -> bool:
    return isinstance(value, fx.Node) and _asks(value)


def _is_layer(node: Node, names: Collection[str]) -> bool:
    return node.op == "call_module" and node.target in names


def _is_float32(node: Node) -> bool:
    return getattr(node.meta.get("tensor_meta"), "dtype", None) == torch.float32
