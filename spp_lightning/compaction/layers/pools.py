"""A pool of planes by the CPU kernels: torch computes those of NCHW pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.kernels.cpu import pools
from spp_lightning.compaction.layers.chain import is_hooked, is_untouched
from spp_lightning.compaction.layers.unwatched import is_unwatched

__all__ = ["pool_planes"]


def pool_planes(x: Tensor, op: PlaneOp, module: nn.Module | None = None) -> Tensor:
    """Pool planes.

    Args:
        x: Input, ``(B, C, H, W)``.
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
    return op(x) if module is None else module(x)
