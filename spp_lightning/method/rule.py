"""The update of the pruning probabilities: pure maths on the weight groups of one layer.

The paper's symbols and their names here:

=====  ================  ===========================================================
R      ``prune_ratio``   share of the layer's weight groups to prune
N_c    ``num_groups``    weight groups of the layer
n      ``num_pruned``    weight groups pruned so far
p      ``probability``   pruning probability of a weight group; 1 means pruned for good
A      ``A``             size of an update: the change of p at rank 0
u      ``u``             flatness of an update: its change at the inflection is u·A
r      ``rank``          rank of a group's importance among the groups alive, from 0
K      ``zero_rank``     rank at which an update changes nothing
α      ``decay``         rate at which the update falls with the rank
q      ``center``        rank of the inflection, about which Δ is symmetric
Δ      ``delta``         change of p in one update
=====  ================  ===========================================================

Source: Wang, Zhang, Wang, Hu: Structured Probabilistic Pruning, BMVC 2018, arXiv 1709.06994.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from spp_lightning.method.ordering import ascending_order, move

__all__ = ["count_updates", "delta", "spaced_ranks", "target_count", "update_probability"]


def target_count(num_groups: int, prune_ratio: float) -> int:
    """Number of weight groups to prune in a layer: ``min(ceil(R·N_c), N_c − 1)``.

    A product ``R·N_c`` that is a whole number up to rounding counts as that number.

    Args:
        num_groups: Weight groups of the layer, at least 1.
        prune_ratio: Share to prune, in [0, 1).

    Returns:
        The number of groups to prune. At least one group is kept.

    >>> target_count(800, 0.75), target_count(75, 0.75), target_count(1, 0.75)
    (600, 57, 0)
    >>> target_count(100, 0.55)  # 0.55 * 100 is 55.00000000000001 in floating point
    55
    """
    product = prune_ratio * num_groups
    return min(math.ceil(product - 1e-9 * max(product, 1.0)), num_groups - 1)


def zero_crossing(
    num_groups: int, prune_ratio: float, num_pruned: int, crossing: float = 0.5
) -> float:
    """Rank K at which an update changes nothing, among the groups still alive.

    ``crossing`` 0 is the rank of the layer's target, 1 that of its last group. SPP uses 0.5.

    >>> zero_crossing(800, 0.75, 0), zero_crossing(800, 0.75, 500)
    (700.0, 200.0)
    """
    return (prune_ratio * (1 - crossing) + crossing) * num_groups - num_pruned


def delta(rank: Tensor, zero_rank: float, A: float = 0.05, u: float = 0.25) -> Tensor:
    """Change of the pruning probability at each rank, in one update.

    Strictly decreasing: ``A`` at rank 0, ``u·A`` at the inflection, 0 at ``zero_rank``, negative
    after that. Symmetric about the inflection.

    Args:
        rank: Ranks from 0 (least important), any shape, not necessarily whole numbers.
        zero_rank: The rank K of no change, above 0.
        A: Change at rank 0, above 0.
        u: Change at the inflection as a share of ``A``, in (0, 1).

    Returns:
        The changes, of the shape and dtype of ``rank``.

    Source: Wang et al., BMVC 2018, the increment Δ.

    >>> delta(torch.tensor([0.0, 700.0, 710.0]), zero_rank=700.0)
    tensor([ 0.0500,  0.0000, -0.0008])
    """
    decay, center = _shape(zero_rank, u)
    rising, falling = _rising(rank, A, decay), _falling(rank, A, u, decay, center)
    return torch.where(rank <= center, rising, falling)


def _delta_of_ranks(
    num_ranks: int, zero_rank: float, A: float, u: float, probability: Tensor
) -> Tensor:
    """:func:`delta` of the ranks 0, 1, …; each side of the inflection is computed alone."""
    decay, center = _shape(zero_rank, u)
    rank = torch.arange(num_ranks, dtype=probability.dtype, device=probability.device)
    early, late = rank.tensor_split([math.floor(center) + 1])
    return torch.cat([_rising(early, A, decay), _falling(late, A, u, decay, center)])


def _shape(zero_rank: float, u: float) -> tuple[float, float]:
    decay = (math.log(2) - math.log(u)) / zero_rank
    return decay, -math.log(u) / decay


def _rising(rank: Tensor, A: float, decay: float) -> Tensor:
    return A * torch.exp(-decay * rank)


def _falling(rank: Tensor, A: float, u: float, decay: float, center: float) -> Tensor:
    return 2 * u * A - A * torch.exp(-decay * (2 * center - rank))


def spaced_ranks(importance: Tensor, zero_rank: float) -> Tensor:
    """Scale importance like ranks: 0 for the smallest, K for that of rank ⌈K⌉.

    Args:
        importance: Importance of the groups alive, ascending, ``(alive,)``.
        zero_rank: The rank K of no change. If fewer groups are alive, the last one gets K.

    Returns:
        A rank per group, ``(alive,)``. If the smallest importance equals that of rank ⌈K⌉, groups
        of this importance get 0 and all others infinity.

    Source: the appendix's comparison "SPP + L1" against "SPP + rank".

    >>> spaced_ranks(torch.tensor([1.0, 2.0, 5.0]), zero_rank=1.5)
    tensor([0.0000, 0.3750, 1.5000])
    """
    last = min(math.ceil(zero_rank), len(importance) - 1)
    distance = importance - importance[0]
    ranks = zero_rank * (distance / distance[last])
    return ranks.masked_fill(distance == 0, 0.0)


def update_probability(
    probability: Tensor,
    importance: Tensor,
    prune_ratio: float,
    num_pruned: int,
    A: float = 0.05,
    u: float = 0.25,
    use_rank: bool = True,
    crossing: float = 0.5,
    recovery: bool = True,
) -> Tensor:
    """Update a layer's pruning probabilities once.

    Groups at 1 are pruned for good. The others change by :func:`delta` of their rank among
    themselves; ties rank by position. If more of them reach 1 than the layer still needs, those of
    lowest rank are pruned. Once the target is reached, all other groups go back to 0.

    Args:
        probability: Pruning probabilities, ``(groups,)``, in [0, 1].
        importance: Importance of the groups, ``(groups,)``, finite.
        prune_ratio: Share of groups to prune, in [0, 1).
        num_pruned: Number of groups at 1, below the target. An argument, because counting would
            wait for the GPU.
        A: Change at rank 0, above 0.
        u: Flatness of an update, in (0, 1).
        use_rank: Whether to use the rank of the importance, or the importance itself, scaled by
            :func:`spaced_ranks`.
        crossing: Where the change crosses zero, in (0, 1]: see :func:`zero_crossing`.
        recovery: Whether p may fall. If False, negative changes become 0.

    Returns:
        The new probabilities, ``(groups,)``; ``probability`` is left as it was.

    Raises:
        ValueError: If the shapes of ``probability`` and ``importance`` differ.

    Source: Wang et al., BMVC 2018, the update of p.

    >>> p = torch.tensor([0.97, 0.0, 1.0, 0.5], dtype=torch.float64)
    >>> update_probability(p, torch.tensor([1.0, 3.0, 0.0, 2.0]), prune_ratio=0.75, num_pruned=1)
    tensor([1.0000, 0.0085, 1.0000, 0.5218], dtype=torch.float64)
    """
    if probability.shape != importance.shape:
        raise ValueError(
            "`probability` and `importance` must have one shape, got"
            f" {tuple(probability.shape)} and {tuple(importance.shape)}."
        )
    num_groups = len(probability)
    num_alive = num_groups - num_pruned
    target = target_count(num_groups, prune_ratio)
    zero_rank = zero_crossing(num_groups, prune_ratio, num_pruned, crossing)

    # Groups alive by ascending importance: the position is the rank. Pruned groups come last.
    order = ascending_order(importance, probability)[:num_alive]
    if use_rank:
        change = _delta_of_ranks(num_alive, zero_rank, A, u, probability)
    else:
        rank = spaced_ranks(importance[order].to(probability.dtype), zero_rank)
        change = delta(rank, zero_rank, A, u)
    if not recovery:
        change = change.clamp(min=0)
    return move(probability, order, change, target - num_pruned)


@lru_cache(maxsize=1024)
def count_updates(
    num_groups: int, prune_ratio: float, A: float = 0.05, u: float = 0.25, crossing: float = 0.5
) -> int:
    """Number of updates until a layer reaches its target, if the ranks of its groups never change.

    In training, ranks do change, and it takes a few updates more.

    Args:
        num_groups: Weight groups of the layer, at least 1.
        prune_ratio: Share of groups to prune, in [0, 1).
        A: Change at rank 0, above 0.
        u: Flatness of an update, in (0, 1).
        crossing: Where an update changes nothing, in (0, 1]: see :func:`zero_crossing`.

    Returns:
        The number of updates; 0 if there is nothing to prune.

    >>> count_updates(800, 0.75)
    75
    """
    target = target_count(num_groups, prune_ratio)
    probability = torch.zeros(num_groups, dtype=torch.float64)
    importance = torch.arange(num_groups, dtype=torch.float32)
    num_updates = num_pruned = 0
    while num_pruned < target:
        # The group of rank 0 gains A per update, so at least every 1/A updates one is pruned.
        assert num_updates <= (num_groups + 1) * (1 / A + 1), "the rule must come to an end"
        probability = update_probability(
            probability, importance, prune_ratio, num_pruned, A, u, crossing=crossing
        )
        num_pruned = int((probability >= 1).sum())
        num_updates += 1
    return num_updates
