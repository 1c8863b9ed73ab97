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


class CallList:
    """Prepared calls for inputs of one shape; a :class:`CallListMaker` makes one.

    Args:
        calls: The calls. Their memories are the inputs, the output, then what lies between them.
        between: Numbers of each memory between the calls.
        shape: Of the output.
        held: What must live as long as the list: the calls read it.
    """

    def __init__(
        self,
        calls: Sequence[NativeCall],
        between: Sequence[int],
        shape: Sequence[int],
        held: Sequence[object],
    ) -> None:
        self._native = (NativeCall * len(calls))(*calls)
        self._address, self._count = ctypes.addressof(self._native), len(calls)
        self._between, self._shape, self._held = tuple(between), tuple(shape), tuple(held)
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
        between = [torch.empty(count, dtype=torch.float32) for count in self._between]
        # As Memory lies in memory: address, number of elements.
        numbers: list[int] = []
        for x in (*inputs, out, *between):
            numbers += (x.data_ptr(), x.numel())
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
            name: (position, 0, math.prod(shape))
            for position, (name, shape) in enumerate(shapes.items())
        }
        self._output, self._memory = output, len(shapes)
        self._blocks = _Blocks()
        self._calls: list[tuple[Any, ...]] = []
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
            self._places[out] = (self._memory + 1 + self._blocks.take(count), 0, count)
        self.shapes[out] = tuple(shape)
        added = _NOWHERE if residual is None else self._places[residual]
        numbers = (kind, threads, what, with_, batch, pixels)
        self._calls.append((*numbers, self._places[x], added, self._places[out]))
        self._held.append(held)

    def free(self, name: Hashable) -> None:
        """Let later calls write where a tensor lies; inputs are left as they are."""
        memory = self._places[name][0]
        if memory > self._memory:
            self._blocks.free(memory - self._memory - 1)

    def made(self) -> CallList:
        """The list."""
        sizes, first = self._blocks.sizes, self._memory + 1
        offsets = [0] * len(sizes)
        if sizes and sum(sizes) <= _MOST_AT_ONCE:
            offsets, sizes = [sum(sizes[:i]) for i in range(len(sizes))], [sum(sizes)]

        def native(memory: int, offset: int, count: int) -> NativePlace:
            if memory < first:
                return NativePlace(memory, offset, count)
            block = memory - first
            return NativePlace(min(memory, first + len(sizes) - 1), offsets[block], count)

        calls = [
            NativeCall(*numbers, *(native(*place) for place in (x, residual, out)))
            for *numbers, x, residual, out in self._calls
        ]
        return CallList(calls, sizes, self.shapes[self._output], self._held)


class _Blocks:
    """Blocks of memory, each for one tensor after the other.

    >>> blocks = _Blocks()
    >>> blocks.take(20), blocks.take(5)
    (0, 1)
    >>> blocks.free(0)
    >>> blocks.free(1)
    >>> blocks.take(3), blocks.take(40), blocks.sizes
    (1, 0, [48, 16])
    """

    def __init__(self) -> None:
        self._free: list[int] = []
        self.sizes: list[int] = []  # numbers of each block

    def take(self, count: int) -> int:
        size = -(-max(1, count) // _LINE) * _LINE
        # The smallest block that is large enough, or else the largest one, which grows.
        block = min(
            self._free,
            key=lambda i: (self.sizes[i] < size, abs(self.sizes[i] - size)),
            default=len(self.sizes),
        )
        if block == len(self.sizes):
            self.sizes.append(0)
        else:
            self._free.remove(block)
        self.sizes[block] = max(self.sizes[block], size)
        return block

    def free(self, block: int) -> None:
        self._free.append(block)
