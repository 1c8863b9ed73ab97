"""Networks as graphs: traced with torch.fx, and what the nodes of such a graph mean."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import local_response_norm
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.query import Node, arguments, module_of
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = ["trace"]


_LEAVES = (ColumnConv2d,)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _LEAVES) or super().is_leaf_module(module, name)


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of a network, with the shapes of its tensors. No node of it writes in place.

    Args:
        model: The network, in evaluation mode. The graph shares its modules.
        inputs: The positional arguments that the network is run with, once.

    Raises:
        Exception: Whatever a network raises that can't be traced.
    """
    if isinstance(model, CompactNetwork):
        raise ValueError("it is compact already")
    tracer = _Tracer(autowrap_functions=(local_response_norm,))
    traced = fx.GraphModule(model, tracer.trace(model), type(model).__name__).eval()
    _drop_calls_without_effect(traced)
    _write_nothing_in_place(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with torch.no_grad():
        ShapeProp(traced).propagate(*inputs)
    _check_names(traced)
    _check_methods(traced)
    return traced


def _check_names(graph: fx.GraphModule) -> None:
    """Check that a compact network can have the layers and tensors under their names."""
    for node in graph.graph.nodes:
        first = str(node.target).partition(".")[0]
        if node.op in ("call_module", "get_attr") and hasattr(CompactNetwork, first):
            raise ValueError(f"the name {first!r} isn't free in a CompactNetwork")


def _check_methods(graph: fx.GraphModule) -> None:
    """Check that all methods are those of tensors: nothing else has a place in a network."""
    for node in graph.graph.nodes:
        kind = node.args[0].meta.get("type") if node.op == "call_method" else Tensor
        if not issubclass(kind, (Tensor, torch.Size)):
            raise ValueError(f"it calls the method {node.target} of a {kind.__name__}")


_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"


def _drop_calls_without_effect(graph: fx.GraphModule) -> None:
    """Remove assertions, and stochastic depth, which passes its input on in evaluation."""
    for node in reversed(graph.graph.nodes):
        if node.op != "call_function":
            continue
        name = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"
        if name == _STOCHASTIC_DEPTH:
            given = arguments(node, ("input", "p", "mode", "training"))
            if given.get("training", True):
                continue
            node.replace_all_uses_with(given["input"])
        elif node.target is not torch._assert:
            continue
        graph.graph.erase_node(node)
    graph.recompile()


_IN_PLACE = {
    getattr(operator, f"i{name.removesuffix('_')}"): getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "pow", "floordiv", "mod", "matmul"),
        *("and_", "or_", "xor", "lshift", "rshift"),
    )
} | {torch.relu_: torch.relu, F.relu_: torch.relu, F.elu_: F.elu, F.leaky_relu_: F.leaky_relu}
_ALIASES = (
    *("view", "reshape", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "chunk"),
    *("split", "contiguous", "detach", "expand", "narrow", "getitem", "t", "to", "unbind"),
    *("select", "unflatten", "dropout"),
)


def _write_nothing_in_place(graph: fx.GraphModule) -> None:
    """Let every node make a new tensor, and later nodes read that one.

    Raises:
        ValueError: If a node writes to a tensor that others may see by another name.
    """
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    modules = {id(m) for m in graph.modules() if getattr(m, "inplace", False) is True}
    for node in list(graph.graph.nodes):
        if id(module_of(graph, node)) not in modules and not _made_out_of_place(graph, node):
            continue
        written = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(written, Node):
            raise ValueError(f"{node.name} writes in place to something that isn't a tensor")
        base = _base(graph, written)
        if base.op in ("placeholder", "get_attr"):
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


def _is_alias(graph: fx.GraphModule, node: Node) -> bool:
    module = module_of(graph, node)
    if module is not None:
        return isinstance(module, (nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d))
    return getattr(node.target, "__name__", str(node.target)) in _ALIASES
