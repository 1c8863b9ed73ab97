"""Trial networks: copies whose least important weight groups are pruned already."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spp_lightning.method.groups import Criterion, LayerGranularity, WeightGroups, weight_of

__all__ = ["least_important_first", "trial_network"]


def least_important_first(
    layer: nn.Module, granularity: LayerGranularity = "column", criterion: Criterion = "l1"
) -> Tensor:
    """Indices of a layer's weight groups, ``(groups,)``, the least important first."""
    groups = WeightGroups.of(layer, granularity)
    return groups.importance(weight_of(layer), criterion).argsort(stable=True)


def trial_network(
    model: nn.Module,
    num_pruned: Mapping[str, int],
    granularity: LayerGranularity = "column",
    criterion: Criterion = "l1",
) -> nn.Module:
    """A copy of a network in evaluation mode, its least important weight groups set to 0.

    Args:
        model: The network; it is left as it was.
        num_pruned: Groups to prune, by layer name.
        granularity: The weight group.
        criterion: Importance of a group.

    >>> net = nn.Sequential(nn.Conv2d(4, 8, 1))
    >>> trial = trial_network(net, {"0": 3})
    >>> int((trial[0].weight == 0).all(0).sum()), int((net[0].weight == 0).all(0).sum())
    (3, 0)
    """
    trial = copy.deepcopy(model).eval()
    for name, count in num_pruned.items():
        layer = trial.get_submodule(name)
        groups = WeightGroups.of(layer, granularity)
        weight = weight_of(layer)
        alive = torch.ones(groups.count, dtype=torch.bool, device=weight.device)
        alive[least_important_first(layer, granularity, criterion)[:count]] = False
        groups.zero(alive, weight)
    return trial
