"""What the launchers ask of tensors: types, sizes, memory formats, precision, device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Pair",
    "check_tensors",
    "device_of",
    "is_channels_last",
    "memory_format",
    "output_size",
    "precision",
]

Pair = tuple[int, int]

_MAX_KERNEL = 15  # rows and columns of a kernel whose taps fit into the 32 bits of `outside`


def check_tensors(first: Tensor, second: Tensor | None = None, kernel_size: Pair = (1, 1)) -> None:
    """Refuse what the kernels can't compute: other types, large kernels, large images."""
    if first.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"The Triton kernels compute in float32, float16 and bfloat16, got {first.dtype}."
        )
    if second is not None and second.dtype != first.dtype:
        raise TypeError(f"All tensors must have one dtype, got {first.dtype} and {second.dtype}.")
    if max(kernel_size) > _MAX_KERNEL:
        raise ValueError(f"`kernel_size` must be at most {_MAX_KERNEL}, got {kernel_size}.")
    # Offsets within an image and pixels are numbered in 32 bits, offsets of images in 64.
    reach = sum((n - 1) * s for n, s in zip(first.shape[1:], first.stride()[1:], strict=True))
    if max(reach, len(first) * math.prod(first.shape[2:])) >= 2**31:
        raise ValueError(
            "A tensor must have fewer than 2**31 pixels, and an image must lie within 2**31"
            f" elements of memory; got shape {tuple(first.shape)}, strides {first.stride()}."
        )


def output_size(
    size: tuple[int, ...], kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Pair:
    """A convolution's output's size, of an input's."""
    height, width = (
        (size[a] + 2 * padding[a] - dilation[a] * (kernel_size[a] - 1) - 1) // stride[a] + 1
        for a in (0, 1)
    )
    return height, width


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are neighbours in memory."""
    return x.stride(1) == 1 and not x.is_contiguous()


def memory_format(x: Tensor) -> torch.memory_format:
    """The format that fits x, for what is computed from it."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def precision(x: Tensor) -> str:
    """How Triton is to multiply x: TF32 if torch's settings allow it."""
    # The convolutions' own setting is TF32 unless one changes it; so let both be asked.
    backends: Any = torch.backends
    settings = {backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision}
    exact = x.dtype == torch.float32 and settings != {"tf32"}
    return "ieee" if exact else "tf32"  # makes no difference to 16-bit numbers


def device_of(x: Tensor) -> Any:
    """Make x's device the current one, where Triton launches; nothing on CPUs."""
    return torch.cuda.device_of(x)
