"""Orders the groups of a layer by importance, and moves their probabilities.

Both exist in torch and, on CPUs, in C++ if the package's library was built. The results are equal
bit for bit. C++ is several times faster: torch's stable sort is slow, and the overhead of its many
small operations exceeds their work on one layer.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spp_lightning import native

__all__ = ["ascending_order", "move"]


def ascending_order(importance: Tensor, probability: Tensor) -> Tensor:
    """Sort the groups by importance: ascending, ties by position, pruned groups last.

    Args:
        importance: Importance of the groups, ``(groups,)``, finite.
        probability: Pruning probabilities, ``(groups,)``; 1 means pruned.

    Returns:
        Positions of the groups, ``(groups,)``, int64.

    >>> p = torch.tensor([0.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    >>> ascending_order(torch.tensor([5.0, 0.0, 2.0, 2.0]), p)
    tensor([2, 3, 0, 1])
    """
    library = _library_for(probability, importance)
    if library is None or importance.dtype not in (torch.float32, torch.float64):
        return importance.masked_fill(probability >= 1, math.inf).argsort(stable=True)
    importance, probability = importance.contiguous(), probability.contiguous()
    order = torch.empty(len(importance), dtype=torch.int64)
    if library.spp_ascending_order(
        importance.data_ptr(),
        importance.dtype == torch.float64,
        probability.data_ptr(),
        len(importance),
        order.data_ptr(),
    ):
        raise MemoryError("Not enough memory to sort the weight groups of a layer.")
    return order


def move(probability: Tensor, order: Tensor, change: Tensor, needed: int) -> Tensor:
    """Change the probabilities of some groups, within [0, 1], and choose which are pruned.

    Args:
        probability: Pruning probabilities, ``(groups,)``.
        order: Positions of the groups that change, from least to most important, ``(alive,)``.
        change: Change of each, ``(alive,)``.
        needed: Groups that the layer still needs to prune. If as many reach 1, the first of them
            in ``order`` do, and all others go to 0.

    Returns:
        The new probabilities, ``(groups,)``; ``probability`` is left as it was.

    >>> p = torch.tensor([0.9, 0.5, 0.9], dtype=torch.float64)
    >>> move(p, torch.tensor([1, 2, 0]), torch.full_like(p, 0.2), needed=1)
    tensor([0., 0., 1.], dtype=torch.float64)
    >>> move(p, torch.tensor([1, 2, 0]), torch.full_like(p, 0.2), needed=3)
    tensor([1.0000, 0.7000, 1.0000], dtype=torch.float64)
    """
    library = _library_for(probability, order, change)
    if library is not None and change.dtype == torch.float64:
        new = probability.clone(memory_format=torch.contiguous_format)
        order, change = order.contiguous(), change.contiguous()
        library.spp_move(order.data_ptr(), change.data_ptr(), len(order), needed, new.data_ptr())
        return new
    moved = (probability[order] + change).clamp(0, 1)
    reached = moved >= 1
    too_many = reached & (reached.cumsum(0) > needed)
    finished = reached.sum() >= needed
    moved = torch.where(too_many | (finished & (moved < 1)), 0.0, moved)
    return probability.scatter(0, order, moved)


def _library_for(probability: Tensor, *others: Tensor) -> Any:
    # C++ reads plain values in host memory: no subclasses, no gradients, no tracing.
    tensors = (probability, *others)
    plain = all(type(x) is Tensor and x.is_cpu and not x.requires_grad for x in tensors)
    plain = plain and probability.dtype == torch.float64 and not torch.compiler.is_compiling()
    return _library() if plain else None


@cache
def _library() -> Any:
    library = native.library()
    if library is not None:
        pointer, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        library.spp_ascending_order.argtypes = [pointer, number, pointer, size, pointer]
        library.spp_move.argtypes = [pointer, pointer, size, size, pointer]
        library.spp_move.restype = None
    return library
