"""Which pools of planes stand alone: those that no layer computes in its epilogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from spp_lightning.compaction.epilogue import PlaneOp
from spp_lightning.compaction.graph.patterns import as_pool
from spp_lightning.compaction.graph.steps import Step, Value, values_in
from spp_lightning.compaction.layers.int8_pool import max_pool_uint8

__all__ = ["PlanePool", "find_pools"]

_NAMES = ("input", "kernel_size", "stride", "padding")
_MAX_NAMES = (*_NAMES, "dilation", "ceil_mode", "return_indices")
_UINT8_NAMES = (*_NAMES, "ceil_mode")
_AVG_NAMES = (*_NAMES, "ceil_mode", "count_include_pad", "divisor_override")


class PlanePool(NamedTuple):
    """A pool of planes.

    Attributes:
        x: What is pooled.
        op: The pool.
        result: Position of its step.
    """

    x: Value
    op: PlaneOp
    result: int

    @property
    def replaced(self) -> tuple[int, ...]:
        """Positions of the steps that the call replaces."""
        return (self.result,)


def find_pools(
    steps: Sequence[Step], layer_of: Callable[[str], nn.Module]
) -> tuple[PlanePool, ...]:
    """The pools of a network.

    Args:
        steps: The network.
        layer_of: The layer of a name.
    """
    found = []
    for position, step in enumerate(steps):
        given = _given(step, layer_of)
        if given is None or not isinstance(x := given.pop("input"), Value):
            continue
        op = None if values_in(given) else as_pool(given, _is_max(step, layer_of))
        if op is not None:
            found.append(PlanePool(x, op, position))
    return tuple(found)


def _is_max(step: Step, layer_of: Callable[[str], nn.Module]) -> bool:
    if step.kind == "layer":
        return type(layer_of(str(step.target))) is nn.MaxPool2d
    return step.target in (F.max_pool2d, torch.max_pool2d, max_pool_uint8)


def _given(step: Step, layer_of: Callable[[str], nn.Module]) -> dict[str, Any] | None:
    """What a pool is called with, by name; None if a step is no pool."""
    if step.kind == "layer" and len(step.args) == 1 and not step.kwargs:
        module = layer_of(str(step.target))
        pools = type(module) in (nn.MaxPool2d, nn.AvgPool2d)
        return {**vars(module), "input": step.args[0]} if pools else None
    if step.kind != "function":
        return None
    if step.target in (F.max_pool2d, torch.max_pool2d):
        names: tuple[str, ...] = _MAX_NAMES
    elif step.target is max_pool_uint8:
        names = _UINT8_NAMES
    elif step.target is F.avg_pool2d:
        names = _AVG_NAMES
    else:
        return None
    given = {**dict(zip(names, step.args, strict=False)), **step.kwargs}
    return given if "input" in given else None
