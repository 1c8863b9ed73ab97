"""Compact layers in a row as a node of an ONNX graph: its inputs and attributes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import ACTIVATIONS
from spp_lightning.compaction.kernels.cpu import cost
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.export.node import NodeCall, geometry_numbers, post_attributes, record, sizes_of

__all__ = ["ChainNode"]

# For which batches and threads a model says which kernels compute it. In between those for the next
# smaller number hold.
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_THREADS = (1, 2, 4, 8, 16)


class ChainNode:
    """Layers in a row as an operator.

    Args:
        layers: One or more, each of which reads the output of the one before it.
        linear: A linear layer that reads the last one's output flattened, if there is one.
    """

    def __init__(self, layers: Sequence[ColumnConv2d], linear: nn.Linear | None = None) -> None:
        self.layers, self.linear = tuple(layers), linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What a tracer records as the node."""
        tensors = [
            tensor
            for layer in self.layers
            for tensor in (layer.weight, layer.columns, _bias_of(layer, layer.out_channels))
        ]
        if self.linear is not None:
            tensors += [self.linear.weight, _bias_of(self.linear, self.linear.out_features)]
        if residual is not None:
            tensors.append(residual)
        shape, has_residual = sizes_of(x), residual is not None
        attributes = partial(self.attributes, shape, has_residual)
        return record(NodeCall("ColumnChain", attributes, self.out_shape(shape)), x, *tensors)

    def out_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the output for an input of a shape."""
        *_, last = self._shapes(shape)
        return last if self.linear is None else (last[0], self.linear.out_features)

    def attributes(self, shape: Sequence[int], has_residual: bool) -> dict[str, Any]:
        """The operator's attributes; the suffix of a name says of which type it is."""
        specs = [layer.spec for layer in self.layers]
        ops = [(i, op) for i, spec in enumerate(specs) for op in spec.epilogue.post]
        return {
            "geometry_i": [n for spec in specs for n in geometry_numbers(spec.geometry)],
            "activation_i": [ACTIVATIONS.index(spec.epilogue.activation) for spec in specs],
            "clamp_f": [n for spec in specs for n in spec.epilogue.clamp],
            **post_attributes(ops),
            "linear_i": int(self.linear is not None),
            "residual_i": int(has_residual),
            "configs_i": self._configs(shape),
        }

    def _shapes(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        shapes = [tuple(shape)]
        for layer in self.layers:
            size = layer.spec.out_size(*shapes[-1][2:])
            shapes.append((shape[0], layer.geometry.filters, *size))
        return shapes

    def _configs(self, shape: Sequence[int]) -> list[int]:
        """Rows of what the cost model says of batches and threads: see ``native/onnx_chain.h``."""
        layers = [(layer.spec, len(layer.columns)) for layer in self.layers]
        rows = []
        for batch in sorted({*_BATCHES, shape[0]} - {0}):
            shapes = self._shapes((batch, *shape[1:]))
            for threads in sorted({*_THREADS, torch.get_num_threads()}):
                at_once = 0
                if len(layers) > 1 or self.linear is not None:
                    at_once = cost.choose_chain(layers, shapes[0], threads).threads
                rows += [batch, threads, at_once]
                for (spec, count), own in zip(layers, shapes, strict=False):
                    config = cost.choose(spec, count, own, torch.float32, threads, False).config
                    rows += [int(config.kernel), config.threads]
        return rows


def _bias_of(layer: ColumnConv2d | nn.Linear, size: int) -> Tensor:
    return layer.weight.new_zeros(size) if layer.bias is None else layer.bias
