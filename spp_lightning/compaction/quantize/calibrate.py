"""Runs a graph over calibration data: ranges of its values, and errors of its int8 layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from spp_lightning.compaction.graph.query import Node
from spp_lightning.compaction.layers.int8_reference import dequantize, quantize
from spp_lightning.compaction.layers.quantized import QuantizedConv2d
from spp_lightning.compaction.quantize.prepare import arguments_of
from spp_lightning.compaction.quantize.ranges import Range

__all__ = ["Noise", "layer_noise", "ranges_of", "watch"]

_Watcher = Callable[[Node, tuple[Any, ...], Any], None]


class _Interpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, watcher: _Watcher) -> None:
        super().__init__(graph)
        self._watcher = watcher

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        self._watcher(n, args, result)
        return result


def watch(graph: fx.GraphModule, batches: Iterable[Any], watcher: _Watcher) -> None:
    """Run a graph over batches, and call ``watcher`` with every node, its arguments and result."""
    with torch.no_grad():
        for batch in batches:
            _Interpreter(graph, watcher).run(*arguments_of(batch))


def ranges_of(
    graph: fx.GraphModule, batches: Sequence[Any], nodes: Collection[Collection[Node]]
) -> list[Range]:
    """The ranges of values; each range holds those of several nodes."""
    ranges = [Range() for _ in nodes]
    of: dict[Node, list[Range]] = {}
    for found, group in zip(ranges, nodes, strict=True):
        for node in group:
            of.setdefault(node, []).append(found)

    def widen(node: Node, _: Any, result: Any) -> None:
        for found in of.get(node, ()):
            found.widen(result)

    def count(node: Node, _: Any, result: Any) -> None:
        for found in of.get(node, ()):
            found.count(result)

    watch(graph, batches, widen)
    if all(found.is_finite for found in ranges):
        watch(graph, batches, count)
    return ranges


class Noise:
    """The error of a value: the root of its sum of squares over that of the exact numbers."""

    def __init__(self) -> None:
        self._exact, self._error = 0.0, 0.0

    def add(self, exact: Tensor, found: Tensor) -> None:
        """Count the numbers of two tensors of one shape."""
        self._exact += float(exact.double().square().sum())
        self._error += float((found.double() - exact.double()).square().sum())

    @property
    def error(self) -> float:
        """Relative error, without a unit."""
        if self._error == 0:
            return 0.0
        return math.sqrt(self._error / self._exact) if self._exact else math.inf

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio in dB."""
        return -20 * math.log10(self.error) if self.error else math.inf


def layer_noise(
    graph: fx.GraphModule, batches: Iterable[Any], layers: Mapping[str, QuantizedConv2d]
) -> dict[str, Noise]:
    """The error of each int8 layer alone, given the exact input.

    Args:
        graph: The float network, fused.
        batches: Inputs.
        layers: The int8 layers of the graph's layers, by name.
    """
    noises = {name: Noise() for name in layers}

    def compare(node: Node, args: tuple[Any, ...], result: Any) -> None:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if layer is not None:
            noises[str(node.target)].add(result, _real_output(layer, *args))

    watch(graph, batches, compare)
    return noises


def _real_output(layer: QuantizedConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """What an int8 layer makes of real numbers, as real numbers."""
    given = quantize(x, layer.input_scale, layer.input_zero_point)
    added = None
    if residual is not None:
        assert layer.residual_scale is not None and layer.residual_zero_point is not None
        added = quantize(residual, layer.residual_scale, layer.residual_zero_point)
    y: Tensor = layer(given) if added is None else layer(given, added)
    if layer.output_scale is None or layer.output_zero_point is None:
        return y
    return dequantize(y, layer.output_scale, layer.output_zero_point)
