"""Networks as graphs: traced with torch.fx, and what the nodes of such a graph mean."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from spp_lightning.compaction.geometry import Clamp, PlaneOp
from spp_lightning.compaction.layer import ColumnConv2d
from spp_lightning.convnet import LRN_ALPHA, LRN_SIZE, local_response_norm

__all__ = [
    "Node",
    "add_operands",
    "arguments",
    "as_clamp",
    "as_plane_op",
    "calls",
    "cat_operands",
    "is_channelwise",
    "module_of",
    "shape_of",
    "single_user",
    "trace",
    "trace_as_it_is",
]

Node = fx.Node

_LEAVES = (ColumnConv2d,)
_ADD = (operator.add, operator.iadd, torch.add)
_CHANNELWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Identity),
    *(nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d),
)
_CHANNELWISE_FUNCTIONS = (
    *(F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu),
    *(F.mish, F.hardswish, F.hardsigmoid, torch.sigmoid, F.sigmoid, torch.tanh, F.dropout),
    *(F.dropout2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(F.adaptive_max_pool2d, F.interpolate, torch.clamp, local_response_norm),
)
_CHANNELWISE_METHODS = (
    "relu",
    "relu_",
    "sigmoid",
    "tanh",
    "contiguous",
    "clone",
    "detach",
    "clamp",
)
_ELEMENTWISE = (
    *_ADD,
    operator.sub,
    operator.isub,
    torch.sub,
    operator.mul,
    operator.imul,
    torch.mul,
)
_ELEMENTWISE_METHODS = ("add", "add_", "sub", "sub_", "mul", "mul_")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _LEAVES) or super().is_leaf_module(module, name)


def trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of a network, with the shapes of its tensors.

    Args:
        model: The network, in evaluation mode. The graph shares its modules.
        inputs: The positional arguments that it is run with, once.

    Raises:
        Exception: Whatever the network raises that can't be traced.
    """
    traced = trace_as_it_is(model)
    _write_nothing_in_place(traced)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    with torch.no_grad():
        ShapeProp(traced).propagate(*inputs)
    return traced


def trace_as_it_is(model: nn.Module) -> fx.GraphModule:
    """The graph of a network, in evaluation mode, with whatever it writes in place.

    Raises:
        Exception: Whatever the network raises that can't be traced.
    """
    tracer = _Tracer(autowrap_functions=(local_response_norm,))
    graph = tracer.trace(model)
    return fx.GraphModule(model, graph, type(model).__name__).eval()


_IN_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "pow", "floordiv", "mod")
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


def module_of(graph: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    return graph.get_submodule(str(node.target))


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape of a node's output for the example input; None if it isn't a tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, Node) else None
    shape = getattr(meta, "shape", None)
    return None if shape is None else tuple(shape)


def single_user(node: Node) -> Node | None:
    """The only node that reads a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def arguments(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    """What a node is called with, by name; `names` are those of the positional arguments."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def calls(node: Node, functions: tuple[Callable[..., Any], ...], methods: tuple[str, ...]) -> bool:
    """Whether a node calls one of the functions, or of the methods."""
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods


def add_operands(node: Node) -> tuple[Node, Node] | None:
    """The two tensors of one shape that a node adds, if that is all it does."""
    if not calls(node, _ADD, ("add", "add_")) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None
    shape = shape_of(first)
    return (first, second) if shape is not None and shape == shape_of(second) else None


def cat_operands(node: Node) -> list[Node] | None:
    """The pictures that a node joins channel by channel, if that is what it does."""
    if not calls(node, (torch.cat, torch.concat), ()):
        return None
    given = arguments(node, ("tensors", "dim"))
    tensors = given.get("tensors")
    if given.get("dim") not in (1, -3) or not isinstance(tensors, (list, tuple)):
        return None
    nodes = [x for x in tensors if isinstance(x, Node) and len(shape_of(x) or ()) == 4]
    return nodes if len(nodes) == len(tensors) else None


def is_channelwise(graph: fx.GraphModule, node: Node) -> bool:
    """Whether each output channel of a node depends on that channel of its inputs alone."""
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        return False
    module = module_of(graph, node)
    if module is not None:
        inputs = list(node.all_input_nodes)
        one = len(inputs) == 1 and len(shape_of(inputs[0]) or ()) == 4
        return one and isinstance(module, _CHANNELWISE_MODULES)
    if calls(node, _CHANNELWISE_FUNCTIONS, _CHANNELWISE_METHODS):
        inputs = node.all_input_nodes
        return len(inputs) == 1 and len(shape_of(inputs[0]) or ()) == 4
    if calls(node, _ELEMENTWISE, _ELEMENTWISE_METHODS):
        # Numbers may stand beside the pictures; a tensor that is none could hold channels anywhere.
        shapes = [shape_of(x) or () for x in node.all_input_nodes]
        return all(len(x) == 4 and x[1] == shape[1] for x in shapes)
    return False


def as_clamp(graph: fx.GraphModule, node: Node) -> Clamp | None:
    """The limits to which a node clamps its input, if that is what it does."""
    module = module_of(graph, node)
    if type(module) is nn.ReLU or calls(node, (F.relu, torch.relu, torch.relu_), ("relu", "relu_")):
        return Clamp(0.0)
    if type(module) is nn.ReLU6 or calls(node, (F.relu6,), ()):
        return Clamp(0.0, 6.0)
    if type(module) is nn.Hardtanh:
        return Clamp(float(module.min_val), float(module.max_val))
    if calls(node, (F.hardtanh,), ()):
        given = arguments(node, ("input", "min_val", "max_val"))
        return Clamp(float(given.get("min_val", -1)), float(given.get("max_val", 1)))
    return None


def as_plane_op(graph: fx.GraphModule, node: Node) -> PlaneOp | None:
    """The pool or norm that a node computes plane by plane, if that is what it does."""
    module = module_of(graph, node)
    given: dict[str, Any]
    if calls(node, (local_response_norm,), ()):
        given = arguments(node, ("x", "size", "alpha"))
        size = given.get("size", LRN_SIZE)
        if type(size) is not int or size % 2 == 0:
            return None
        return PlaneOp(
            "local_response_norm", (size, size), alpha=float(given.get("alpha", LRN_ALPHA))
        )
    if type(module) in (nn.MaxPool2d, nn.AvgPool2d):
        given = vars(module)
        maximum = type(module) is nn.MaxPool2d
    elif calls(node, (F.max_pool2d, torch.max_pool2d), ()):
        names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
        given, maximum = arguments(node, (*names, "return_indices")), True
    elif calls(node, (F.avg_pool2d,), ()):
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        given, maximum = arguments(node, (*names, "divisor_override")), False
    else:
        return None
    if (
        given.get("return_indices", False)
        or _pair(given.get("dilation", 1)) != (1, 1)
        or given.get("divisor_override") is not None
    ):
        return None
    kernel = _pair(given["kernel_size"])
    stride = given.get("stride")
    return PlaneOp(
        "max_pool" if maximum else "avg_pool",
        kernel,
        kernel if stride is None or stride == [] else _pair(stride),
        _pair(given.get("padding", 0)),
        bool(given.get("ceil_mode", False)),
        bool(given.get("count_include_pad", True)),
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
