"""A pool of planes by the CPU kernels: torch computes those of NCHW pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.kernels.cpu import pools
from spp_lightning.compaction.layers.int8_pool import max_pool_uint8
from spp_lightning.compaction.layers.unwatched import is_hooked, is_untouched, is_unwatched

__all__ = ["pool_planes"]


def pool_planes(x: Tensor, op: PlaneOp, module: nn.Module | None = None) -> Tensor:
    """Pool planes.

    Args:
        x: Input, ``(B, C, H, W)``; for a max pool it may be uint8.
        op: The pool.
        module: The same pool as a module, if it is one.

    Returns:
        The pool's output as torch computes it: a maximum to the bit, a mean up to rounding.

    >>> x = torch.arange(16.0).view(1, 1, 4, 4)
    >>> pool_planes(x, PlaneOp("max_pool", (2, 2), (2, 2)))
    tensor([[[[ 5.,  7.],
              [13., 15.]]]])
    """
    if (
        is_unwatched(x, torch.float32)
        and not is_hooked()
        and (module is None or is_untouched(module, type(module)))
        and x.dim() == 4
        and x.numel()
        and not (x.requires_grad and torch.is_grad_enabled())
    ):
        return pools.pool(x, op)
    if module is not None:
        y: Tensor = module(x)
        return y
    if x.dtype is torch.uint8 and op.kind == "max_pool":
        return max_pool_uint8(x, op.kernel_size, op.stride, op.padding, op.ceil_mode)
    return op(x)
