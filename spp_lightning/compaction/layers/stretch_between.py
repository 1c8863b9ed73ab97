"""Parts of a stretch between its compact layers: gates, pools, norms, concatenations, sums."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from torch import nn

from spp_lightning.compaction.epilogue import Clamp, PlaneOp
from spp_lightning.compaction.kernels.cpu.between import Gate, Norm
from spp_lightning.compaction.kernels.cpu.call_list import CallKind, CallListMaker
from spp_lightning.compaction.kernels.cpu.pools import native_op
from spp_lightning.compaction.layers.between import is_own_pool, norm_of
from spp_lightning.compaction.layers.column_conv import ColumnConv2d, need_grad
from spp_lightning.compaction.layers.stretch_parts import Part, Prepared, ReadsAll
from spp_lightning.compaction.layers.unwatched import is_untouched

__all__ = ["prepared_between"]


def prepared_between(part: Part, layers: Sequence[Any], other: nn.Module | None) -> Prepared | None:
    """What the modules of a part that is no row have prepared by now; None if that isn't all.

    Args:
        part: The part.
        layers: A gate's compact layers, or the norm.
        other: The pool or a norm's activation, if that is a module.
    """
    if part.kind == "gate":
        gate = layers[0]._gate
        return None if gate is None else _Gate(other, layers[0], layers[1], gate)
    if part.kind == "norm":
        norm = norm_of(layers[0], part.how)
        return None if norm is None else _Norm(layers[0], other, part.how, norm)
    if part.kind == "means":
        return _Means(other)
    if part.kind == "pool":
        return _Pool(other)
    return _Concat() if part.kind == "concat" else _Sum()


class _Gate(ReadsAll):
    def __init__(
        self, pool: nn.Module | None, reduce: ColumnConv2d, expand: ColumnConv2d, gate: Gate
    ) -> None:
        self._pool, self._reduce, self._expand, self._gate = pool, reduce, expand, gate

    def holds(self) -> bool:
        reduce, expand = self._reduce, self._expand
        first, second = reduce._tensors(), expand._tensors()
        return (
            reduce._gate is self._gate
            and is_untouched(reduce, ColumnConv2d)
            and is_untouched(expand, ColumnConv2d)
            and (self._pool is None or is_own_pool(self._pool))
            and not need_grad(first[0], first[2])
            and not need_grad(second[0], second[2])
            and self._gate.holds((*first, *second))
        )

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        (x,) = part.args
        batch, channels, height, width = _image_shape(maker, x)
        if channels != self._reduce.geometry.channels:
            raise ValueError(
                f"`x` must have {self._reduce.geometry.channels} channels, got {channels}."
            )
        maker.add(
            *(CallKind.GATE, x, part.out, maker.shapes[x]),
            what=self._gate.address,
            batch=batch,
            size=(height, width),
            threads=threads,
            held=self._gate,
        )


class _Means(ReadsAll):
    def __init__(self, pool: nn.Module | None) -> None:
        self._pool = pool

    def holds(self) -> bool:
        return self._pool is None or is_own_pool(self._pool)

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        (x,) = part.args
        batch, channels, height, width = _image_shape(maker, x)
        maker.add(
            *(CallKind.MEANS, x, part.out),
            (batch, channels, 1, 1) if part.how else (batch, channels),
            batch=batch * channels,
            size=(height, width),
            threads=threads,
        )


class _Pool(ReadsAll):
    def __init__(self, module: nn.Module | None) -> None:
        self._module = module

    def holds(self) -> bool:
        return self._module is None or is_untouched(self._module, type(self._module))

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        (x,), op = part.args, part.how
        assert isinstance(op, PlaneOp)
        batch, channels, height, width = _image_shape(maker, x)
        native, size = native_op(op), op.out_size(height, width)
        if min(size) < 1:
            raise ValueError(f"{op} has no window in planes of {height}×{width}.")
        uint8 = maker.is_uint8(x)
        if uint8 and op.kind != "max_pool":
            raise ValueError("Means of uint8 aren't computed.")
        kind = CallKind.INT8_POOL if uint8 else CallKind.POOL
        maker.add(
            *(kind, x, part.out, (batch, channels, *size)),
            what=ctypes.addressof(native),
            batch=batch * channels,
            size=(height, width),
            threads=threads,
            uint8=uint8,
            held=native,
        )


class _Norm(ReadsAll):
    def __init__(
        self, module: nn.Module, activation: nn.Module | None, clamp: Clamp, norm: Norm
    ) -> None:
        self._module, self._activation, self._clamp, self._norm = module, activation, clamp, norm

    def holds(self) -> bool:
        activation = self._activation
        return (activation is None or is_untouched(activation, type(activation))) and norm_of(
            self._module, self._clamp
        ) is self._norm

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        channels = sum(_image_shape(maker, x)[1] for x in part.args)
        if channels != self._norm.channels:
            raise ValueError(f"The norm must have {channels} channels, got {self._norm.channels}.")
        batch, _, *size = maker.shapes[part.args[0]]
        shape = (batch, channels, *size)
        read = None if reader is None else reader.channels_read(shape, threads)
        maker.add_of_parts(
            *(CallKind.NORM, part.args, part.out),
            what=self._norm.address,
            with_=None if read is None else read.data_ptr(),
            threads=threads,
            held=(self._norm, read),
        )


class _Concat(ReadsAll):
    def holds(self) -> bool:
        return True

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        maker.add_of_parts(CallKind.CONCAT, part.args, part.out, threads=threads)


class _Sum(ReadsAll):
    def holds(self) -> bool:
        return True

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        x, y = part.args
        shape = maker.shapes[x]
        if maker.shapes[y] != shape:
            raise ValueError(f"`y` must be {shape}, got {maker.shapes[y]}.")
        maker.add(CallKind.ADD, x, part.out, shape, residual=y, threads=threads)


def _image_shape(maker: CallListMaker, x: Any) -> tuple[int, ...]:
    shape = maker.shapes[x]
    if len(shape) != 4:
        raise ValueError(f"`x` must be (B, C, H, W), got {shape}.")
    return shape
