"""to_dense(): a compact network as an ordinary one, for runtimes that don't have its kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import (
    Activation,
    Clamp,
    Epilogue,
    PlaneOp,
    local_response_norm,
)
from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.graph.query import set_module
from spp_lightning.compaction.graph.steps import Step, Value, map_values
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear
from spp_lightning.compaction.layers.quantized import QuantizedConv2d

__all__ = ["calls_behind_clamp", "to_dense"]

_Call = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


def to_dense(model: nn.Module) -> nn.Module:
    """Make an ordinary network of a compact one: convolutions with zeros in the pruned columns.

    What a compact layer computes on the way (additions, clamps, pools) becomes functions of torch
    again. The result runs wherever torch does, and can be exported; ``torch.onnx.export`` knows
    all of it. It computes what the compact network computes, up to rounding.

    Args:
        model: A compact network, or any network with compact layers in it; left as it was.

    Returns:
        The ordinary network, with the names, the mode and the device of ``model``. Channels that
        ``compact()`` removed stay removed.

    Raises:
        ValueError: If ``model`` isn't a network, or is quantised.

    >>> from spp_lightning.compaction.epilogue import RELU
    >>> conv = nn.Conv2d(3, 8, 3, padding=1)
    >>> net = nn.Sequential(ColumnConv2d.of(conv, RELU), nn.Flatten())
    >>> dense = to_dense(net)
    >>> isinstance(dense[0], nn.Conv2d) and torch.equal(dense[0].weight, conv.weight)
    True
    >>> x = torch.randn(2, 3, 8, 8)
    >>> torch.allclose(dense(x), net(x), atol=1e-5)
    True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` must be a network, an instance of nn.Module, got {model!r}.")
    if any(isinstance(module, QuantizedConv2d) for module in model.modules()):
        raise ValueError(
            "`model` must not be quantised; make the network dense that `quantize_compact` was"
            " given."
        )
    if isinstance(model, ColumnConv2d):
        return _DenseConv2d(model)
    if isinstance(model, ColumnLinear):
        return model.to_dense()
    model = copy.deepcopy(model)
    for network in [module for module in model.modules() if isinstance(module, CompactNetwork)]:
        _write_out(network)
    made: dict[nn.Module, nn.Module] = {}  # a layer in two places stays one
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if isinstance(layer, ColumnConv2d):
                parent._modules[name] = made[layer] = made.get(layer) or _DenseConv2d(layer)
            elif isinstance(layer, ColumnLinear):
                parent._modules[name] = made[layer] = made.get(layer) or layer.to_dense()
    return model


class _DenseConv2d(nn.Conv2d):
    """A convolution and what follows it, for networks without a graph to write that into."""

    def __init__(self, layer: ColumnConv2d) -> None:
        conv = _convolution(layer)
        g = layer.geometry
        super().__init__(*g[:6], groups=g.groups, bias=conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.calls = _calls(layer)
        self.train(layer.training)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        if residual is not None:
            y = y + residual
        for function, args, kwargs in self.calls:
            y = function(y, *args, **kwargs)
        return y


def _write_out(network: CompactNetwork) -> None:
    """Replace a network's compact layers by convolutions, and by steps for what follows them."""
    layers = {
        name: layer
        for name in {str(step.target) for step in network.compact_steps if step.kind == "layer"}
        if isinstance(layer := network.get_submodule(name), ColumnConv2d)
    }
    made = {layer: _convolution(layer) for layer in layers.values()}
    for name, layer in layers.items():
        set_module(network, name, made[layer])
    names = {step.name for step in network.compact_steps}
    places: list[int] = []  # of the old steps' results among the new steps
    steps: list[Step] = []

    def moved(argument: Any) -> Any:
        return map_values(argument, lambda x: Value(places[x.step]) if isinstance(x, Value) else x)

    for step in network.compact_steps:
        args, kwargs = moved(step.args), moved(step.kwargs)
        if step.kind == "layer" and step.target in layers:
            given = {**dict(zip(("x", "residual"), args, strict=False)), **kwargs}
            steps.append(Step("layer", step.name, step.target, (given["x"],)))
            for call in _calls(layers[step.target], given.get("residual")):
                function, more, named = call
                name = _fresh(f"{step.name}_{function.__name__}", names)
                result = Value(len(steps) - 1)
                steps.append(Step("function", name, function, (result, *more), named))
        else:
            steps.append(Step(step.kind, step.name, step.target, args, kwargs))
        places.append(len(steps) - 1)
    network._set_steps(steps)


def _fresh(name: str, names: set[str]) -> str:
    """A name that isn't in ``names`` yet, and is now."""
    count, found = 0, name
    while found in names:
        count += 1
        found = f"{name}_{count}"
    names.add(found)
    return found


def _convolution(layer: ColumnConv2d) -> nn.Conv2d:
    conv = layer.to_dense()
    conv.weight.requires_grad_(layer.weight.requires_grad)
    if conv.bias is not None and layer.bias is not None:
        conv.bias.requires_grad_(layer.bias.requires_grad)
    return conv


def _calls(layer: ColumnConv2d, residual: Any = None) -> list[_Call]:
    """What a layer does after the convolution: functions, and their arguments after the first."""
    calls: list[_Call] = [] if residual is None else [(torch.add, (residual,), {})]
    clamp = layer.epilogue.clamp
    if clamp == (0, math.inf):
        calls.append((F.relu, (), {}))
    elif clamp != Clamp():
        calls.append((torch.clamp, tuple(clamp), {}))
    return calls + calls_behind_clamp(layer.epilogue)


def calls_behind_clamp(epilogue: Epilogue) -> list[_Call]:
    """What an epilogue does after its clamp, as functions of torch with their further arguments."""
    activation = epilogue.activation
    calls = [] if activation == "none" else [_ACTIVATIONS[activation]]
    return calls + [_plane_call(op) for op in epilogue.post]


_ACTIVATIONS: dict[Activation, _Call] = {
    "sigmoid": (torch.sigmoid, (), {}),
    "silu": (F.silu, (), {}),
    "hardsigmoid": (F.hardsigmoid, (), {}),
    "hardswish": (F.hardswish, (), {}),
    "gelu": (F.gelu, (), {}),
    "gelu_tanh": (F.gelu, (), {"approximate": "tanh"}),
}


def _plane_call(op: PlaneOp) -> _Call:
    sizes = (op.kernel_size, op.stride, op.padding)
    if op.kind == "max_pool":
        return F.max_pool2d, sizes, {"ceil_mode": op.ceil_mode}
    if op.kind == "avg_pool":
        return (
            F.avg_pool2d,
            sizes,
            {
                "ceil_mode": op.ceil_mode,
                "count_include_pad": op.count_include_pad,
            },
        )
    return local_response_norm, (op.kernel_size[0], op.alpha), {}
