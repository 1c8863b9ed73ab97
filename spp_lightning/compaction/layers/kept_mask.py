"""Which columns a masked layer keeps, and whether a call is one of plain tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from spp_lightning.method.masks import acting_mask

__all__ = ["KeptNumbers", "is_plain_call"]


class KeptNumbers:
    """The numbers of the columns that a layer's acting mask keeps, read when the mask has changed.

    Args:
        kernel_size: Of a convolution; a channel's group has so many columns.
    """

    def __init__(self, kernel_size: tuple[int, ...] = ()) -> None:
        self.kernel_size = kernel_size
        self._known: dict[bool, tuple[Any, Tensor | None]] = {}  # by the layer's mode

    def of(self, layer: nn.Module) -> Tensor | None:
        """``(columns,)``, int64, ascending; None if the mask has other factors than 0 and 1.

        Also None if it keeps no column, or isn't on the CPU: to read it there would wait for it.
        """
        mask = acting_mask(layer)
        if not mask.is_cpu:
            return None
        stamp = (id(mask), mask._version)
        known = self._known.get(layer.training)
        if known is None or known[0] != stamp:
            with torch.inference_mode(False), torch.no_grad():
                known = stamp, self._read(mask)
            self._known[layer.training] = known
        return known[1]

    def _read(self, mask: Tensor) -> Tensor | None:
        kept = mask != 0
        if mask.dtype != torch.bool and not torch.equal(kept.to(mask.dtype), mask):
            return None
        size = kept.shape[: kept.dim() - len(self.kernel_size)]
        numbers = kept.expand(*size, *self.kernel_size).flatten().nonzero().flatten()
        return numbers if len(numbers) else None


def is_plain_call(x: Tensor, weight: Tensor) -> bool:
    """Whether torch computes here and now, on plain tensors on the CPU.

    It doesn't where something looks at the operators: compilers, tracers, counters of FLOPs,
    transforms of ``torch.func``.
    """
    return (
        type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and _get_current_dispatch_mode() is None
    )
