"""The geometry of a convolution, and its weights with and without pruned columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

__all__ = ["Geometry", "Pair", "dense_weight", "kept_columns"]

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """A 2-d convolution without its weights.

    Attributes:
        channels: Input channels.
        filters: Output channels.
        groups: Convolution groups.
    """

    channels: int
    filters: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Geometry:
        """The geometry of a layer.

        Raises:
            ValueError: If the padding isn't zeros, or isn't the same on opposite sides.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"`padding_mode` must be 'zeros', got {conv.padding_mode!r}.")
        return cls(
            conv.in_channels,
            conv.out_channels,
            _pair(conv.kernel_size),
            _pair(conv.stride),
            _padding(conv),
            _pair(conv.dilation),
            conv.groups,
        )

    def check(self) -> None:
        """Check the attributes.

        Raises:
            ValueError: If a number is out of range, or ``groups`` doesn't divide ``channels`` and
                ``filters``.
        """
        numbers = (self.channels, self.filters, self.groups)
        for name, values, least in (
            *zip(
                ("channels", "filters", "groups"), ((n,) for n in numbers), (1, 1, 1), strict=True
            ),
            *(("kernel_size", self.kernel_size, 1), ("stride", self.stride, 1)),
            *(("padding", self.padding, 0), ("dilation", self.dilation, 1)),
        ):
            if min(values) < least:
                raise ValueError(f"`{name}` (={values}) must be at least {least}.")
        if self.channels % self.groups or self.filters % self.groups:
            raise ValueError(
                f"`channels` (={self.channels}) and `filters` (={self.filters}) must be divisible"
                f" by `groups` (={self.groups})."
            )

    @property
    def is_depthwise(self) -> bool:
        """Whether every group is one channel and one filter."""
        return 1 < self.groups == self.channels == self.filters

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return math.prod(self.kernel_size)

    @property
    def num_columns(self) -> int:
        """Columns of the dense layer, over all convolution groups."""
        return self.channels * self.taps

    def out_size(self, height: int, width: int) -> Pair:
        """Height and width of the output for an input of ``height`` by ``width``.

        Raises:
            ValueError: If the input is smaller than the kernel.
        """
        sizes = []
        for axis, size in enumerate((height, width)):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1
            room = size + 2 * self.padding[axis] - reach
            if room < 0:
                raise ValueError(
                    f"The input ({height} × {width}, with padding {self.padding}) must be at least"
                    f" as large as the kernel ({self.kernel_size}, dilation {self.dilation})."
                )
            sizes.append(room // self.stride[axis] + 1)
        return sizes[0], sizes[1]

    def macs(self, shape: Sequence[int], num_weights: int) -> int:
        """Multiply-accumulate operations of a pass over a batch.

        Args:
            shape: Of the input, ``(B, C, H, W)``.
            num_weights: Weights that are kept, ``filters / groups`` per kept column.

        >>> Geometry(4, 6, (3, 3), padding=(1, 1), groups=2).macs((1, 4, 5, 5), 36 * 3)
        2700
        """
        height, width = self.out_size(shape[2], shape[3])
        return shape[0] * height * width * num_weights


def _pair(value: object) -> Pair:
    if isinstance(value, int):
        return value, value
    height, width = cast(Sequence[int], value)
    return int(height), int(width)


def _padding(conv: nn.Conv2d) -> Pair:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding == "same":
        sizes = []
        for kernel, dilation in zip(_pair(conv.kernel_size), _pair(conv.dilation), strict=True):
            if dilation * (kernel - 1) % 2:
                raise ValueError("`padding` 'same' must be the same on both sides: odd kernels.")
            sizes.append(dilation * (kernel - 1) // 2)
        return sizes[0], sizes[1]
    return _pair(conv.padding)


def dense_weight(weight: Tensor, columns: Tensor, geometry: Geometry) -> Tensor:
    """The convolution's weight with zeros in the pruned columns.

    Args:
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Which they are, ``(columns,)``.
        geometry: The convolution.

    Returns:
        The dense weight, ``(filters, channels / groups, kh, kw)``.
    """
    g = geometry
    rows = g.filters // g.groups
    full = weight.new_zeros(rows, g.num_columns)
    full = full.index_copy(1, columns.long(), weight)
    by_group = full.view(rows, g.groups, g.channels // g.groups, *g.kernel_size)
    return by_group.transpose(0, 1).flatten(0, 1)


def kept_columns(weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The columns of a dense weight that aren't all 0: the inverse of :func:`dense_weight`.

    Args:
        weight: ``(filters, channels / groups, kh, kw)``.
        geometry: The convolution.

    Returns:
        Kept columns ``(filters / groups, columns)``, and which they are, ``(columns,)`` int32.

    >>> kept_columns(torch.tensor([[[[1.0]], [[0.0]], [[2.0]]]]), Geometry(3, 1, (1, 1)))
    (tensor([[1., 2.]]), tensor([0, 2], dtype=torch.int32))
    """
    g = geometry
    by_group = weight.unflatten(0, (g.groups, -1)).transpose(0, 1)
    matrix = by_group.reshape(g.filters // g.groups, g.num_columns)
    columns = (matrix != 0).any(0).nonzero().flatten()
    return matrix[:, columns].contiguous(), columns.to(torch.int32)
