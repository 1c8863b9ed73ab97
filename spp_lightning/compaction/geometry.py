"""The shape of a convolution, and of what may follow it plane by plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spp_lightning.convnet import local_response_norm

__all__ = ["Clamp", "Geometry", "PlaneOp", "size_after"]

Pair = tuple[int, int]
Kind = Literal["max_pool", "avg_pool", "local_response_norm"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # by number, as the C++ kernels and the operators have it


class Geometry(NamedTuple):
    """All of a 2-d convolution but its weights.

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
            ValueError: If its padding isn't zeros of one number per side.
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
        """Check that there can be such a convolution.

        Raises:
            ValueError: If a number is out of range.
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
    def taps(self) -> int:
        """Kernel positions."""
        return math.prod(self.kernel_size)

    @property
    def num_columns(self) -> int:
        """Columns of the dense layer, over all convolution groups."""
        return self.channels * self.taps

    def out_size(self, height: int, width: int) -> Pair:
        """Output pixels for an input of ``height`` by ``width``.

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


class Clamp(NamedTuple):
    """Limits of the output; ReLU is (0, inf)."""

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def of(cls, limits: object) -> Clamp:
        """The limits that a pair of numbers, (low, high), stands for.

        Raises:
            ValueError: If it isn't one.
        """
        if (
            not isinstance(limits, tuple)
            or len(limits) != 2
            or not all(type(x) is float or type(x) is int for x in limits)
        ):
            raise ValueError(f"`clamp` must be two numbers, such as (0, inf), got {limits!r}.")
        return cls(*limits)


class PlaneOp(NamedTuple):
    """An operation on each plane of a convolution's output.

    Attributes:
        kind: What it does.
        kernel_size: Of the window; the norm's is square and odd, and nothing but ``alpha`` beside
            it counts there.
        alpha: Of the local response norm.
    """

    kind: Kind
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    alpha: float = 0.0

    def check(self) -> None:
        """Check that the kernels can compute it.

        Raises:
            ValueError: If it is a norm whose window isn't square and odd.
        """
        height, width = self.kernel_size
        if self.kind == "local_response_norm" and (height != width or height % 2 == 0):
            raise ValueError(
                f"`kernel_size` of a norm must be square and odd, got {self.kernel_size}."
            )

    def __call__(self, x: Tensor) -> Tensor:
        """What it does, in torch: ``(B, N, H, W)`` to ``(B, N, H', W')``."""
        if self.kind == "max_pool":
            pooled: Tensor = F.max_pool2d(
                x, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode
            )
            return pooled
        if self.kind == "avg_pool":
            return F.avg_pool2d(
                x,
                self.kernel_size,
                self.stride,
                self.padding,
                self.ceil_mode,
                self.count_include_pad,
            )
        return local_response_norm(x, self.kernel_size[0], self.alpha)

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of its input ``x``, ``grad`` being that of its output."""
        aten = torch.ops.aten
        sizes = (self.kernel_size, self.stride, self.padding)
        if self.kind == "max_pool":
            rest = ((1, 1), self.ceil_mode)
            _, places = aten.max_pool2d_with_indices(x, *sizes, *rest)
            pooled: Tensor = aten.max_pool2d_with_indices_backward(grad, x, *sizes, *rest, places)
            return pooled
        if self.kind == "avg_pool":
            flags = (self.ceil_mode, self.count_include_pad, None)
            spread: Tensor = aten.avg_pool2d_backward(grad, x, *sizes, *flags)
            return spread
        # y = x · s^(-3/4), s = 1 + α · mean(x²); the mean is its own transpose.
        window = (self.kernel_size[0], 1, self.kernel_size[0] // 2)
        scale = 1 + self.alpha * F.avg_pool2d(x * x, *window)
        power = torch.rsqrt(scale * scale.sqrt())
        inner = F.avg_pool2d(grad * x * power / scale, *window)
        return grad * power - 1.5 * self.alpha * x * inner

    def out_size(self, height: int, width: int) -> Pair:
        """Size of the output planes.

        Raises:
            ValueError: If nothing is left of them.
        """
        if self.kind == "local_response_norm":
            return height, width
        sizes = []
        for axis, size in enumerate((height, width)):
            kernel, stride, pad = self.kernel_size[axis], self.stride[axis], self.padding[axis]
            room = size + 2 * pad - kernel
            out = (-(-room // stride) if self.ceil_mode else room // stride) + 1
            if self.ceil_mode and (out - 1) * stride >= size + pad:
                out -= 1  # the last window would start beyond the picture
            if out < 1:
                raise ValueError(
                    f"`x` is too small: planes of {height} × {width} are left for a"
                    f" {self.kind} of {self.kernel_size}, stride {self.stride}."
                )
            sizes.append(out)
        return sizes[0], sizes[1]


def size_after(post: Sequence[PlaneOp], size: Pair) -> Pair:
    """Height and width of planes of a ``size`` behind operations on them.

    >>> size_after([PlaneOp("max_pool", (2, 2), (2, 2)), PlaneOp("local_response_norm")], (8, 6))
    (4, 3)
    """
    for op in post:
        size = op.out_size(*size)
    return size


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
        ``(filters, channels / groups, kh, kw)``.
    """
    g = geometry
    rows = g.filters // g.groups
    full = weight.new_zeros(rows, g.num_columns)
    full = full.index_copy(1, columns.long(), weight)
    by_group = full.view(rows, g.groups, g.channels // g.groups, *g.kernel_size)
    return by_group.transpose(0, 1).flatten(0, 1)


def kept_columns(weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The columns of a weight that aren't all 0: the way back of :func:`dense_weight`.

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
