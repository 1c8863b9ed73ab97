"""Float layers as int8 layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.quantized import QuantizedConv2d, QuantizedLinear
from spp_lightning.compaction.quantize.prepare import ClampedLinear
from spp_lightning.compaction.quantize.ranges import LEAST

__all__ = ["quantized"]


def quantized(
    layer: nn.Module,
    given: TensorScale,
    output: TensorScale | None,
    residual: TensorScale | None,
) -> QuantizedConv2d:
    """The int8 layer of a float layer.

    Args:
        layer: A :class:`ColumnConv2d` without operations behind its clamp, or a
            :class:`ClampedLinear`.
        given: Scale of the input.
        output: Scale of the output; None for an output of float32.
        residual: Scale of the residual; None without one.
    """
    if isinstance(layer, ClampedLinear):
        linear = layer.linear
        geometry, clamp = Geometry(linear.in_features, linear.out_features, (1, 1)), layer.clamp
        weight, columns, bias = linear.weight, linear.columns, linear.bias
        kind: type[QuantizedConv2d] = QuantizedLinear
    else:
        assert isinstance(layer, ColumnConv2d)
        geometry, clamp = layer.geometry, layer.epilogue.clamp
        weight, columns, bias = layer.weight, layer.columns, layer.bias
        kind = QuantizedConv2d
    numbers, scales = _rounded(weight.detach(), columns, geometry)
    spec = Int8Spec(geometry, given, output, residual, (float(clamp[0]), float(clamp[1])))
    return kind(spec, numbers, columns, scales, bias).eval()


def _rounded(weight: Tensor, columns: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Weights as int8 and the filters' scales; a row has a filter of every convolution group.

    The largest weight of a filter is 127 steps. Smaller steps, which limit it, were not compared on
    trained networks.
    """
    g = geometry
    numbers = torch.zeros_like(weight, dtype=torch.int8)
    group_of = columns // (g.num_columns // g.groups)
    scales: list[Any] = []
    for group in range(g.groups):
        own = group_of == group
        part = weight[:, own]
        scale = weight.new_ones(len(weight))
        if part.numel():
            most = part.abs().amax(1) / 127
            scale = torch.where(most > 0, most.clamp(min=LEAST), 1.0)
            numbers[:, own] = (part / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        scales.append(scale)
    return numbers, torch.cat(scales)
