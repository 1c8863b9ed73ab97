"""Sets of coupled channels: what gets one pruning ratio where channels are pruned together."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from spp_lightning.method.coupled.dependencies import Dependents, Side, dependent_channels
from spp_lightning.method.coupled.example import Example
from spp_lightning.method.selection import is_convolution, is_depthwise, is_linear

__all__ = ["ChannelSet", "Member", "channel_sets"]


@dataclass(frozen=True)
class Member:
    """A layer's part in a set of coupled channels.

    Attributes:
        name: Of the layer.
        side: ``"in"`` if the layer reads the channels, ``"out"`` if it writes them. Norms and
            depthwise convolutions write the channels that they read.
        channels: The layer's channels of each weight group, ``(groups, width)``, int64. Where an
            image is flattened, a linear layer reads one feature per pixel. Channels of a grouped
            convolution go from all its groups at once.
    """

    name: str
    side: Side
    channels: Tensor


@dataclass(frozen=True)
class ChannelSet:
    """Channels that the same layers write and read. Each weight group is one of them.

    Attributes:
        name: Of the first layer that writes them.
        writers: Names of the convolutions and linear layers that write them.
        members: All layers that have a part in them, in the network's order.
    """

    name: str
    writers: tuple[str, ...]
    members: tuple[Member, ...]

    @property
    def count(self) -> int:
        """Number of weight groups."""
        return len(self.members[0].channels)


def channel_sets(model: nn.Module, example: Example) -> tuple[list[ChannelSet], dict[str, str]]:
    """Find the channels of a network that can be removed, and which of them only together.

    Args:
        model: The network; it is left as it was.
        example: An input of it.

    Returns:
        The sets in the network's order; and the layers that write other channels, by name, with the
        reason why those can't be removed.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        ValueError: If the network fails for the example, or Torch-Pruning can't follow its
            channels.

    >>> from spp_lightning.method.coupled.example import example_of
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    >>> found, left_out = channel_sets(net, example_of(net, (1, 3, 8, 8)))
    >>> [(x.name, x.count, [(y.name, y.side) for y in x.members]) for x in found]
    [('0', 8, [('0', 'out'), ('1', 'out'), ('2', 'in')])]
    >>> left_out
    {'2': 'coupled to an output of the network'}
    """
    modules = dict(model.named_modules())
    obstacles = _obstacles(model, modules, example)
    alike: dict[Any, list[Dependents]] = defaultdict(list)
    left_out: dict[str, str] = {}
    for dependents in dependent_channels(model, example):
        names = {name for name, _, _ in dependents.slots}
        writers = _writers(modules, dependents)
        met = {*dependents.obstacles, *(obstacles[x] for x in names if x in obstacles)}
        reasons = [f"coupled to {obstacle}" for obstacle in met]
        if any(not _exists(modules[name], side, i) for name, side, i in dependents.slots):
            reasons.append("Torch-Pruning can't follow its channels")
        elif not reasons and not any(side == "in" for _, side, _ in dependents.slots):
            reasons.append("no layer reads its channels")
        if reasons:
            left_out.update(dict.fromkeys(writers, min(reasons)))
        else:
            alike[frozenset(Counter(slot[:2] for slot in dependents.slots).items())].append(
                dependents
            )
    order = {name: i for i, name in enumerate(modules)}
    found = [_set_of(modules, order, dependents) for dependents in alike.values()]
    found.sort(key=lambda x: (order[x.name], int(_channels_of(x, x.name).min())))
    times = Counter(x.name for x in found)
    found = [_with_range(x) if times[x.name] > 1 else x for x in found]
    written = {name for x in found for name in x.writers}
    return found, {name: left_out[name] for name in modules if name in left_out.keys() - written}


def _obstacles(
    model: nn.Module, modules: Mapping[str, nn.Module], example: Example
) -> dict[str, str]:
    """The layers whose channels can't be removed, with the reason."""
    calls: Counter[str] = Counter()
    twin = copy.deepcopy(model).eval()
    for name, module in twin.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    try:
        with torch.no_grad():
            example.run(twin)
    except Exception as error:  # whatever a network raises for an input that doesn't fit
        raise ValueError(
            f"`input_shape` (={example}) must be that of an input of the network, but it fails for"
            f" it: {str(error).splitlines()[0]}"
        ) from error
    owners = Counter(id(p) for module in modules.values() for p in module._parameters.values())
    found = {}
    for name, module in modules.items():
        kind = type(module).__name__
        weight = module._parameters.get("weight")
        if not (is_convolution(module) or is_linear(module) or isinstance(module, _BatchNorm)):
            found[name] = f"the layer {name!r} ({kind})"
        elif _has_groups_of_one(module):
            found[name] = f"the grouped convolution {name!r}"
        elif calls[name] > 1:
            found[name] = f"the layer {name!r}, which is called several times"
        elif weight is not None and owners[id(weight)] > 1:
            found[name] = f"the layer {name!r}, which shares its weight"
    return found


def _has_groups_of_one(module: nn.Module) -> bool:
    """Whether each group has one channel on one side and several on the other."""
    if not isinstance(module, _ConvNd) or module.groups == 1:
        return False
    sizes = module.in_channels, module.out_channels
    return module.groups in sizes and sizes[0] != sizes[1]


def _writers(modules: Mapping[str, nn.Module], dependents: Dependents) -> list[str]:
    """The convolutions and linear layers that write channels, but not depthwise ones."""
    writing = {name for name, side, _ in dependents.slots if side == "out"}
    layers = {x for x in writing if is_convolution(modules[x]) or is_linear(modules[x])}
    return [name for name in modules if name in layers and not is_depthwise(modules[name])]


def _exists(module: Any, side: Side, channel: int) -> bool:
    sizes = ("in_channels", "in_features") if side == "in" else ("out_channels", "out_features")
    names = (*sizes, "num_features")
    count = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    return count is None or channel < int(count)


def _set_of(
    modules: Mapping[str, nn.Module], order: Mapping[str, int], alike: Iterable[Dependents]
) -> ChannelSet:
    rows = []
    for dependents in alike:
        channels: dict[tuple[str, Side], list[int]] = defaultdict(list)
        for name, side, channel in sorted(dependents.slots):
            channels[name, side].append(channel)
        rows.append(channels)
    writers = _writers(modules, next(iter(alike)))
    rows.sort(key=lambda row: row[writers[0], "out"])
    keys = sorted(rows[0], key=lambda key: (order[key[0]], key[1]))
    members = [Member(*key, torch.tensor([row[key] for row in rows])) for key in keys]
    return ChannelSet(writers[0], tuple(writers), tuple(members))


def _channels_of(channels: ChannelSet, name: str) -> Tensor:
    """The channels of a set that a layer writes."""
    return next(x.channels for x in channels.members if (x.name, x.side) == (name, "out"))


def _with_range(channels: ChannelSet) -> ChannelSet:
    """A set whose name says which channels it has of its first writer, as others have the rest."""
    written = _channels_of(channels, channels.name)
    name = f"{channels.name}[{int(written.min())}:{int(written.max()) + 1}]"
    return ChannelSet(name, channels.writers, channels.members)
