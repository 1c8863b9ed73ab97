"""The range of a value over calibration data, and the scale that loses least of it.

PyTorch has observers for this in ``torch.ao.quantization``, which is deprecated.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from spp_lightning.compaction.int8_spec import TensorScale

__all__ = ["LEAST", "METHODS", "Method", "Range"]

Method = Literal["mse", "percentile", "max"]
METHODS: tuple[Method, ...] = get_args(Method)

_BINS = 2048
_TAIL = 1e-4  # share of the numbers that the percentile leaves outside of the range
_STEPS = 24  # limits that are tried on each side for the least squared error
LEAST = 1e-20  # of a scale: float32 must hold it and its inverse


class Range:
    """How the numbers of a value are distributed.

    Attributes:
        low: The least number, or 0 if that is less: padding is 0.
        high: The largest number, or 0.
        is_finite: Whether all numbers were finite.

    First all numbers go through :meth:`widen`, then once more through :meth:`count`.

    >>> x = torch.tensor([-1.0, 0.0, 4.1])
    >>> found = Range()
    >>> found.widen(x)
    >>> found.count(x)
    >>> found.scale("max").zero_point  # 5.1 / 255 is a step, and 50 of them are 1.0
    50
    """

    def __init__(self) -> None:
        self.low, self.high, self.is_finite = 0.0, 0.0, True
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def widen(self, x: Tensor) -> None:
        """Let the range hold the numbers of ``x``."""
        if x.numel():
            low, high = (float(limit) for limit in x.aminmax())
            self.is_finite = self.is_finite and math.isfinite(low) and math.isfinite(high)
            self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, x: Tensor) -> None:
        """Count the numbers of ``x``, which the range holds."""
        if self.high > self.low:
            counts = torch.histc(x.float().cpu(), _BINS, self.low, self.high)
            self._counts += counts.double()

    def scale(self, method: Method) -> TensorScale:
        """A scale and a zero point for uint8.

        Args:
            method: ``"max"`` holds all numbers; ``"percentile"`` leaves the 0.01 % that are
                farthest out to rounding; ``"mse"`` tries limits and takes those with the least
                squared error.
        """
        if self.high == self.low:
            return TensorScale(1.0)
        low, high = self.low, self.high
        if method == "percentile":
            low, high = self._percentiles()
        elif method == "mse":
            low, high = self._least_error()
        return _scale_of(low, high)

    def _centers(self) -> Tensor:
        width = (self.high - self.low) / _BINS
        return self.low + width * (torch.arange(_BINS, dtype=torch.float64) + 0.5)

    def _percentiles(self) -> tuple[float, float]:
        share = self._counts.cumsum(0) / self._counts.sum()
        first = int((share > _TAIL / 2).nonzero()[0])
        last = int((share >= 1 - _TAIL / 2).nonzero()[0])
        width = (self.high - self.low) / _BINS
        return min(self.low + first * width, 0.0), max(self.low + (last + 1) * width, 0.0)

    def _least_error(self) -> tuple[float, float]:
        centers = self._centers()
        shrunk = torch.linspace(1, 1 / _STEPS, _STEPS).tolist()
        lows = [self.low * x for x in shrunk] if self.low < 0 else [0.0]
        highs = [self.high * x for x in shrunk] if self.high > 0 else [0.0]
        tried = [(low, high) for low in lows for high in highs]
        errors = [self._squared_error(_scale_of(low, high), centers) for low, high in tried]
        return tried[errors.index(min(errors))]

    def _squared_error(self, to: TensorScale, centers: Tensor) -> float:
        rounded = (centers / to.scale).round_().clamp_(-to.zero_point, 255 - to.zero_point)
        return float((self._counts * (rounded * to.scale - centers).square_()).sum())


def _scale_of(low: float, high: float) -> TensorScale:
    step = max((high - low) / 255, LEAST)
    return TensorScale(float(torch.tensor(step)), min(max(round(-low / step), 0), 255))
