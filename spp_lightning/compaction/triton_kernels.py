"""Column-pruned convolutions on a GPU: an implicit GEMM over the kept columns, in Triton.

Shapes and names, shared with the CPU kernels: a convolution of ``G`` groups with weight
``(N, C/G, kh, kw)`` is stored as its ``T`` kept columns. ``columns[t]`` is
``(c * kh + i) * kw + j`` with the input channel ``c`` counted over all groups; ``weight[r, t]`` is
the weight of filter ``r`` of column t's group.

The forward pass of a group is the matrix product ``weight (N/G, T_g) @ x_columns (T_g, B·Ho·Wo)``
on the tensor cores, whose right side is gathered from ``x`` tile by tile and never stored. What
bounds it is not the product but the gather, one load per element, since neighbouring columns lie
anywhere; so everything about an element that can be is worked out before the loop:

* its address is a pointer of its pixel plus an offset of its column: one instruction;
* whether it lies in the zero padding is ``outside[pixel] & taps[column] != 0``, one instruction:
  bit ``i`` of ``outside`` says that row ``i`` of the kernel falls off the picture there, bit
  ``15 + j`` that column ``j`` does, and ``taps`` has the bits of the element's ``i`` and ``j``;
* the next tile's loads are issued before the product of the present one.

Loads coalesce along pixels in NCHW. In channels-last they coalesce along the columns of one kernel
position, so there all tiles are transposed, and the columns should be ordered by position: see
`channels_last_order`.

Block sizes are tuned when a kernel first meets a size: that takes seconds, and must be over before
a CUDA graph is captured. No atomic additions are used: the same call gives the same bits for as
long as the process lives; another one may choose other blocks, which add up in another order.

This module can be imported without Triton; `is_available` says whether its functions work.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # there are no wheels for this platform
    triton = None

__all__ = [
    "channels_last_order",
    "column_conv2d",
    "column_conv2d_backward_input",
    "column_conv2d_backward_weight",
    "column_table",
    "is_available",
]

Pair = tuple[int, int]

_MAX_KERNEL = 15  # rows and columns of a kernel whose taps fit into the 32 bits of `outside`
_CACHED = (
    2**24
)  # elements of the product of `column_conv2d_backward_input` that stay in the L2 cache
_PROGRAMS = 512  # that keep a large GPU busy; how far the sum over the pixels is split up


def is_available() -> bool:
    """Whether Triton is there, with a GPU or (``TRITON_INTERPRET=1``) its interpreter."""
    return triton is not None and (_interpreted() or torch.cuda.is_available())


def channels_last_order(columns: Tensor, kernel_size: Pair, groups: int, channels: int) -> Tensor:
    """The order of columns in which channels-last inputs are read fastest.

    Neighbours in memory are the channels of one pixel, so within a convolution group the columns
    of one kernel position come together: order by (group, i, j, c). ``columns[order]`` and
    ``weight[:, order]`` stand for the same convolution; compute them once.

    Args:
        columns: Kept columns, ``(T,)``.
        kernel_size: ``(kh, kw)``.
        groups: Convolution groups.
        channels: Input channels of all groups.

    Returns:
        A permutation of T, int64, on the device of ``columns``.

    >>> channels_last_order(torch.tensor([0, 3, 4, 9]), (3, 3), groups=1, channels=2)
    tensor([0, 3, 1, 2])
    """
    taps = kernel_size[0] * kernel_size[1]
    channel, tap = columns.long() // taps, columns.long() % taps
    return ((channel // (channels // groups) * taps + tap) * channels + channel).argsort()


def column_table(columns: Tensor, x: Tensor, kernel_size: Pair, dilation: Pair) -> Tensor:
    """Where a convolution's kept columns are read from: the kernels' table of offsets and taps.

    Args:
        columns: Kept columns, ``(T,)``, int32.
        x: The input that it is for, or any tensor of its strides.
        kernel_size: ``(kh, kw)``.
        dilation: Distance of the kernel's elements.

    Returns:
        Per column, its element's offset in ``x`` from the one under the kernel's corner, and the
        bits of its row and column in the kernel: ``(2, more than T)``, int32. What is behind the
        last column is read in whole tiles, and its taps make sure that nothing is taken from there.
    """
    length = -(-len(columns) // 256) * 256 + 256
    table = torch.empty((2, length), dtype=torch.int32, device=columns.device)
    with _device_of(columns):
        _make_table[(length // 256,)](
            columns,
            table,
            len(columns),
            length,
            dilation,
            x.stride(),
            KH=kernel_size[0],
            KW=kernel_size[1],
        )
    return table


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
        ValueError: If the kernel or a picture is too large.
    """
    _check(x, weight, kernel_size)
    filters, kept = weight.shape
    height, width = _output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    shape = (x.shape[0], groups * filters, height, width)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    pixels = x.shape[0] * height * width
    if not y.numel():
        return y
    _check(y)
    if table is None:
        table = column_table(columns, x, kernel_size, dilation)
    if groups == 1 and kept % 16:
        weight = F.pad(weight, (0, -kept % 16))  # or its rows could only be read number by number
        kept = weight.shape[1]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(filters, meta["BLOCK_F"]) * triton.cdiv(pixels, meta["BLOCK_P"])
        return (groups * tiles,)

    with _device_of(x):
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
            _size_class(kept),
            _size_class(pixels),
            GROUPS=groups,
            KH=kernel_size[0],
            KW=kernel_size[1],
            BIAS=bias is not None,
            RESIDUAL=residual is not None,
            LAST=_is_channels_last(x),
            PRECISION=_precision(x),
        )
    return y


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
    ``grad``'s dtype); it is done for so many pictures at once as stay in the L2 cache.

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
        ValueError: If the kernel or a picture is too large.
    """
    _check(grad, weight, kernel_size)
    kept = len(columns)
    weight = weight[:, :kept]
    batch, channels, *size = input_shape
    height, width = grad.shape[2:]
    result = torch.empty(
        tuple(input_shape),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=_memory_format(grad),
    )
    if not (kept and grad.numel() and result.numel()):
        return result.zero_()
    _check(result)
    taps = kernel_size[0] * kernel_size[1]
    # Which row of the product holds a column, by its number; -1 for a pruned one.
    rows = columns.new_full((channels * taps,), -1)
    rows.scatter_(0, columns.long(), torch.arange(kept, dtype=rows.dtype, device=rows.device))
    chunk = min(batch, max(1, _CACHED // (kept * height * width)))
    with _device_of(grad):
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
                _size_class(inputs),
                KH=kernel_size[0],
                KW=kernel_size[1],
                LAST=_is_channels_last(grad),
            )
    return result


def _transpose_and_multiply(
    g: Tensor, weight: Tensor, columns: Tensor, columns_per_group: int, groups: int
) -> Tensor:
    """What every kept column gets from the outputs, ``(B, T, Ho, Wo)``, in g's memory format."""
    batch, _, height, width = g.shape
    filters, kept = weight.shape
    last = _is_channels_last(g)
    if groups == 1 and last:
        rows = g.permute(0, 2, 3, 1).reshape(-1, filters) @ weight
        return rows.view(batch, height, width, kept).permute(0, 3, 1, 2)
    if groups == 1:
        return (weight.mT @ g.flatten(2)).unflatten(2, (height, width))
    product = torch.empty(
        (batch, kept, height, width),
        dtype=g.dtype,
        device=g.device,
        memory_format=_memory_format(g),
    )
    _check(product)
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
        _size_class(kept),
        _size_class(pixels),
        LAST=last,
        PRECISION=_precision(g),
    )
    return product


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
        ValueError: If the kernel or a picture is too large.
    """
    _check(grad, x, kernel_size)
    filters, kept = grad.shape[1] // groups, len(columns)
    height, width = grad.shape[2:]
    pixels = len(grad) * height * width
    if not (filters and kept and pixels):
        return x.new_zeros(filters, kept)
    _check(x)
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

    with _device_of(x):
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
            _size_class(kept),
            _size_class(pixels),
            LAST=_is_channels_last(x),
            PRECISION=_precision(x),
        )
    return parts.sum(0).to(x.dtype)


def _check(first: Tensor, second: Tensor | None = None, kernel_size: Pair = (1, 1)) -> None:
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"The Triton kernels compute in float32, float16 and bfloat16, got {first.dtype}."
        )
    if second is not None and second.dtype != first.dtype:
        raise TypeError(f"All tensors must have one dtype, got {first.dtype} and {second.dtype}.")
    if max(kernel_size) > _MAX_KERNEL:
        raise ValueError(f"`kernel_size` must be at most {_MAX_KERNEL}, got {kernel_size}.")
    # Offsets within a picture and pixels are numbered in 32 bits, offsets of pictures in 64.
    reach = sum((n - 1) * s for n, s in zip(first.shape[1:], first.stride()[1:], strict=True))
    if max(reach, len(first) * math.prod(first.shape[2:])) >= 2**31:
        raise ValueError(
            "A tensor must have fewer than 2**31 pixels, and a picture must lie within 2**31"
            f" elements of memory; got shape {tuple(first.shape)}, strides {first.stride()}."
        )


def _output_size(
    size: tuple[int, ...], kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Pair:
    height, width = (
        (size[a] + 2 * padding[a] - dilation[a] * (kernel_size[a] - 1) - 1) // stride[a] + 1
        for a in (0, 1)
    )
    return height, width


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


def _precision(x: Tensor) -> str:
    # The convolutions' own setting is TF32 unless one changes it; so let both be asked.
    backends: Any = torch.backends
    settings = {backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision}
    exact = x.dtype == torch.float32 and settings != {"tf32"}
    return "ieee" if exact else "tf32"  # makes no difference to 16-bit numbers


def _size_class(n: int) -> int:
    # Sizes are tuned by powers of 2, or every new batch size would be tuned anew.
    return (n - 1).bit_length() if n else 0


def _device_of(x: Tensor) -> Any:
    return torch.cuda.device_of(x)  # Triton launches on the current device; does nothing on CPUs


def _tiles(rows: int, pixels: int) -> Any:
    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_K"]) * triton.cdiv(pixels, meta["BLOCK_P"]),)

    return grid


@functools.cache
def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _jit(function):
    if triton is None:
        return function
    # These numbers only choose the blocks; nothing is gained from compiling for their values.
    return triton.jit(function, do_not_specialize=["kept_class", "pixel_class"])


def _tuned(key, *blocks, exact=()):
    """Tune a kernel, per ``key``, over blocks (a dict of sizes, warps); not in the interpreter.

    In exact float32 tensor cores have no part, and other blocks, ``exact``, are tried.
    """
    if triton is None:
        return lambda kernel: kernel
    if _interpreted():
        # Blocks so small that small tensors, too, take several of them.
        small = {"BLOCK_F": 16, "BLOCK_P": 64, "BLOCK_K": 16}
        return triton.autotune([triton.Config({name: small[name] for name in blocks[0][0]})], key)
    configs = [triton.Config(sizes, num_warps=warps) for sizes, warps in (*blocks, *exact)]

    def choose(configs, arguments, **options):
        is_exact = exact and options["PRECISION"] == "ieee"
        return configs[len(blocks) :] if is_exact else configs[: len(blocks)]

    return triton.autotune(
        configs,
        key,
        prune_configs_by={"early_config_prune": choose},
        do_bench=functools.partial(triton.testing.do_bench, warmup=5, rep=20),
    )


def _blocks(filters, pixels, kept, warps):
    return {"BLOCK_F": filters, "BLOCK_P": pixels, "BLOCK_K": kept}, warps


@_jit
def _m(a, LAST: tl.constexpr):
    """As the first axis of a tile; as the second in channels-last, where tiles are transposed."""
    if LAST:
        return a[None, :]
    else:  # noqa: RET505 - after an `if`, Triton would compile this branch too
        return a[:, None]


@_jit
def _n(a, LAST: tl.constexpr):
    """As the second axis of a tile; as the first in channels-last."""
    if LAST:
        return a[:, None]
    else:  # noqa: RET505
        return a[None, :]


@_jit
def _zeros(M: tl.constexpr, N: tl.constexpr, LAST: tl.constexpr):
    if LAST:
        return tl.zeros((N, M), tl.float32)
    else:  # noqa: RET505
        return tl.zeros((M, N), tl.float32)


@_jit
def _dot(a, b, total, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """``a (M, K) @ b (K, N) + total``; in channels-last of tiles that are all transposed."""
    if LAST:
        return tl.dot(b, a, total, input_precision=PRECISION)
    else:  # noqa: RET505
        return tl.dot(a, b, total, input_precision=PRECISION)


@_jit
def _pixel_offsets(p, size, strides):
    """Of pixels p of all pictures: their offset, 64 bits wide."""
    image = (p // (size[0] * size[1])).to(tl.int64)
    y = p // size[1] % size[0]
    x = p % size[1]
    return image * strides[0] + y * strides[2] + x * strides[3]


@_jit
def _origins(p, end, size, out, step, strides, KH: tl.constexpr, KW: tl.constexpr):
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


@_jit
def _make_table(columns, table, kept, length, step, strides, KH: tl.constexpr, KW: tl.constexpr):
    k = tl.program_id(0) * 256 + tl.arange(0, 256)
    column = tl.load(columns + k, mask=k < kept, other=0)
    i = column // KW % KH
    j = column % KW
    offset = column // (KH * KW) * strides[1] + i * step[0] * strides[2] + j * step[1] * strides[3]
    tl.store(table + k, offset)
    tl.store(table + length + k, tl.where(k < kept, (1 << i) | (1 << (15 + j)), 1 << 30))


@_jit
def _gather(pointers, outside, table, length, k, end, GROUPS: tl.constexpr, LAST: tl.constexpr):
    """The tile of columns k: x at the pixels' pointers plus the columns' offsets."""
    offset = tl.load(table + k)
    taps = tl.load(table + length + k)
    if GROUPS > 1:  # else the table ends where the columns do, and its loads need no mask
        taps = tl.where(k < end, taps, 1 << 30)
    inside = (_m(taps, LAST) & outside) == 0
    return tl.load(pointers + _m(offset, LAST), mask=inside, other=0.0)


@_tuned(
    ["filters", "kept_class", "pixel_class", "GROUPS", "LAST", "PRECISION"],
    _blocks(128, 128, 32, 4),
    _blocks(128, 128, 64, 8),
    _blocks(128, 256, 32, 8),
    _blocks(256, 128, 32, 8),
    _blocks(64, 128, 32, 4),
    _blocks(64, 256, 32, 8),
    _blocks(64, 64, 64, 4),
    _blocks(32, 128, 32, 4),
    _blocks(32, 64, 64, 4),
    _blocks(16, 128, 32, 4),
    exact=(_blocks(64, 64, 16, 8), _blocks(128, 64, 16, 8), _blocks(32, 64, 16, 4)),
)
@_jit
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

    origin, outside = _origins(p, pixels, size, out, step, x_strides, KH, KW)
    pointers, outside = _n(x + origin, LAST), _n(outside, LAST)
    k = start + tl.arange(0, BLOCK_K)
    x_tile = _gather(pointers, outside, table, length, k, end, GROUPS, LAST)
    total = _zeros(BLOCK_F, BLOCK_P, LAST)
    for t in range(start, end, BLOCK_K):
        k = t + tl.arange(0, BLOCK_K)
        w_tile = tl.load(
            weight + _m(f, LAST) * weight_strides[0] + _n(k, LAST) * weight_strides[1],
            mask=(_m(f, LAST) < filters) & (_n(k, LAST) < end),
            other=0.0,
        )
        x_now = x_tile
        x_tile = _gather(pointers, outside, table, length, k + BLOCK_K, end, GROUPS, LAST)
        total = _dot(w_tile, x_now, total, LAST, PRECISION)

    n = group * filters + f
    written = _m(f < filters, LAST) & _n(p < pixels, LAST)
    if BIAS:
        total += _m(tl.load(bias + n, mask=f < filters, other=0.0), LAST).to(tl.float32)
    if RESIDUAL:
        at = _n(_pixel_offsets(p, out, residual_strides), LAST) + _m(n, LAST) * residual_strides[1]
        total += tl.load(residual + at, mask=written, other=0.0).to(tl.float32)
    total = tl.maximum(total, low, propagate_nan=tl.PropagateNan.ALL)
    total = tl.minimum(total, high, propagate_nan=tl.PropagateNan.ALL)
    at = _n(_pixel_offsets(p, out, y_strides), LAST) + _m(n, LAST) * y_strides[1]
    tl.store(y + at, total, mask=written)


@_tuned(
    ["filters", "kept_class", "pixel_class", "LAST", "PRECISION"],
    _blocks(32, 128, 128, 4),
    _blocks(64, 128, 128, 8),
    _blocks(32, 128, 64, 4),
    _blocks(64, 64, 64, 4),
    _blocks(32, 64, 32, 4),
    exact=(_blocks(16, 64, 64, 8), _blocks(16, 64, 128, 8), _blocks(16, 64, 32, 4)),
)
@_jit
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
    group = tl.load(columns + k, mask=k < kept, other=0) // columns_per_group
    first_group = tl.load(columns + first) // columns_per_group
    last_group = tl.load(columns + tl.minimum(first + BLOCK_K, kept) - 1) // columns_per_group

    pointers = grad + _n(_pixel_offsets(p, out, grad_strides), LAST)
    total = _zeros(BLOCK_K, BLOCK_P, LAST)
    for g in range(first_group, last_group + 1):  # the groups that the tile's columns belong to
        for r in range(0, filters, BLOCK_F):
            f = r + tl.arange(0, BLOCK_F)
            w_tile = tl.load(
                weight + _n(f, LAST) * weight_strides[0] + _m(k, LAST) * weight_strides[1],
                mask=_n(f < filters, LAST) & _m((k < kept) & (group == g), LAST),
                other=0.0,
            )
            g_tile = tl.load(
                pointers + _m(g * filters + f, LAST) * grad_strides[1],
                mask=_m(f < filters, LAST) & _n(p < pixels, LAST),
                other=0.0,
            )
            total = _dot(w_tile, g_tile, total, LAST, PRECISION)
    at = _n(_pixel_offsets(p, out, product_strides), LAST) + _m(k, LAST) * product_strides[1]
    tl.store(product + at, total, mask=_m(k < kept, LAST) & _n(p < pixels, LAST))


@_tuned(
    ["channels", "pixel_class", "KH", "KW", "LAST"],
    ({"BLOCK_P": 128, "BLOCK_K": 8}, 4),
    ({"BLOCK_P": 256, "BLOCK_K": 4}, 4),
    ({"BLOCK_P": 32, "BLOCK_K": 32}, 4),
    ({"BLOCK_P": 16, "BLOCK_K": 64}, 4),
)
@_jit
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
    total = _zeros(BLOCK_K, BLOCK_P, LAST)
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
                product + _n(at, LAST) + _m(row, LAST) * product_strides[1],
                mask=_n(reads, LAST) & _m(row >= 0, LAST),
                other=0.0,
            ).to(tl.float32)
    at = _n(_pixel_offsets(p, size, dx_strides), LAST) + _m(c, LAST) * dx_strides[1]
    tl.store(dx + at, total, mask=_m(c < channels, LAST) & _n(p < pixels, LAST))


@_jit
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
    origin, beyond = _origins(p, pixels, size, out, step, x_strides, KH, KW)
    tl.store(origins + p, origin)
    tl.store(outside + p, beyond)
    tl.store(places + p, _pixel_offsets(p, out, grad_strides))


@_jit
def _gather_pair(
    x, taps, origins, outside, grad, is_filter, filters_at, places, p, end, LAST: tl.constexpr
):
    """Tiles of x and of the gradient at output pixels p."""
    inside = (taps & _n(tl.load(outside + p), LAST)) == 0
    x_tile = tl.load(x + _n(tl.load(origins + p), LAST), mask=inside, other=0.0)
    at = filters_at + _n(tl.load(places + p), LAST)
    return x_tile, tl.load(grad + at, mask=is_filter & _n(p < end, LAST), other=0.0)


@_tuned(
    ["filters", "kept_class", "pixel_class", "LAST", "PRECISION"],
    _blocks(128, 32, 64, 8),
    _blocks(128, 32, 128, 8),
    _blocks(64, 32, 64, 4),
    _blocks(64, 32, 128, 8),
    _blocks(64, 64, 64, 8),
    _blocks(32, 32, 64, 4),
    exact=(_blocks(64, 16, 64, 8), _blocks(128, 16, 64, 8), _blocks(32, 16, 64, 4)),
)
@_jit
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
    group = tl.load(columns + k, mask=k < kept, other=0) // columns_per_group
    first_group = tl.load(columns + first) // columns_per_group
    last_group = tl.load(columns + tl.minimum(first + BLOCK_K, kept) - 1) // columns_per_group

    pointers = x + _m(offset, LAST)
    total = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
    for g in range(first_group, last_group + 1):  # the groups that the tile's columns belong to
        its_taps = _m(tl.where(group == g, taps, 1 << 30), LAST)
        is_filter = _m(f < filters, LAST)
        filters_at = _m(g * filters + f, LAST) * grad_stride
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
