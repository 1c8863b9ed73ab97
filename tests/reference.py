"""An independent reference of SPP: plain Python loops, written from the paper's method alone.

Nothing here imports the package or torch; a weight is a NumPy array, all else is floats and lists.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np


def target(ratio: float, groups: int) -> int:
    """How many groups a layer prunes: the smallest whole number not under R * N_c; one stays."""
    count = 0
    while count < ratio * groups - 1e-9:
        count += 1
    return min(count, groups - 1)


def crossing(ratio: float, groups: int, pruned: int, at: float = 0.5) -> float:
    """K: the rank, among the groups alive, at which the change of p is zero.

    It lies a share ``at`` of the way from the target to the last group.
    """
    return ratio * groups + at * (groups - ratio * groups) - pruned


def delta(r: float, k: float, a: float, u: float) -> float:
    alpha = (math.log(2) - math.log(u)) / k
    q = -math.log(u) / alpha
    if r <= q:
        return a * math.exp(-alpha * r)
    exponent = -alpha * (2 * q - r)
    return 2 * u * a - a * math.exp(exponent) if exponent < 700 else -math.inf


def positions(importance: list[float], alive: list[int], k: float, by: str) -> dict[int, float]:
    """r of every group alive: its rank, or its importance stretched so that rank K stays at K."""
    order = sorted(alive, key=lambda g: (importance[g], g))
    if by == "rank":
        return {g: float(rank) for rank, g in enumerate(order)}
    low = importance[order[0]]
    at_k = importance[order[min(math.ceil(k), len(order) - 1)]]
    return {g: k * (importance[g] - low) / (at_k - low) for g in order}


@dataclass
class Layer:
    """The pruning state of one layer."""

    groups: int
    ratio: float
    a: float = 0.05
    u: float = 0.25
    by: str = "rank"
    at: float = 0.5
    p: list[float] = field(default_factory=list)
    updates: int = 0

    def __post_init__(self) -> None:
        self.p = [0.0] * self.groups

    @property
    def pruned(self) -> set[int]:
        return {g for g in range(self.groups) if self.p[g] == 1}

    @property
    def finished(self) -> bool:
        return len(self.pruned) == target(self.ratio, self.groups)

    def update(self, importance: list[float]) -> None:
        if self.finished:
            return
        self.updates += 1
        alive = [g for g in range(self.groups) if self.p[g] < 1]
        needed = target(self.ratio, self.groups) - len(self.pruned)
        k = crossing(self.ratio, self.groups, len(self.pruned), self.at)
        r = positions(importance, alive, k, self.by)
        reached = 0
        for g in sorted(alive, key=lambda g: (importance[g], g)):
            value = min(max(self.p[g] + delta(r[g], k, self.a, self.u), 0.0), 1.0)
            if value == 1:
                reached += 1
                if reached > needed:
                    value = math.nextafter(1.0, 0.0)
            self.p[g] = value
        if self.finished:
            for g in range(self.groups):
                if self.p[g] < 1:
                    self.p[g] = 0.0


def members(
    shape: tuple[int, ...], conv_groups: int, granularity: str
) -> list[list[tuple[int, ...]]]:
    """The weight positions of every weight group, in the order of the groups.

    ``shape`` is ``(filters, channels per conv group, *kernel)``. A column is one input channel and
    one kernel position, over all filters that read the channel.
    """
    filters, channels_read, *kernel = shape
    spots = list(itertools.product(*(range(size) for size in kernel)))
    per_group = filters // conv_groups
    if granularity == "filter":
        return [
            [(f, c, *spot) for c in range(channels_read) for spot in spots] for f in range(filters)
        ]
    groups = []
    for channel in range(channels_read * conv_groups):
        conv_group, c = divmod(channel, channels_read)
        readers = range(conv_group * per_group, (conv_group + 1) * per_group)
        columns = [[(f, c, *spot) for f in readers] for spot in spots]
        groups += (
            columns
            if granularity == "column"
            else [[spot for column in columns for spot in column]]
        )
    return groups


def importance(
    weight: np.ndarray, conv_groups: int = 1, granularity: str = "column", norm: int = 1
) -> list[float]:
    scores = []
    for group in members(weight.shape, conv_groups, granularity):
        total = 0.0
        for spot in group:
            total += abs(float(weight[spot])) ** norm
        scores.append(total ** (1 / norm))
    return scores


def weight_mask(
    factors: list[float], shape: tuple[int, ...], conv_groups: int = 1, granularity: str = "column"
) -> np.ndarray:
    mask = np.zeros(shape)
    for factor, group in zip(factors, members(shape, conv_groups, granularity), strict=True):
        for spot in group:
            mask[spot] = float(factor)
    return mask


@dataclass
class Training:
    """SGD with momentum and weight decay on ``0.5 * sum((w * mask - goal)^2)``, under SPP."""

    weight: np.ndarray
    goal: np.ndarray
    layer: Layer
    interval: int
    lr: float
    momentum: float
    decay: float

    def __post_init__(self) -> None:
        self.buffer = np.zeros_like(self.weight)
        self.step = 0

    def clear_pruned(self) -> None:
        groups = members(self.weight.shape, 1, "column")
        for g in self.layer.pruned:
            for spot in groups[g]:
                self.weight[spot] = self.buffer[spot] = 0.0

    def update_if_due(self) -> None:
        if self.step % self.interval == 0:
            self.layer.update(importance(self.weight))
            self.clear_pruned()

    def train_step(self, kept: list[bool]) -> None:
        mask = weight_mask(kept, self.weight.shape)
        for spot in itertools.product(*(range(size) for size in self.weight.shape)):
            from_loss = mask[spot] * (self.weight[spot] * mask[spot] - self.goal[spot])
            slope = from_loss + self.decay * self.weight[spot]
            self.buffer[spot] = self.momentum * self.buffer[spot] + slope
            self.weight[spot] -= self.lr * self.buffer[spot]
        self.clear_pruned()
        self.step += 1
