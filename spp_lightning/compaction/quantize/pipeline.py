"""quantize_compact(): makes a compact network compute in int8. The steps stand in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_leaves

from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.layers.quantized import QuantizedConv2d
from spp_lightning.compaction.quantize.calibrate import layer_noise, ranges_of
from spp_lightning.compaction.quantize.notes import note_reason
from spp_lightning.compaction.quantize.prepare import arguments_of, fuse, prepare
from spp_lightning.compaction.quantize.ranges import METHODS, Method
from spp_lightning.compaction.quantize.rewrite import int8_layers, rewrite
from spp_lightning.compaction.quantize.select import FLOAT_KINDS, float_reasons, matches
from spp_lightning.compaction.quantize.values import domains

__all__ = ["checked_batches", "quantize_compact"]


def quantize_compact(
    net: nn.Module,
    batches: Iterable[Any],
    keep: Sequence[str] = (),
    max_error: float | None = None,
    method: Method = "mse",
) -> CompactNetwork:
    """Make a compact network compute in int8: post-training quantisation.

    Convolutions and large linear layers get int8 weights with a scale per filter. They read uint8
    activations with a scale and a zero point per tensor, which are found on ``batches``. Batch
    norms are folded. Activations stay uint8 from layer to layer, through additions that layers
    compute, max pools and concatenations. Everything else computes in float32: depthwise
    convolutions, gates, average pools, small linear layers. :func:`quantize_report` tells which
    layers became int8, why the others did not, and how large the error of each is.

    The result is for inference, on images of any size that ``net`` takes. The same network and
    batches give the same bits.

    Args:
        net: What :func:`compact` returned or :func:`load_compact` read; it is left as it was.
        batches: What the network is run with to find the ranges of its activations, such as a few
            hundred training images, prepared as for training: a list of tensors, or, for a network
            of several inputs, of tuples of its positional arguments. All of them are kept in
            memory.
        keep: Names of layers that stay float32; patterns as of a shell, such as ``"layer4.*"``.
        max_error: Layers whose own relative error on ``batches`` is larger stay float32. None: all
            become int8.
        method: How the scales of activations are chosen: ``"mse"`` by the least squared error,
            ``"max"`` so that all numbers of the batches fit, ``"percentile"`` so that all but
            0.01 % of them do.

    Returns:
        The quantised network, in evaluation mode and on the device of ``net``.

    Raises:
        ValueError: If ``net`` isn't a compact network of float32, or has no layer that can become
            int8; if ``batches`` has no batch, or the network fails for one, or makes numbers of it
            that aren't finite; if a pattern of ``keep`` is that of no layer, or another argument is
            out of range.

    >>> from spp_lightning import compact
    >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    >>> with torch.no_grad():
    ...     _ = net[2].weight[:, :, 1:].zero_()
    >>> batches = [torch.randn(8, 16, 32, 32) for _ in range(2)]
    >>> fast = compact(net, batches[0])
    >>> quantized = quantize_compact(fast, batches)
    >>> quantized.get_submodule("2").weight.dtype, quantized(batches[0]).dtype
    (torch.int8, torch.float32)
    >>> error = quantized(batches[0]) - fast(batches[0])
    >>> bool(error.norm() < 0.02 * fast(batches[0]).norm())
    True
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    if max_error is not None and not (isinstance(max_error, (int, float)) and max_error > 0):
        raise ValueError(f"`max_error` must be a number above 0, or None, got {max_error!r}.")
    given = checked_batches("net", net, batches)
    assert isinstance(net, CompactNetwork)
    graph = prepare(net, given[0])
    reasons = float_reasons(graph, _checked_patterns(graph, keep))
    network, above = _quantized(graph, reasons, given, method, max_error)
    if above:
        network, _ = _quantized(prepare(net, given[0]), reasons | above, given, method, None)
    return network


def _quantized(
    graph: fx.GraphModule,
    reasons: dict[str, str],
    batches: Sequence[Any],
    method: Method,
    max_error: float | None,
) -> tuple[CompactNetwork, dict[str, str]]:
    """The int8 network of a prepared graph, and why some of its int8 layers should stay float32."""
    names = [name for name, reason in reasons.items() if not reason]
    if not names:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"`net` has no layer that can become int8. {told or 'It has no layers'}.")
    for name, reason in reasons.items():
        note_reason(graph.get_submodule(name), reason)
    fuse(graph, names)
    with torch.no_grad():
        ShapeProp(graph).propagate(*arguments_of(batches[0]))
    found = domains(graph, names)
    ranges = ranges_of(graph, batches, [domain.roots for domain in found])
    for domain, numbers in zip(found, ranges, strict=True):
        if not numbers.is_finite:
            value = domain.roots[0].name
            raise ValueError(f"`batches` must give finite numbers; {value} is not finite for them.")
    scales = {domain: numbers.scale(method) for domain, numbers in zip(found, ranges, strict=True)}
    layers = int8_layers(graph, names, scales)
    above = {} if max_error is None else _above(graph, batches, layers, max_error)
    rewrite(graph, layers, scales)
    return CompactNetwork.of(graph).requires_grad_(False), above


def _above(
    graph: fx.GraphModule,
    batches: Sequence[Any],
    layers: Mapping[str, QuantizedConv2d],
    max_error: float,
) -> dict[str, str]:
    """The layers whose error is above a limit, and what is said of them."""
    return {
        name: f"its error, {noise.error:.3f}, is above `max_error` (={max_error})"
        for name, noise in layer_noise(graph, batches, layers).items()
        if noise.error > max_error
    }


def checked_batches(name: str, net: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """Calibration data as a list, after a network and the data were checked.

    Args:
        name: Of the argument ``net``.
        net: The network.
        batches: The data.

    Raises:
        ValueError: If ``net`` is no compact network of float32, or fails for a batch.
    """
    if not isinstance(net, CompactNetwork):
        raise ValueError(_not_compact(name, net))
    if name == "net" and any(isinstance(x, QuantizedConv2d) for x in net.modules()):
        raise ValueError("`net` must be a float network, but is quantised already.")
    opaque = net.opaque_layers
    if opaque:
        raise ValueError(
            f"`{name}` must hold no modules that torch.fx cannot trace, got {', '.join(opaque)}."
        )
    other = {
        str(x.dtype) for x in net.parameters() if x.is_floating_point() and x.dtype != torch.float32
    }
    if other:
        raise ValueError(f"`{name}` must be of float32, got parameters of {', '.join(other)}.")
    if isinstance(batches, Tensor):
        raise ValueError(
            "`batches` must be a list of batches, got one tensor; give `[batch]`, or"
            " `batch.split(64)`."
        )
    if not isinstance(batches, Iterable):
        raise ValueError(f"`batches` must be a list of batches, got {type(batches).__name__}.")
    given = list(batches)
    if not given:
        raise ValueError("`batches` must hold at least one batch, got none.")
    for position, batch in enumerate(given):
        try:
            with torch.no_grad():
                net(*arguments_of(batch))
        except Exception as error:  # whatever a network raises for an input that doesn't fit
            leaves = tree_leaves(batch)
            shapes = "; ".join(
                f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
                for x in leaves
            )
            hint = ""
            if isinstance(batch, list):
                hint = " Of a loader of images and labels, give `[x for x, _ in loader]`."
            raise ValueError(
                f"`batches[{position}]` (={shapes}) must be an input of `{name}`, but the network"
                f" fails for it: {error}{hint}"
            ) from error
    return given


def _not_compact(name: str, net: object) -> str:
    modules = net.named_modules() if isinstance(net, nn.Module) else ()
    parts = [f"`{name}.{x}`" for x, part in modules if isinstance(part, CompactNetwork)]
    told = f"; quantise its compact parts, {', '.join(parts)}" if parts else ""
    return (
        f"`{name}` must be a network that `compact` made of a traceable one (a CompactNetwork), got"
        f" {type(net).__name__}{told}."
    )


def _checked_patterns(graph: fx.GraphModule, keep: Sequence[str]) -> Sequence[str]:
    if isinstance(keep, str) or not all(isinstance(x, str) for x in keep):
        raise ValueError(f"`keep` must be a list of patterns of layer names, got {keep!r}.")
    names = [name for name, x in graph.named_modules() if isinstance(x, FLOAT_KINDS)]
    for pattern in keep:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(
                f"`keep` (={list(keep)}) must name layers, but {pattern!r} matches none of"
                f" {', '.join(names)}."
            )
    return keep
