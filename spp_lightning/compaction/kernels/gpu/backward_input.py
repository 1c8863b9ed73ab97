"""The gradient of the input: a product with the weight's transpose, then a gather."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.gpu.language import jit, tl, triton
from spp_lightning.compaction.kernels.gpu.tensors import (
    Pair,
    check_tensors,
    device_of,
    is_channels_last,
    memory_format,
    precision,
)
from spp_lightning.compaction.kernels.gpu.tiles import (
    dot,
    groups_of,
    on_m,
    on_n,
    pixel_offsets,
    zeros,
)
from spp_lightning.compaction.kernels.gpu.tuning import blocks, size_class, tuned

__all__ = ["column_conv2d_backward_input"]

_CACHED = 2**24  # elements of the product that stay in the L2 cache


def column_conv2d_backward_input(
    grad: Tensor,
    weight: Tensor,
    columns: Tensor,
    input_shape: tuple[int, ...],
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """Gradient of `column_conv2d` (without residual and clamp) with respect to its input.

    First the product ``weightᵀ @ grad``, one row for every kept column, then a gather: every input
    element adds up what its channel's columns hold for it. This takes the multiplications of the
    kept columns alone, on the tensor cores, and no atomic additions. One fused kernel can't do
    that: which outputs an input element needs differs from column to column, so a tile of it is no
    matrix product unless all columns take part. The price is the product's way through memory (in
    ``grad``'s dtype); it is done for so many images at once as stay in the L2 cache.

    Args:
        grad: Gradient of the output, ``(B, N, Ho, Wo)``.
        weight: As in `column_conv2d`, like the arguments not named here.
        columns: As in `column_conv2d`.
        input_shape: ``(B, C, H, W)``.
        kernel_size: ``(kh, kw)``.
        stride: As in the forward pass, like the next three.
        padding: Zeros around the input.
        dilation: Distance of the kernel's elements.
        groups: Convolution groups.

    Returns:
        ``(B, C, H, W)``, channels-last if ``grad`` is.

    Raises:
        TypeError: If the dtypes aren't float32, float16 or bfloat16.
        ValueError: If the kernel or an image is too large.
    """
    check_tensors(grad, weight, kernel_size)
    kept = len(columns)
    weight = weight[:, :kept]
    batch, channels, *size = input_shape
    height, width = grad.shape[2:]
    result = torch.empty(
        tuple(input_shape),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=memory_format(grad),
    )
    if not (kept and grad.numel() and result.numel()):
        return result.zero_()
    check_tensors(result)
    taps = kernel_size[0] * kernel_size[1]
    # Which row of the product holds a column, by its number; -1 for a pruned one.
    rows = columns.new_full((channels * taps,), -1)
    rows.scatter_(0, columns.long(), torch.arange(kept, dtype=rows.dtype, device=rows.device))
    chunk = min(batch, max(1, _CACHED // (kept * height * width)))
    with device_of(grad):
        for start in range(0, batch, chunk):
            g, dx = grad[start : start + chunk], result[start : start + chunk]
            product = _transpose_and_multiply(g, weight, columns, channels // groups * taps, groups)
            inputs = len(g) * math.prod(size)
            _gather_input[_tiles(channels, inputs)](
                product,
                rows,
                dx,
                channels,
                inputs,
                tuple(size),
                (height, width),
                (*stride, *padding, *dilation),
                product.stride(),
                dx.stride(),
                size_class(inputs),
                KH=kernel_size[0],
                KW=kernel_size[1],
                LAST=is_channels_last(grad),
            )
    return result


def _transpose_and_multiply(
    g: Tensor, weight: Tensor, columns: Tensor, columns_per_group: int, groups: int
) -> Tensor:
    """What every kept column gets from the outputs, ``(B, T, Ho, Wo)``, in g's memory format."""
    batch, _, height, width = g.shape
    filters, kept = weight.shape
    last = is_channels_last(g)
    if groups == 1 and last:
        rows = g.permute(0, 2, 3, 1).reshape(-1, filters) @ weight
        return rows.view(batch, height, width, kept).permute(0, 3, 1, 2)
    if groups == 1:
        return (weight.mT @ g.flatten(2)).unflatten(2, (height, width))
    product = torch.empty(
        (batch, kept, height, width),
        dtype=g.dtype,
        device=g.device,
        memory_format=memory_format(g),
    )
    check_tensors(product)
    pixels = batch * height * width
    _transposed_product[_tiles(kept, pixels)](
        g,
        weight,
        columns,
        product,
        filters,
        kept,
        pixels,
        columns_per_group,
        (height, width),
        g.stride(),
        weight.stride(),
        product.stride(),
        size_class(kept),
        size_class(pixels),
        LAST=last,
        PRECISION=precision(g),
    )
    return product


def _tiles(rows: int, pixels: int) -> Any:
    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_K"]) * triton.cdiv(pixels, meta["BLOCK_P"]),)

    return grid


@tuned(
    ["filters", "kept_class", "pixel_class", "LAST", "PRECISION"],
    blocks(32, 128, 128, 4),
    blocks(64, 128, 128, 8),
    blocks(32, 128, 64, 4),
    blocks(64, 64, 64, 4),
    blocks(32, 64, 32, 4),
    exact=(blocks(16, 64, 64, 8), blocks(16, 64, 128, 8), blocks(16, 64, 32, 4)),
)
@jit
def _transposed_product(
    grad,
    weight,
    columns,
    product,
    filters,
    kept,
    pixels,
    columns_per_group,
    out,
    grad_strides,
    weight_strides,
    product_strides,
    kept_class,
    pixel_class,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(kept, BLOCK_K)
    program = tl.program_id(0)
    first = program % column_tiles * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    p = program // column_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    group, lowest, highest = groups_of(columns, first, k, kept, columns_per_group, BLOCK_K)

    pointers = grad + on_n(pixel_offsets(p, out, grad_strides), LAST)
    total = zeros(BLOCK_K, BLOCK_P, LAST)
    for g in range(lowest, highest + 1):  # the groups that the tile's columns belong to
        for r in range(0, filters, BLOCK_F):
            f = r + tl.arange(0, BLOCK_F)
            w_tile = tl.load(
                weight + on_n(f, LAST) * weight_strides[0] + on_m(k, LAST) * weight_strides[1],
                mask=on_n(f < filters, LAST) & on_m((k < kept) & (group == g), LAST),
                other=0.0,
            )
            g_tile = tl.load(
                pointers + on_m(g * filters + f, LAST) * grad_strides[1],
                mask=on_m(f < filters, LAST) & on_n(p < pixels, LAST),
                other=0.0,
            )
            total = dot(w_tile, g_tile, total, LAST, PRECISION)
    at = on_n(pixel_offsets(p, out, product_strides), LAST) + on_m(k, LAST) * product_strides[1]
    tl.store(product + at, total, mask=on_m(k < kept, LAST) & on_n(p < pixels, LAST))


@tuned(
    ["channels", "pixel_class", "KH", "KW", "LAST"],
    ({"BLOCK_P": 128, "BLOCK_K": 8}, 4),
    ({"BLOCK_P": 256, "BLOCK_K": 4}, 4),
    ({"BLOCK_P": 32, "BLOCK_K": 32}, 4),
    ({"BLOCK_P": 16, "BLOCK_K": 64}, 4),
)
@jit
def _gather_input(
    product,
    rows,
    dx,
    channels,
    pixels,
    size,
    out,
    step,
    product_strides,
    dx_strides,
    pixel_class,
    KH: tl.constexpr,
    KW: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, BLOCK_K)
    program = tl.program_id(0)
    c = program % channel_tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    p = program // channel_tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (p // (size[0] * size[1])).to(tl.int64)
    top = p // size[1] % size[0] + step[2]
    left = p % size[1] + step[3]
    total = zeros(BLOCK_K, BLOCK_P, LAST)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            # Output pixel (y, x) reads this input pixel at (i, j) if y·stride is the distance.
            down = top - i * step[4]
            right = left - j * step[5]
            y = down // step[0]
            x = right // step[1]
            reads = (down >= 0) & (down % step[0] == 0) & (y < out[0]) & (p < pixels)
            reads &= (right >= 0) & (right % step[1] == 0) & (x < out[1])
            row = tl.load(rows + (c * KH + i) * KW + j, mask=c < channels, other=-1)
            at = image * product_strides[0] + y * product_strides[2] + x * product_strides[3]
            total += tl.load(
                product + on_n(at, LAST) + on_m(row, LAST) * product_strides[1],
                mask=on_n(reads, LAST) & on_m(row >= 0, LAST),
                other=0.0,
            ).to(tl.float32)
    at = on_n(pixel_offsets(p, size, dx_strides), LAST) + on_m(c, LAST) * dx_strides[1]
    tl.store(dx + at, total, mask=on_m(c < channels, LAST) & on_n(p < pixels, LAST))
