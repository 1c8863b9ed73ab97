"""Which handles belong to which weights: for the operators, which see tensors and no layer."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.kernels.cpu.tables import ShapeTable
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["handle_for", "num_weights"]

_MOST = 4  # handles of one weight: with and without the epilogue, and of some other tensors


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    handles: ShapeTable[Handle]  # by the ids of columns and bias, and the description


_entries: dict[int, _Entry] = {}  # by the id of the weight, as long as it lives


def handle_for(weight: Tensor, columns: Tensor, bias: Tensor | None, spec: ConvSpec) -> Handle:
    """The handle of a layer; packed anew if :meth:`Handle.holds` says that its tensors changed.

    The arguments are those of :class:`Handle`.
    """
    handles = _handles_of(weight)
    key: tuple[Any, ...] = (id(columns), id(bias), spec)
    found = handles.get(key)
    if found is not None and found.holds(weight, columns, bias):
        return found
    return handles.put(key, Handle(weight, columns, bias, spec, before=found))


def num_weights() -> int:
    """How many weights have handles."""
    return len(_entries)


def _handles_of(weight: Tensor) -> ShapeTable[Handle]:
    number = id(weight)
    entry = _entries.get(number)
    if entry is None or entry.weight() is not weight:  # an id may be that of a tensor which is gone
        reference = weakref.ref(weight, lambda _: _forget(number, reference))
        entry = _entries[number] = _Entry(reference, ShapeTable(_MOST))
    return entry.handles


def _forget(number: int, reference: weakref.ref[Tensor]) -> None:
    entry = _entries.get(number)
    if entry is not None and entry.weight is reference:
        del _entries[number]
