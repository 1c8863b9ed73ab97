"""Compact layers of a stretch, alone and in rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spp_lightning.compaction.kernels.cpu.call_list import CallKind, CallListMaker
from spp_lightning.compaction.kernels.cpu.chain import ChainHandle
from spp_lightning.compaction.kernels.cpu.config import Kernel
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.layers.chain import holds
from spp_lightning.compaction.layers.column_conv import ColumnConv2d, need_grad
from spp_lightning.compaction.layers.stretch_linear import add_linear
from spp_lightning.compaction.layers.stretch_parts import (
    Part,
    Prepared,
    check_residual,
    residual_of,
)
from spp_lightning.compaction.layers.unwatched import is_untouched

__all__ = ["prepared_row"]


def prepared_row(layers: Sequence[Any], linear: nn.Module | None) -> Prepared | None:
    """What compact layers have prepared by now; None if that isn't all.

    Args:
        layers: The layers.
        linear: The linear layer behind them, if there is one.
    """
    first = layers[0]
    if not all(_is_float(layer) for layer in layers):
        return None
    if len(layers) == 1 and linear is None:
        return None if first._handle is None else _Layer(first, first._handle)
    chain = first._chain
    if chain is None or (linear is None) != (chain.linear is None):
        return None
    return _Row(tuple(layers), linear, chain)


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

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        _check_dim(maker, part.args[0])
        _add_layer(maker, self.handle, part.args[0], residual_of(part, maker), part.out, threads)

    def channels_read(self, shape: Sequence[int], threads: int) -> Tensor | None:
        return _channels_read(self.layer, self.handle, shape, threads)


class _Row(NamedTuple):
    layers: tuple[ColumnConv2d, ...]
    linear: nn.Module | None
    chain: ChainHandle

    def holds(self) -> bool:
        layers, linear, chain = self
        return layers[0]._chain is chain and holds(chain, layers, linear)

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        chain, x = self.chain, part.args[0]
        _check_dim(maker, x)
        found = chain.prepared_for(maker.shapes[x], threads)
        if found.native is None:
            self._add_one_by_one(part, maker, threads)
            return
        residual = residual_of(part, maker)
        check_residual(maker, residual, found.conv_shape)
        maker.add(
            *(CallKind.CHAIN, x, part.out, found.out_shape),
            what=found.native.address,
            with_=None if chain.linear is None else chain.linear.address,
            residual=residual,
            held=(found, chain),
        )

    def _add_one_by_one(self, part: Part, maker: CallListMaker, threads: int) -> None:
        chain, linear = self.chain, self.chain.linear
        x: Any = part.args[0]
        for i, handle in enumerate(chain.handles):
            is_last = handle is chain.handles[-1]
            out = part.out if is_last and linear is None else (part.out, i)
            residual = residual_of(part, maker) if is_last else None
            _add_layer(maker, handle, x, residual, out, threads)
            if i:
                maker.free(x)
            x = out
        if linear is not None:
            add_linear(maker, linear, x, part.out, threads)
            maker.free(x)

    def channels_read(self, shape: Sequence[int], threads: int) -> Tensor | None:
        return _channels_read(self.layers[0], self.chain.handles[0], shape, threads)


def _is_float(layer: ColumnConv2d) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dtype == torch.float32


def _channels_read(
    layer: ColumnConv2d, handle: Handle, shape: Sequence[int], threads: int
) -> Tensor | None:
    """Those of the kept columns, where no kernel reads others and multiplies them by 0."""
    g = layer.geometry
    config = handle.config_for(shape, torch.float32, threads)
    if g.groups > 1 or config.kernel not in (Kernel.PIXELS, Kernel.CHANNELS):
        return None
    read = torch.zeros(g.channels, dtype=torch.bool)
    read[layer.columns.long() // g.taps] = True
    return read


def _add_layer(
    maker: CallListMaker, handle: Handle, x: Any, residual: Any, out: Any, threads: int
) -> None:
    found = handle.prepared_for(maker.shapes[x], torch.float32, threads)
    check_residual(maker, residual, found.conv_shape)
    chain = found.chain
    maker.add(
        *(CallKind.LAYER if chain is None else CallKind.CHAIN, x, out, found.out_shape),
        what=handle.address if chain is None else chain.address,
        with_=found.address if chain is None else None,
        residual=residual,
        held=(found, handle),
    )


def _check_dim(maker: CallListMaker, x: Any) -> None:
    if len(maker.shapes[x]) != 4:
        raise ValueError(f"`x` must be (B, C, H, W), got {maker.shapes[x]}.")
