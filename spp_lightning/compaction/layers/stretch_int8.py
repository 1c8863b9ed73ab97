"""Int8 layers of a stretch, and the quantisations between them."""

from __future__ import annotations

import ctypes
import math

from torch import nn

from spp_lightning.compaction.epilogue import Epilogue
from spp_lightning.compaction.kernels.cpu.call_list import CallKind, CallListMaker
from spp_lightning.compaction.kernels.cpu.int8 import Int8Handle
from spp_lightning.compaction.kernels.cpu.library import NativeEpilogueOp, NativeInt8Rounding
from spp_lightning.compaction.kernels.cpu.pools import native_op
from spp_lightning.compaction.layers.quantized import (
    Quantize,
    QuantizedConv2d,
    QuantizedLinear,
    RoundingNumbers,
)
from spp_lightning.compaction.layers.stretch_parts import (
    Part,
    Prepared,
    ReadsAll,
    check_residual,
    residual_of,
)
from spp_lightning.compaction.layers.unwatched import is_untouched

__all__ = ["INT8_KINDS", "prepared_int8"]

INT8_KINDS = (Quantize, QuantizedConv2d, QuantizedLinear)


def prepared_int8(module: nn.Module) -> Prepared | None:
    """What a module of one of the kinds has prepared by now; None if that is nothing."""
    if isinstance(module, Quantize):
        numbers = module.prepared()
        return None if numbers is None else _Rounding(module, numbers)
    assert isinstance(module, QuantizedConv2d)
    handle = module.prepared()
    return None if handle is None else _Int8Layer(module, handle)


class _Int8Layer(ReadsAll):
    def __init__(self, layer: QuantizedConv2d, handle: Int8Handle) -> None:
        self._layer, self._handle = layer, handle

    def holds(self) -> bool:
        layer, handle = self._layer, self._handle
        return is_untouched(layer, type(layer)) and layer.prepared() is handle

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        x, handle = part.args[0], self._handle
        is_linear, spec = isinstance(self._layer, QuantizedLinear), handle.spec
        shape = maker.shapes[x]
        found = handle.prepared_for((*shape, 1, 1) if is_linear else shape, threads)
        residual = residual_of(part, maker)
        if (residual is None) != (spec.residual is None):
            raise ValueError("`residual` must be there if and only if it has a scale.")
        check_residual(maker, residual, found.out_shape)
        maker.add(
            *(CallKind.INT8_LAYER, x, part.out, found.out_shape[: 2 if is_linear else 4]),
            what=handle.address,
            with_=found.address,
            residual=residual,
            uint8=spec.output is not None,
            held=(found, handle),
        )


class _Rounding(ReadsAll):
    def __init__(self, module: Quantize, numbers: RoundingNumbers) -> None:
        self._module, self._numbers = module, numbers
        count = len(module.post)
        ops = (NativeEpilogueOp * count)(*map(native_op, module.post))
        self._native = NativeInt8Rounding(ops, count, numbers.inverse, numbers.zero_point)

    def holds(self) -> bool:
        module = self._module
        return is_untouched(module, Quantize) and module.prepared() is self._numbers

    def add(
        self, part: Part, maker: CallListMaker, threads: int, reader: Prepared | None = None
    ) -> None:
        (x,), post = part.args, self._module.post
        shape, planes, size = maker.shapes[x], 0, (0, 0)
        if post:
            batch, channels, height, width = shape
            planes, size = batch * channels, (height, width)
            shape = (batch, channels, *Epilogue(post=post).out_size(height, width))
        if not math.prod(shape):
            raise ValueError(f"There is no window in planes of {size}.")
        maker.add(
            *(CallKind.INT8_ROUNDING, x, part.out, shape),
            what=ctypes.addressof(self._native),
            batch=planes,
            size=size,
            threads=threads,
            uint8=True,
            held=self,
        )
