"""Removes coupled channels from a copy of a network, and checks that this changes no output."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spp_lightning.method.coupled.channels import PrunedChannels
from spp_lightning.method.coupled.example import Example
from spp_lightning.method.selection import is_depthwise

__all__ = ["without_channels", "wrong_removals"]

_ROUNDING = 1e-3  # of the norm of an output
_ROUNDING_HALF = 0.1  # likewise, where weights have 16 bits


def without_channels(
    model: nn.Module, units: Sequence[PrunedChannels], alive: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a network with smaller layers.

    Args:
        model: The network.
        units: Sets of coupled channels.
        alive: Which groups of each set are kept, ``(groups,)``, bool, by name of the set.

    Returns:
        A network of the same class. Its convolutions, linear layers and norms have the channels
        that are kept.
    """
    gone: dict[tuple[str, str], list[int]] = defaultdict(list)
    for unit in units:
        for member in unit.channels.members:
            pruned = member.channels[~alive[unit.name].cpu()]
            gone[member.name, member.side] += pruned.flatten().tolist()
    smaller = copy.deepcopy(model)
    for (name, side), channels in gone.items():
        _shrink(smaller.get_submodule(name), side, torch.tensor(channels, dtype=torch.int64))
    return smaller


def wrong_removals(
    model: nn.Module, units: Sequence[PrunedChannels], example: Example
) -> dict[str, str]:
    """The sets whose channels can't be removed after all, by name, with the reason.

    Half of each set's channels are removed from one copy of the network and set to 0 in another.
    The two must give the same outputs for random numbers.

    Args:
        model: The network; it is left as it was.
        units: Sets of coupled channels.
        example: An input of the network.
    """
    if _problem(model, units, example) is None:
        return {}
    found = {}
    for unit in units:
        problem = _problem(model, [unit], example)
        if problem is not None:
            found[unit.name] = problem
    return found


def _problem(model: nn.Module, units: Sequence[PrunedChannels], example: Example) -> str | None:
    alive = {unit.name: torch.arange(unit.count) % 2 == 0 for unit in units}
    masked = copy.deepcopy(model).eval()
    for unit in units:
        for parameter, zero in unit.zeros(alive[unit.name], masked):
            zero(parameter)
    drawn = example.random()
    try:
        smaller = without_channels(model, units, alive).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found, expected = drawn.run(smaller), drawn.run(masked)
    except Exception as error:  # whatever a forward may raise for other shapes than it expects
        return f"without its channels the network fails ({str(error).splitlines()[0]})"
    same = all(map(_close, tree_leaves(found), tree_leaves(expected)))
    return None if same else "without its channels the network computes something else"


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return True
    if found.shape != expected.shape:
        return False
    allowed = _ROUNDING_HALF if torch.finfo(expected.dtype).bits < 32 else _ROUNDING
    expected, found = (x.to("cpu", torch.float64) for x in (expected, found))
    if not bool(expected.isfinite().all()):  # which says nothing about the removal
        return True
    return bool((found - expected).norm() <= allowed * expected.norm())


def _shrink(layer: Any, side: str, gone: Tensor) -> None:
    """Remove channels of a layer in place."""
    weight, bias = (layer._parameters.get(name) for name in ("weight", "bias"))
    dim = 1 if side == "in" else 0
    _set(layer, "weight", weight, gone, dim)
    if dim == 0:
        _set(layer, "bias", bias, gone, 0)
        for name in ("running_mean", "running_var"):
            if getattr(layer, name, None) is not None:
                setattr(layer, name, _removed(getattr(layer, name), gone, 0))
    sizes = ("in_channels", "in_features") if dim else ("out_channels", "out_features")
    names = (*sizes, "num_features")
    if is_depthwise(layer):
        names = ("in_channels", "out_channels", "groups")
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, getattr(layer, name) - len(gone))


def _set(layer: nn.Module, name: str, value: Tensor | None, gone: Tensor, dim: int) -> None:
    if value is not None:
        parameter = nn.Parameter(_removed(value.detach(), gone, dim), value.requires_grad)
        setattr(layer, name, parameter)


def _removed(values: Tensor, gone: Tensor, dim: int) -> Tensor:
    kept = torch.ones(values.shape[dim], dtype=torch.bool)
    kept[gone % len(kept)] = False  # a grouped convolution's weight has the channels of one group
    return values.index_select(dim, kept.nonzero().flatten().to(values.device))
