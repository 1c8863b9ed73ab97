"""Chains of a network, measured on the device that runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spp_lightning.compaction.graph.network import CompactNetwork
from spp_lightning.compaction.layers.chain import tune_chain
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = ["tune_chains"]


def tune_chains(network: CompactNetwork, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Measure every chain of a network for an input, and keep what is fastest.

    Args:
        network: The network.
        inputs: Its positional arguments.
        named: Its keyword arguments.
    """
    seen: dict[nn.Module, tuple[Any, ...]] = {}
    chains = [[network.get_submodule(name) for name in row] for row in network.joined_layers]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, given: seen.update({layer: given}))
        for chain in chains
        for layer in chain
    ]
    try:
        with torch.no_grad():
            network(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    for chain in chains:
        layers = [layer for layer in chain if isinstance(layer, ColumnConv2d)]
        linear = chain[-1] if isinstance(chain[-1], nn.Linear) else None
        (x,), (_, *residual) = seen[layers[0]][:1], seen[layers[-1]]
        tune_chain(x, residual[0] if residual else None, *layers, linear=linear)
