"""Weight groups: the units of one layer's weight that are pruned as a whole.

A linear layer is a 1×1 convolution of tokens: its weight is ``(N, C)``, its kernel ``()``.

A convolution's weight is ``(N, C / conv_groups, *kernel)``. Split by the convolution's ``groups``
it is ``(conv_groups, N / conv_groups, C / conv_groups, *kernel)``. A weight group is a slice of
that: all positions along some dimensions, one position along the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Criterion", "Granularity", "LayerGranularity", "WeightGroups", "weight_of"]

LayerGranularity = Literal["column", "channel", "filter"]
Granularity = Literal["column", "channel", "filter", "coupled-channel"]
Criterion = Literal["l1", "l2"]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def weight_of(layer: nn.Module) -> nn.Parameter:
    """The parameter ``weight``. A masked layer's attribute ``weight`` is parameter times mask."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


@dataclass(frozen=True)
class WeightGroups:
    """The weight groups of one convolution or linear layer.

    Args:
        weight_shape: Shape of the weight, ``(N, C / conv_groups, *kernel)``.
        conv_groups: The convolution's ``groups``.
        granularity: ``"column"``: one position ``(c, i, j)`` across all filters that read input
            channel ``c``. ``"channel"``: all columns of an input channel. ``"filter"``: all weights
            of an output channel.

    >>> groups = WeightGroups.of(nn.Conv2d(3, 32, 5))
    >>> groups.count, groups.size
    (75, 32)
    >>> WeightGroups.of(nn.Conv2d(8, 16, 3, groups=2)).count  # N_c = C·kh·kw all the same
    72
    """

    weight_shape: tuple[int, ...]
    conv_groups: int = 1
    granularity: LayerGranularity = "column"

    @classmethod
    def of(cls, layer: nn.Module, granularity: LayerGranularity = "column") -> WeightGroups:
        """The weight groups of a layer with a convolution's ``weight`` (and ``groups``)."""
        shape = tuple(weight_of(layer).shape)
        return cls(shape, int(getattr(layer, "groups", 1)), granularity)

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of a mask of the groups. It broadcasts against the weight after :meth:`split`."""
        filters, channels, *kernel = self.weight_shape
        per_group = filters // self.conv_groups
        shapes: dict[str, tuple[int, ...]] = {
            "column": (self.conv_groups, 1, channels, *kernel),
            "channel": (self.conv_groups, 1, channels, *(1 for _ in kernel)),
            "filter": (self.conv_groups, per_group, 1, *(1 for _ in kernel)),
        }
        return shapes[self.granularity]

    @property
    def count(self) -> int:
        """Number of weight groups, N_c in the paper."""
        return math.prod(self.mask_shape)

    @property
    def size(self) -> int:
        """Weights in one group."""
        return math.prod(self.weight_shape) // self.count

    def split(self, weight: Tensor) -> Tensor:
        """View a weight, or a tensor of its shape, so that a mask broadcasts against it."""
        return weight.unflatten(0, (self.conv_groups, -1))

    def importance(self, weight: Tensor, criterion: Criterion = "l1") -> Tensor:
        """Compute the norm of each weight group.

        Args:
            weight: The layer's weight.
            criterion: ``"l1"``, the sum of magnitudes, or ``"l2"``, the Euclidean norm.

        Returns:
            One importance per group, ``(count,)``, in float32 at least.

        Raises:
            ValueError: If ``criterion`` is another one.

        >>> groups = WeightGroups((2, 1, 1, 2))
        >>> groups.importance(torch.tensor([[[[1.0, 3.0]]], [[[-2.0, 4.0]]]]))
        tensor([3., 7.])
        """
        split = self.split(weight.detach())
        dims = tuple(
            i for i, size in enumerate(self.mask_shape) if size == 1 and split.shape[i] > 1
        )
        split = split.to(torch.promote_types(weight.dtype, torch.float32))
        if not dims and criterion in ("l1", "l2"):  # of one weight both norms are its magnitude
            return split.abs().flatten()
        # Sum in memory order: another order, or torch's vector_norm, takes many times as long on
        # a CPU.
        order = sorted(range(split.dim()), key=split.stride, reverse=True)
        place = [order.index(dim) for dim in range(split.dim())]
        terms = split.permute(order)

        def total(x: Tensor) -> Tensor:
            return x.sum([place[dim] for dim in dims], keepdim=True).permute(place).flatten()

        if criterion == "l1":
            return total(terms.abs())
        if criterion == "l2":
            return total(terms.square()).sqrt()
        raise ValueError(f'`criterion` must be one of "l1", "l2", got {criterion!r}.')

    def zero(self, alive: Tensor, *tensors: Tensor) -> None:
        """Set the groups that are not alive to 0, in place.

        Args:
            alive: Which groups are kept, ``(count,)``, bool.
            tensors: The weight, its gradient, or an optimizer's state of the same shape.
        """
        # Bitwise: on CPUs several times faster than masked_fill_ with a broadcast mask.
        keep: dict[tuple[torch.device, int], Tensor] = {}
        for tensor in tensors:
            place = tensor.device, tensor.element_size()
            if place not in keep:
                bits = alive.view(self.mask_shape).to(tensor.device, _BITS[place[1]])
                keep[place] = bits.neg_()  # −1 has all bits set
            self.split(tensor.detach()).view(_BITS[place[1]]).bitwise_and_(keep[place])
