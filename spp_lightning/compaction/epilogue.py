"""What follows a convolution and is computed with it: residual, clamp, operations on planes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from spp_lightning.compaction.geometry import Pair

__all__ = ["LRN_ALPHA", "LRN_SIZE", "Clamp", "PlaneOp", "local_response_norm", "size_after"]


Kind = Literal["max_pool", "avg_pool", "local_response_norm"]


KINDS: tuple[Kind, ...] = get_args(Kind)  # by number, as the C++ kernels and the operators have it


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


LRN_SIZE, LRN_ALPHA = 3, 5e-5


def local_response_norm(x: Tensor, size: int = LRN_SIZE, alpha: float = LRN_ALPHA) -> Tensor:
    """Normalise ``x`` within each channel: ``x · (1 + α·mean(x²))^(−0.75)``, over 3 × 3 pixels.

    Args:
        x: Feature maps, ``(B, C, H, W)``. Outside the picture they count as 0.
        size: Rows and columns of the window around each pixel, odd.
        alpha: α, the weight of the mean.

    Returns:
        The normalised maps, of the shape of ``x``.

    Source: Caffe's LRN layer with ``norm_region: WITHIN_CHANNEL``.
    """
    if torch.is_autocast_enabled(x.device.type):
        # 1 + α·mean needs more digits than 16 bits have, and products of mixed types are slow.
        with torch.autocast(x.device.type, enabled=False):
            return local_response_norm(x.float(), size, alpha).to(x.dtype)
    mean = F.avg_pool2d(x * x, size, stride=1, padding=size // 2)
    scale = 1 + alpha * mean
    # scale^(-3/4) through two square roots: several times faster than pow, forward and backward.
    return x * torch.rsqrt(scale * scale.sqrt())
