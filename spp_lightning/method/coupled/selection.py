"""Selects the sets of coupled channels to prune, and their ratios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from spp_lightning.method.coupled.channels import PrunedChannels
from spp_lightning.method.coupled.example import Example
from spp_lightning.method.coupled.macs import NetworkMacs
from spp_lightning.method.coupled.removal import wrong_removals
from spp_lightning.method.coupled.sets import ChannelSet, channel_sets
from spp_lightning.method.rule import target_count
from spp_lightning.method.selection import check_weights, is_convolution
from spp_lightning.method.settings import SPPSettings

__all__ = ["ChannelSelection", "select_channels"]


class ChannelSelection(NamedTuple):
    """What is pruned of a network's coupled channels.

    Attributes:
        units: The sets that are pruned, in the network's order.
        skipped: Layers that write channels which are not pruned, by name, with the reason.
        macs: The MACs of the network.
    """

    units: list[PrunedChannels]
    skipped: dict[str, str]
    macs: NetworkMacs


def select_channels(model: nn.Module, settings: SPPSettings, example: Example) -> ChannelSelection:
    """Find the sets of coupled channels to prune, and how far.

    Args:
        model: The network; it is left as it was.
        settings: ``prune_ratio``, ``speedup`` and ``layers`` count. A pattern matches a set if it
            matches a layer that writes the set's channels.
        example: An input.

    Raises:
        ImportError: If Torch-Pruning is not installed.
        ValueError: If Torch-Pruning can't follow the network's channels, a pattern matches no set,
            there is no set to prune, a layer computes the weight that it uses, or the speedup can't
            be reached.
    """
    lazy = [name for name, x in model.named_parameters() if isinstance(x, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"`model` must be initialised, but has lazy parameters: {', '.join(lazy)}. Run it once."
        )
    modules = dict(model.named_modules())
    sets, skipped = channel_sets(model, example)
    if settings.layers is None:
        sets = [x for x in sets if any(is_convolution(modules[name]) for name in x.writers)]
    else:
        sets = _matching("layers", settings.layers, sets, skipped)
    if isinstance(settings.prune_ratio, Mapping):
        with_ratio = _matching("prune_ratio", settings.prune_ratio, sets, skipped)
        for channels in sets:
            if channels not in with_ratio:
                skipped |= dict.fromkeys(channels.writers, "no ratio")
        sets = with_ratio
    units = [
        PrunedChannels(x.name, 0.0, 0, slice(0, x.count), channels=x, modules=modules) for x in sets
    ]
    check_weights({name: x for unit in units for name, x in unit.layers.items()}, [])
    wrong = wrong_removals(model, units, example)
    for unit in units:
        if unit.name in wrong:
            skipped |= dict.fromkeys(unit.channels.writers, wrong[unit.name])
    units = [unit for unit in units if unit.name not in wrong]
    if not units:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in skipped.items()) or "none"
        raise ValueError(
            "There are no coupled channels to prune. Layers whose channels are left out:"
            f" {reasons}."
        )
    macs = NetworkMacs(model, [unit.channels for unit in units], example)
    ratios = _ratios(units, settings, macs)
    start = 0
    for unit in units:
        unit.ratio = ratios[unit.name]
        unit.target = target_count(unit.count, unit.ratio)
        unit.span = slice(start, start + unit.count)
        start = unit.span.stop
    return ChannelSelection(units, skipped, macs)


def _ratios(
    units: Sequence[PrunedChannels], settings: SPPSettings, macs: NetworkMacs
) -> dict[str, float]:
    given = settings.prune_ratio
    if given is None:
        counts = macs.solve(macs.dense / settings.factor, f"`speedup` (={settings.factor:g})")
        return {unit.name: counts[unit.name] / unit.count for unit in units}
    if not isinstance(given, Mapping):
        return {unit.name: float(given) for unit in units}
    return {
        unit.name: next(
            float(x) for pattern, x in given.items() if _matches(unit.channels, pattern)
        )
        for unit in units
    }


def _matching(
    argument: str, patterns: Iterable[str], sets: Sequence[ChannelSet], skipped: Mapping[str, str]
) -> list[ChannelSet]:
    for pattern in patterns:
        if not any(_matches(channels, pattern) for channels in sets):
            writers = ", ".join(name for channels in sets for name in channels.writers) or "none"
            why = [f"{name} ({skipped[name]})" for name in skipped if fnmatchcase(name, pattern)]
            raise ValueError(
                f"`{argument}` must hold patterns that match layers whose output channels can be"
                f" removed, but {pattern!r} matches {', '.join(why) or 'none'}. There are:"
                f" {writers}."
            )
    return [x for x in sets if any(_matches(x, pattern) for pattern in patterns)]


def _matches(channels: ChannelSet, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (channels.name, *channels.writers))
