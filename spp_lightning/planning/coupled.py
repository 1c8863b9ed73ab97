"""Plans for coupled channels: one ratio for all sets, solved from the MACs that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from spp_lightning.method.coupled.example import Example
from spp_lightning.method.coupled.selection import select_channels
from spp_lightning.method.groups import weight_of
from spp_lightning.planning.plan import LayerPlan, Plan
from spp_lightning.planning.target import Target, TargetSettings

__all__ = ["CoupledPlanner"]


class CoupledPlanner:
    """Finds the coupled channels of a network once, and solves any number of targets from that.

    Args:
        model: The network; it is left as it was.
        inputs: The positional arguments that show how its channels are coupled. MACs are those of
            one image.
        settings: What may be pruned, and the ratios or the speedup where there is no target.

    Raises:
        ValueError: If there are no coupled channels to prune, or the given speedup can't be
            reached.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> settings = TargetSettings(granularity="coupled-channel", prune_ratio=0.5)
    >>> found = CoupledPlanner(net, (torch.zeros(1, 3, 8, 8),), settings).solve(None)
    >>> found.ratios, found.dense_macs, found.macs
    ({'0': 0.5}, 12384, 6192)
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], settings: TargetSettings) -> None:
        found = select_channels(model, settings, Example(inputs, {}))
        self._units, self._macs = found.units, found.macs
        self._left_out = found.skipped
        self._floor: Mapping[str, int] = {}

    def solve(self, target: Target | None) -> Plan:
        """The plan for a target of the network's MACs.

        Args:
            target: The target; None for the ratios or the speedup that the settings give.

        Raises:
            ValueError: If the target can't be reached.
        """
        if target is None:
            counts = {unit.name: unit.target for unit in self._units}
        else:
            limit = target.limit(self._macs.dense)
            counts = self._macs.solve(limit, str(target), self._floor)
        dense = self._macs.layers({})
        layers = [
            LayerPlan(
                unit.name,
                tuple(weight_of(unit.modules[unit.channels.writers[0]]).shape),
                unit.count,
                counts[unit.name],
                sum(dense[name] for name in unit.channels.writers),
            )
            for unit in self._units
        ]
        return Plan(
            "the given ratios" if target is None else target.in_words(),
            tuple(layers),
            self._left_out,
            self._macs.dense,
            self._macs.total(counts),
        )

    def go_beyond(self, plan: Plan) -> None:
        """From now on, prune at least what a plan prunes of each set."""
        self._floor = {layer.name: layer.pruned for layer in plan.layers}
