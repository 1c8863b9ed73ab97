"""Compact layers in a row as one call of the CPU kernels."""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from spp_lightning.compaction.kernels.cpu.chain import Linear, Sequence
from spp_lightning.compaction.kernels.cpu.plan import Plan
from spp_lightning.compaction.layers.column_conv import ColumnConv2d, is_plain, stamp_of

__all__ = ["column_sequence"]


def column_sequence(
    x: Tensor, residual: Tensor | None, *layers: ColumnConv2d, linear: nn.Module | None = None
) -> Tensor:
    """One layer after the other, with one call of the CPU kernels where that computes them all.

    Args:
        x: Input of the first layer, ``(B, C, H, W)`` or ``(C, H, W)``.
        residual: Added to the last layer's convolution, of its shape, or None.
        layers: One or more, each with as many channels as the one before it has filters.
        linear: What reads the last one's output, flattened from its second dimension on.

    Returns:
        The last layer's output, ``(B, N, H', W')`` or ``(N, H', W')``, bit for bit the same either
        way; or that of ``linear``, ``(B, out_features)``, the same but for rounding.

    Raises:
        ValueError: If a shape doesn't fit.
    """
    at_once = (
        not torch.compiler.is_compiling() and _is_own(layers[0]) and layers[0]._takes_at_once(x)
    )
    sequence = _sequence(x, residual, layers, linear) if at_once else None
    if sequence is not None:
        y = sequence.forward(x, residual)
        if sequence.linear is not None:
            return y
    else:
        for layer in layers[:-1]:
            x = layer(x)
        y = layers[-1](x) if residual is None else layers[-1](x, residual)
    return y if linear is None else _run_linear(linear, y, at_once)


def _run_linear(linear: nn.Module, x: Tensor, at_once: bool) -> Tensor:
    # By the kernels wherever they can: torch rounds otherwise.
    tensors = None
    if at_once and not _is_hooked() and _is_readable(x) and not _needs_grad(x, None):
        tensors = _tensors_of(linear)
    y: Tensor = linear(torch.flatten(x, 1)) if tensors is None else Linear(*tensors)(x)
    return y


def _is_hooked() -> bool:
    """Whether somebody wants to see the inputs and outputs of all modules."""
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)


def _sequence(
    x: Tensor, residual: Tensor | None, layers: tuple[ColumnConv2d, ...], linear: nn.Module | None
) -> Sequence | None:
    """The layers as one call, if they all can be; with the linear one, if that can be, too."""
    if _is_hooked():
        return None
    found: _Known | None = layers[0]._known_sequence
    if found is not None and found.fits(x, residual, layers, linear):
        return found.sequence
    plans, last, are_new = list[Plan](), layers[-1], False
    for layer in layers:
        if not _is_untouched(layer, ColumnConv2d):
            return None
        known = layer._known_plan
        plan = layer._plan_at_once(x, residual if layer is last else None)
        if plan is None or (plans and not _follows(plans[-1], plan)):
            return None
        if layer._known_plan is None or layer._known_plan[0] is not plan:
            return None  # its tensors don't count their changes
        are_new = are_new or known is not layer._known_plan
        plans.append(plan)
    if are_new or x.dtype != torch.float32:  # weights that change at every call aren't worth it
        return None
    tensors = None if linear is None else _tensors_of(linear)
    if len(plans) == 1 and tensors is None:
        return None
    own = None if tensors is None else Linear(*tensors)
    sequence = Sequence(plans, own, None if found is None else found.sequence)
    layers[0]._known_sequence = _Known(sequence, layers, tensors)
    return sequence


def _follows(before: Plan, plan: Plan) -> bool:
    """Whether the kernels can let a plan read the one before it."""
    return before.geometry.filters == plan.geometry.channels and plan.geometry.stride[1] == 1


class _State(NamedTuple):
    """What a layer was like when a sequence was made of it."""

    layer: weakref.ref[ColumnConv2d]  # which has the sequence
    weight: Tensor
    bias: Tensor | None
    columns: Tensor
    stamp: tuple[int, ...]


class _Known:
    """A sequence, and what its layers were like when it was made."""

    def __init__(
        self,
        sequence: Sequence,
        layers: tuple[ColumnConv2d, ...],
        linear: tuple[Tensor, Tensor | None] | None,
    ) -> None:
        self.sequence = sequence
        self._layers = [
            _State(weakref.ref(layer), *tensors, stamp_of(*tensors))
            for layer, tensors in ((layer, layer._tensors()) for layer in layers)
        ]
        self._linear = None if linear is None else _place_of(*linear)

    def fits(
        self,
        x: Tensor,
        residual: Tensor | None,
        layers: tuple[ColumnConv2d, ...],
        linear: nn.Module | None,
    ) -> bool:
        """Whether nothing has changed that decides about it: faster than to look it all up."""
        if x.dtype != torch.float32 or len(layers) != len(self._layers):
            return False
        for layer, (expected, weight, bias, columns, stamp) in zip(
            layers, self._layers, strict=True
        ):
            own = layer.__dict__
            parameters = own["_parameters"]
            if not (
                layer is expected()
                and _is_untouched(layer, ColumnConv2d)
                and parameters.get("weight") is weight
                and parameters.get("bias") is bias
                and own["_buffers"].get("columns") is columns
                and stamp_of(weight, bias, columns) == stamp
                and not _needs_grad(weight, bias)
            ):
                return False
        if residual is not None and not layers[-1]._adds_at_once(x, residual):
            return False
        tensors = None if linear is None else _tensors_of(linear)
        return (None if tensors is None else _place_of(*tensors)) == self._linear


def _is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does, and nobody wants to see it do so."""
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
    )


def _needs_grad(weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _tensors_of(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, if the kernels may read them in its place."""
    if not _is_untouched(linear, nn.Linear):
        return None
    parameters = linear._parameters
    if "weight" not in parameters or "bias" not in parameters:  # they are attributes, or computed
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    if weight is None or not _is_readable(weight) or (bias is not None and not _is_readable(bias)):
        return None
    return None if _needs_grad(weight, bias) else (weight, bias)


def _is_readable(tensor: Tensor) -> bool:
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and is_plain(tensor)
    )


def _place_of(weight: Tensor, bias: Tensor | None) -> tuple[object, ...]:
    """Which tensors they are, as long as they live, and where; not what is in them."""
    place = (id(weight), weight.data_ptr(), weight.shape)
    return place if bias is None else (*place, id(bias), bias.data_ptr(), bias.shape)


def _is_own(layer: object) -> TypeGuard[ColumnConv2d]:
    """Whether a layer computes what this package wrote, and nobody put another one in its place."""
    return type(layer) is ColumnConv2d and "forward" not in layer.__dict__
