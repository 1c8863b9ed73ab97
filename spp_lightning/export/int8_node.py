"""Int8 layers, and the roundings between them, as nodes of an ONNX graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.layers.quantized import Quantize, QuantizedConv2d, QuantizedLinear
from spp_lightning.export.node import NodeCall, geometry_numbers, post_attributes, record, sizes_of

__all__ = ["Int8LayerNode", "QuantizeNode"]


class Int8LayerNode:
    """An int8 layer as an operator.

    Args:
        name: Of the layer, for errors.
        layer: A convolution or a linear layer.
    """

    def __init__(self, name: str, layer: QuantizedConv2d) -> None:
        self.name, self.layer = name, layer

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What a tracer records as the node."""
        layer, shape = self.layer, sizes_of(x)
        if isinstance(layer, QuantizedLinear) and len(shape) != 2:
            rows = self(x.reshape(-1, layer.in_features))
            return rows.view(*x.shape[:-1], layer.out_features)
        self._check(x, shape, residual)
        out_shape = self.out_shape(shape)
        if residual is not None and sizes_of(residual) != out_shape:
            raise ValueError(
                f"`{self.name}` must add a residual of shape {out_shape}, got {sizes_of(residual)}."
            )
        scale = layer.weight_scale
        bias = scale.new_zeros(scale.shape) if layer.bias is None else layer.bias
        to_float = layer.output_scale is None
        call = NodeCall(
            "Int8ConvolutionToFloat" if to_float else "Int8Convolution",
            self.attributes,
            out_shape,
            torch.float32 if to_float else torch.uint8,
        )
        added = () if residual is None else (residual,)
        return record(call, x, layer.weight, layer.columns, scale, bias, *added)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the output for an input of a shape."""
        g = self.layer.geometry
        return (shape[0], g.filters, *(g.out_size(*shape[2:]) if len(shape) == 4 else ()))

    def attributes(self) -> dict[str, Any]:
        """The operator's attributes; the suffix of a name says of which type it is."""
        spec = self.layer.spec
        scales = [(0.0, 0) if s is None else s for s in (spec.input, spec.residual, spec.output)]
        return {
            "geometry_i": geometry_numbers(spec.geometry),
            "scales_f": [scale for scale, _ in scales],
            "zero_points_i": [zero_point for _, zero_point in scales],
            "clamp_f": list(spec.clamp),
        }

    def _check(self, x: Tensor, shape: tuple[int, ...], residual: Tensor | None) -> None:
        g, is_linear = self.layer.geometry, isinstance(self.layer, QuantizedLinear)
        form = f"(B, {g.channels})" if is_linear else f"(B, {g.channels}, H, W)"
        if (
            x.dtype != torch.uint8
            or len(shape) != (2 if is_linear else 4)
            or shape[1] != g.channels
        ):
            raise ValueError(
                f"`{self.name}` must read uint8 of shape {form}, got {x.dtype} of shape {shape}."
            )
        if (residual is None) != (self.layer.residual_scale is None):
            must = "be given" if residual is None else "not be given"
            raise ValueError(f"The residual of `{self.name}` must {must}: the layer was made so.")
        if residual is not None and residual.dtype != torch.uint8:
            raise ValueError(f"`{self.name}` must add a residual of uint8, got {residual.dtype}.")


class QuantizeNode:
    """A rounding to uint8 as an operator, with the pools and norms before it.

    Args:
        name: Of the layer, for errors.
        layer: The layer.
    """

    def __init__(self, name: str, layer: Quantize) -> None:
        self.name, self.layer = name, layer

    def __call__(self, x: Tensor) -> Tensor:
        """What a tracer records as the node."""
        shape, post = sizes_of(x), self.layer.post
        if x.dtype != torch.float32 or (post and len(shape) != 4):
            form = " of shape (B, C, H, W)" if post else ""
            raise ValueError(
                f"`{self.name}` must read float32{form}, got {x.dtype} of shape {shape}."
            )
        if post:
            shape = (*shape[:2], *Epilogue(post=post).out_size(*shape[2:]))
        return record(NodeCall("Int8Quantize", self.attributes, shape, torch.uint8), x)

    def attributes(self) -> dict[str, Any]:
        """The operator's attributes; the suffix of a name says of which type it is."""
        return {
            "scales_f": [float(self.layer.scale)],
            "zero_points_i": [int(self.layer.zero_point)],
            **post_attributes((0, op) for op in self.layer.post),
        }
