"""The forward pass: the product of the weight and the gathered columns, up to the clamp."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spp_lightning.compaction.kernels.gpu.language import jit, tl, triton
from spp_lightning.compaction.kernels.gpu.tables import column_table
from spp_lightning.compaction.kernels.gpu.tensors import (
    Pair,
    check_tensors,
    device_of,
    is_channels_last,
    memory_format,
    output_size,
    precision,
)
from spp_lightning.compaction.kernels.gpu.tiles import (
    corner_offsets,
    dot,
    on_m,
    on_n,
    pixel_offsets,
    zeros,
)
from spp_lightning.compaction.kernels.gpu.tuning import blocks, size_class, tuned

__all__ = ["column_conv2d"]


def column_conv2d(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    residual: Tensor | None = None,
    clamp: tuple[float, float] = (-math.inf, math.inf),
    table: Tensor | None = None,
) -> Tensor:
    """``clamp(convolution + bias + residual)`` with the kept columns of a weight.

    Sums are taken in float32. float32 is multiplied exactly, or in TF32 where PyTorch's settings
    allow that for matrix products and for convolutions.

    Args:
        x: Input, ``(B, C, H, W)``, float32, float16 or bfloat16, of any strides.
        weight: Kept columns, ``(N/G, T)``, of x's dtype. If G = 1 zeros may follow: with a multiple
            of 16 columns it needn't be padded at each call.
        columns: Their numbers, ``(T,)``, int32; sorted by group, in any order within one.
        bias: ``(N,)`` or None.
        kernel_size: ``(kh, kw)``, at most 15 each.
        stride: ``(vertical, horizontal)``, like the next two.
        padding: Zeros around the input.
        dilation: Distance of the kernel's elements.
        groups: Convolution groups G.
        residual: Added before the clamp, ``(B, N, Ho, Wo)``, or None.
        clamp: Lowest and highest output; ``(0, inf)`` is a ReLU. NaN stays NaN.
        table: `column_table` of ``columns`` and ``x``, if known already; saves a small kernel.

    Returns:
        ``(B, N, Ho, Wo)``, channels-last if ``x`` is.

    Raises:
        TypeError: If the dtypes aren't one of the three.
        ValueError: If the kernel or an image is too large.
    """
    check_tensors(x, weight, kernel_size)
    filters, kept = weight.shape
    height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    shape = (x.shape[0], groups * filters, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    pixels = x.shape[0] * height * width
    if not y.numel():
        return y
    check_tensors(y)
    if table is None:
        table = column_table(columns, x, kernel_size, dilation)
    if groups == 1 and kept % 16:
        weight = F.pad(weight, (0, -kept % 16))  # or its rows could only be read number by number
        kept = weight.shape[1]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(filters, meta["BLOCK_F"]) * triton.cdiv(pixels, meta["BLOCK_P"])
        return (groups * tiles,)

    with device_of(x):
        _forward[grid](
            x,
            weight,
            columns,
            table,
            x if bias is None else bias,
            x if residual is None else residual,
            y,
            filters,
            kept,
            table.shape[1],
            pixels,
            x.shape[1] // groups * kernel_size[0] * kernel_size[1],
            tuple(x.shape[2:]),
            (height, width),
            (*stride, *padding, *dilation),
            x.stride(),
            weight.stride(),
            y.stride() if residual is None else residual.stride(),
            y.stride(),
            float(clamp[0]),
            float(clamp[1]),
            size_class(kept),
            size_class(pixels),
            GROUPS=groups,
            KH=kernel_size[0],
            KW=kernel_size[1],
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            LAST=is_channels_last(x),
            PRECISION=precision(x),
        )
    return y


@jit
def _gather(pointers, outside, table, length, k, end, GROUPS: tl.constexpr, LAST: tl.constexpr):
    """The tile of columns k: x at the pixels' pointers plus the columns' offsets."""
    offset = tl.load(table + k)
    taps = tl.load(table + length + k)
    if GROUPS > 1:  # else the table ends where the columns do, and its loads need no mask
        taps = tl.where(k < end, taps, 1 << 30)
    inside = (on_m(taps, LAST) & outside) == 0
    return tl.load(pointers + on_m(offset, LAST), mask=inside, other=0.0)


@tuned(
    ["filters", "kept_class", "pixel_class", "GROUPS", "LAST", "PRECISION"],
    blocks(128, 128, 32, 4),
    blocks(128, 128, 64, 8),
    blocks(128, 256, 32, 8),
    blocks(256, 128, 32, 8),
    blocks(64, 128, 32, 4),
    blocks(64, 256, 32, 8),
    blocks(64, 64, 64, 4),
    blocks(32, 128, 32, 4),
    blocks(32, 64, 64, 4),
    blocks(16, 128, 32, 4),
    exact=(blocks(64, 64, 16, 8), blocks(128, 64, 16, 8), blocks(32, 64, 16, 4)),
)
@jit
def _forward(
    x,
    weight,
    columns,
    table,
    bias,
    residual,
    y,
    filters,
    kept,
    length,
    pixels,
    columns_per_group,
    size,
    out,
    step,
    x_strides,
    weight_strides,
    residual_strides,
    y_strides,
    low,
    high,
    kept_class,
    pixel_class,
    GROUPS: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that read the same pixels are neighbours, so that they share the L2 cache.
    filter_tiles = tl.cdiv(filters, BLOCK_F)
    program = tl.program_id(0)
    f = program % filter_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    group = program // filter_tiles % GROUPS
    p = program // (filter_tiles * GROUPS) * BLOCK_P + tl.arange(0, BLOCK_P)

    start = 0
    end = kept
    if GROUPS > 1:  # the group's columns: count those before it and those up to its end
        before = tl.zeros((1024,), tl.int32)
        until = tl.zeros((1024,), tl.int32)
        for t in range(0, kept, 1024):
            k = t + tl.arange(0, 1024)
            g = tl.load(columns + k, mask=k < kept, other=2**31 - 1) // columns_per_group
            before += (g < group).to(tl.int32)
            until += (g <= group).to(tl.int32)
        start = tl.sum(before)
        end = tl.sum(until)

    origin, outside = corner_offsets(p, pixels, size, out, step, x_strides, KH, KW)
    pointers, outside = on_n(x + origin, LAST), on_n(outside, LAST)
    k = start + tl.arange(0, BLOCK_K)
    x_tile = _gather(pointers, outside, table, length, k, end, GROUPS, LAST)
    total = zeros(BLOCK_F, BLOCK_P, LAST)
    for t in range(start, end, BLOCK_K):
        k = t + tl.arange(0, BLOCK_K)
        w_tile = tl.load(
            weight + on_m(f, LAST) * weight_strides[0] + on_n(k, LAST) * weight_strides[1],
            mask=(on_m(f, LAST) < filters) & (on_n(k, LAST) < end),
            other=0.0,
        )
        x_now = x_tile
        x_tile = _gather(pointers, outside, table, length, k + BLOCK_K, end, GROUPS, LAST)
        total = dot(w_tile, x_now, total, LAST, PRECISION)

    n = group * filters + f
    written = on_m(f < filters, LAST) & on_n(p < pixels, LAST)
    if BIAS:
        total += on_m(tl.load(bias + n, mask=f < filters, other=0.0), LAST).to(tl.float32)
    if RESIDUAL:
        at = (
            on_n(pixel_offsets(p, out, residual_strides), LAST)
            + on_m(n, LAST) * residual_strides[1]
        )
        total += tl.load(residual + at, mask=written, other=0.0).to(tl.float32)
    total = tl.maximum(total, low, propagate_nan=tl.PropagateNan.ALL)
    total = tl.minimum(total, high, propagate_nan=tl.PropagateNan.ALL)
    at = on_n(pixel_offsets(p, out, y_strides), LAST) + on_m(n, LAST) * y_strides[1]
    tl.store(y + at, total, mask=written)
