"""A set of coupled channels under pruning: its importance, its zeros and its masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from spp_lightning.method.buffers import Spread
from spp_lightning.method.coupled.sets import ChannelSet, Member
from spp_lightning.method.groups import Criterion, WeightGroups, weight_of
from spp_lightning.method.layer import MaskedLayer, PrunedUnit, Zero

__all__ = ["PrunedChannels", "masked_readers"]


@dataclass
class PrunedChannels(PrunedUnit):
    """A set of coupled channels. A weight group is a channel, with all weights that belong to it.

    These are the filters that write the channel, with their biases; its scales and shifts in norms;
    and the columns that read it. Once the group is pruned they are all 0, so that the channel is 0
    wherever it is computed.
    """

    channels: ChannelSet
    modules: Mapping[str, nn.Module]  # of the network, by name

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The convolutions and linear layers that write or read the channels."""
        found = {x.name: self.modules[x.name] for x in self.channels.members}
        return {name: layer for name, layer in found.items() if not _is_norm(layer)}

    @property
    def devices(self) -> set[torch.device]:
        """The devices of its weights."""
        weights = [self.modules[x.name]._parameters.get("weight") for x in self.channels.members]
        return {weight.device for weight in weights if weight is not None}

    def importance(self, criterion: Criterion) -> Tensor:
        """The norm of all filters and columns of each group, ``(groups,)``.

        Biases and norms don't count, as they don't in the groups of single layers.
        """
        terms = []
        for member in self.channels.members:
            layer = self.modules[member.name]
            if _is_norm(layer):
                continue
            norms = _groups_of(layer, member).importance(weight_of(layer), criterion)
            norms = norms[member.channels.to(norms.device)]
            terms.append((norms if criterion == "l1" else norms.square()).sum(1))
        total = torch.stack(terms).sum(0)
        return total if criterion == "l1" else total.sqrt()

    def zeros(
        self, alive: Tensor, model: nn.Module | None = None
    ) -> Iterator[tuple[nn.Parameter, Zero]]:
        """Weights of all layers; biases of those that write the channels, and of norms."""
        for member in self.channels.members:
            layer = self.modules[member.name]
            if model is not None:
                layer = model.get_submodule(member.name)
            weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
            if weight is not None:
                groups = None if _is_norm(layer) else _groups_of(layer, member)
                kept = _kept(member, alive, weight.shape[0] if groups is None else groups.count)
                zero = partial(_zero_entries, kept)
                yield weight, zero if groups is None else partial(groups.zero, kept)
            if bias is not None and member.side == "out":
                yield bias, partial(_zero_entries, _kept(member, alive, len(bias)))


def masked_readers(units: Sequence[PrunedChannels]) -> tuple[list[MaskedLayer], Spread]:
    """The layers on which the masks of coupled channels act: those that read the channels.

    A layer that doesn't read a channel computes as if the channel weren't there. That holds
    behind whatever norms and activations lie in between, and leaves the norms' running averages of
    masked channels as they are, for channels that come back.

    Returns:
        The layers in the order of their first channels; and how the masks of the groups are spread
        over their channels.
    """
    readers: dict[str, MaskedLayer] = {}
    places, groups = [], []
    size = 0
    for unit in units:
        for member in unit.channels.members:
            if member.side == "out":
                continue
            if member.name not in readers:
                layer = unit.modules[member.name]
                count = WeightGroups.of(layer, "channel").count
                readers[member.name] = MaskedLayer(
                    name=member.name,
                    module=layer,
                    groups=WeightGroups.of(layer, "channel"),
                    span=slice(size, size + count),
                )
                size += count
            places.append((readers[member.name].span.start + member.channels).flatten())
            numbers = torch.arange(unit.span.start, unit.span.stop)
            groups.append(numbers.repeat_interleave(member.channels.shape[1]))
    return list(readers.values()), Spread(size, torch.cat(places), torch.cat(groups))


def _is_norm(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is None or weight.dim() == 1


def _groups_of(layer: nn.Module, member: Member) -> WeightGroups:
    return WeightGroups.of(layer, "channel" if member.side == "in" else "filter")


def _kept(member: Member, alive: Tensor, count: int) -> Tensor:
    """Which of a layer's channels are kept, ``(count,)``, bool."""
    channels = member.channels.to(alive.device)
    kept = torch.ones(count, dtype=torch.bool, device=alive.device)
    return kept.index_copy_(0, channels.flatten(), alive.repeat_interleave(channels.shape[1]))


def _zero_entries(kept: Tensor, *tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.detach().masked_fill_(~kept.to(tensor.device), 0)
