"""Compact layers in a row as one call of the CPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor, is_grad_enabled, nn

from spp_lightning.compaction.kernels.cpu.chain import ChainHandle, Linear, may_follow
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.layers.column_conv import ColumnConv2d, need_grad
from spp_lightning.compaction.layers.flat_linear import flat_linear, tensors_of
from spp_lightning.compaction.layers.unwatched import is_hooked, is_untouched

__all__ = ["column_chain", "holds", "tune_chain"]


def column_chain(
    x: Tensor, residual: Tensor | None, *layers: ColumnConv2d, linear: nn.Module | None = None
) -> Tensor:
    """Run layers in a row, by one call of the CPU kernels where that is faster.

    One call is for float32 in evaluation, where nobody would notice: with hooks, gradients or other
    dtypes, or under a compiler, the layers are called one by one.

    Args:
        x: Input of the first layer, ``(B, C, H, W)`` or ``(C, H, W)``.
        residual: Added to the last layer's convolution, of its shape, or None.
        layers: One or more, each with as many channels as the one before it has filters.
        linear: A linear layer that reads the last layer's output, flattened from its second
            dimension on.

    Returns:
        The last layer's output, ``(B, N, H', W')`` or ``(N, H', W')``, the same bit for bit either
        way. With ``linear`` its output, ``(B, out_features)``, the same up to rounding.

    Raises:
        ValueError: If a shape doesn't fit.
    """
    first = layers[0]
    directly = (
        not torch.compiler.is_compiling()
        and type(first) is ColumnConv2d
        and "forward" not in first.__dict__
        and first._takes_directly(x)
    )
    chain = _chain_of(x, residual, layers, linear) if directly else None
    if chain is not None:
        y = chain.forward(x, residual)
        if chain.linear is not None:
            return y
    else:
        for layer in layers[:-1]:
            x = layer(x)
        y = layers[-1](x) if residual is None else layers[-1](x, residual)
    return y if linear is None else flat_linear(y, linear)


def tune_chain(
    x: Tensor, residual: Tensor | None, *layers: ColumnConv2d, linear: nn.Module | None = None
) -> dict[int, float]:
    """Measure a chain, and use the faster of one call and several for inputs of this shape.

    The arguments are those of :func:`column_chain`.

    Returns:
        Milliseconds by the threads of the one call, or 0 for one layer at a time; empty where the
        layers can't be one call.
    """
    with torch.no_grad():
        column_chain(x, residual, *layers, linear=linear)  # packs the weights
        if type(layers[0]) is not ColumnConv2d or not layers[0]._takes_directly(x):
            return {}
        chain = _chain_of(x, residual, layers, linear)
        return {} if chain is None else chain.tune(x, residual)


def _chain_of(
    x: Tensor, residual: Tensor | None, layers: tuple[ColumnConv2d, ...], linear: nn.Module | None
) -> ChainHandle | None:
    """The layers as one call, if they all can be; with the linear layer, if that can be, too."""
    if is_hooked() or x.dtype != torch.float32:
        return None
    found: ChainHandle | None = layers[0]._chain
    adds = residual is None or layers[-1]._adds_directly(x, residual)
    if found is not None and adds and holds(found, layers, linear):
        return found
    handles, last, are_new = list[Handle](), layers[-1], False
    for layer in layers:
        if not is_untouched(layer, ColumnConv2d):
            return None
        before = layer._handle
        handle = layer._handle_for(x, residual if layer is last else None)
        if handle is None or not handle.counts_changes:
            return None
        if handles and not may_follow(handles[-1].spec.geometry, handle.spec.geometry):
            return None
        are_new = are_new or before is not handle
        handles.append(handle)
    tensors = None if linear is None else tensors_of(linear)
    if are_new or (len(handles) == 1 and tensors is None):
        return None  # weights that change at every call aren't worth a chain
    own = None if tensors is None else Linear(*tensors)
    chain = layers[0]._chain = ChainHandle(handles, own, before=found)
    return chain


def holds(chain: ChainHandle, layers: tuple[ColumnConv2d, ...], linear: nn.Module | None) -> bool:
    """Whether a chain is that of these layers, and they are what they were."""
    if len(layers) != len(chain.handles):
        return False
    # One loop without calls: small networks wait for it.
    records = is_grad_enabled()
    for layer, handle in zip(layers, chain.handles):  # noqa: B905 (of one length; faster)
        own = layer.__dict__
        parameters = own["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if (
            own.get("_handle") is not handle
            or type(layer) is not ColumnConv2d
            or "forward" in own
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or not handle.holds(weight, own["_buffers"].get("columns"), bias)
            or (records and need_grad(weight, bias))
        ):
            return False
    if chain.linear is None:
        return linear is None or tensors_of(linear) is None
    if linear is None or not is_untouched(linear, nn.Linear):
        return False
    parameters = linear._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or (records and need_grad(weight, bias)):
        return False
    return chain.linear.is_of(weight, bias)
