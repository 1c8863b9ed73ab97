"""Instructions in a row that one call can run: compact layers, and what stands between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

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
from spp_lightning.compaction.layers.quantized import QuantizedConv2d
from spp_lightning.compaction.layers.stretch import Stretch
from spp_lightning.compaction.layers.stretch_int8 import INT8_KINDS
from spp_lightning.compaction.layers.stretch_parts import Part

__all__ = ["join_instructions", "run_stretch"]

_NO_KWARGS: dict[str, Any] = {}
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
    # Slots of images that calls make which can be joined; of what follows from their means, which
    # often has another shape than the images that it is added to or concatenated with; and of
    # uint8, of which there are no sums and concatenations here.
    images, means, uint8 = set[int](), set[int](), set[int]()

    def can_be_joined(call: Instruction) -> bool:
        small = not means.isdisjoint(call.args)
        is_uint8 = call.run is run_pool and not uint8.isdisjoint(call.args)
        if call.run is run_layer:
            layer = layer_of(".".join(call.target))
            plain = not call.kwargs and len(call.args) <= 2
            joined = type(layer) in (ColumnConv2d, *INT8_KINDS) and plain
            is_float = isinstance(layer, QuantizedConv2d) and layer.output_scale is None
            is_uint8 = type(layer) in INT8_KINDS and not is_float
        elif call.run in (run_concat, run_sum):
            joined = not images.isdisjoint(call.args) and (means | uint8).isdisjoint(call.args)
        else:
            joined = call.run in _JOINED
        if joined:
            has_linear = call.run is run_row and call.target.has_linear
            small = small or has_linear or call.run in (run_means, run_head)
            (uint8 if is_uint8 else means if small else images).add(call.out)
        return joined

    instructions: list[Instruction] = []
    for joined, group in groupby(program.instructions, key=can_be_joined):
        for calls in _cut(list(group)) if joined else [list(group)]:
            whole = _joined(calls) if joined and len(calls) > 1 else None
            instructions += calls if whole is None else [whole]
    return program._replace(instructions=tuple(instructions))


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
