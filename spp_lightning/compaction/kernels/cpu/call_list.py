"""Calls of the kernels in a row as one call of the library."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Hashable, Mapping, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.cpu.library import NativeCall, NativePlace, library

__all__ = ["CallKind", "CallList", "CallListMaker"]

_LINE = 16  # numbers of a line of the cache: every tensor begins with one
_NOWHERE = (-1, 0, 0)


class CallKind(IntEnum):
    """``CallKind`` of ``native/call_list.h``."""

    LAYER = 0
    CHAIN = 1
    GATE = 2
    MEANS = 3
    LINEAR = 4


class CallList:
    """Prepared calls for inputs of one shape; a :class:`CallListMaker` makes one.

    Args:
        calls: The calls. Memory 0 holds what lies between them, the inputs follow, then the output.
        floats: Numbers of memory 0.
        shape: Of the output.
        held: What must live as long as the list: the calls read it.
    """

    def __init__(
        self, calls: Sequence[NativeCall], floats: int, shape: Sequence[int], held: Sequence[object]
    ) -> None:
        self._native = (NativeCall * len(calls))(*calls)
        self._address, self._count = ctypes.addressof(self._native), len(calls)
        self._floats, self._shape, self._held = floats, tuple(shape), tuple(held)
        self._run = library().spp_run_calls

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run the calls.

        Args:
            inputs: Of the shapes that the list was made for; float32, contiguous, on the CPU.

        Returns:
            The output of the last call.

        Raises:
            ValueError: If an input has too few numbers.
            MemoryError: If there is no memory for it.
        """
        out = torch.empty(*self._shape, dtype=torch.float32)
        between = torch.empty(self._floats, dtype=torch.float32)
        # As Memory lies in memory: address, number of elements.
        numbers = [between.data_ptr(), self._floats]
        for x in inputs:
            numbers += (x.data_ptr(), x.numel())
        numbers += (out.data_ptr(), out.numel())
        memories = (ctypes.c_int64 * len(numbers))(*numbers)
        self._run(self._address, self._count, ctypes.addressof(memories), len(numbers) // 2)
        return out


class CallListMaker:
    """Makes a :class:`CallList`, call by call.

    Args:
        shapes: Shapes of the inputs, by name, in the order in which they will be given.
        output: Name of the tensor that the list returns.
    """

    def __init__(self, shapes: Mapping[Hashable, tuple[int, ...]], output: Hashable) -> None:
        self.shapes = dict(shapes)
        self._places: dict[Hashable, tuple[int, int, int]] = {
            name: (1 + position, 0, math.prod(shape))
            for position, (name, shape) in enumerate(shapes.items())
        }
        self._output, self._memory = output, 1 + len(shapes)
        self._room = _Room()
        self._calls: list[NativeCall] = []
        self._held: list[object] = []

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
        pixels: int = 0,
        threads: int = 1,
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
            batch: As the function takes it, like ``pixels`` and ``threads``.
            pixels: Likewise.
            threads: Likewise.
            held: What lies at the addresses.
        """
        count = math.prod(shape)
        if out == self._output:
            self._places[out] = (self._memory, 0, count)
        else:
            self._places[out] = (0, self._room.take(count), count)
        self.shapes[out] = tuple(shape)
        added = _NOWHERE if residual is None else self._places[residual]
        places = (NativePlace(*place) for place in (self._places[x], added, self._places[out]))
        self._calls.append(NativeCall(kind, threads, what, with_, batch, pixels, *places))
        self._held.append(held)

    def free(self, name: Hashable) -> None:
        """Let later calls write where a tensor lies; inputs are left as they are."""
        memory, offset, _ = self._places[name]
        if memory == 0:
            self._room.free(offset)

    def made(self) -> CallList:
        """The list."""
        return CallList(self._calls, self._room.most, self.shapes[self._output], self._held)


class _Room:
    """Where tensors lie in one memory: each at the first place that is free.

    >>> room = _Room()
    >>> room.take(20), room.take(5)
    (0, 32)
    >>> room.free(0)
    >>> room.take(33), room.take(3), room.most
    (48, 0, 96)
    """

    def __init__(self) -> None:
        self._taken: dict[int, int] = {}  # ends of what is taken, by its beginning
        self.most = 0  # numbers in all

    def take(self, count: int) -> int:
        size, begin = -(-max(1, count) // _LINE) * _LINE, 0
        for other in sorted(self._taken):
            if begin + size <= other:
                break
            begin = self._taken[other]
        self._taken[begin] = begin + size
        self.most = max(self.most, begin + size)
        return begin

    def free(self, begin: int) -> None:
        del self._taken[begin]
