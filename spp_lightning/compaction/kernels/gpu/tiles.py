"""Parts of kernels: tiles of either orientation, and where their pixels lie in memory."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from spp_lightning.compaction.kernels.gpu.language import jit, tl

__all__ = ["corner_offsets", "dot", "groups_of", "on_m", "on_n", "pixel_offsets", "zeros"]


@jit
def on_m(a, LAST: tl.constexpr):
    """As the first axis of a tile; as the second in channels-last, where tiles are transposed."""
    if LAST:
        return a[None, :]
    else:  # noqa: RET505 - after an `if`, Triton would compile this branch too
        return a[:, None]


@jit
def on_n(a, LAST: tl.constexpr):
    """As the second axis of a tile; as the first in channels-last."""
    if LAST:
        return a[:, None]
    else:  # noqa: RET505
        return a[None, :]


@jit
def zeros(M: tl.constexpr, N: tl.constexpr, LAST: tl.constexpr):
    """A tile to add up in, ``(M, N)``."""
    if LAST:
        return tl.zeros((N, M), tl.float32)
    else:  # noqa: RET505
        return tl.zeros((M, N), tl.float32)


@jit
def dot(a, b, total, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """``a (M, K) @ b (K, N) + total``; in channels-last of tiles that are all transposed."""
    if LAST:
        return tl.dot(b, a, total, input_precision=PRECISION)
    else:  # noqa: RET505
        return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def groups_of(columns, first, k, kept, columns_per_group, BLOCK_K: tl.constexpr):
    """Of a tile's columns k, from the first on: their groups, the lowest and the highest."""
    group = tl.load(columns + k, mask=k < kept, other=0) // columns_per_group
    lowest = tl.load(columns + first) // columns_per_group
    highest = tl.load(columns + tl.minimum(first + BLOCK_K, kept) - 1) // columns_per_group
    return group, lowest, highest


@jit
def pixel_offsets(p, size, strides):
    """Of pixels p of all images: their offset, 64 bits wide."""
    image = (p // (size[0] * size[1])).to(tl.int64)
    y = p // size[1] % size[0]
    x = p % size[1]
    return image * strides[0] + y * strides[2] + x * strides[3]


@jit
def corner_offsets(p, end, size, out, step, strides, KH: tl.constexpr, KW: tl.constexpr):
    """Of output pixels p: offset of the input element under the kernel's corner, and `outside`."""
    image = (p // (out[0] * out[1])).to(tl.int64)
    top = p // out[1] % out[0] * step[0] - step[2]
    left = p % out[1] * step[1] - step[3]
    outside = tl.where(p < end, 1 << 30, -1)  # bit 30: a column that isn't there
    for i in tl.static_range(KH):
        y = top + i * step[4]
        outside |= ((y < 0) | (y >= size[0])).to(tl.int32) << i
    for j in tl.static_range(KW):
        x = left + j * step[5]
        outside |= ((x < 0) | (x >= size[1])).to(tl.int32) << (15 + j)
    return image * strides[0] + top * strides[2] + left * strides[3], outside
