"""Operations in place, written out of place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from spp_lightning.compaction.graph.query import Node, module_of

__all__ = ["InPlaceProxy", "write_nothing_in_place"]

_AUGMENTED = {
    getattr(operator, f"i{name.removesuffix('_')}"): getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "pow", "floordiv", "mod", "matmul"),
        *("and_", "or_", "xor", "lshift", "rshift"),
    )
}
_IN_PLACE = _AUGMENTED | {
    torch.relu_: torch.relu,
    F.relu_: torch.relu,
    F.elu_: F.elu,
    F.leaky_relu_: F.leaky_relu,
}
_ALIASES = (
    *("view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "chunk"),
    *("split", "contiguous", "detach", "expand", "narrow", "getitem", "t", "to", "unbind"),
    *("select", "unflatten", "dropout"),
)


class InPlaceProxy(fx.Proxy):
    """A proxy that knows ``x += y`` from ``x = x + y``: torch.fx takes one for the other."""


def _augmented(function: Any) -> Any:
    def method(self: InPlaceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in _AUGMENTED:
    setattr(InPlaceProxy, f"__{_function.__name__}__", _augmented(_function))


def write_nothing_in_place(graph: fx.GraphModule) -> bool:
    """Let every node make a new tensor, and later nodes read that one.

    Args:
        graph: A traced network, changed in place.

    Returns:
        Whether a node wrote in place.

    Raises:
        ValueError: If a node writes to a tensor that others may see by another name.
    """
    any_wrote = False
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    modules = {id(m) for m in graph.modules() if getattr(m, "inplace", False) is True}
    for node in list(graph.graph.nodes):
        is_augmented = node.target in _AUGMENTED
        if id(module_of(graph, node)) not in modules and not _made_out_of_place(graph, node):
            continue
        written = node.args[0] if node.args else node.kwargs.get("input")
        if _is_number(written):
            continue  # which can't be written to: its name stands for another one now
        if not isinstance(written, Node):
            raise ValueError(f"{node.name} writes in place to something that isn't a tensor")
        any_wrote = True
        base = _base(graph, written)
        # An input that `x += y` writes to keeps its values: the caller does not expect others.
        if base.op == "get_attr" or (base.op == "placeholder" and not is_augmented):
            owner = "input" if base.op == "placeholder" else f"own tensor {base.target}"
            raise ValueError(f"{node.name} writes in place to the network's {owner}")
        later = [user for user in written.users if place[user] > place[node]]
        same_memory = [base]
        for tensor in same_memory:  # which grows
            views = (x for x in tensor.users if place[x] < place[node] and _is_alias(graph, x))
            same_memory.extend(views)
            readers = (x for x in tensor.users if place[x] > place[node] and not _asks_shape(x))
            if tensor is not written and any(readers):
                raise ValueError(
                    f"{node.name} writes in place to a part or a view of {base.name}, which is"
                    " read later by another name"
                )
        for user in later:
            user.replace_input_with(written, node)
    for module in graph.modules():
        if id(module) in modules:
            vars(module)["inplace"] = False  # the network is a copy
    return any_wrote


def _made_out_of_place(graph: fx.GraphModule, node: Node) -> bool:
    """Whether a node wrote in place; it doesn't any more."""
    if node.op == "call_function" and node.target in _IN_PLACE:
        node.target = _IN_PLACE[node.target]  # type: ignore[index]
        return True
    if node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    name = str(node.target)
    if node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
        if not hasattr(Tensor, name[:-1]):
            raise ValueError(f"{node.name} writes in place, and can't do so anywhere else")
        node.target = name[:-1]
        return True
    if node.op == "call_function" and node.target is operator.setitem:
        raise ValueError(f"{node.name} writes to a part of a tensor")
    return False


def _base(graph: fx.GraphModule, node: Node) -> Node:
    """The tensor that a node is a view of, or the node itself."""
    while _is_alias(graph, node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _asks_shape(node: Node) -> bool:
    """Whether a node asks a tensor for something that isn't in its memory."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _is_number(value: Any) -> bool:
    """Whether a value is a tensor's size, or follows from sizes and other numbers alone."""
    if not isinstance(value, Node):
        return isinstance(value, (int, float))
    if value.op == "call_method":
        return value.target in ("size", "dim", "numel")
    if value.op != "call_function":
        return False
    if value.target is getattr:
        return value.args[1] in ("shape", "ndim")
    if value.target is operator.getitem:
        return _is_number(value.args[0])
    arithmetic = value.target in _AUGMENTED.values() or value.target in _AUGMENTED
    return arithmetic and all(_is_number(x) for x in value.args)


def _is_alias(graph: fx.GraphModule, node: Node) -> bool:
    module = module_of(graph, node)
    if module is not None:
        return isinstance(module, (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d))
    return getattr(node.target, "__name__", str(node.target)) in _ALIASES
