"""A masked convolution on the columns that its mask keeps.

The layer's parameter stays dense. Before every pass the kept columns are gathered from it and
packed; their gradient is scattered back. The gradient of a dropped column is 0, as that of the
dense product of weight and mask.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu import training_cost
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.kept_mask import KeptNumbers, is_plain_call
from spp_lightning.compaction.spec import ConvSpec
from spp_lightning.method.groups import weight_of
from spp_lightning.method.masks import note_positions

__all__ = ["KeptConvolution"]

_NOTHING = Epilogue()


class Columns(NamedTuple):
    """The columns that a mask keeps.

    Attributes:
        kept: As :class:`KeptNumbers` gives them, ``(columns,)``, int64, ascending.
        numbers: The same as the kernels take them, int32.
        places: Where they are in the weight as it lies in memory, int64.
        channels_last: Whether the weight lies in that memory format.
    """

    kept: Tensor
    numbers: Tensor
    places: Tensor
    channels_last: bool


class KeptConvolution:
    """Computes a masked convolution on the CPU kernels, from the columns that its mask keeps.

    Args:
        geometry: The convolution.
        if_it_pays: Whether the cost model is asked. If not, all that can be is computed so.
    """

    def __init__(self, geometry: Geometry, if_it_pays: bool) -> None:
        self.geometry = geometry
        self.if_it_pays = if_it_pays
        self._kept = KeptNumbers(geometry.kernel_size)
        self._known: Columns | None = None

    def __call__(self, layer: nn.Module, x: Tensor, epilogue: Epilogue = _NOTHING) -> Tensor | None:
        """Run the layer and an epilogue; None where the dense layer must, or had better."""
        weight, bias, g = weight_of(layer), layer._parameters["bias"], self.geometry
        dtype = _dtype_of_output(x, weight)
        if dtype is None or x.dim() != 4 or x.shape[1] != g.channels or not x.numel():
            return None
        numbers = self._kept.of(layer)
        if numbers is None:
            return None
        spec = ConvSpec(g, epilogue)
        try:
            size = g.out_size(*x.shape[2:])
            spec.out_size(*x.shape[2:])
        except ValueError:  # too small an input: torch says so
            return None
        passes = 1 + torch.is_grad_enabled() * (x.requires_grad + weight.requires_grad)
        # An epilogue's output is left as the next layer of this kind reads it.
        last = epilogue.is_empty and (_is_channels_last(x) or _is_channels_last(weight))
        choice = spec, len(numbers), tuple(x.shape), passes, last
        if self.if_it_pays and not training_cost.pays(*choice):
            return None
        note_positions(layer, math.prod(size))
        columns = self._columns(numbers, weight)
        y: Tensor = _Convolution.apply(x.contiguous(), weight, bias, columns, spec)
        return y.to(dtype, memory_format=torch.channels_last if last else torch.preserve_format)

    def _columns(self, numbers: Tensor, weight: Tensor) -> Columns:
        g = self.geometry
        last = g.groups == 1 and _is_channels_last(weight)
        known = self._known
        if known is None or known.kept is not numbers or known.channels_last != last:
            places = numbers % g.taps * g.channels + numbers // g.taps if last else numbers
            known = self._known = Columns(numbers, numbers.int(), places, last)
        return known


class _Convolution(torch.autograd.Function):
    """The convolution of the kept columns of a dense weight, and an epilogue."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: Columns, spec: ConvSpec
    ) -> Tensor:
        kept = _gather(weight, columns.places, spec.geometry)
        handle = Handle(kept, columns.numbers, bias, spec)
        ctx.save_for_backward(x, weight, bias)
        ctx.layer = kept, columns, handle
        return handle.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        kept, columns, handle = ctx.layer
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return (
                *_differentiable(grad, x, weight, bias, columns, handle.spec, wanted),
                None,
                None,
            )
        dy = grad.float().contiguous()
        fused = not handle.spec.epilogue.is_empty
        dx, dw, db = handle.backward(dy, kept.float(), x.float(), wanted, fused)
        return (
            dx.to(x.dtype) if wanted[0] else None,
            _scatter(dw, columns.places, weight, handle.spec.geometry) if wanted[1] else None,
            db.to(bias.dtype) if wanted[2] else None,
            None,
            None,
        )


def _differentiable(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Columns,
    spec: ConvSpec,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients by torch's dense convolution, for gradients of gradients."""
    g = spec.geometry
    mask = _scatter(
        weight.new_ones(g.filters // g.groups, len(columns.numbers)), columns.places, weight, g
    )
    y = F.conv2d(x, (weight * mask).to(x.dtype), bias, g.stride, g.padding, g.dilation, g.groups)
    tensors = zip((x, weight, bias), wanted, strict=True)
    inputs = [tensor for tensor, wants in tensors if wants and tensor is not None]
    found = iter(torch.autograd.grad(spec.epilogue(y), inputs, grad, create_graph=True))
    return [next(found) if wants else None for wants in wanted]


def _dtype_of_output(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype that the dense layer would return; None where the kernels can't compute it."""
    if not is_plain_call(x, weight) or not is_available():
        return None
    computed = (torch.float32, torch.bfloat16)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        known = x.dtype in computed and weight.dtype in computed
    else:
        dtype = x.dtype
        known = dtype in computed and weight.dtype == dtype
    return dtype if known and not training_cost.has_fast_products(dtype) else None


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _matrix(weight: Tensor, g: Geometry) -> Tensor:
    """The weight as ``(filters / groups, columns of all groups)``; a view if there is one group."""
    if g.groups > 1:
        by_group = weight.unflatten(0, (g.groups, -1)).transpose(0, 1)
        return by_group.reshape(g.filters // g.groups, g.num_columns)
    return (weight.permute(0, 2, 3, 1) if _is_channels_last(weight) else weight).flatten(1)


def _gather(weight: Tensor, places: Tensor, g: Geometry) -> Tensor:
    """The kept columns, ``(filters / groups, columns)``."""
    # An expanded index is read several times faster than that of index_select.
    return _matrix(weight, g).gather(1, places.expand(g.filters // g.groups, -1))


def _scatter(kept: Tensor, places: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """A tensor like a weight with the kept columns, and zeros elsewhere."""
    rows = g.filters // g.groups
    full = torch.zeros_like(weight)
    if g.groups == 1 and (full.is_contiguous() or _is_channels_last(full)):
        _matrix(full, g).scatter_(1, places.expand(rows, -1), kept.to(full.dtype))
        return full
    matrix = kept.new_zeros(rows, g.num_columns).scatter_(1, places.expand(rows, -1), kept)
    by_group = matrix.view(rows, g.groups, g.channels // g.groups, *g.kernel_size)
    return full.copy_(by_group.transpose(0, 1).flatten(0, 1))
