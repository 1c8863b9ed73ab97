"""The cost model of training on kept columns: whether a layer's step is faster than the dense one.

Like :mod:`~spp_lightning.compaction.kernels.cpu.cost` it asks no clock. What it says follows from
the layer, the batch, the number of kept columns and the instruction set alone: a resumed run and
every rank choose alike.

Both times are sums of what grows with the multiplications and what grows with the numbers of input
and output, in the forward pass and both gradients. Threads divide both by about the same, so the
model compares one thread's times.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from spp_lightning.compaction.kernels.cpu.library import instruction_set
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["has_fast_products", "linear_pays", "pays", "step_us"]


class _Times(NamedTuple):
    """Nanoseconds of a training step's parts."""

    mac: float  # a multiplication of the forward pass, or of the gradient of weights or input
    input: float  # a number of the input, in all passes
    output: float  # a number of the convolution's output
    epilogue: float  # likewise, if an epilogue follows
    call: float
    channels_last: float = 0.0  # a number of input or output in that memory format


# Fitted to 26 layers, those of ConvNet and of ResNet-18 on 32×32 images and smaller ones, with all,
# 75, 50, 25 and 10 % of their columns: CPU time on one core of an AMD EPYC (Zen 3, AVX2), best
# of 6. Four fifths of the estimates are within 20 % of what was measured.
_KEPT = _Times(mac=0.0242, input=1.56, output=0.50, epilogue=2.2, call=490_000, channels_last=4.3)
_DENSE = _Times(mac=0.0232, input=0.94, output=0.78, epilogue=4.0, call=360_000)
_TILE = 4  # filters that the kernels compute at once


@cache
def has_fast_products(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies numbers of a dtype faster than the kernels do float32.

    The kernels compute gradients in float32. Where there are products of bfloat16, the dense layer
    in 16 bits is faster than that.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pays(
    spec: ConvSpec,
    num_columns: int,
    shape: tuple[int, ...],
    passes: int = 3,
    channels_last: bool = False,
) -> bool:
    """Whether a training step on the kept columns takes less time than a dense one.

    Args:
        spec: The convolution, and the epilogue that is computed with it.
        num_columns: Kept columns.
        shape: Of the input, ``(B, C, H, W)``.
        passes: The forward pass, and one for each gradient, of weights and of input.
        channels_last: Whether input and output are in that memory format, which the kernels don't
            have: both are transposed, and so are their gradients.

    >>> from spp_lightning.compaction.geometry import Geometry
    >>> conv2 = ConvSpec(Geometry(32, 32, (5, 5), padding=(2, 2)))  # ConvNet's; 800 columns
    >>> [pays(conv2, columns, (100, 32, 16, 16)) for columns in (200, 800)]
    [True, False]
    """
    if instruction_set() not in ("avx2", "avx512"):
        return False
    return num_columns < _columns_that_do_not_pay(spec, shape, passes, channels_last)


@lru_cache(maxsize=1024)
def _columns_that_do_not_pay(
    spec: ConvSpec, shape: tuple[int, ...], passes: int, channels_last: bool
) -> int:
    """The least number of kept columns of which a step isn't faster; every step asks for it."""
    low, high = 0, spec.geometry.num_columns + 1
    while low < high:  # a step takes the longer, the more columns are kept
        middle = (low + high) // 2
        kept, dense = step_us(spec, middle, shape, passes, channels_last)
        low, high = (middle + 1, high) if kept < dense else (low, middle)
    return low


def step_us(
    spec: ConvSpec,
    num_columns: int,
    shape: tuple[int, ...],
    passes: int = 3,
    channels_last: bool = False,
) -> tuple[float, float]:
    """Estimated microseconds of a step, on the kept columns and dense; arguments as above."""
    g = spec.geometry
    inputs, outputs = math.prod(shape), shape[0] * g.filters * math.prod(g.out_size(*shape[2:]))
    per_group = g.filters // g.groups
    in_tiles = math.ceil(per_group / _TILE) * _TILE
    fused = int(not spec.epilogue.is_empty)
    kept, dense = (
        times.call
        + passes / 3 * (times.input * inputs + (times.output + times.epilogue * fused) * outputs)
        for times in (_KEPT, _DENSE)
    )
    kept += passes / 3 * _KEPT.channels_last * channels_last * (inputs + outputs)
    # With an epilogue the convolution is computed once more for the gradients.
    again = fused if passes > 1 else 0
    kept += _KEPT.mac * (passes + again) * g.macs(shape, in_tiles * num_columns)
    dense += _DENSE.mac * passes * g.macs(shape, per_group * g.num_columns)
    return kept / 1e3, dense / 1e3


# Of linear layers, which torch computes on gathered features: measured on five, of 10 to 4,096
# features and 64 to 12,608 tokens, with 90, 50 and 25 % of them. A matrix of an odd size takes a
# tenth longer. A gathered number of the input or of the weight takes as many nanoseconds as below,
# the dense weight times its mask as many a number; a call, so many more than the dense one.
_ODD_SIZE, _INPUT, _WEIGHT, _DENSE_WEIGHT, _MORE = 1.1, 10.0, 6.0, 5.0, 50_000.0


def linear_pays(shape: tuple[int, int], num_features: int, tokens: int, passes: int = 3) -> bool:
    """Whether a step of a linear layer on kept features takes less time than a dense one.

    Args:
        shape: Of the weight, ``(out_features, in_features)``.
        num_features: Kept features.
        tokens: Rows of the input, over the batch.
        passes: As for :func:`pays`.

    >>> [linear_pays((768, 192), kept, 12608) for kept in (48, 180)]
    [True, False]
    """
    out, features = shape
    products = _DENSE.mac * passes * tokens * out
    kept = products * _ODD_SIZE * num_features + _MORE
    kept += (_INPUT * tokens + _WEIGHT * out) * num_features
    return kept < products * features + _DENSE_WEIGHT * out * features
