"""What stands between convolutions and is no part of one: gates, norms, and global pools."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import ACTIVATIONS, Clamp, Epilogue
from spp_lightning.compaction.kernels.cpu.library import (
    NativeGate,
    NativeGateLayer,
    NativeNorm,
    library,
)

__all__ = ["Gate", "GateLayer", "Norm", "plane_means"]

GateLayer = tuple[Tensor, Tensor, Tensor | None, Epilogue]  # weight, columns, bias, epilogue


class _Prepared:
    """Addresses of tensors: it holds for these tensors, as long as they stay where they are.

    Values that change in place are seen, since nothing is copied.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self._tensors = tuple(tensors)
        self._places = [(x, x.data_ptr(), x.shape) for x in tensors if x is not None]

    def holds(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether it reads these tensors, as many as it was made of, where they are now."""
        if not all(map(is_, self._tensors, tensors)):
            return False
        for x, place, shape in self._places:  # a loop: `all` takes longer
            if x.data_ptr() != place or x.shape != shape:
                return False
        return True


class Gate(_Prepared):
    """Squeeze and excitation: every channel times what two layers make of the channels' means.

    All tensors are float32 (the columns int32), contiguous, and on the CPU.

    Args:
        reduce: The layer that reads the means: its weight, ``(S, columns)``, the columns that it
            keeps, its bias, and its epilogue without operations on planes.
        expand: The layer that reads the first one's S outputs, and makes a number per channel.
    """

    def __init__(self, reduce: GateLayer, expand: GateLayer) -> None:
        super().__init__((*reduce[:3], *expand[:3]))
        self._native = NativeGate(_layer(*reduce), _layer(*expand), len(expand[0]))
        self.address, self._run = ctypes.addressof(self._native), library().spp_gate

    def __call__(self, x: Tensor) -> Tensor:
        """Gate images, ``(B, C, H, W)``, float32, contiguous: a new tensor of the same shape.

        Raises:
            ValueError: If the shapes don't fit.
        """
        batch, _, height, width = x.shape
        out, count, threads = torch.empty_like(x), x.numel(), torch.get_num_threads()
        pixels = height * width
        # Arguments one by one: a call with unpacked tuples takes longer.
        self._run(self.address, x.data_ptr(), count, batch, pixels, threads, out.data_ptr(), count)
        return out


def _layer(
    weight: Tensor, columns: Tensor, bias: Tensor | None, epilogue: Epilogue
) -> NativeGateLayer:
    low, high = epilogue.clamp
    return NativeGateLayer(
        *(weight.data_ptr(), weight.numel(), None if bias is None else bias.data_ptr()),
        *(columns.data_ptr(), len(columns), len(weight), low, high),
        ACTIVATIONS.index(epilogue.activation),
    )


class Norm(_Prepared):
    """A batch norm by running statistics and a clamp, of tensors that are concatenated first.

    All tensors are float32, contiguous, and on the CPU, with a number per channel.

    Args:
        tensors: Mean, variance, weight and bias; the last two may be None.
        eps: Added to the variance.
        clamp: Limits of the result.
    """

    def __init__(self, tensors: Sequence[Tensor | None], eps: float, clamp: Clamp) -> None:
        super().__init__(tensors)
        assert tensors[0] is not None
        self.settings, self.channels = (eps, clamp), len(tensors[0])
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        self._native = NativeNorm(*addresses, self.channels, eps, *clamp)
        self.address, self._run = ctypes.addressof(self._native), library().spp_norm

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Norm tensors, ``(B, C_i, H, W)``, float32, contiguous: a new tensor ``(B, C, H, W)``.

        Raises:
            ValueError: If the shapes don't fit.
        """
        batch, _, height, width = parts[0].shape
        out = torch.empty(batch, self.channels, height, width, dtype=torch.float32)
        # As ConcatPart lies in memory: address, number of elements, channels.
        numbers = [n for x in parts for n in (x.data_ptr(), x.numel(), x.shape[1])]
        given = (ctypes.c_int64 * len(numbers))(*numbers)
        threads, pixels = torch.get_num_threads(), height * width
        self._run(
            *(self.address, ctypes.addressof(given), len(parts), None, batch, pixels, threads),
            *(out.data_ptr(), out.numel()),
        )
        return out


def plane_means(x: Tensor, keep: bool) -> Tensor:
    """The mean of every plane of images.

    Args:
        x: Images, ``(B, C, H, W)``, float32, contiguous, on the CPU; not empty.
        keep: Whether the result is ``(B, C, 1, 1)``, or ``(B, C)``.
    """
    batch, channels, height, width = x.shape
    shape = (batch, channels, 1, 1) if keep else (batch, channels)
    out, planes = torch.empty(*shape, dtype=torch.float32), batch * channels
    library().spp_plane_means(
        *(x.data_ptr(), x.numel(), planes, height * width, torch.get_num_threads()),
        *(out.data_ptr(), planes),
    )
    return out
