"""The prepared handle of an int8 layer: its packed weights, and shapes prepared for."""

from __future__ import annotations

import ctypes
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from spp_lightning.compaction.int8_spec import Int8Spec
from spp_lightning.compaction.kernels.cpu.checks import check_columns, check_size, check_tensor
from spp_lightning.compaction.kernels.cpu.library import (
    NativeConfig,
    NativeGeometry,
    NativeInt8Scales,
    library,
)
from spp_lightning.compaction.kernels.cpu.tables import ShapeTable

__all__ = ["Int8Handle", "Int8Prepared", "instruction_set"]


def instruction_set() -> str:
    """The best one for int8: ``"amx"``, ``"avx512_vnni"``, ``"avx_vnni"``, ``"avx2"``, ``"base"``.

    ``"none"`` without kernels. Small layers may take another one (`Int8Handle.instruction_set`).
    """
    functions = library()
    return functions.spp_int8_isa().decode() if functions else "none"


class Int8Prepared(NamedTuple):
    """How a layer computes inputs of one shape."""

    out_shape: tuple[int, ...]
    address: int  # of `native`
    native: NativeConfig


class Int8Handle:
    """An int8 layer's weights, packed for the kernels of the instruction set that is used now.

    Sums are exact, and every float operation is rounded once: each instruction set makes the same
    bits. With ``s`` and ``z`` for scales and zero points, of the column ``k`` of a pixel::

        acc = Σ_k weight[f, k] * (x[k] - z_in)                       int32; padding reads z_in
        v = float32(acc) * (s_in * weight_scale[f]) + bias[f]
        v = v + float32(residual - z_res) * s_res
        v = min(max(v, low), high)                                  the output of float32
        q = clamp(round(v * (1 / s_out)) + z_out, 0, 255)           the output of uint8

    ``round`` takes the even one of two integers.

    Args:
        weight: Kept columns, ``(filters / groups, columns)``, int8.
        columns: Indices of the kept columns, ``(columns,)``, int32, ascending.
        weight_scale: Real units per step of each filter's weights, ``(filters,)``, float32.
        bias: ``(filters,)``, float32, real units; or None.
        spec: The convolution, and the scales of its tensors.

    Tensors are packed once: later changes in place aren't seen. ``instruction_set`` names what they
    are packed for.

    Raises:
        ValueError: If a tensor isn't on the CPU or has another dtype or shape, ``columns`` aren't
            ascending or name columns that the layer doesn't have, a scale or a bias isn't finite,
            or a conv group has more than 65 535 columns, whose sums int32 doesn't hold.
        NotImplementedError: If the kernels weren't built.
        MemoryError: If there is no memory for the packed weights.
    """

    def __init__(
        self,
        weight: Tensor,
        columns: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        spec: Int8Spec,
    ) -> None:
        spec.check()
        g = spec.geometry
        check_columns(columns, g)
        _check("weight", weight, (g.filters // g.groups, len(columns)), torch.int8)
        _check("weight_scale", weight_scale, (g.filters,), torch.float32)
        if bias is not None:
            _check("bias", bias, (g.filters,), torch.float32)
        self.spec = spec
        self.num_columns = len(columns)
        self._dtype = torch.float32 if spec.output is None else torch.uint8
        self._prepared: ShapeTable[Int8Prepared] = ShapeTable()
        self._library = library()
        if self._library is None:
            raise NotImplementedError("The CPU kernels weren't built.")
        self._forward = self._library.spp_int8_forward
        self.address = self._pack(weight, columns, weight_scale, bias)
        self.instruction_set: str = self._library.spp_int8_plan_isa(self.address).decode()
        weakref.finalize(self, self._library.spp_int8_free, self.address)

    def _pack(
        self, weight: Tensor, columns: Tensor, weight_scale: Tensor, bias: Tensor | None
    ) -> int:
        g, pair = self.spec.geometry, ctypes.c_int32 * 2
        geometry = NativeGeometry(
            *(g.channels, g.filters, g.groups),
            *(pair(*x) for x in (g.kernel_size, g.stride, g.padding, g.dilation)),
        )
        weight, columns = weight.detach().contiguous(), columns.contiguous()
        multiplier = _float32(self.spec.input.scale) * weight_scale.detach()
        bias = None if bias is None else bias.detach().contiguous()
        scales, made = _native_scales(self.spec), ctypes.c_void_p()
        self._library.spp_int8_create(
            *(ctypes.byref(geometry), columns.data_ptr(), len(columns)),
            *(weight.data_ptr(), weight.numel(), multiplier.data_ptr(), multiplier.numel()),
            *((None, 0) if bias is None else (bias.data_ptr(), bias.numel())),
            *(ctypes.byref(scales), ctypes.byref(made)),
        )
        return int(made.value or 0)

    @property
    def num_prepared(self) -> int:
        """For how many input shapes something is prepared, at most 32."""
        return len(self._prepared)

    def run(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer, on as many threads as torch uses.

        Args:
            x: Input, ``(B, C, H, W)``, uint8, contiguous.
            residual: Added before the clamp, ``(B, N, H', W')``, uint8, contiguous; if and only if
                ``spec.residual`` is there.

        Returns:
            The output, ``(B, N, H', W')``, contiguous; uint8, or float32 without ``spec.output``.

        Raises:
            ValueError: If a shape, a dtype or a layout doesn't fit.
            MemoryError: If there is no memory for it.
        """
        prepared = self.prepared_for(x.shape, torch.get_num_threads())
        _check_dense("x", x)
        added, count = None, 0
        if (residual is None) != (self.spec.residual is None):
            raise ValueError(
                f"`residual` must be {'a tensor' if residual is None else 'None'}: the layer"
                f" has {'a' if residual is None else 'no'} scale for it."
            )
        if residual is not None:
            check_tensor("residual", residual, prepared.out_shape)
            _check_dense("residual", residual)
            added, count = residual.data_ptr(), residual.numel()
        out = torch.empty(*prepared.out_shape, dtype=self._dtype)
        self._forward(
            *(self.address, prepared.address, x.data_ptr(), x.numel()),
            *(added, count, out.data_ptr(), out.numel()),
        )
        return out

    def prepared_for(self, shape: tuple[int, ...], threads: int) -> Int8Prepared:
        """What the kernels need for inputs of a shape.

        Raises:
            ValueError: If the shape doesn't fit the layer.
        """
        key = (*shape, threads)
        prepared = self._prepared.get(key)
        return (
            self._prepared.put(key, self._prepare(shape, threads)) if prepared is None else prepared
        )

    def _prepare(self, shape: tuple[int, ...], threads: int) -> Int8Prepared:
        g = self.spec.geometry
        if len(shape) != 4 or shape[1] != g.channels:
            raise ValueError(f"`x` must be of shape (B, {g.channels}, H, W), got {tuple(shape)}.")
        batch, _, height, width = shape
        size = g.out_size(height, width)
        out_shape = (batch, g.filters, *size)
        check_size(shape, out_shape)
        native = NativeConfig(batch, height, width, *size, threads)
        return Int8Prepared(out_shape, ctypes.addressof(native), native)


def _float32(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float32)


def _native_scales(spec: Int8Spec) -> NativeInt8Scales:
    scales = NativeInt8Scales(input_zero=spec.input.zero_point, output_inverse=1)
    scales.low, scales.high = spec.clamp
    if spec.residual is not None:
        scales.has_residual = 1
        scales.residual_scale, scales.residual_zero = spec.residual
    if spec.output is not None:
        scales.is_quantised, scales.output_zero = 1, spec.output.zero_point
        scales.output_inverse = float(1 / _float32(spec.output.scale))
    return scales


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_tensor(name, tensor, shape)
    if tensor.dtype != dtype:
        raise ValueError(f"`{name}` must be {dtype}, got {tensor.dtype}.")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8 or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"`{name}` must be uint8 and contiguous, on the CPU, got {tensor.dtype} with strides"
            f" {tensor.stride()} on {tensor.device}."
        )
