"""What stands between int8 layers: pools, norms, and floats rounded to uint8."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import Epilogue, PlaneOp
from spp_lightning.compaction.kernels.cpu.library import NativeEpilogueOp, library
from spp_lightning.compaction.kernels.cpu.pools import native_op

__all__ = ["max_pool", "post_and_quantize", "quantize"]


def max_pool(x: Tensor, op: PlaneOp) -> Tensor:
    """The largest number of every window.

    Args:
        x: Planes, uint8 ``(B, C, H, W)``, contiguous, on the CPU.
        op: A max pool.

    Raises:
        ValueError: If the planes are smaller than a window, or the padding is larger than half of
            one.
    """
    batch, channels, height, width = x.shape
    out = torch.empty(batch, channels, *op.out_size(height, width), dtype=torch.uint8)
    native, threads = native_op(op), torch.get_num_threads()
    library().spp_int8_max_pool(
        *(ctypes.byref(native), batch * channels, height, width, threads),
        *(x.data_ptr(), x.numel(), out.data_ptr(), out.numel()),
    )
    return out


def post_and_quantize(
    x: Tensor, post: Sequence[PlaneOp], inverse: float, zero_point: int
) -> Tensor:
    """Pools and norms of planes, then rounded to uint8.

    Args:
        x: Planes, float32 ``(B, C, H, W)``, contiguous, on the CPU.
        post: The operations, in order.
        inverse: 1 over the real units per step, as float32.
        zero_point: The number that stands for 0.

    Raises:
        ValueError: If the planes are smaller than a window.
    """
    batch, channels, height, width = x.shape
    size = Epilogue(post=tuple(post)).out_size(height, width)
    out = torch.empty(batch, channels, *size, dtype=torch.uint8)
    native = (NativeEpilogueOp * len(post))(*(native_op(op) for op in post))
    library().spp_int8_post(
        *(native, len(post), batch * channels, height, width),
        *(inverse, zero_point, torch.get_num_threads()),
        *(x.data_ptr(), x.numel(), out.data_ptr(), out.numel()),
    )
    return out


def quantize(x: Tensor, inverse: float, zero_point: int) -> Tensor:
    """Real numbers as uint8.

    Args:
        x: float32, contiguous, on the CPU.
        inverse: 1 over the real units per step, as float32.
        zero_point: The number that stands for 0.

    Returns:
        ``clamp(round(x * inverse) + zero_point, 0, 255)``; halves are rounded to the even number,
        NaN counts as the least.

    Raises:
        ValueError: If ``inverse`` isn't finite and positive, or ``zero_point`` is out of range.
    """
    out = torch.empty(x.shape, dtype=torch.uint8)
    library().spp_int8_quantize(
        *(inverse, zero_point, torch.get_num_threads()),
        *(x.data_ptr(), x.numel(), out.data_ptr(), out.numel()),
    )
    return out
