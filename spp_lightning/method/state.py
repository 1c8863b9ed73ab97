"""Packs and checks the saved state of a pruner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["STATE_VERSION", "checked_probabilities", "pack_state"]

STATE_VERSION = 1

_COUNTERS = ("num_updates", "last_update", "step")


def pack_state(
    settings: dict[str, Any], probability: dict[str, Tensor], counters: dict[str, int]
) -> dict[str, Any]:
    """Put a pruner's state into a plain dict, for :func:`checked_probabilities`."""
    return {
        "version": STATE_VERSION,
        "settings": settings,
        "probability": probability,
        **counters,
    }


def checked_probabilities(
    state: Mapping[str, Any],
    settings: dict[str, Any],
    num_target: dict[str, int],
    num_groups: dict[str, int],
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Check that a saved state fits a pruner, and unpack it.

    Args:
        state: The saved state.
        settings: The settings of the pruner, as a plain dict.
        num_target: Number of groups to prune, by layer.
        num_groups: Number of groups, by layer.

    Returns:
        The probabilities by layer, ``(groups,)`` each, and the counters by name.

    Raises:
        ValueError: If the state is incomplete, of another version, of other layers or other
            settings, or if a number in it is out of range.
    """
    if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
        found = state.get("version") if isinstance(state, Mapping) else state
        raise ValueError(
            f"The state must be one of SPP's version {STATE_VERSION}, got version {found!r}."
        )
    missing = {"settings", "probability", *_COUNTERS} - state.keys()
    if missing:
        raise ValueError(f"The state lacks {', '.join(sorted(missing))}.")
    saved = state["settings"]
    different = [
        f"{name} was {saved.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(settings.keys() | saved.keys())
        if saved.get(name) != settings.get(name)
    ]
    if different:
        raise ValueError(
            f"The state must be of a run with these settings, but {'; '.join(different)}."
        )
    probability: dict[str, Tensor] = dict(state["probability"])
    if not all(isinstance(p, Tensor) for p in probability.values()):
        raise ValueError(f"The state's probabilities must be tensors by layer, got {probability}.")
    if {name: tuple(p.shape) for name, p in probability.items()} != {
        name: (count,) for name, count in num_groups.items()
    }:
        was = ", ".join(f"{name} ({p.numel()} groups)" for name, p in probability.items())
        now = ", ".join(f"{name} ({count} groups)" for name, count in num_groups.items())
        raise ValueError(f"The state must be of this network: it holds {was}; here are {now}.")
    for name, p in probability.items():
        if not bool(((p >= 0) & (p <= 1)).all()):
            wrong = p[~((p >= 0) & (p <= 1))][0].item()
            raise ValueError(
                f"The probabilities of layer {name!r} must be in [0, 1], but the state holds"
                f" {wrong}."
            )
        pruned = int((p >= 1).sum())
        if pruned > num_target[name]:
            raise ValueError(
                f"The state must have pruned at most {num_target[name]} groups of layer {name!r},"
                f" but has pruned {pruned}."
            )
    counters = {name: state[name] for name in _COUNTERS}
    for name, value in counters.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < -1:
            raise ValueError(f"The state's {name} must be a whole number, got {value!r}.")
    return probability, counters
