"""One layer under pruning."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from spp_lightning.method.groups import WeightGroups, weight_of

__all__ = ["PrunedLayer"]


@dataclass
class PrunedLayer:
    """A layer under pruning: where its groups lie in the pruner's buffers, and its counts."""

    name: str
    module: nn.Module
    groups: WeightGroups
    ratio: float  # target sparsity
    target: int  # groups to prune
    span: slice  # of the buffers
    num_pruned: int = 0
    num_recovered: int = 0  # groups whose p fell in the last update
    positions: int = 0  # output positions per input; 0 until the layer has run uncompiled

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, without masks."""
        return weight_of(self.module)

    @property
    def finished(self) -> bool:
        """Whether the target is reached."""
        return self.num_pruned == self.target

    @property
    def macs(self) -> tuple[int, int]:
        """MACs per input, dense and without the pruned groups."""
        per_group = self.positions * self.groups.size
        count = self.groups.count
        return per_group * count, per_group * (count - self.num_pruned)
