"""What an int8 layer computes, in torch: the definition that the int8 kernels follow bit for bit.

It runs where there are no kernels: without the built library, on other devices, under compilers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spp_lightning.compaction.geometry import Geometry, dense_weight

__all__ = ["convolve", "dequantize", "quantize", "requantize"]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Round real numbers to the nearest that uint8 can hold, halves to the even one.

    Args:
        x: Real numbers; NaN counts as the least.
        scale: Real units per step, float32, of no dimension.
        zero_point: The number that stands for 0, uint8, of no dimension.

    Returns:
        ``q`` of the shape of ``x``, uint8: ``x`` is about ``scale * (q - zero_point)``.

    >>> quantize(torch.tensor([-9.0, 0.0, 0.3, 99.0]), torch.tensor(0.25), torch.tensor(8).byte())
    tensor([  0,   8,   9, 255], dtype=torch.uint8)
    """
    steps = (x.float() * scale.reciprocal()).round_().add_(zero_point)
    return steps.clamp_(0, 255).nan_to_num_(0.0).to(torch.uint8)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The real numbers that uint8 stands for, float32; the arguments are those of `quantize`."""
    return (q.float() - zero_point) * scale


def convolve(
    x: Tensor, zero_point: Tensor, weight: Tensor, columns: Tensor, geometry: Geometry
) -> Tensor:
    """The exact sums of products of a quantised convolution. Padding counts as 0.

    Args:
        x: Input, uint8 ``(B, C, H, W)``.
        zero_point: That of the input, uint8, of no dimension.
        weight: Kept columns, int8 ``(filters / groups, columns)``.
        columns: Which they are, int32 ``(columns,)``.
        geometry: The convolution.

    Returns:
        The sums as float64, which holds them exactly, ``(B, N, H', W')``.
    """
    g = geometry
    dense = dense_weight(weight.double(), columns, g)
    numbers = x.double() - zero_point
    return F.conv2d(numbers, dense, None, g.stride, g.padding, g.dilation, g.groups)


def requantize(
    sums: Tensor,
    multiplier: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    clamp: tuple[float, float],
) -> Tensor:
    """The real output of a layer, each operation rounded to float32, in this order.

    Args:
        sums: What :func:`convolve` returns.
        multiplier: Real units per step of each filter's sums, float32 ``(filters,)``.
        bias: Real units, float32 ``(filters,)``, or None.
        residual: Real units, float32, of the shape of ``sums``, or None.
        clamp: Limits of the output.
    """
    y = sums.float() * multiplier[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    if residual is not None:
        y = y + residual
    return y.clamp_(*clamp)
