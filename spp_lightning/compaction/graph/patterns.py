"""Which operation a node computes: an addition, an activation, a pool, a concatenation."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import (
    LRN_ALPHA,
    LRN_SIZE,
    Activation,
    Clamp,
    PlaneOp,
    local_response_norm,
)
from spp_lightning.compaction.graph.query import Node, arguments, calls, module_of, shape_of

__all__ = [
    "add_operands",
    "as_activation",
    "as_clamp",
    "as_plane_op",
    "as_pool",
    "averages_pixels",
    "cat_operands",
    "is_channelwise",
    "is_pointwise",
    "is_whole_slice",
]


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


_POINTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Dropout),
)
_POINTWISE = (
    *(F.relu, torch.relu, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish),
    *(F.hardswish, F.hardsigmoid, torch.sigmoid, F.sigmoid, torch.tanh),
)
_POINTWISE_METHODS = ("relu", "sigmoid", "tanh", "contiguous")


def add_operands(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that a node adds, if it does no more and they are of one shape."""
    if not calls(node, _ADD, ("add", "add_")) or len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if not isinstance(first, Node) or not isinstance(second, Node):
        return None
    shape = shape_of(first)
    return (first, second) if shape is not None and shape == shape_of(second) else None


def cat_operands(node: Node) -> list[Node] | None:
    """The 4-d tensors that a node concatenates along the channels, if that is what it does."""
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
    if averages_pixels(node) or is_whole_slice(node):
        return True
    if calls(node, _ELEMENTWISE, _ELEMENTWISE_METHODS):
        # Scalars may be among the operands. A tensor that isn't 4-d could have channels anywhere.
        shapes = [shape_of(x) or () for x in node.all_input_nodes]
        return all(len(x) == 4 and x[1] == shape[1] for x in shapes)
    return False


def averages_pixels(node: Node) -> bool:
    """Whether a node averages the pixels of each channel of an image."""
    if not calls(node, (torch.mean,), ("mean",)) or len(shape_of(node.args[0]) or ()) != 4:
        return False
    dims = arguments(node, ("input", "dim")).get("dim")
    return isinstance(dims, (tuple, list)) and {int(d) % 4 for d in dims} == {2, 3}


def is_whole_slice(node: Node) -> bool:
    """Whether a node slices a tensor in such a way that all of it is left, as GhostNet does."""
    if not calls(node, (operator.getitem,), ()) or shape_of(node) != shape_of(node.args[0]):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    # A stop beyond the end stays one where channels are removed.
    return all(isinstance(x, slice) and not x.start and x.step in (None, 1) for x in index)


def is_pointwise(graph: fx.GraphModule, node: Any) -> bool:
    """Whether each number of a node's output depends on that number of its only input."""
    if not isinstance(node, Node) or len(node.all_input_nodes) != 1 or not node.args:
        return False
    module = module_of(graph, node)
    if module is not None:
        return type(module) in _POINTWISE_MODULES
    return calls(node, _POINTWISE, _POINTWISE_METHODS)


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


_ACTIVATION_MODULES: dict[type[nn.Module], Activation] = {
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
}


_ACTIVATION_FUNCTIONS: dict[Any, Activation] = {
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.hardsigmoid: "hardsigmoid",
    F.hardswish: "hardswish",
}


def as_activation(graph: fx.GraphModule, node: Node) -> Activation | None:
    """The activation that a node computes of its input, if that is what it does; not a clamp."""
    module = module_of(graph, node)
    if type(module) is nn.GELU or node.target is F.gelu:
        given = vars(module) if module else arguments(node, ("input", "approximate"))
        return "gelu_tanh" if given.get("approximate", "none") == "tanh" else "gelu"
    if node.op == "call_method" and node.target == "sigmoid":
        return "sigmoid"
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)
    return None if module is None else _ACTIVATION_MODULES.get(type(module))


def as_plane_op(graph: fx.GraphModule, node: Node) -> PlaneOp | None:
    """The pool or norm of planes that a node computes, if that is what it does."""
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
    return as_pool(given, maximum)


def as_pool(given: Mapping[str, Any], maximum: bool) -> PlaneOp | None:
    """The pool of torch's arguments, by name; None if the kernels have no such pool."""
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
