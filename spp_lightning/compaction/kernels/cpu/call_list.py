"""Calls of the kernels in a row as one call of the library."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.cpu.library import NativeCall, NativePlace, library
from spp_lightning.compaction.kernels.cpu.memory import (
    Concatenated,
    Event,
    Freed,
    Made,
    lay_out,
)

__all__ = ["CallKind", "CallList", "CallListMaker"]

_NOWHERE = NativePlace(-1, 0, 0)
# Numbers in all up to which what lies between the calls is allocated at once. One large allocation
# takes longer than some of the size of a layer's output, which malloc keeps from call to call.
_MOST_AT_ONCE = 2**20


class CallKind(IntEnum):
    """``CallKind`` of ``native/call_list.h``."""

    LAYER = 0
    CHAIN = 1
    GATE = 2
    MEANS = 3
    LINEAR = 4
    POOL = 5
    NORM = 6
    CONCAT = 7
    ADD = 8
    INT8_LAYER = 9
    INT8_ROUNDING = 10
    INT8_POOL = 11


_READ_UINT8 = (CallKind.INT8_LAYER, CallKind.INT8_POOL)


class CallList:
    """Prepared calls for inputs of one shape; a :class:`CallListMaker` makes one.

    Args:
        calls: The calls. Their memories are the inputs, the output, then what lies between them.
        between: Numbers of each memory between the calls.
        shape: Of the output.
        dtype: Of the output.
        held: What must live as long as the list: the calls read it.
    """

    def __init__(
        self,
        calls: Sequence[NativeCall],
        between: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype,
        held: Sequence[object],
    ) -> None:
        self._native = (NativeCall * len(calls))(*calls)
        self._address, self._count = ctypes.addressof(self._native), len(calls)
        self._between, self._shape, self._held = tuple(between), tuple(shape), tuple(held)
        self._dtype = dtype
        self._run = library().spp_run_calls

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run the calls.

        Args:
            inputs: Of the shapes and types that the list was made for; contiguous, on the CPU.

        Returns:
            The output of the last call.

        Raises:
            ValueError: If an input has too few numbers.
            MemoryError: If there is no memory for it.
        """
        out = torch.empty(*self._shape, dtype=self._dtype)
        between = [torch.empty(count, dtype=torch.float32) for count in self._between]
        # As Memory lies in memory: address, bytes.
        numbers: list[int] = []
        for x in (*inputs, out, *between):
            numbers += (x.data_ptr(), x.nbytes)
        memories = (ctypes.c_int64 * len(numbers))(*numbers)
        self._run(self._address, self._count, ctypes.addressof(memories), len(numbers) // 2)
        return out


class _Call(NamedTuple):
    """A call whose tensors have names yet, not places."""

    kind: CallKind
    threads: int
    what: int | None
    with_: int | None
    batch: int
    size: tuple[int, int]
    x: Hashable
    residual: Hashable
    out: Hashable
    parts: tuple[Hashable, ...]


class CallListMaker:
    """Makes a :class:`CallList`, call by call.

    Args:
        shapes: Shapes of the inputs, by name, in the order in which they will be given.
        output: Name of the tensor that the list returns.
        uint8: Names of the inputs that are uint8, not float32.
    """

    def __init__(
        self,
        shapes: Mapping[Hashable, tuple[int, ...]],
        output: Hashable,
        uint8: Collection[Hashable] = (),
    ) -> None:
        self.shapes, self._uint8 = dict(shapes), set(uint8)
        self._inputs, self._output = tuple(shapes), output
        self._calls: list[_Call] = []
        self._events: list[Event] = []
        self._held: list[object] = []

    def is_uint8(self, name: Hashable) -> bool:
        """Whether a tensor is uint8, not float32."""
        return name in self._uint8

    def add(
        self,
        kind: CallKind,
        x: Hashable,
        out: Hashable,
        shape: Sequence[int],
        *,
        what: int | None = None,
        with_: int | None = None,
        residual: Hashable = None,
        batch: int = 0,
        size: tuple[int, int] = (0, 0),
        threads: int = 1,
        uint8: bool = False,
        held: Any = None,
    ) -> None:
        """Add a call.

        Args:
            kind: Its function.
            x: Name of the tensor that it reads.
            out: Name of the tensor that it makes.
            shape: Of that tensor.
            what: Address of what is called.
            with_: Address of what is handed on.
            residual: Name of the tensor that is added, or None.
            batch: As the function takes it, like ``size`` and ``threads``.
            size: Height and width of the input, likewise.
            threads: Likewise.
            uint8: Whether what it makes is uint8, not float32.
            held: What lies at the addresses.

        Raises:
            ValueError: If a tensor that it reads isn't of the type that it takes.
        """
        if uint8:
            self._uint8.add(out)
        self._events.append(Made(out, -(-math.prod(shape) // 4) if uint8 else math.prod(shape)))
        self._append(_Call(kind, threads, what, with_, batch, size, x, residual, out, ()), shape)
        self._held.append(held)

    def add_of_parts(
        self,
        kind: CallKind,
        parts: Sequence[Hashable],
        out: Hashable,
        *,
        what: int | None = None,
        with_: int | None = None,
        threads: int = 1,
        held: Any = None,
    ) -> None:
        """Add a call that concatenates tensors along their channels; the arguments are as above.

        Raises:
            ValueError: If their other sizes differ, or one is uint8.
        """
        (batch, _, *size), *others = (self.shapes[part] for part in parts)
        channels = [self.shapes[part][1] for part in parts]
        if any((x[0], *x[2:]) != (batch, *size) for x in others) or len(size) != 2:
            raise ValueError(f"Only channels may differ, got {[self.shapes[x] for x in parts]}.")
        shape = (batch, sum(channels), *size)
        if kind is CallKind.CONCAT and batch == 1:
            pixels = math.prod(size)
            firsts = [pixels * n for n in accumulate(channels[:-1], initial=0)]
            places = dict(zip(reversed(parts), reversed(firsts), strict=True))
            self._events.append(Concatenated(out, math.prod(shape), places))
        else:
            self._events.append(Made(out, math.prod(shape)))
        numbers = (kind, threads, what, with_, batch, (size[0], size[1]))
        self._append(_Call(*numbers, None, None, out, tuple(parts)), shape)
        self._held.append(held)

    def _append(self, call: _Call, shape: Sequence[int]) -> None:
        takes_uint8 = call.kind in _READ_UINT8
        for name in (call.x, call.residual, *call.parts):
            if name is not None and self.is_uint8(name) != takes_uint8:
                wanted = "uint8" if takes_uint8 else "float32"
                raise ValueError(
                    f"What {call.kind.name} reads must be {wanted}, but {name!r} isn't."
                )
        self.shapes[call.out] = tuple(shape)
        self._calls.append(call)

    def free(self, name: Hashable) -> None:
        """Let later calls write where a tensor lies; inputs are left as they are."""
        self._events.append(Freed(name))

    def made(self) -> CallList:
        """The list."""
        layout = lay_out(self._events, self._output)
        sizes = layout.sizes[1:]  # behind the output
        at_once = bool(sizes) and sum(sizes) <= _MOST_AT_ONCE
        starts = list(accumulate(sizes[:-1], initial=0))

        def place(name: Hashable) -> NativePlace:
            if name is None:
                return _NOWHERE
            count = math.prod(self.shapes[name])
            if name in self._inputs:
                return NativePlace(self._inputs.index(name), 0, count)
            block, first = layout.places[name]
            if at_once and block:
                block, first = 1, starts[block - 1] + first
            return NativePlace(len(self._inputs) + block, 4 * first, count)

        calls = []
        for call in self._calls:
            parts = (NativePlace * len(call.parts))(*map(place, call.parts))
            self._held.append(parts)
            calls.append(
                NativeCall(
                    *(call.kind, call.threads, call.what, call.with_, call.batch, *call.size),
                    *(place(call.x), place(call.residual), place(call.out)),
                    *(parts, len(parts)),
                )
            )
        sizes = [sum(sizes)] if at_once else sizes
        dtype = torch.uint8 if self.is_uint8(self._output) else torch.float32
        return CallList(calls, sizes, self.shapes[self._output], dtype, self._held)
