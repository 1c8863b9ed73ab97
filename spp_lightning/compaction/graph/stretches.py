"""Instructions in a row that one call can run: compact layers, and what stands between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from spp_lightning.compaction.graph.program import (
    Instruction,
    Program,
    picker,
    run_concat,
    run_gate,
    run_head,
    run_layer,
    run_means,
    run_norm,
    run_pool,
    run_row,
    run_sum,
)
from spp_lightning.compaction.layers.column_conv import ColumnConv2d
from spp_lightning.compaction.layers.stretch import Stretch
from spp_lightning.compaction.layers.stretch_int8 import INT8_KINDS
from spp_lightning.compaction.layers.stretch_parts import Part

__all__ = ["join_instructions", "run_stretch"]

_NO_KWARGS: dict[str, Any] = {}
# An image; what follows from its means, which often has another shape than the images that it is
# added to or concatenated with; or uint8, of which the library has no sums and concatenations.
_Kind = Literal["image", "means", "uint8"]
_JOINED = (run_row, run_gate, run_means, run_norm, run_pool, run_head)


class _Target(NamedTuple):
    """What the call of a stretch calls.

    Attributes:
        stretch: The one call.
        instructions: The instructions that it stands for; they free their own results only.
        inputs: Slots of what they read and don't make.
    """

    stretch: Stretch
    instructions: tuple[Instruction, ...]
    inputs: tuple[int, ...]


def run_stretch(network: nn.Module, target: _Target, args: Sequence[Any], kwargs: Any) -> Any:
    """Run instructions by one call, or one by one."""
    if not torch.compiler.is_compiling():
        y = target.stretch.run(network, args)
        if y is not None:
            return y
    slots = dict(zip(target.inputs, args, strict=True))
    for run, what, _, pick, _, out, free in target.instructions:
        slots[out] = run(network, what, pick(slots), _NO_KWARGS)
        for i in free:
            del slots[i]
    return slots[target.instructions[-1].out]


def join_instructions(program: Program, layer_of: Callable[[str], nn.Module]) -> Program:
    """A program with one instruction in the place of several in a row.

    Args:
        program: The program.
        layer_of: The layer of a name.
    """
    kinds: dict[int, _Kind] = {}

    def can_be_joined(call: Instruction) -> bool:
        kind = _kind_of(call, {kinds[i] for i in call.args if i in kinds}, layer_of)
        if kind is not None:
            kinds[call.out] = kind
        return kind is not None

    instructions: list[Instruction] = []
    for joined, group in groupby(program.instructions, key=can_be_joined):
        for calls in _cut(list(group)) if joined else [list(group)]:
            whole = _joined(calls) if joined and len(calls) > 1 else None
            instructions += calls if whole is None else [whole]
    return program._replace(instructions=tuple(instructions))


def _kind_of(
    call: Instruction, read: set[_Kind], layer_of: Callable[[str], nn.Module]
) -> _Kind | None:
    """What a call makes that can be joined, of what it reads; None if it can't be."""
    if call.run is run_layer:
        layer = layer_of(".".join(call.target))
        if call.kwargs or len(call.args) > 2 or type(layer) not in (ColumnConv2d, *INT8_KINDS):
            return None
        if type(layer) in INT8_KINDS and getattr(layer, "output_scale", layer) is not None:
            return "uint8"
    elif call.run in (run_concat, run_sum):
        if read != {"image"}:
            return None
    elif call.run not in _JOINED:
        return None
    elif call.run is run_pool and "uint8" in read:
        return "uint8"
    ends = call.run in (run_means, run_head) or (call.run is run_row and call.target.has_linear)
    return "means" if ends or "means" in read else "image"


def _cut(calls: list[Instruction]) -> Iterator[list[Instruction]]:
    """Pieces of instructions, each of which ends with a result that others read."""
    freed, piece = {slot for call in calls for slot in call.free}, list[Instruction]()
    for call in calls:
        piece.append(call)
        if call.out not in freed:
            yield piece
            piece = []
    if piece:
        yield piece


def _joined(calls: list[Instruction]) -> Instruction | None:
    """One instruction in the place of several; None if others read more than the last result."""
    made = {call.out for call in calls}
    freed = dict.fromkeys(slot for call in calls for slot in call.free)
    last = calls[-1].out
    if made - {*freed} != {last}:
        return None
    inputs = tuple(dict.fromkeys(i for call in calls for i in call.args if i not in made))
    own = [call._replace(free=tuple(i for i in call.free if i in made)) for call in calls]
    target = _Target(Stretch([_part(call) for call in own], inputs), tuple(own), inputs)
    free = tuple(slot for slot in freed if slot not in made)
    return Instruction(run_stretch, target, inputs, picker(inputs), (), last, free)


def _part(call: Instruction) -> Part:
    target, places = call.target, (call.args, call.out, call.free)
    if call.run is run_layer:
        return Part("row", (target,), None, *places)
    if call.run is run_head:
        return Part("linear", (), target, *places)
    if call.run is run_row:
        layers = target.paths[:-1] if target.has_linear else target.paths
        return Part("row", layers, target.paths[-1] if target.has_linear else None, *places)
    if call.run is run_norm:
        return Part("norm", (target.norm,), target.activation, *places, target.clamp)
    if call.run is run_pool:
        return Part("pool", (), target.module, *places, target.op)
    if call.run in (run_concat, run_sum):
        return Part("concat" if call.run is run_concat else "sum", (), None, *places)
    pool = target.pool if isinstance(target.pool, tuple) else None
    if call.run is run_gate:
        return Part("gate", target.layers, pool, *places)
    return Part("means", (), pool, *places, target.keeps)
