"""Whether the kernels may compute in torch's place: nobody would notice, and they can."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from spp_lightning.compaction.kernels.cpu.library import is_available

__all__ = ["is_eager", "is_hooked", "is_plain", "is_readable", "is_untouched", "is_unwatched"]

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


def is_eager() -> bool:
    """Whether torch computes at once, and nobody watches or transforms that."""
    return (
        not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def is_hooked() -> bool:
    """Whether somebody wants to see the inputs and outputs of all modules."""
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does, and nobody wants to see it do so."""
    own = module.__dict__
    return (
        type(module) is kind
        and "forward" not in own
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
    )


def is_readable(tensor: Tensor) -> bool:
    """Whether the kernels can read a tensor's memory."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and is_plain(tensor)
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its values in order; that of a negated view doesn't."""
    return tensor.is_contiguous() and not tensor.is_neg()
