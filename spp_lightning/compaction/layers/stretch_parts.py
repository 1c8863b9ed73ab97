"""What the modules of a stretch have prepared, and the calls that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from spp_lightning.compaction.kernels.cpu.between import Gate
from spp_lightning.compaction.kernels.cpu.call_list import CallKind, CallListMaker
from spp_lightning.compaction.kernels.cpu.chain import ChainHandle
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.layers.between import is_own_pool
from spp_lightning.compaction.layers.chain import holds, is_untouched
from spp_lightning.compaction.layers.column_conv import ColumnConv2d, need_grad

__all__ = ["Part", "Path", "Prepared", "prepared"]

Path = tuple[str, ...]


class Part(NamedTuple):
    """One of the calls of a stretch.

    Attributes:
        kind: ``"row"`` of compact layers, ``"gate"`` or ``"pool"``.
        layers: Paths of the compact layers.
        other: Path of the linear layer behind a row, or of the pool; None where there is none, or
            the pool is a function.
        x: Name of what it reads.
        residual: Name of what the last layer of a row adds, or None.
        out: Name of what it makes.
        free: Names of results of the stretch that it is the last one to read.
        keeps: Whether a pool's result is ``(B, C, 1, 1)``, or ``(B, C)``.
    """

    kind: str
    layers: tuple[Path, ...]
    other: Path | None
    x: int
    residual: int | None
    out: int
    free: tuple[int, ...]
    keeps: bool = True


class Prepared(Protocol):
    """A part with what its modules have prepared; it never changes."""

    def holds(self) -> bool:
        """Whether the modules are what they were when this was made."""
        ...

    def add(self, part: Part, maker: CallListMaker, threads: int) -> None:
        """Add the part's calls for the shapes that the maker knows.

        Raises:
            ValueError: If a shape doesn't fit.
        """
        ...


def prepared(part: Part, layers: Sequence[Any], other: nn.Module | None) -> Prepared | None:
    """What the modules of a part have prepared by now; None if that isn't all.

    Args:
        part: The part.
        layers: Its compact layers.
        other: Its linear layer or its pool.
    """
    if part.kind == "pool":
        return _Pool(other)
    first = layers[0]
    if part.kind == "gate":
        return None if first._gate is None else _Gate(other, first, layers[1], first._gate)
    if not all(_is_float(layer) for layer in layers):
        return None
    if len(layers) == 1 and other is None:
        return None if first._handle is None else _Layer(first, first._handle)
    chain = first._chain
    if chain is None or (other is None) != (chain.linear is None):
        return None
    return _Row(tuple(layers), other, chain)


class _Layer(NamedTuple):
    layer: ColumnConv2d
    handle: Handle

    def holds(self) -> bool:
        layer, handle = self
        own = layer.__dict__
        parameters = own["_parameters"]
        weight, bias = parameters.get("weight"), parameters.get("bias")
        return (
            own["_handle"] is handle
            and is_untouched(layer, ColumnConv2d)
            and handle.holds(weight, own["_buffers"].get("columns"), bias)
            and not need_grad(weight, bias)
        )

    def add(self, part: Part, maker: CallListMaker, threads: int) -> None:
        _add_layer(maker, self.handle, part.x, part.residual, part.out, threads)


class _Row(NamedTuple):
    layers: tuple[ColumnConv2d, ...]
    linear: nn.Module | None
    chain: ChainHandle

    def holds(self) -> bool:
        layers, linear, chain = self
        return layers[0]._chain is chain and holds(chain, layers, linear)

    def add(self, part: Part, maker: CallListMaker, threads: int) -> None:
        chain = self.chain
        found = chain.prepared_for(maker.shapes[part.x], threads)
        if found.native is None:
            self._add_one_by_one(part, maker, threads)
            return
        _check_residual(maker, part.residual, found.conv_shape)
        maker.add(
            *(CallKind.CHAIN, part.x, part.out, found.out_shape),
            what=found.native.address,
            with_=None if chain.linear is None else chain.linear.address,
            residual=part.residual,
            held=(found, chain),
        )

    def _add_one_by_one(self, part: Part, maker: CallListMaker, threads: int) -> None:
        chain, linear = self.chain, self.chain.linear
        x: Any = part.x
        for i, handle in enumerate(chain.handles):
            is_last = handle is chain.handles[-1]
            out = part.out if is_last and linear is None else (part.out, i)
            _add_layer(maker, handle, x, part.residual if is_last else None, out, threads)
            if i:
                maker.free(x)
            x = out
        if linear is not None:
            shape = maker.shapes[x]
            linear.check(shape)
            maker.add(
                *(CallKind.LINEAR, x, part.out, (shape[0], linear.out_features)),
                what=linear.address,
                batch=shape[0],
                threads=threads,
                held=linear,
            )
            maker.free(x)


class _Gate(NamedTuple):
    pool: nn.Module | None
    reduce: ColumnConv2d
    expand: ColumnConv2d
    gate: Gate

    def holds(self) -> bool:
        pool, reduce, expand, gate = self
        first, second = reduce._tensors(), expand._tensors()
        return (
            reduce._gate is gate
            and is_untouched(reduce, ColumnConv2d)
            and is_untouched(expand, ColumnConv2d)
            and (pool is None or is_own_pool(pool))
            and not need_grad(first[0], first[2])
            and not need_grad(second[0], second[2])
            and gate.holds((*first, *second))
        )

    def add(self, part: Part, maker: CallListMaker, threads: int) -> None:
        shape = maker.shapes[part.x]
        if shape[1] != self.reduce.geometry.channels:
            raise ValueError(
                f"`x` must have {self.reduce.geometry.channels} channels, got {shape}."
            )
        maker.add(
            *(CallKind.GATE, part.x, part.out, shape),
            what=self.gate.address,
            batch=shape[0],
            pixels=shape[2] * shape[3],
            threads=threads,
            held=self.gate,
        )


class _Pool(NamedTuple):
    pool: nn.Module | None

    def holds(self) -> bool:
        return self.pool is None or is_own_pool(self.pool)

    def add(self, part: Part, maker: CallListMaker, threads: int) -> None:
        batch, channels, height, width = maker.shapes[part.x]
        maker.add(
            *(CallKind.MEANS, part.x, part.out),
            (batch, channels, 1, 1) if part.keeps else (batch, channels),
            batch=batch * channels,
            pixels=height * width,
            threads=threads,
        )


def _is_float(layer: ColumnConv2d) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dtype == torch.float32


def _add_layer(
    maker: CallListMaker, handle: Handle, x: Any, residual: Any, out: Any, threads: int
) -> None:
    found = handle.prepared_for(maker.shapes[x], torch.float32, threads)
    _check_residual(maker, residual, found.conv_shape)
    chain = found.chain
    maker.add(
        *(CallKind.LAYER if chain is None else CallKind.CHAIN, x, out, found.out_shape),
        what=handle.address if chain is None else chain.address,
        with_=found.address if chain is None else None,
        residual=residual,
        held=(found, handle),
    )


def _check_residual(maker: CallListMaker, residual: Any, shape: tuple[int, ...]) -> None:
    if residual is not None and maker.shapes[residual] != shape:
        raise ValueError(f"`residual` must be {shape}, got {maker.shapes[residual]}.")
