"""The knapsack: one candidate per layer, of least cost, within a limit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["allocate", "fit_exactly"]

_BINS = 4000  # into which the limit is divided


def allocate(
    costs: Sequence[NDArray[np.float64]], sizes: Sequence[NDArray[np.float64]], limit: float
) -> list[int] | None:
    """Choose a candidate for every layer so that the sizes add up to about ``limit``.

    A dynamic program over the layers. Sizes are rounded to a 4000th of what the limit leaves over
    the smallest candidates, so the sum may miss the limit by a few of those.

    Args:
        costs: Cost of each candidate, ``(candidates,)``, layer by layer.
        sizes: What each candidate takes of the limit, likewise.
        limit: Most that all sizes may add up to, in the unit of ``sizes``.

    Returns:
        Number of the candidate of each layer, of the least total cost; None if even the smallest
        candidates exceed the limit.

    >>> costs = [np.array([0.0, 1.0, 5.0])] * 2
    >>> allocate(costs, [np.array([8.0, 4.0, 2.0]), np.array([3.0, 2.0, 1.0])], 7.0)
    [1, 0]
    """
    slack = limit - sum(float(size.min()) for size in sizes)
    if slack < 0:
        return None
    unit = max(slack / _BINS, 1e-300)
    best = np.zeros(_BINS + 1)  # least cost of the layers so far, by the bins that they may fill
    choices = []
    for cost, size in zip(costs, sizes, strict=True):
        bins = np.minimum((size - size.min()) / unit + 0.5, _BINS + 1).astype(int)
        options = np.full((len(size), _BINS + 1), np.inf)
        for i, width in enumerate(bins):
            if width <= _BINS:
                options[i, width:] = best[: _BINS + 1 - width] + cost[i]
        choices.append((options.argmin(0), bins))
        best = options.min(0)
    chosen, room = [], _BINS
    for candidate, bins in reversed(choices):
        chosen.append(int(candidate[room]))
        room -= int(bins[chosen[-1]])
    return chosen[::-1]


def fit_exactly(
    pruned: Sequence[int], most: Sequence[int], sizes: Sequence[int], excess: int
) -> list[int]:
    """Prune some groups more or less, so that the network ends just within its limit.

    Args:
        pruned: Groups to prune, layer by layer.
        most: Most groups that may be pruned, likewise.
        sizes: Size of one group, likewise.
        excess: By how much the network is above its limit; negative if below, in the unit of
            ``sizes``.

    Returns:
        The groups to prune: the limit is kept, and no pruned group could be kept, too.

    >>> fit_exactly([10, 10], [20, 20], [7, 2], excess=12)  # 2 · 7 more, but not 2 · 1
    [12, 9]
    """
    pruned = list(pruned)
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    # From a few groups of every layer to many, so that no layer changes much more than others.
    for share in (0.02, 0.1, 1.0):
        for i in largest_first:
            if excess > 0:
                room = min(most[i] - pruned[i], max(1, int(share * most[i])))
                count = min(room, -(-excess // sizes[i]))
                pruned[i] += count
                excess -= count * sizes[i]
    for share in (0.02, 0.1, 1.0):
        for i in largest_first:
            count = min(pruned[i], max(1, int(share * most[i])), -excess // sizes[i])
            pruned[i] -= count
            excess += count * sizes[i]
    return pruned
