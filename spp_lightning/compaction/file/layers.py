"""Layers as plain data: their class, what they were made with, and their tensors; and back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import KINDS, Activation, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.file.allowlist import LAYERS, check_layer
from spp_lightning.compaction.file.tensors import TensorStore
from spp_lightning.compaction.file.values import decode, encode
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.column_linear import ColumnLinear
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear

__all__ = ["describe", "rebuild"]

_COMPACT = {
    kind.__name__: kind
    for kind in (ColumnConv2d, ColumnLinear, Quantize, QuantizedConv2d, QuantizedLinear)
}


def describe(module: nn.Module, store: TensorStore) -> dict[str, Any]:
    """A layer as plain data; its tensors are added to ``store``.

    Raises:
        ValueError: If it is neither a compact layer nor one of torch.nn's own layers, or more than
            what the class can be made with.

    >>> describe(nn.MaxPool2d(3, 2), TensorStore())["arguments"]["stride"]
    2
    """
    kind = type(module)
    if kind is not _COMPACT.get(kind.__name__, LAYERS.get(kind.__name__)):
        raise ValueError(
            "it must be a compact layer, or one of the layers of torch.nn that a file may name, got"
            f" {kind.__module__}.{kind.__qualname__}; to save the network without it, make"
            " `compact` of the parts before and behind it"
        )
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError("it has forward hooks, which can't be saved; remove them first")
    if isinstance(module, ColumnConv2d):
        values: dict[str, Any] = {
            "geometry": tuple(module.geometry),
            "clamp": tuple(module.epilogue.clamp),
            "post": tuple(tuple(op) for op in module.epilogue.post),
            "activation": module.epilogue.activation,
        }
    elif isinstance(module, ColumnLinear):
        values = {"in_features": module.in_features}
    elif isinstance(module, QuantizedConv2d):
        values = {"geometry": tuple(module.geometry), "clamp": module.clamp}
    elif isinstance(module, Quantize):
        values = {"post": tuple(tuple(op) for op in module.post)}
    else:
        values = _constructor_arguments(module)
    description = {
        "class": kind.__name__,
        "arguments": {name: encode(value) for name, value in values.items()},
        "tensors": {name: store.add(tensor) for name, tensor in _tensors(module).items()},
    }
    try:
        rebuilt = rebuild(description, store.tensors)
    except Exception as error:  # a class may refuse what it has made of its arguments
        raise ValueError(f"{kind.__name__} can't be made anew: {error}") from error
    _compare(module, rebuilt)
    return description


def rebuild(description: Any, tensors: Sequence[Tensor]) -> nn.Module:
    """The layer that :func:`describe` described, in evaluation mode.

    Args:
        description: Plain data.
        tensors: Those that it refers to; the layer holds these, not copies.

    Raises:
        ValueError: If it isn't a layer that :func:`describe` describes.
    """
    if not isinstance(description, dict) or description.keys() != {"class", "arguments", "tensors"}:
        raise ValueError(f"a layer has a class, arguments and tensors, got {description!r}")
    name = description["class"]
    values = {key: decode(value) for key, value in description["arguments"].items()}
    indices = description["tensors"]
    wrong = [x for x in indices.values() if type(x) is not int or not 0 <= x < len(tensors)]
    if wrong:
        raise ValueError(f"{wrong[0]!r} must be an index below {len(tensors)}")
    own = {key: tensors[index] for key, index in indices.items()}
    if name == ColumnConv2d.__name__:
        module: nn.Module = _column_conv(own, **values)
    elif name == ColumnLinear.__name__:
        module = _column_linear(own, **values)
    elif name in (QuantizedConv2d.__name__, QuantizedLinear.__name__):
        module = _quantized(_COMPACT[name], own, **values)
    elif name == Quantize.__name__:
        module = Quantize(_scale(own, ""), _plane_ops(**values))
    else:
        if name not in LAYERS:
            raise ValueError(f"{name!r} isn't a layer that a file may name")
        check_layer(name, values)
        with torch.device("meta"):  # draws no random numbers; the tensors come from the file
            module = LAYERS[name](**values)
    expected = {key: _signature(tensor) for key, tensor in _tensors(module).items()}
    found = {key: _signature(tensor) for key, tensor in own.items()}
    if expected != found:
        raise ValueError(f"a layer {name} has the tensors {expected}, got {found}")
    for key, tensor in own.items():
        if isinstance(tensor, nn.Parameter):
            module._parameters[key] = tensor
        else:
            module._buffers[key] = tensor
    return module.eval()


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor of the file must share with the layer's own: all but the values."""
    # A layer may be of any floating type; counts and columns are of one.
    floating = tensor.is_floating_point() or tensor.is_complex()
    dtype = "floating" if floating else str(tensor.dtype)
    return tuple(tensor.shape), dtype, isinstance(tensor, nn.Parameter)


def _constructor_arguments(module: nn.Module) -> dict[str, Any]:
    values = {}
    for name, parameter in inspect.signature(type(module)).parameters.items():
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variable or name in ("device", "dtype"):  # the latter are those of the tensors
            continue
        if name in module._parameters:  # such as `bias`, which says whether there is one
            values[name] = module._parameters[name] is not None
        elif hasattr(module, name):
            values[name] = getattr(module, name)
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"it doesn't tell what its argument `{name}` was, so {type(module).__name__} can't"
                " be saved"
            )
    return values


def _compare(module: nn.Module, rebuilt: nn.Module) -> None:
    common = vars(nn.Module())
    expected = {name: value for name, value in vars(rebuilt).items() if name not in common}
    own = vars(copy.copy(module))  # without what a layer only remembers
    different = sorted(name for name in expected if own.get(name) != expected[name])
    if different or module.extra_repr() != rebuilt.extra_repr():
        raise ValueError(
            f"made anew from its arguments, it differs in {', '.join(different) or 'its text'}"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _column_conv(
    tensors: dict[str, Tensor],
    geometry: tuple[Any, ...],
    clamp: tuple[float, float],
    post: tuple[tuple[Any, ...], ...],
    activation: Activation,
) -> ColumnConv2d:
    g = _geometry(geometry)
    epilogue = Epilogue(Clamp.of(clamp), _plane_ops(post), activation)
    return ColumnConv2d(g, tensors["weight"], tensors["columns"], tensors.get("bias"), epilogue)


def _plane_ops(post: tuple[tuple[Any, ...], ...]) -> tuple[PlaneOp, ...]:
    ops = tuple(PlaneOp(*op) for op in post)
    for op in ops:
        if (
            op.kind not in KINDS
            or {len(op.kernel_size), len(op.stride), len(op.padding)} != {2}
            or not _are_ints(*op.kernel_size, *op.stride, least=1)
            or not _are_ints(*op.padding, least=0)
            or any(2 * pad > size for pad, size in zip(op.padding, op.kernel_size, strict=True))
            or not all(type(flag) is bool for flag in (op.ceil_mode, op.count_include_pad))
            or type(op.alpha) is not float
        ):
            raise ValueError(f"{op} isn't an operation on planes")
        op.check()
    return ops


def _geometry(numbers: tuple[Any, ...]) -> Geometry:
    # The kernels rely on these numbers: nothing of them may come from a file unchecked.
    g = Geometry(*numbers)
    counts = (g.channels, g.filters, g.groups, *g.kernel_size, *g.stride, *g.dilation)
    if (
        not _are_ints(*counts, least=1)
        or not _are_ints(*g.padding, least=0)
        or {len(pair) for pair in g[2:6]} != {2}
        or g.channels % g.groups
        or g.filters % g.groups
    ):
        raise ValueError(f"{g} isn't the geometry of a convolution")
    return g


def _quantized(
    kind: Any, tensors: dict[str, Tensor], geometry: tuple[Any, ...], clamp: tuple[float, float]
) -> nn.Module:
    scales = {
        name: _scale(tensors, f"{name}_")
        for name in ("input", "output", "residual")
        if f"{name}_scale" in tensors
    }
    spec = Int8Spec(_geometry(geometry), clamp=Clamp.of(clamp), **scales)
    own = [tensors[name] for name in ("weight", "columns", "weight_scale")]
    module: nn.Module = kind(spec, *own, tensors.get("bias"))
    return module


def _scale(tensors: dict[str, Tensor], prefix: str) -> TensorScale:
    scale, zero_point = tensors[f"{prefix}scale"], tensors[f"{prefix}zero_point"]
    for tensor, dtype in ((scale, torch.float32), (zero_point, torch.uint8)):
        if tensor.dtype != dtype or tensor.dim():
            raise ValueError(
                f"a scale must be {dtype} of no dimension, got {tensor.dtype} of shape"
                f" {tuple(tensor.shape)}"
            )
    return TensorScale(float(scale.detach()), int(zero_point))


def _column_linear(tensors: dict[str, Tensor], in_features: Any) -> ColumnLinear:
    if not _are_ints(in_features, least=1):
        raise ValueError(f"{in_features!r} isn't a number of features")
    return ColumnLinear(in_features, tensors["weight"], tensors["columns"], tensors.get("bias"))


def _are_ints(*numbers: object, least: int) -> bool:
    return all(type(x) is int and least <= x < 2**31 for x in numbers)
