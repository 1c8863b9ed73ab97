"""A linear layer of flattened images by the CPU kernels."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, is_grad_enabled, nn

from spp_lightning.compaction.kernels.cpu.chain import Linear
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.column_conv import need_grad
from spp_lightning.compaction.layers.unwatched import (
    is_eager,
    is_hooked,
    is_readable,
    is_untouched,
)

__all__ = ["flat_linear", "linear_of", "tensors_of"]

_linears: WeakKeyDictionary[nn.Module, Linear] = WeakKeyDictionary()


def flat_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Compute a linear layer.

    Args:
        x: Its inputs, flattened from their second dimension on: ``(B, ...)``.
        linear: The layer.

    Returns:
        ``linear(x.flatten(1))``, the same up to rounding whether the kernels compute it.

    Raises:
        ValueError: If an input has another number of features.
    """
    if (
        not torch.compiler.is_compiling()
        and is_available()
        and not is_hooked()
        and is_eager()
        and is_readable(x)
        and x.numel()
        and not (is_grad_enabled() and x.requires_grad)
    ):
        prepared = linear_of(linear)
        if prepared is not None:
            return prepared(x)
    y: Tensor = linear(torch.flatten(x, 1))
    return y


def linear_of(linear: nn.Module) -> Linear | None:
    """A linear layer as the kernels compute it, if they may read its tensors."""
    tensors = tensors_of(linear)
    if tensors is None:
        return None
    found = _linears.get(linear)
    if found is None or not found.is_of(*tensors):
        found = _linears[linear] = Linear(*tensors)
    return found


def tensors_of(linear: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer, if the kernels may read them in its place."""
    if not is_untouched(linear, nn.Linear):
        return None
    parameters = linear._parameters
    if "weight" not in parameters or "bias" not in parameters:  # they are attributes, or computed
        return None
    weight, bias = parameters["weight"], parameters["bias"]
    if weight is None or not is_readable(weight) or (bias is not None and not is_readable(bias)):
        return None
    return None if need_grad(weight, bias) else (weight, bias)
