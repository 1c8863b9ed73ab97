"""Slices of the channels that leave all of them, as GhostNet makes them."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from spp_lightning.compaction.graph.patterns import cat_operands, is_channelwise, is_whole_slice
from spp_lightning.compaction.graph.query import Node, module_of

__all__ = ["drop_whole_slices"]


def drop_whole_slices(graph: fx.GraphModule) -> None:
    """Remove the slices that leave all channels of an image, whatever its size.

    Args:
        graph: A traced network with the shapes of its tensors, changed in place.
    """
    for node in list(graph.graph.nodes):
        if not is_whole_slice(node) or not _leaves_pixels(node.args[1]):
            continue
        if _has_fixed_channels(graph, node.args[0]):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def _leaves_pixels(index: Any) -> bool:
    """Whether an index slices the second dimension only, up to a number."""
    index = index if isinstance(index, tuple) else (index,)
    return all(x.stop is None or (dim == 1 and type(x.stop) is int) for dim, x in enumerate(index))


def _has_fixed_channels(graph: fx.GraphModule, node: Node) -> bool:
    """Whether the layers that made a tensor always give it the same number of channels."""
    if type(module_of(graph, node)) in (nn.Conv2d, nn.BatchNorm2d):
        return True
    parts = cat_operands(node)
    if parts is None and is_channelwise(graph, node):
        parts = list(node.all_input_nodes)
    return bool(parts) and all(_has_fixed_channels(graph, part) for part in parts or ())
