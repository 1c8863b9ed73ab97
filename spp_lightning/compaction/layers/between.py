"""Modules between convolutions that one call of the CPU kernels computes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import Clamp
from spp_lightning.compaction.kernels.cpu.between import Gate, Norm, plane_means
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.unwatched import (
    is_eager,
    is_hooked,
    is_readable,
    is_untouched,
)

__all__ = ["channel_gate", "channel_means", "concat_norm", "is_own_pool", "norm_of"]


def channel_gate(x: Tensor, pool: Callable[[Tensor], Tensor], *layers: ColumnConv2d) -> Tensor:
    """Squeeze and excitation: ``x`` times what two layers make of its channels' means.

    Args:
        x: Input, ``(B, C, H, W)``.
        pool: The global average pool.
        layers: Two 1×1 convolutions without operations on planes.

    Returns:
        ``x * expand(reduce(pool(x)))``, the same up to rounding whether one call computes it.
    """
    reduce, expand = layers
    if (
        not torch.compiler.is_compiling()
        and not is_hooked()
        and is_untouched(reduce, ColumnConv2d)
        and reduce._takes_directly(x)
        and x.dtype == torch.float32
        and x.numel()
        and is_own_pool(pool)
        and is_untouched(expand, ColumnConv2d)
    ):
        prepared = _gate_of(reduce, expand)
        if prepared is not None:
            return prepared(x)
    gated: Tensor = x * expand(reduce(pool(x)))
    return gated


def _gate_of(reduce: ColumnConv2d, expand: ColumnConv2d) -> Gate | None:
    """The two layers as a gate, if the kernels may read their tensors."""
    first, second = reduce._tensors(), expand._tensors()
    tensors = (*first, *second)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return None
    found: Gate | None = reduce._gate
    if found is not None and found.holds(tensors):
        return found
    if not all(x is None or x.dtype == torch.int32 or is_readable(x) for x in tensors):
        return None
    made = reduce._gate = Gate((*first, reduce.epilogue), (*second, expand.epilogue))
    return made


def channel_means(x: Tensor, pool: Callable[[Tensor], Tensor], keep: bool) -> Tensor:
    """A global average pool.

    Args:
        x: Input, ``(B, C, H, W)``.
        pool: What computes it.
        keep: Whether the result is ``(B, C, 1, 1)``, or ``(B, C)``.

    Returns:
        ``pool(x)``, the same up to rounding whether the kernels compute it.
    """
    if (
        not torch.compiler.is_compiling()
        and is_available()
        and not is_hooked()
        and is_own_pool(pool)
        and is_eager()  # before sizes are read, which are tensors when torch.jit traces
        and _is_plain_image(x)
    ):
        return plane_means(x, keep)
    return pool(x)


def is_own_pool(pool: Callable[[Tensor], Tensor]) -> bool:
    """Whether a pool is a function, or a module that nobody wants to see."""
    return not isinstance(pool, nn.Module) or is_untouched(pool, nn.AdaptiveAvgPool2d)


def concat_norm(
    parts: Sequence[Tensor], norm: nn.Module, activation: Callable[[Tensor], Tensor], clamp: Clamp
) -> Tensor:
    """Concatenate tensors along the channels, norm and clamp them.

    Args:
        parts: One or more, ``(B, C_i, H, W)``.
        norm: The batch norm.
        activation: What clamps.
        clamp: Its limits.

    Returns:
        ``activation(norm(torch.cat(parts, 1)))``, the same up to rounding whether one call computes
        it.
    """
    if (
        not torch.compiler.is_compiling()
        and is_available()
        and not is_hooked()
        and (not isinstance(activation, nn.Module) or is_untouched(activation, type(activation)))
        and is_eager()
        and all(_is_plain_image(x) for x in parts)
    ):
        prepared = norm_of(norm, clamp)
        if prepared is not None:
            return prepared(parts)
    x = torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]
    return activation(norm(x))


_norms: WeakKeyDictionary[nn.Module, Norm] = WeakKeyDictionary()


def norm_of(norm: nn.Module, clamp: Clamp) -> Norm | None:
    """A batch norm as the kernels compute it, if they may read its tensors."""
    if not is_untouched(norm, nn.BatchNorm2d) or norm.training:
        return None
    assert isinstance(norm, nn.BatchNorm2d)
    buffers, own = norm._buffers, norm._parameters
    statistics = (buffers["running_mean"], buffers["running_var"])
    tensors = (*statistics, own["weight"], own["bias"])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return None
    found = _norms.get(norm)
    if found is not None and found.settings == (norm.eps, clamp) and found.holds(tensors):
        return found
    readable = all(x is None or (is_readable(x) and len(x) == norm.num_features) for x in tensors)
    if any(x is None for x in statistics) or not readable:
        return None
    made = _norms[norm] = Norm(tensors, norm.eps, clamp)
    return made


def _is_plain_image(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and x.dim() == 4
        and x.numel() > 0
        and is_readable(x)
        and not (x.requires_grad and torch.is_grad_enabled())
    )
