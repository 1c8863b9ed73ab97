"""Pools of planes that are no part of a convolution's epilogue."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import KINDS, PlaneOp
from spp_lightning.compaction.kernels.cpu.library import NativeEpilogueOp, library

__all__ = ["native_op", "pool"]


def pool(x: Tensor, op: PlaneOp) -> Tensor:
    """The mean or the largest number of every window.

    Args:
        x: Planes, float32 ``(B, C, H, W)``, contiguous, on the CPU.
        op: A pool.

    Raises:
        ValueError: If the planes are smaller than a window, or the padding is larger than half of
            one.
    """
    batch, channels, height, width = x.shape
    out = torch.empty(batch, channels, *op.out_size(height, width))
    native, threads = native_op(op), torch.get_num_threads()
    library().spp_pool(
        *(ctypes.byref(native), batch * channels, height, width, threads),
        *(x.data_ptr(), x.numel(), out.data_ptr(), out.numel()),
    )
    return out


def native_op(op: PlaneOp) -> NativeEpilogueOp:
    """An operation as the kernels read it."""
    pair = ctypes.c_int32 * 2
    return NativeEpilogueOp(
        KINDS.index(op.kind),
        *(pair(*x) for x in (op.kernel_size, op.stride, op.padding)),
        *(op.ceil_mode, op.count_include_pad, op.alpha),
    )
