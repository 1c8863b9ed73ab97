"""Kept columns as the kernels read them: their order, and the table of their offsets and taps."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.gpu.language import jit, tl
from spp_lightning.compaction.kernels.gpu.tensors import Pair, device_of

__all__ = ["channels_last_order", "column_table"]


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
    with device_of(columns):
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


@jit
def _make_table(columns, table, kept, length, step, strides, KH: tl.constexpr, KW: tl.constexpr):
    k = tl.program_id(0) * 256 + tl.arange(0, 256)
    column = tl.load(columns + k, mask=k < kept, other=0)
    i = column // KW % KH
    j = column % KW
    offset = column // (KH * KW) * strides[1] + i * step[0] * strides[2] + j * step[1] * strides[3]
    tl.store(table + k, offset)
    tl.store(table + length + k, tl.where(k < kept, (1 << i) | (1 << (15 + j)), 1 << 30))
