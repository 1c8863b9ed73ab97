"""Whether the int8 kernels may compute in torch's place."""

from __future__ import annotations

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.cpu.library import is_available

__all__ = ["is_unwatched"]

# Bound once, as in column_conv.py.
_is_tracing = torch._C._is_tracing
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


def is_unwatched(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels can read a tensor, and nobody watches or transforms what is computed.

    Args:
        x: The tensor.
        dtype: That the kernels read.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype is dtype
        and x.is_contiguous()
        and not x.is_neg()
        and not _is_tracing()
        and not _num_dispatch_modes()
        and not _num_function_modes()
        and _transform() is None
        and is_available()
    )
