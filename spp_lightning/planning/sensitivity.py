"""What pruning a layer costs in accuracy, estimated without training."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spp_lightning.method.groups import Criterion, LayerGranularity, WeightGroups, weight_of
from spp_lightning.method.rule import target_count
from spp_lightning.planning.trial import least_important_first

__all__ = ["MOST", "RATIOS", "Sensitivity", "loss_sensitivity", "weight_sensitivity"]

MOST = 31 / 32  # highest ratio that a plan gives a layer
RATIOS = (0.25, 0.5, 0.75, 0.875, MOST)
Sensitivity = dict[str, NDArray[np.float64]]  # by layer, a number for each of RATIOS


def weight_sensitivity(
    layers: Mapping[str, nn.Module],
    granularity: LayerGranularity = "column",
    criterion: Criterion = "l1",
) -> Sensitivity:
    """How much of a layer's weights goes with its least important groups.

    Args:
        layers: The layers, by name.
        granularity: The weight group.
        criterion: Importance of a group, by which the least important are found.

    Returns:
        By layer, −ln of the share of the squared norm that is kept, for each of ``RATIOS``.

    >>> conv = nn.Conv2d(4, 1, 1)
    >>> with torch.no_grad():
    ...     _ = conv.weight.copy_(torch.tensor([1.0, 3.0, 2.0, 4.0]).view(1, 4, 1, 1))
    >>> np.exp(-weight_sensitivity({"conv": conv})["conv"]) * 30
    array([29., 25., 16., 16., 16.])
    """
    costs = {}
    for name, layer in layers.items():
        groups = WeightGroups.of(layer, granularity)
        energy = groups.importance(weight_of(layer), "l2").double().square()
        order = least_important_first(layer, granularity, criterion)
        kept = energy[order].flip(0).cumsum(0).flip(0).cpu().numpy()  # from a group on
        counts = [target_count(groups.count, ratio) for ratio in RATIOS]
        shares = kept[counts] / kept[0] if kept[0] else np.ones(len(counts))
        costs[name] = -np.log(np.maximum(shares, 1e-12))
    return costs


def loss_sensitivity(
    model: nn.Module,
    names: list[str],
    loss: Callable[[nn.Module], float],
    granularity: LayerGranularity = "column",
    criterion: Criterion = "l1",
) -> Sensitivity:
    """How much the loss rises without a layer's least important groups, one layer at a time.

    Args:
        model: The network; it is left as it was.
        names: Names of the layers.
        loss: The loss of a network on a few batches. It is called with a copy of ``model`` in
            evaluation mode, ``1 + len(names) · len(RATIOS)`` times.
        granularity: The weight group.
        criterion: Importance of a group.

    Returns:
        By layer, the rise for each of ``RATIOS``, in the loss's unit. It is at least 0, and its
        slope never falls: where the loss of a ruined network stops rising, that says nothing about
        what is lost.

    Raises:
        ValueError: If the loss of the unpruned network is not finite.
    """
    twin = copy.deepcopy(model).eval()
    rises: Sensitivity = {}
    with torch.no_grad():
        dense = float(loss(twin))
        if not math.isfinite(dense):
            raise ValueError(f"`loss` of the unpruned network must be finite, got {dense}.")
        for name in names:
            layer = twin.get_submodule(name)
            groups, weight = WeightGroups.of(layer, granularity), weight_of(layer)
            order = least_important_first(layer, granularity, criterion)
            whole = weight.detach().clone()
            alive = torch.ones(groups.count, dtype=torch.bool, device=weight.device)
            row = []
            for ratio in RATIOS:
                alive[order[: target_count(groups.count, ratio)]] = False
                groups.zero(alive, weight)
                row.append(float(loss(twin)) - dense)
            weight.copy_(whole)
            rises[name] = _convex(np.array(row))
    return rises


def _convex(rises: NDArray[np.float64]) -> NDArray[np.float64]:
    """Raise values at ``RATIOS`` so that they start at 0 or above and never rise more slowly.

    >>> _convex(np.array([1.0, 1.0, 4.0, 4.0, np.inf]))
    array([1.  , 2.  , 4.  , 5.  , 5.75])
    """
    widths = np.diff([0.0, *RATIOS])
    rises = np.where(np.isfinite(rises), rises, np.nan)
    raised, slope, before = [], 0.0, 0.0
    for rise, width in zip(rises, widths, strict=True):
        slope = float(np.nanmax([slope, (rise - before) / width]))
        before += slope * width
        raised.append(before)
    return np.array(raised)
