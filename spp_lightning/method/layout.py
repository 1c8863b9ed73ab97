"""What a pruner works on: units with a ratio each, and the layers on which their masks act."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from spp_lightning.method.buffers import Spread
from spp_lightning.method.coupled.channels import masked_readers
from spp_lightning.method.coupled.example import example_of
from spp_lightning.method.coupled.macs import NetworkMacs
from spp_lightning.method.coupled.selection import select_channels
from spp_lightning.method.groups import WeightGroups
from spp_lightning.method.layer import MaskedLayer, PrunedLayer, PrunedUnit
from spp_lightning.method.rule import target_count
from spp_lightning.method.selection import select_layers
from spp_lightning.method.settings import SPPSettings

__all__ = ["Layout", "lay_out"]


class Layout(NamedTuple):
    """What is pruned of a network.

    Attributes:
        units: What has a ratio each: layers, or sets of coupled channels.
        masked: The layers on which masks act.
        spread: Which channels of those each group masks. None: the units are the masked layers.
        skipped: Layers that are left out, by name, with the reason.
        macs: The MACs of a network with coupled channels; None for single layers.
    """

    units: Sequence[PrunedUnit]
    masked: list[MaskedLayer]
    spread: Spread | None
    skipped: dict[str, str]
    macs: NetworkMacs | None


def lay_out(model: nn.Module, settings: SPPSettings) -> Layout:
    """Select what is pruned, and give it its place in the pruner's buffers.

    Raises:
        ValueError: As :func:`select_layers` or :func:`select_channels` do.
    """
    if settings.granularity == "coupled-channel":
        found = select_channels(model, settings, example_of(model, settings.input_shape))
        return Layout(found.units, *masked_readers(found.units), found.skipped, found.macs)
    selection = select_layers(model, settings.ratio, settings.layers)
    units: list[PrunedLayer] = []
    start = 0
    for name, module in selection.layers.items():
        groups = WeightGroups.of(module, settings.granularity)
        ratio = selection.ratios[name]
        target = target_count(groups.count, ratio)
        span = slice(start, start + groups.count)
        layer = MaskedLayer(name, module, groups, span)
        units.append(PrunedLayer(name, ratio, target, span, layer))
        start = span.stop
    return Layout(units, [unit.layer for unit in units], None, selection.skipped, None)
