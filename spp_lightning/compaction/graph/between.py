"""Which steps stand between convolutions: gates, norms, pools, concatenations, and sums."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import Clamp
from spp_lightning.compaction.graph.pools import PlanePool, find_pools
from spp_lightning.compaction.graph.steps import Step, Value, users_of
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = [
    "Call",
    "Combination",
    "Gate",
    "GlobalPool",
    "NormedParts",
    "averages_planes",
    "find_calls",
    "find_gates",
    "multiplies",
]


class Gate(NamedTuple):
    """Squeeze and excitation.

    Attributes:
        x: What is gated.
        pool: Position of the global average pool's step.
        layers: Positions of the two layers' steps.
        result: Position of the multiplication's step, where the call stands.
    """

    x: Value
    pool: int
    layers: tuple[int, int]
    result: int

    @property
    def replaced(self) -> tuple[int, ...]:
        """Positions of the steps that the call replaces."""
        return (self.pool, *self.layers, self.result)


class NormedParts(NamedTuple):
    """A batch norm and a clamp, and perhaps a concatenation before them.

    Attributes:
        parts: What is concatenated, or the one tensor that is normed.
        norm: Position of the batch norm's step.
        clamp: What the last step clamps to.
        result: Position of the clamp's step, where the call stands.
        replaced: Positions of the steps that the call replaces.
    """

    parts: tuple[Value, ...]
    norm: int
    clamp: Clamp
    result: int
    replaced: tuple[int, ...]


class GlobalPool(NamedTuple):
    """A global average pool that is no part of a gate.

    Attributes:
        x: What is pooled.
        result: Position of the pool's step.
        keeps: Whether the result is ``(B, C, 1, 1)``, or ``(B, C)``.
    """

    x: Value
    result: int
    keeps: bool

    @property
    def replaced(self) -> tuple[int, ...]:
        """Positions of the steps that the call replaces."""
        return (self.result,)


class Combination(NamedTuple):
    """A concatenation along the channels that no norm reads alone, or an addition of two results.

    Attributes:
        parts: What is combined.
        result: Position of its step.
        adds: Whether it is an addition.
    """

    parts: tuple[Value, ...]
    result: int
    adds: bool

    @property
    def replaced(self) -> tuple[int, ...]:
        """Positions of the steps that the call replaces."""
        return (self.result,)


Call = Gate | NormedParts | GlobalPool | PlanePool | Combination

_LayerOf = Callable[[str], nn.Module]


def find_calls(steps: Sequence[Step], layer_of: _LayerOf) -> tuple[Call, ...]:
    """The calls between the layers of a network.

    Args:
        steps: The network.
        layer_of: The layer of a name.
    """
    gates = find_gates(steps, layer_of)
    pools = {gate.pool for gate in gates}
    others = [pool for pool in _find_pools(steps, layer_of) if pool.result not in pools]
    norms = _find_norms(steps, layer_of)
    normed = {position for norm in norms for position in norm.replaced}
    concatenations = (
        Combination(parts, position, adds=False)
        for position, step in enumerate(steps)
        if position not in normed and (parts := _concatenated(step))
    )
    planes = find_pools(steps, layer_of)
    return (*gates, *norms, *others, *planes, *concatenations, *_find_sums(steps))


def find_gates(steps: Sequence[Step], layer_of: _LayerOf) -> tuple[Gate, ...]:
    """The gates of a network; the arguments are those of `find_calls`."""
    users, found = users_of(steps), []
    for pool, step in enumerate(steps):
        x = step.args[0] if step.args else None
        if not isinstance(x, Value) or not averages_planes(step, layer_of):
            continue
        reduce = _only_user(users, pool)
        expand = None if reduce is None else _only_user(users, reduce)
        result = None if expand is None else _only_user(users, expand)
        if reduce is None or expand is None or result is None:
            continue
        reads = {reduce: (Value(pool),), expand: (Value(reduce),)}
        layers = all(
            _is_pointwise(steps[i], layer_of) and steps[i].args == args for i, args in reads.items()
        )
        if layers and multiplies(steps[result], x, Value(expand)):
            found.append(Gate(x, pool, (reduce, expand), result))
    return tuple(found)


def _find_norms(steps: Sequence[Step], layer_of: _LayerOf) -> tuple[NormedParts, ...]:
    """The batch norms that are followed by a clamp."""
    users, found = users_of(steps), []
    for norm, step in enumerate(steps):
        plain = step.kind == "layer" and len(step.args) == 1 and not step.kwargs
        if not plain or type(layer_of(str(step.target))) is not nn.BatchNorm2d:
            continue
        result = _only_user(users, norm)
        clamp = None if result is None else _clamp_of(steps[result], layer_of)
        x = step.args[0]
        if result is None or clamp is None or not isinstance(x, Value):
            continue
        parts: tuple[Value, ...] = (x,)
        before: tuple[int, ...] = ()
        if len(users[x.step]) == 1 and (several := _concatenated(steps[x.step])):
            parts, before = several, (x.step,)
        found.append(NormedParts(parts, norm, clamp, result, (*before, norm, result)))
    return tuple(found)


def _find_pools(steps: Sequence[Step], layer_of: _LayerOf) -> tuple[GlobalPool, ...]:
    """The global average pools."""
    return tuple(
        GlobalPool(step.args[0], position, keeps)
        for position, step in enumerate(steps)
        for keeps in (True, False)
        if averages_planes(step, layer_of, keeps) and step.args and isinstance(step.args[0], Value)
    )


def _find_sums(steps: Sequence[Step]) -> Iterator[Combination]:
    """The additions of results that aren't tensors of the network: those are smaller, mostly."""
    functions = (operator.add, torch.add)
    for position, step in enumerate(steps):
        is_sum = step.target in (functions if step.kind == "function" else ("add",))
        if not is_sum or step.kwargs or len(step.args) != 2:
            continue
        x, y = step.args
        if not isinstance(x, Value) or not isinstance(y, Value):
            continue
        if "tensor" not in (steps[x.step].kind, steps[y.step].kind):
            yield Combination((x, y), position, adds=True)


def _only_user(users: list[list[int]], position: int) -> int | None:
    return users[position][0] if len(users[position]) == 1 else None


def averages_planes(step: Step, layer_of: _LayerOf, keeps: bool = True) -> bool:
    """Whether a step computes the mean of each plane.

    Args:
        step: The step.
        layer_of: The layer of a name.
        keeps: Whether the result must be ``(B, C, 1, 1)``, or ``(B, C)``.
    """
    if step.target in ("mean", torch.mean) and step.kind in ("method", "function"):
        given: dict[str, Any] = dict(
            zip(("input", "dim", "keepdim"), step.args, strict=False), **step.kwargs
        )
        dims = given.get("dim")
        if not isinstance(dims, (tuple, list)) or not all(type(d) is int for d in dims):
            return False
        planes = sorted(dims) in ([2, 3], [-2, -1])
        plain = given.keys() <= {"input", "dim", "keepdim"}
        return planes and plain and given.get("keepdim", False) is keeps
    if not keeps:
        return False
    if step.kind == "layer":
        module = layer_of(str(step.target))
        ones = type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))
        return ones and len(step.args) == 1 and not step.kwargs
    if step.kind == "function" and step.target is F.adaptive_avg_pool2d:
        given = dict(zip(("input", "output_size"), step.args, strict=False), **step.kwargs)
        return given.get("output_size") in (1, (1, 1), [1, 1])
    return False


def _is_pointwise(step: Step, layer_of: _LayerOf) -> bool:
    module = layer_of(str(step.target)) if step.kind == "layer" and not step.kwargs else None
    if type(module) is not ColumnConv2d:
        return False
    g = module.geometry
    plain = (g.kernel_size, g.stride, g.padding, g.groups) == ((1, 1), (1, 1), (0, 0), 1)
    return plain and not module.epilogue.post


def multiplies(step: Step, x: Value, by: Value) -> bool:
    """Whether a step computes the product of two results."""
    functions = (operator.mul, torch.mul, torch.multiply)
    is_product = step.target in (functions if step.kind == "function" else ("mul",))
    return is_product and not step.kwargs and step.args in ((x, by), (by, x))


def _concatenated(step: Step) -> tuple[Value, ...] | None:
    if step.kind != "function" or step.target not in (torch.cat, torch.concat):
        return None
    given = dict(zip(("tensors", "dim"), step.args, strict=False), **step.kwargs)
    tensors = given.get("tensors")
    if given.get("dim") != 1 or given.keys() != {"tensors", "dim"}:
        return None
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(x, Value) for x in tensors):
        return None
    return tuple(tensors)


def _clamp_of(step: Step, layer_of: _LayerOf) -> Clamp | None:
    if step.kind == "layer":
        relus = {nn.ReLU: Clamp(0.0), nn.ReLU6: Clamp(0.0, 6.0)}
        return relus.get(type(layer_of(str(step.target))))  # type: ignore[call-overload, no-any-return]
    plain = len(step.args) == 1 and not step.kwargs.get("inplace")
    if step.kind == "function" and step.target in (F.relu, torch.relu) and plain:
        return Clamp(0.0)
    return Clamp(0.0) if (step.kind, step.target) == ("method", "relu") else None
