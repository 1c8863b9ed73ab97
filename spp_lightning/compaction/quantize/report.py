"""Which layers of a network are int8, and how large the error of each is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.layers.quantized import QuantizedConv2d
from spp_lightning.compaction.quantize.calibrate import Noise, layer_noise
from spp_lightning.compaction.quantize.notes import reason_of
from spp_lightning.compaction.quantize.pipeline import checked_batches
from spp_lightning.compaction.quantize.prepare import arguments_of, fuse, prepare
from spp_lightning.compaction.quantize.select import float_reasons

__all__ = ["LayerPrecision", "QuantizeReport", "quantize_report"]


class LayerPrecision(NamedTuple):
    """How a convolution or linear layer computes.

    Attributes:
        name: Of the layer.
        precision: ``"int8"`` or ``"float32"``.
        error: Relative error of the layer's output, as the root of a mean square, given the exact
            input; 0 for float32.
        snr_db: The same as a signal-to-noise ratio in dB.
        reason: Why the layer is float32; empty for int8.
    """

    name: str
    precision: str
    error: float
    snr_db: float
    reason: str


class QuantizeReport(NamedTuple):
    """What a quantised network computes; as text, a table.

    Attributes:
        layers: One row per convolution and linear layer, in the order of the forward pass.
        error: Relative error of the network's output.
        snr_db: The same as a signal-to-noise ratio in dB.
    """

    layers: tuple[LayerPrecision, ...]
    error: float
    snr_db: float

    def __str__(self) -> str:
        head = ("layer", "precision", "error", "dB", "why float32")
        rows = [
            (
                *(row.name, row.precision),
                *(
                    ("", "")
                    if row.precision == "float32"
                    else (f"{row.error:.4f}", f"{row.snr_db:.1f}")
                ),
                row.reason,
            )
            for row in self.layers
        ]
        rows.append(("output", "", f"{self.error:.4f}", f"{self.snr_db:.1f}", ""))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i in (2, 3) else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (head, *rows)
        )


def quantize_report(net: nn.Module, quantized: nn.Module, batches: Iterable[Any]) -> QuantizeReport:
    """Compare a quantised network with the float one, layer by layer.

    Args:
        net: The float network that :func:`quantize_compact` was given.
        quantized: What it returned, or :func:`load_compact` read.
        batches: Inputs, as :func:`quantize_compact` takes them: its calibration data, or others.

    Raises:
        ValueError: If one of the networks isn't a compact one, they don't have the same layers,
            or ``batches`` are no inputs of them.

    >>> from spp_lightning import compact, quantize_compact
    >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    >>> with torch.no_grad():
    ...     _ = net[2].weight[:, :, 1:].zero_()
    >>> batches = [torch.randn(8, 16, 32, 32)]
    >>> fast = compact(net, batches[0])
    >>> report = quantize_report(fast, quantize_compact(fast, batches, keep=["0"]), batches)
    >>> [(row.name, row.precision, row.reason) for row in report.layers]
    [('0', 'float32', 'named by `keep`'), ('2', 'int8', '')]
    >>> report.layers[1].error < 0.02
    True
    """
    given = checked_batches("net", net, batches)
    given = checked_batches("quantized", quantized, given)
    assert isinstance(net, CompactNetwork)
    graph = prepare(net, given[0])
    reasons = float_reasons(graph)
    layers = {
        name: layer
        for name, layer in quantized.named_modules()
        if isinstance(layer, QuantizedConv2d)
    }
    unknown = [name for name in layers if name not in reasons or reasons[name]]
    if unknown:
        raise ValueError(
            f"`quantized` must be what `quantize_compact` made of `net`, but its int8 layers"
            f" {', '.join(unknown)} are none that it makes of it."
        )
    fuse(graph, layers)
    noises = layer_noise(graph, given, layers)
    rows = []
    for name, reason in reasons.items():
        noise = noises.get(name, Noise())
        if name in layers:
            rows.append(LayerPrecision(name, "int8", noise.error, noise.decibels, ""))
            continue
        noted = reason_of(quantized.get_submodule(name))
        why = noted or reason or "chosen by `keep` or `max_error`"
        rows.append(LayerPrecision(name, "float32", noise.error, noise.decibels, why))
    whole = _output_noise(net, quantized, given)
    return QuantizeReport(tuple(rows), whole.error, whole.decibels)


def _output_noise(net: nn.Module, quantized: nn.Module, batches: Iterable[Any]) -> Noise:
    noise = Noise()
    with torch.no_grad():
        for batch in batches:
            exact, found = (
                [x for x in tree_leaves(network(*arguments_of(batch))) if isinstance(x, Tensor)]
                for network in (net, quantized)
            )
            for first, second in zip(exact, found, strict=True):
                noise.add(first, second)
    return noise
