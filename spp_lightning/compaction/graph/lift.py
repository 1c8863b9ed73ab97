"""Functions that a network calls with tensors of its own, made layers, so that passes find them.

Libraries join a norm and an activation in one module of their own, or standardise a weight before
they convolve with it. torch.fx traces through such modules and finds functions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F

from spp_lightning.compaction.graph.constants import own_values, source_of
from spp_lightning.compaction.graph.query import (
    Node,
    arguments,
    free_name,
    set_module,
    shape_of,
)

__all__ = ["make_layers"]

_NORM_TENSORS = ("running_mean", "running_var", "weight", "bias")
_NORM = ("input", *_NORM_TENSORS, "training", "momentum", "eps")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_LINEAR = ("input", "weight", "bias")


def make_layers(graph: fx.GraphModule) -> None:
    """Replace calls of ``F.batch_norm``, ``F.conv2d`` and ``F.linear`` by calls of layers.

    A call becomes a layer where its tensors are the network's own, or follow from those alone: a
    standardised weight becomes the weight of an ``nn.Conv2d``. The layer of the tensor
    ``bn1.weight`` is ``bn1.norm``; the other kinds are ``conv`` and ``linear``.

    Args:
        graph: A network in evaluation mode, with the shapes of its tensors; changed in place.
    """
    lifter = _Lifter(graph)
    for node in list(graph.graph.nodes):
        if node.op == "call_function":
            lifter.lift(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()


class _Lifter:
    """Makes layers, one of each set of tensors."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._values = own_values(graph)
        self._made: dict[tuple[object, ...], str] = {}

    def lift(self, node: Node) -> None:
        """Replace a node by the call of a layer, if it is a norm, a convolution or linear."""
        if node.target is F.batch_norm:
            found = self._norm(node)
        elif node.target is F.conv2d:
            found = self._convolution(node)
        elif node.target is F.linear:
            found = self._linear(node)
        else:
            return
        if found is None:
            return
        key, kind, layer = found
        if key not in self._made:
            parent = next(str(name).rpartition(".")[0] for name in key if isinstance(name, str))
            self._made[key] = free_name(self._graph, f"{parent}.{kind}".lstrip("."))
            set_module(self._graph, self._made[key], layer)
        given = arguments(node, ("input",))
        with self._graph.graph.inserting_before(node):
            call = self._graph.graph.call_module(self._made[key], (given["input"],))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self._graph.graph.erase_node(node)

    def _norm(self, node: Node) -> tuple[tuple[object, ...], str, nn.Module] | None:
        given = arguments(node, _NORM)
        tensors = [given.get(name) for name in _NORM_TENSORS]
        if (
            len(shape_of(node) or ()) != 4
            or not all(x is None or self._is_own(x) for x in tensors)
            or None in tensors[:2]
            or (tensors[2] is None) != (tensors[3] is None)
            or given.get("training", False) is not False
        ):
            return None
        momentum, eps = given.get("momentum", 0.1), given.get("eps", 1e-5)
        mean, variance, weight, bias = self._read(tensors)
        affine, device = weight is not None, mean.device
        norm = nn.BatchNorm2d(len(mean), eps, momentum, affine, device=device, dtype=mean.dtype)
        norm.running_mean, norm.running_var = mean, variance
        if affine:
            norm.weight, norm.bias = _parameter(weight), _parameter(bias)
        return (*self._sources(tensors), momentum, eps), "norm", norm.eval()

    def _convolution(self, node: Node) -> tuple[tuple[object, ...], str, nn.Module] | None:
        given = arguments(node, _CONV)
        tensors = [given["weight"], given.get("bias")]
        sizes = {key: given.get(key, 1) for key in _CONV[3:]} | {"padding": given.get("padding", 0)}
        if len(shape_of(node) or ()) != 4 or not self._are_known(tensors):
            return None
        if any(isinstance(x, Node) for value in sizes.values() for x in _numbers(value)):
            return None
        weight, bias = self._read(tensors)
        filters, channels, *kernel = weight.shape
        pairs: dict[str, Any] = {
            key: value if isinstance(value, (int, str)) else tuple(value)
            for key, value in sizes.items()
        }
        pairs |= {"bias": bias is not None, "device": "meta"}
        conv = nn.Conv2d(channels * sizes["groups"], filters, tuple(kernel), **pairs)
        conv.weight = _parameter(weight)
        if bias is not None:
            conv.bias = _parameter(bias)
        return (*self._sources(tensors), str(sizes)), "conv", conv.eval()

    def _linear(self, node: Node) -> tuple[tuple[object, ...], str, nn.Module] | None:
        given = arguments(node, _LINEAR)
        tensors = [given["weight"], given.get("bias")]
        if not self._are_known(tensors):
            return None
        weight, bias = self._read(tensors)
        if weight.dim() != 2:
            return None
        features, inputs = weight.shape
        linear = nn.Linear(inputs, features, bias is not None, device="meta")
        linear.weight = _parameter(weight)
        if bias is not None:
            linear.bias = _parameter(bias)
        return tuple(self._sources(tensors)), "linear", linear.eval()

    def _is_own(self, value: Any) -> bool:
        """Whether a value is one of the network's own tensors, as it is."""
        return isinstance(value, Node) and value.op == "get_attr" and value in self._values

    def _are_known(self, tensors: list[Any]) -> bool:
        """Whether a weight, and a bias if there is one, follow from the network's own tensors."""
        return all(
            x is None or (isinstance(x, Node) and isinstance(self._values.get(x), Tensor))
            for x in tensors
        )

    def _read(self, tensors: list[Any]) -> list[Any]:
        return [None if x is None else self._values[x] for x in tensors]

    def _sources(self, tensors: list[Any]) -> list[str | int | None]:
        """What tells tensors apart; the first name is that of one of the network's own."""
        names: list[str | int | None] = []
        for x in tensors:
            names.append(None if x is None else source_of(x))
            if x is not None and x.op != "get_attr":
                names.append(id(x))  # the node that computes it
        return names


def _parameter(tensor: Tensor) -> nn.Parameter:
    """The network's own parameter, or a new one that isn't trained."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.contiguous(), False)


def _numbers(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
