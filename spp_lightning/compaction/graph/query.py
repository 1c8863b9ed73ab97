"""Questions about the nodes of a traced network: module, shape, arguments, users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear

__all__ = [
    "Node",
    "arguments",
    "calls",
    "convolution_like",
    "free_name",
    "is_opaque",
    "linear_like",
    "module_of",
    "set_module",
    "shape_of",
    "single_user",
    "times_called",
]

Node = fx.Node

_COMPACT = (ColumnConv2d, ColumnLinear, Quantize, QuantizedConv2d, QuantizedLinear)


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


def times_called(graph: fx.GraphModule, target: object) -> int:
    """How many nodes call a layer, or read one of its tensors without calling it."""
    return sum(
        (node.op == "call_module" and node.target == target)
        or (node.op == "get_attr" and str(node.target).startswith(f"{target}."))
        for node in graph.graph.nodes
    )


def set_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of a name by another one."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def free_name(network: nn.Module, name: str) -> str:
    """A name, with a number behind it where something in the network has the name already."""
    parent, _, last = name.rpartition(".")
    count = 0
    while hasattr(network.get_submodule(parent), last if not count else f"{last}_{count}"):
        count += 1
    return name if not count else f"{name}_{count}"


def convolution_like(
    conv: nn.Conv2d, channels: int, filters: int, groups: int, bias: bool
) -> nn.Conv2d:
    """A convolution of other sizes, else with the settings of ``conv``; its weights are random."""
    return nn.Conv2d(
        channels,
        filters,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        groups,
        bias,
        conv.padding_mode,
        conv.weight.device,
        conv.weight.dtype,
    ).train(conv.training)


def linear_like(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with other weights, in the mode of ``linear``."""
    made = nn.Linear(weight.shape[1], len(weight), bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), linear.weight.requires_grad)
    if bias is not None:
        grad = linear.weight.requires_grad if linear.bias is None else linear.bias.requires_grad
        made.bias = nn.Parameter(bias.detach().clone(), grad)
    return made.train(linear.training)


def is_opaque(module: nn.Module) -> bool:
    """Whether a module that a graph calls is neither a layer of torch nor one of compaction."""
    kind = type(module)
    layer = kind in _COMPACT or kind.__module__.startswith("torch.nn.")
    return not layer or kind.__module__ == nn.Sequential.__module__  # a container
