"""MACs of a network's layers, as pruned channels shrink both sides of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from spp_lightning.method.coupled.example import Example
from spp_lightning.method.coupled.sets import ChannelSet
from spp_lightning.method.groups import weight_of
from spp_lightning.method.positions import positions_of
from spp_lightning.method.rule import target_count
from spp_lightning.method.selection import is_convolution, is_depthwise, is_linear

__all__ = ["NetworkMacs"]

_BISECTIONS = 50


@dataclass(frozen=True)
class _Layer:
    macs: int  # of the whole layer, per input
    sides: tuple[int, ...]  # its channels, and those that it writes unless it is depthwise
    lost: tuple[dict[str, int], ...]  # channels that go with each group of a set, by side and set


class NetworkMacs:
    """Multiply-accumulates of a network per input, for a number of pruned groups per set.

    Args:
        model: The network. It is run once in evaluation mode, and left as it was.
        sets: The sets of coupled channels that are pruned.
        example: An input.

    >>> from spp_lightning.method.coupled.example import example_of
    >>> from spp_lightning.method.coupled.sets import channel_sets
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    >>> example = example_of(net, (1, 3, 8, 8))
    >>> sets, _ = channel_sets(net, example)
    >>> macs = NetworkMacs(net, sets, example)
    >>> macs.layers({"0": 4, "1": 4}) == {  # filters · channels · kernel · pixels
    ...     "0": 4 * 3 * 9 * 36, "1": 4 * 4 * 9 * 16, "2": 4 * 4 * 9 * 4
    ... }
    True
    """

    def __init__(self, model: nn.Module, sets: Sequence[ChannelSet], example: Example) -> None:
        found = {
            name: layer
            for name, layer in model.named_modules()
            if is_convolution(layer) or is_linear(layer)
        }
        positions = positions_of(model, found, example.kwargs or example.args)
        lost: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for channels in sets:
            for member in channels.members:
                lost[member.name, member.side][channels.name] = member.channels.shape[1]
        self._counts = {channels.name: channels.count for channels in sets}
        self._layers: dict[str, _Layer] = {}
        for name, layer in found.items():
            sides = ("out",) if is_depthwise(layer) else ("out", "in")
            sizes = tuple(_channels(layer, side) for side in sides)
            macs = weight_of(layer).numel() * positions[name]
            self._layers[name] = _Layer(macs, sizes, tuple(lost[name, side] for side in sides))

    @property
    def dense(self) -> int:
        """MACs of the unpruned network."""
        return sum(layer.macs for layer in self._layers.values())

    def total(self, num_pruned: Mapping[str, int]) -> int:
        """MACs of the network.

        Args:
            num_pruned: Pruned groups, by set.
        """
        return sum(self.layers(num_pruned).values())

    def layers(self, num_pruned: Mapping[str, int]) -> dict[str, int]:
        """MACs of each convolution and linear layer, likewise."""
        found = {}
        for name, layer in self._layers.items():
            macs = layer.macs
            for size, lost in zip(layer.sides, layer.lost, strict=True):
                gone = sum(width * num_pruned.get(channels, 0) for channels, width in lost.items())
                macs = macs // size * (size - gone) if gone else macs
            found[name] = macs
        return found

    def solve(
        self, limit: float, target: str, at_least: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Pruned groups of each set with which the network has at most so many MACs.

        All sets are pruned at the same ratio. With the MACs that this leaves over, some groups are
        kept.

        Args:
            limit: The MACs.
            target: What asks for them, in an error's words.
            at_least: Groups of each set that are pruned in any case.

        Returns:
            Pruned groups, by set: none of them could be kept, too.

        Raises:
            ValueError: If the network has more MACs with one group left in each set.
        """
        floor = dict(at_least or {})

        def counts(ratio: float) -> dict[str, int]:
            return {
                name: max(target_count(count, ratio), floor.get(name, 0))
                for name, count in self._counts.items()
            }

        low, high = 0.0, 1.0
        least = self.total(counts(high))
        if least > limit:
            raise ValueError(
                f"{target} must leave the network at least {least:,} of its {self.dense:,} MACs,"
                f" which are those of one channel in every set, but asks for {limit:,.0f}."
            )
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.total(counts(middle)) > limit else (low, middle)
        found = counts(high)
        kept = True
        while kept:
            kept = False
            for name in found:
                fewer = {**found, name: found[name] - 1}
                if fewer[name] >= floor.get(name, 0) and self.total(fewer) <= limit:
                    found, kept = fewer, True
        return found


def _channels(layer: Any, side: str) -> int:
    names = ("out_channels", "out_features") if side == "out" else ("in_channels", "in_features")
    return int(next(getattr(layer, name) for name in names if hasattr(layer, name)))
