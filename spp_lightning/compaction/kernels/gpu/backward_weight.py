"""The gradient of the weight: a product over all output pixels, split up and summed."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.gpu.language import jit, tl, triton
from spp_lightning.compaction.kernels.gpu.tables import column_table
from spp_lightning.compaction.kernels.gpu.tensors import (
    Pair,
    check_tensors,
    device_of,
    is_channels_last,
    precision,
)
from spp_lightning.compaction.kernels.gpu.tiles import (
    corner_offsets,
    groups_of,
    on_m,
    on_n,
    pixel_offsets,
)
from spp_lightning.compaction.kernels.gpu.tuning import blocks, size_class, tuned

__all__ = ["column_conv2d_backward_weight"]

_PROGRAMS = 512  # that keep a large GPU busy; how far the sum over the pixels is split up


def column_conv2d_backward_weight(
    grad: Tensor,
    x: Tensor,
    columns: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    table: Tensor | None = None,
) -> Tensor:
    """Gradient of `column_conv2d` (without residual and clamp) with respect to its weight.

    The product ``grad @ x_columnsᵀ`` runs over all output pixels. They are split up among so many
    programs as keep a GPU busy; each adds up its share in float32, and a second kernel sums the
    shares, always in the same order.

    Args:
        grad: Gradient of the output, ``(B, N, Ho, Wo)``.
        x: Input of the forward pass, ``(B, C, H, W)``.
        columns: As in `column_conv2d`, like the arguments not named here.
        kernel_size: ``(kh, kw)``.
        stride: As in the forward pass, like the next three.
        padding: Zeros around the input.
        dilation: Distance of the kernel's elements.
        groups: Convolution groups.
        table: As in `column_conv2d`.

    Returns:
        ``(N/G, T)`` of x's dtype, contiguous.

    Raises:
        TypeError: If the dtypes aren't float32, float16 or bfloat16.
        ValueError: If the kernel or an image is too large.
    """
    check_tensors(grad, x, kernel_size)
    filters, kept = grad.shape[1] // groups, len(columns)
    height, width = grad.shape[2:]
    pixels = len(grad) * height * width
    if not (filters and kept and pixels):
        return x.new_zeros(filters, kept)
    check_tensors(x)
    if table is None:
        table = column_table(columns, x, kernel_size, dilation)
    tiles = -(-filters // 64) * -(-kept // 64)
    splits = max(1, min(_PROGRAMS // tiles, pixels // 1024))
    share = -(-pixels // splits // 256) * 256  # a tile of pixels lies in one share
    splits = -(-pixels // share)
    # What is worked out per pixel is the same for all tiles: do it once, up to a tile too far.
    places = [
        torch.empty(-(-pixels // 256) * 256 + 256, dtype=dtype, device=x.device)
        for dtype in (torch.int64, torch.int32, torch.int64)
    ]
    parts = torch.empty((splits, filters, kept), dtype=torch.float32, device=x.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        tiles = triton.cdiv(filters, meta["BLOCK_F"]) * triton.cdiv(kept, meta["BLOCK_K"])
        return (tiles, splits)

    with device_of(x):
        _make_pixels[(len(places[0]) // 256,)](
            *places,
            pixels,
            tuple(x.shape[2:]),
            (height, width),
            (*stride, *padding, *dilation),
            x.stride(),
            grad.stride(),
            KH=kernel_size[0],
            KW=kernel_size[1],
        )
        _weight_gradient[grid](
            grad,
            x,
            columns,
            table,
            *places,
            parts,
            filters,
            kept,
            table.shape[1],
            pixels,
            share,
            x.shape[1] // groups * kernel_size[0] * kernel_size[1],
            grad.stride(1),
            size_class(kept),
            size_class(pixels),
            LAST=is_channels_last(x),
            PRECISION=precision(x),
        )
    return parts.sum(0).to(x.dtype)


@jit
def _make_pixels(
    origins,
    outside,
    places,
    pixels,
    size,
    out,
    step,
    x_strides,
    grad_strides,
    KH: tl.constexpr,
    KW: tl.constexpr,
):
    p = tl.program_id(0) * 256 + tl.arange(0, 256)
    origin, beyond = corner_offsets(p, pixels, size, out, step, x_strides, KH, KW)
    tl.store(origins + p, origin)
    tl.store(outside + p, beyond)
    tl.store(places + p, pixel_offsets(p, out, grad_strides))


@jit
def _gather_pair(
    x, taps, origins, outside, grad, is_filter, filters_at, places, p, end, LAST: tl.constexpr
):
    """Tiles of x and of the gradient at output pixels p."""
    inside = (taps & on_n(tl.load(outside + p), LAST)) == 0
    x_tile = tl.load(x + on_n(tl.load(origins + p), LAST), mask=inside, other=0.0)
    at = filters_at + on_n(tl.load(places + p), LAST)
    return x_tile, tl.load(grad + at, mask=is_filter & on_n(p < end, LAST), other=0.0)


@tuned(
    ["filters", "kept_class", "pixel_class", "LAST", "PRECISION"],
    blocks(128, 32, 64, 8),
    blocks(128, 32, 128, 8),
    blocks(64, 32, 64, 4),
    blocks(64, 32, 128, 8),
    blocks(64, 64, 64, 8),
    blocks(32, 32, 64, 4),
    exact=(blocks(64, 16, 64, 8), blocks(128, 16, 64, 8), blocks(32, 16, 64, 4)),
)
@jit
def _weight_gradient(
    grad,
    x,
    columns,
    table,
    origins,
    outside,
    places,
    parts,
    filters,
    kept,
    length,
    pixels,
    share,
    columns_per_group,
    grad_stride,
    kept_class,
    pixel_class,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column_tiles = tl.cdiv(kept, BLOCK_K)
    first = tl.program_id(0) % column_tiles * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    f = tl.program_id(0) // column_tiles * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, pixels)
    offset = tl.load(table + k)
    taps = tl.load(table + length + k)
    group, lowest, highest = groups_of(columns, first, k, kept, columns_per_group, BLOCK_K)

    pointers = x + on_m(offset, LAST)
    total = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
    for g in range(lowest, highest + 1):  # the groups that the tile's columns belong to
        its_taps = on_m(tl.where(group == g, taps, 1 << 30), LAST)
        is_filter = on_m(f < filters, LAST)
        filters_at = on_m(g * filters + f, LAST) * grad_stride
        p = begin + tl.arange(0, BLOCK_P)
        x_tile, g_tile = _gather_pair(
            pointers, its_taps, origins, outside, grad, is_filter, filters_at, places, p, end, LAST
        )
        for q in range(begin, end, BLOCK_P):
            x_now, g_now = x_tile, g_tile
            p = q + BLOCK_P + tl.arange(0, BLOCK_P)
            x_tile, g_tile = _gather_pair(
                pointers,
                its_taps,
                origins,
                outside,
                grad,
                is_filter,
                filters_at,
                places,
                p,
                end,
                LAST,
            )
            if LAST:
                total = tl.dot(tl.trans(g_now), x_now, total, input_precision=PRECISION)
            else:
                total = tl.dot(g_now, tl.trans(x_now), total, input_precision=PRECISION)
    at = (tl.program_id(1).to(tl.int64) * filters + f[:, None]) * kept + k[None, :]
    tl.store(parts + at, total, mask=(f[:, None] < filters) & (k[None, :] < kept))
