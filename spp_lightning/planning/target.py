"""Targets of the whole network, and the settings that name one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch

from spp_lightning.method.checks import check, check_choice, is_whole, number
from spp_lightning.method.settings import SPPSettings

__all__ = ["Of", "Target", "TargetSettings"]

Of = Literal["layers", "network", "latency"]
_DEFAULT_SPEEDUP = 4.0
_NAMES = {
    "layers": "each layer's MACs",
    "macs": "the network's MACs",
    "latency": "the network's latency",
}


class Target(NamedTuple):
    """What the pruned network is to reach.

    Attributes:
        quantity: What is counted: ``"macs"`` of the network for one image, its ``"latency"``, or
            ``"layers"``, the MACs of each pruned layer.
        argument: The argument that names the target: ``"speedup"``, ``"macs"`` or ``"latency_ms"``.
        value: Its value: a factor, MACs or milliseconds.
    """

    quantity: Literal["layers", "macs", "latency"]
    argument: str
    value: float

    def limit(self, dense: float) -> float:
        """The MACs or milliseconds to reach, for a network that has ``dense`` of them.

        >>> Target("latency", "speedup", 2.0).limit(9.0)
        4.5
        """
        return dense / self.value if self.argument == "speedup" else self.value

    def given(self, limit: float, dense: float) -> float:
        """The value of the argument that asks for a limit: the inverse of :meth:`limit`."""
        return dense / limit if self.argument == "speedup" else limit

    def in_words(self) -> str:
        """What is to be reached, such as ``"the network's latency / 2"``."""
        whole = _NAMES[self.quantity]
        if self.argument == "speedup":
            return f"{whole} / {self.value:g}"
        return f"{whole}: " + (
            f"{self.value:,.0f}" if self.quantity == "macs" else f"{self.value:g} ms"
        )

    def __str__(self) -> str:
        value = f"{self.value:,.0f}" if self.argument == "macs" else f"{self.value:g}"
        more = f" of {_NAMES[self.quantity]}" if self.argument == "speedup" else ""
        return f"`{self.argument}` (={value}){more}"


@dataclass(frozen=True)
class TargetSettings(SPPSettings):
    """The settings of a pruning run, and a target of the whole network.

    Give at most one of ``prune_ratio``, ``speedup``, ``macs`` and ``latency_ms``. With
    ``of="network"``, ``of="latency"``, ``macs`` or ``latency_ms`` the ratio of each layer is
    solved: see :func:`~spp_lightning.plan`.

    Args:
        of: What ``speedup`` is a factor of. ``"layers"``: the MACs of every pruned layer; with
            coupled channels those of the whole network, too, as layers depend on each other.
            ``"network"``: the MACs of the whole network. ``"latency"``: the latency of the whole
            network, the unpruned network in torch over the pruned one that ``compact`` makes.
        macs: MACs to be left in the whole network for one image.
        latency_ms: Milliseconds that the compact network is to take for one batch.
        device: Device whose latency counts, such as ``"cpu"``. Default: the network's.
        threads: CPU threads with which the latency is measured. Default: as many as torch uses.

    Raises:
        ValueError: If an argument has the wrong type or is out of range, or if more than one of
            ``prune_ratio``, ``speedup``, ``macs`` and ``latency_ms`` is given.

    >>> TargetSettings(speedup=3, of="network").target
    Target(quantity='macs', argument='speedup', value=3.0)
    >>> TargetSettings(speedup=3).target is None
    True
    """

    of: Of = "layers"
    macs: float | None = None
    latency_ms: float | None = None
    device: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("prune_ratio", "speedup", "macs", "latency_ms")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if len(given) > 1:
            raise ValueError(
                f"Only one of {', '.join(f'`{name}`' for name in names)} must be given, got"
                f" {' and '.join(f'{name}={value}' for name, value in given.items())}."
            )
        check_choice("of", self.of, Of)
        if self.granularity == "coupled-channel" and (self.of == "latency" or self.latency_ms):
            argument = "latency_ms" if self.latency_ms else "of"
            raise ValueError(
                f"`{argument}` must not ask for a latency with coupled channels, got"
                f" {getattr(self, argument)!r}; give `prune_ratio`, `macs`, or `speedup` alone,"
                " which is a factor of the network's MACs."
            )
        if self.of != "layers":
            rule = '"layers" unless `speedup` is given'
            check("of", self.of, rule, not given.keys() - {"speedup"})
        for name in ("macs", "latency_ms"):
            value = getattr(self, name)
            if value is not None:
                check(name, value, "a finite number above 0", 0 < number(value) < math.inf)
        if self.threads is not None:
            check(
                "threads", self.threads, "a whole number of at least 1", is_whole(self.threads, 1)
            )
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f'`device` must be a device such as "cpu" or "cuda:0", got {self.device!r}.'
                ) from error

    @property
    def target(self) -> Target | None:
        """The target of the whole network; None if each layer has a ratio given."""
        if self.macs is not None:
            return Target("macs", "macs", float(self.macs))
        if self.latency_ms is not None:
            return Target("latency", "latency_ms", float(self.latency_ms))
        if self.of == "layers":
            return None
        return self.target_at(float(self.speedup or _DEFAULT_SPEEDUP))

    def target_at(self, speedup: float) -> Target:
        """The target of a speedup of what ``of`` says."""
        quantities: dict[Of, Literal["layers", "macs", "latency"]]
        quantities = {"layers": "layers", "network": "macs", "latency": "latency"}
        return Target(quantities[self.of], "speedup", speedup)

    def of_pruner(self, ratios: Mapping[str, float] | None = None) -> dict[str, Any]:
        """The arguments of :class:`~spp_lightning.SPPPruner`.

        Args:
            ratios: The solved ratios, by layer pattern, where there is a target.
        """
        arguments = {field.name: getattr(self, field.name) for field in fields(SPPSettings)}
        if ratios is not None:
            arguments |= {"prune_ratio": dict(ratios), "speedup": None}
        return arguments
