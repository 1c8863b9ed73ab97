"""A max pool of uint8 by the int8 kernels: torch computes it number by number."""

from __future__ import annotations

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.kernels.cpu import int8_planes
from spp_lightning.compaction.layers.unwatched import is_unwatched

__all__ = ["max_pool_uint8"]


def max_pool_uint8(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """The largest number of every window; the arguments are those of ``F.max_pool2d``.

    >>> x = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    >>> max_pool_uint8(x, (2, 2), (2, 2), (0, 0), False)
    tensor([[[[ 5,  7],
              [13, 15]]]], dtype=torch.uint8)
    """
    op = PlaneOp("max_pool", kernel_size, stride, padding, ceil_mode)
    x = x.contiguous()  # torch's pool of uint8 in channels-last takes at most 255 numbers per image
    if x.dim() == 4 and is_unwatched(x, torch.uint8):
        return int8_planes.max_pool(x, op)
    return op(x)
