"""Masks that act on the weight a layer uses, without renaming its parameter.

A masked layer gets a subclass of its class, in which ``weight`` is a property: the layer's
``forward`` reads parameter times mask. The parameter keeps its place and its name: ``state_dict``,
``parameters`` and optimizers never see the mask. A copy or a pickle of a masked layer is a plain
layer. A masked layer also counts its output positions, for its MACs. A hook could count them, but
removing a hook makes a compiled network compile again.

A masked layer may be handed a :class:`Computation`, which replaces the dense product of weight and
mask.
"""

from __future__ import annotations

import copy
import copyreg
import math
from functools import cache
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from spp_lightning.method.groups import WeightGroups, weight_of

__all__ = [
    "Computation",
    "Masking",
    "acting_mask",
    "computation_of",
    "is_masked",
    "mask_layer",
    "note_positions",
    "output_positions",
    "unmask_layer",
]

Masking = Literal["sample", "scale"]

_NEW: Any = vars(copyreg)["__newobj__"]
_RECONSTRUCT: Any = vars(copyreg)["_reconstructor"]
_ATTRIBUTES = ("_spp_sampled", "_spp_expected", "_spp_positions", "_spp_computation")


class Computation(Protocol):
    """Computes a masked layer, or leaves it to the dense layer."""

    def __call__(self, layer: nn.Module, x: Tensor, *args: Any) -> Tensor | None:
        """The output of a masked layer, whose mask is :func:`acting_mask`; None to leave it."""


def mask_layer(
    layer: nn.Module,
    groups: WeightGroups,
    sampled: Tensor,
    expected: Tensor,
    computation: Computation | None = None,
) -> None:
    """Let masks act on a layer's weight until :func:`unmask_layer`.

    Args:
        layer: A layer with a parameter ``weight``. Its class becomes a subclass of its class.
        groups: The layer's weight groups.
        sampled: Mask in training mode, ``(groups,)``: bool, True = kept, or a float factor per
            group. Later in-place changes act, too.
        expected: Mask in evaluation mode, likewise.
        computation: Asked first whenever the layer runs uncompiled.

    Raises:
        ValueError: If the layer is masked already.
    """
    if is_masked(layer):
        raise ValueError(f"`layer` (={layer}) is masked already. A layer takes one mask at a time.")
    # With one convolution group, the mask broadcasts against the weight without a split.
    shape = groups.mask_shape[1:] if groups.conv_groups == 1 else groups.mask_shape
    attributes = (sampled.view(shape), expected.view(shape), 0, computation)
    for name, value in zip(_ATTRIBUTES, attributes, strict=True):
        setattr(layer, name, value)
    cls: Any = type(layer)
    layer.__class__ = _masked_class(cls)


def unmask_layer(layer: nn.Module) -> None:
    """Give a masked layer its own class back. Its parameters do not change."""
    if is_masked(layer):
        layer.__class__ = type(layer).__mro__[1]
        for name in _ATTRIBUTES:
            delattr(layer, name)


def is_masked(layer: nn.Module) -> bool:
    """Whether masks act on a layer."""
    return "_spp_masked_class" in vars(type(layer))


def output_positions(layer: nn.Module) -> int:
    """Output positions that a masked layer computes per input; 0 until it has run uncompiled."""
    return int(vars(layer)["_spp_positions"])


def note_positions(layer: nn.Module, count: int) -> None:
    """Set :func:`output_positions` of a masked layer."""
    vars(layer)["_spp_positions"] = count


def acting_mask(layer: nn.Module) -> Tensor:
    """The mask of a masked layer that acts in its mode, shaped as its weight groups."""
    attributes = vars(layer)
    mask: Tensor = attributes["_spp_sampled" if layer.training else "_spp_expected"]
    return mask


def computation_of(layer: nn.Module) -> Computation | None:
    """What computes a masked layer; None without it, and where hooks wait for the layer's call.

    A ``forward`` of the layer's own counts as a hook.
    """
    computation: Computation | None = vars(layer).get("_spp_computation")
    hooked = (
        "forward" in vars(layer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )
    return None if hooked else computation


def _masked_weight(layer: Any) -> Tensor:
    weight: Tensor = weight_of(layer)
    mask = acting_mask(layer)
    if mask.device != weight.device:  # the network was moved; the pruner moves at its next step
        mask = mask.to(weight.device)
    if mask.dtype != torch.bool:
        mask = mask.to(weight.dtype)
    if mask.dim() == weight.dim():
        if mask.shape[1:] == weight.shape[1:] and not weight.is_contiguous():
            # Channels-last, for example. A mask of another memory format makes the product, forward
            # and backward, several times slower than this copy of the size of one filter.
            mask = torch.empty_like(weight[:1], dtype=mask.dtype).copy_(mask)
        return weight * mask
    return (weight.unflatten(0, (mask.shape[0], -1)) * mask).flatten(0, 1)


def _forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
    compiling = torch.compiler.is_compiling()
    if layer._spp_computation is not None and not compiling and len(args) == 1 and not kwargs:
        output = layer._spp_computation(layer, args[0])
        if output is not None:
            return output
    output = super(type(layer), layer).forward(*args, **kwargs)
    if not compiling and layer._spp_positions == 0:
        kernel_dims = weight_of(layer).dim() - 2
        sizes = output.shape[-kernel_dims:] if kernel_dims else output.shape[1:-1]
        layer._spp_positions = math.prod(sizes)
    return output


def _reduce_as_plain(layer: nn.Module, protocol: Any) -> Any:
    plain = copy.copy(layer.__dict__)
    for name in _ATTRIBUTES:
        plain.pop(name)
    twin: nn.Module = object.__new__(type(layer).__mro__[1])
    twin.__dict__.update(plain)
    reduced: Any = twin.__reduce_ex__(protocol)
    make, args, *rest = reduced
    if make is _NEW:  # pickle requires it to make an object of the layer's own class
        make, args = _RECONSTRUCT, (*args, object, None)
    return (make, args, *rest)


@cache
def _masked_class(cls: type[nn.Module]) -> type[nn.Module]:
    members = {
        "weight": property(_masked_weight),
        "forward": _forward,
        "__reduce_ex__": _reduce_as_plain,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_spp_masked_class": True,
    }
    return cast(type[nn.Module], type(cls.__name__, (cls,), members))
