"""Kernel configs: which kernel computes a layer, and with how many threads."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

__all__ = ["CHUNK", "WINOGRAD", "Kernel", "KernelConfig"]

CHUNK = 16  # filters that lie next to each other for the channel-blocked kernels


class Kernel(IntEnum):
    """A kernel, by its number in ``native/geometry.h``; ``docs/kernels.md`` describes them.

    The first two, and the sums of the third, add the columns in one order: their outputs are equal
    bit for bit. Winograd's round otherwise, and so do pairs of bfloat16.
    """

    # Pixel-vectorised (NCHW): the pixels under the kept columns are packed into panels. Depthwise
    # layers have a kernel of their own, which goes plane by plane.
    PIXELS = 0
    PAIRS = 2  # the same, with products of pairs of bfloat16
    CHANNELS = 3  # channel-blocked (nChw16c): vectors of 16 filters
    WINOGRAD_4 = 4  # Winograd's minimal filtering, tiles of 4×4 outputs
    WINOGRAD_2 = 5  # the same, tiles of 2×2 outputs

    def __str__(self) -> str:
        return _NAMES[self]


_NAMES = {
    Kernel.PIXELS: "pixel-vectorised",
    Kernel.PAIRS: "pixel-vectorised, bfloat16 pairs",
    Kernel.CHANNELS: "channel-blocked",
    Kernel.WINOGRAD_4: "Winograd 4×4",
    Kernel.WINOGRAD_2: "Winograd 2×2",
}

WINOGRAD = {4: Kernel.WINOGRAD_4, 2: Kernel.WINOGRAD_2}  # by the outputs of a tile per side


class KernelConfig(NamedTuple):
    """How a layer is computed for inputs of one shape."""

    kernel: Kernel
    threads: int
