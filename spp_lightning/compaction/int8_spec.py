"""One description of an int8 layer: its geometry, and the scales of its tensors.

Activations are uint8 with one scale and one zero point per tensor, weights int8 with one scale per
filter and no zero point. Padding reads the zero point, which is the real number 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from spp_lightning.compaction.geometry import Geometry

__all__ = ["Int8Spec", "TensorScale"]

_SCALES = (1e-30, 1e30)  # so that float32 holds a scale and its inverse


class TensorScale(NamedTuple):
    """What the numbers ``q`` of a uint8 tensor stand for: ``scale * (q - zero_point)``.

    Attributes:
        scale: Real units per step; the kernels round it to float32.
        zero_point: The number that stands for 0, in [0, 255].
    """

    scale: float
    zero_point: int = 0

    def check(self, name: str) -> None:
        """Check the attributes; ``name`` is the tensor's.

        Raises:
            ValueError: If one is out of range.
        """
        if not _SCALES[0] <= self.scale <= _SCALES[1]:
            raise ValueError(f"The scale of `{name}` (={self.scale}) must be in {_SCALES}.")
        if self.zero_point not in range(256):
            raise ValueError(
                f"The zero point of `{name}` (={self.zero_point}) must be an integer in [0, 255]."
            )


class Int8Spec(NamedTuple):
    """An int8 convolution and its epilogue: all of a layer but its tensors.

    Attributes:
        geometry: The convolution.
        input: Scale of the input.
        output: Scale of the output; None for an output of float32.
        residual: Scale of a residual that is added before the clamp; None without one.
        clamp: Limits of the output, in real units; ``(0, inf)`` is a ReLU.
    """

    geometry: Geometry
    input: TensorScale
    output: TensorScale | None = None
    residual: TensorScale | None = None
    clamp: tuple[float, float] = (-math.inf, math.inf)

    def check(self) -> None:
        """Check all attributes.

        Raises:
            ValueError: If one is out of range.
        """
        self.geometry.check()
        for name in ("input", "output", "residual"):
            scale = getattr(self, name)
            if scale is not None:
                scale.check(name)
            elif name == "input":
                raise ValueError("`input` must be a scale, got None.")
        low, high = self.clamp
        if not low <= high or low == math.inf or high == -math.inf:
            raise ValueError(f"`clamp` must be two limits in order, got {self.clamp}.")
