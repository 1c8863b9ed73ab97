"""Layers that compute with int8 weights and uint8 activations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spp_lightning.compaction.epilogue import Epilogue, PlaneOp
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.kernels.cpu import int8_planes
from spp_lightning.compaction.kernels.cpu.checks import check_columns
from spp_lightning.compaction.kernels.cpu.int8 import Int8Handle
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.layers.conv_shape import ConvShape
from spp_lightning.compaction.layers.int8_reference import (
    convolve,
    dequantize,
    quantize,
    requantize,
)
from spp_lightning.compaction.layers.unwatched import is_unwatched

__all__ = ["Quantize", "QuantizedConv2d", "QuantizedLinear", "RoundingNumbers"]

_MOST_COLUMNS = 2**16 - 1  # of a convolution group, so that int32 holds their sums of products


class _Packed(NamedTuple):
    """A handle, the tensors that it was made of, and their versions then."""

    handle: Int8Handle
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]


class RoundingNumbers(NamedTuple):
    """What the kernels read of a scale and a zero point, and the tensors' versions then."""

    tensors: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    inverse: float
    zero_point: int


class Quantize(nn.Module):
    """Rounds real numbers to uint8, with one scale and one zero point for all of a tensor.

    There are no gradients.

    Args:
        to: Scale and zero point.
        post: Pools and norms of planes that are computed before.

    Raises:
        ValueError: If one is out of range, or ``post`` isn't a tuple of operations.

    >>> Quantize(TensorScale(0.25, 8))(torch.tensor([-9.0, 0.0, 0.3, 99.0]))
    tensor([  0,   8,   9, 255], dtype=torch.uint8)
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, to: TensorScale, post: tuple[PlaneOp, ...] = ()) -> None:
        super().__init__()
        to.check("to")
        Epilogue(post=post).check()
        self.post = post
        self.register_buffer("scale", torch.tensor(to.scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(to.zero_point, dtype=torch.uint8))
        self._numbers: RoundingNumbers | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Real numbers to uint8: of any shape, or ``(B, C, H, W)`` where there are operations."""
        x = x.detach()
        if (
            not is_unwatched(x, torch.float32)
            or self.scale.is_inference()
            or (self.post and x.dim() != 4)
        ):
            for op in self.post:
                x = op(x)
            return quantize(x, self.scale, self.zero_point)
        found = self.prepared()
        if found is None:
            inverse = float(self.scale.reciprocal())
            tensors = (self.scale, self.zero_point)
            versions = (tensors[0]._version, tensors[1]._version)
            found = RoundingNumbers(tensors, versions, inverse, int(self.zero_point))
            self._numbers = found
        if not self.post:
            return int8_planes.quantize(x, found.inverse, found.zero_point)
        return int8_planes.post_and_quantize(x, self.post, found.inverse, found.zero_point)

    def prepared(self) -> RoundingNumbers | None:
        """What the kernels read of the tensors; None if they changed, or never were read."""
        tensors, found = (self.scale, self.zero_point), self._numbers
        if found is None or not _same(found.tensors, tensors):
            return None
        return found if found.versions == (tensors[0]._version, tensors[1]._version) else None

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join(op.kind for op in self.post)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_numbers": None}


class QuantizedConv2d(ConvShape, nn.Module):
    """A convolution without its pruned columns, in int8.

    Computes ``clamp(conv(x) + residual)``. The input and the residual are uint8. The output is
    uint8, or float32 where ``spec.output`` is None. The kernels and torch compute the same numbers,
    bit for bit. There are no gradients.

    Args:
        spec: The convolution, the scales of its tensors, and its clamp.
        weight: Kept columns, int8 ``(filters / groups, columns)``, in [-127, 127].
        columns: Indices of the kept columns, int32 ``(columns,)``, ascending, as those of a
            :class:`ColumnConv2d`.
        weight_scale: Real units per step of each filter's weights, float32 ``(filters,)``.
        bias: In real units, float32 ``(filters,)``, or None.

    Raises:
        ValueError: If the tensors or the scales are out of range, or don't fit; when the layer is
            called, if an input doesn't fit.

    >>> spec = Int8Spec(Geometry(2, 1, (1, 1)), TensorScale(0.5, 10), clamp=(0, math.inf))
    >>> weight, columns = torch.tensor([[4]]).to(torch.int8), torch.tensor([1], dtype=torch.int32)
    >>> layer = QuantizedConv2d(spec, weight, columns, torch.tensor([0.25]))
    >>> layer
    QuantizedConv2d(2, 1, kernel_size=(1, 1), columns=1 of 2, clamp=(0, inf), output=float32)
    >>> layer(torch.tensor([10, 30, 16, 6], dtype=torch.uint8).view(1, 2, 1, 2))
    tensor([[[[3., 0.]]]])
    """

    weight: Tensor
    columns: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    output_scale: Tensor | None
    output_zero_point: Tensor | None
    residual_scale: Tensor | None
    residual_zero_point: Tensor | None

    def __init__(
        self,
        spec: Int8Spec,
        weight: Tensor,
        columns: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        spec.check()
        g = spec.geometry
        check_columns(columns, g)
        _check_weight(weight, columns, g)
        _check_numbers("weight_scale", weight_scale, g)
        least, most = (float(x) for x in weight_scale.detach().aminmax())
        if not (least >= 1e-30 and most * spec.input.scale <= 1e30):
            raise ValueError(
                "`weight_scale` must be at least 1e-30, and its product with the input's scale"
                f" (={spec.input.scale}) at most 1e30, got {least} to {most}."
            )
        if bias is not None:
            _check_numbers("bias", bias, g)
        self.geometry, self.clamp = g, (float(spec.clamp[0]), float(spec.clamp[1]))
        tensors = {"weight": weight, "columns": columns, "weight_scale": weight_scale, "bias": bias}
        for name, tensor in tensors.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        for name in ("input", "output", "residual"):
            scale: TensorScale | None = getattr(spec, name)
            both: tuple[Tensor | None, Tensor | None] = None, None
            if scale is not None:
                both = (
                    torch.tensor(scale.scale, dtype=torch.float32, device=weight.device),
                    torch.tensor(scale.zero_point, dtype=torch.uint8, device=weight.device),
                )
            self.register_buffer(f"{name}_scale", both[0])
            self.register_buffer(f"{name}_zero_point", both[1])
        self._packed: _Packed | None = None

    @property
    def spec(self) -> Int8Spec:
        """All of the layer but its weights, columns and bias."""
        scales = {}
        for name in ("input", "output", "residual"):
            scale = self._buffers[f"{name}_scale"]
            zero_point = self._buffers[f"{name}_zero_point"]
            if scale is not None and zero_point is not None:
                scales[name] = TensorScale(float(scale), int(zero_point))
        return Int8Spec(self.geometry, clamp=self.clamp, **scales)  # type: ignore[arg-type]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the convolution and its epilogue.

        Args:
            x: Input, uint8 ``(B, C, H, W)`` or ``(C, H, W)``.
            residual: Added to the convolution's output, uint8, of its shape; for a layer that has a
                scale for it.

        Returns:
            The output, ``(B, N, H', W')`` or ``(N, H', W')``.

        Raises:
            ValueError: If an input is of another shape or dtype than the layer's, or a residual is
                missing, or there shouldn't be one.
        """
        return self._convolve(x, residual)

    def _convolve(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if (
            x.dim() == 4
            and is_unwatched(x, torch.uint8)
            and (residual is None or is_unwatched(residual, torch.uint8))
        ):
            return self._handle().run(x, residual)
        if x.dim() == 3:
            return self._convolve(x[None], None if residual is None else residual[None])[0]
        self._check(x, residual)
        if not (x.is_contiguous() and (residual is None or residual.is_contiguous())):
            added = None if residual is None else residual.contiguous()
            return self._convolve(x.contiguous(), added)
        return self._in_torch(x, residual)

    def _handle(self) -> Int8Handle:
        """The handle; packed anew if the layer's tensors changed since, by torch's versions."""
        found = self.prepared()
        if found is not None:
            return found
        tensors = tuple(self._buffers.values())
        handle = Int8Handle(self.weight, self.columns, self.weight_scale, self.bias, self.spec)
        if any(x is not None and x.is_inference() for x in tensors):  # they count no versions
            return handle
        versions = tuple(0 if x is None else x._version for x in tensors)
        self._packed = _Packed(handle, tensors, versions)
        return handle

    def prepared(self) -> Int8Handle | None:
        """The handle; None if the layer's tensors changed, or never were packed."""
        tensors, found = tuple(self._buffers.values()), self._packed
        if found is None or len(found.tensors) != len(tensors):
            return None
        # One loop without calls: small layers wait for it.
        for tensor, packed, version in zip(tensors, found.tensors, found.versions):  # noqa: B905
            if tensor is not packed or (tensor is not None and tensor._version != version):
                return None
        return found.handle

    @property
    def instruction_set(self) -> str:
        """What the CPU kernels compute the layer with; ``"none"`` without kernels."""
        return self._handle().instruction_set if is_available() else "none"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _check(self, x: Tensor, residual: Tensor | None) -> None:
        g = self.geometry
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] != g.channels:
            raise ValueError(
                f"`x` must be uint8 of shape (B, {g.channels}, H, W), got {x.dtype} of shape"
                f" {tuple(x.shape)}."
            )
        if (residual is None) != (self.residual_scale is None):
            must = "be given" if residual is None else "be None"
            raise ValueError(f"`residual` must {must}: the layer was made so.")
        if residual is None:
            return
        shape = (len(x), g.filters, *g.out_size(x.shape[2], x.shape[3]))
        if residual.dtype != torch.uint8 or residual.shape != shape:
            raise ValueError(
                f"`residual` must be uint8 of shape {shape}, got {residual.dtype} of shape"
                f" {tuple(residual.shape)}."
            )

    def _in_torch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        sums = convolve(x, self.input_zero_point, self.weight, self.columns, self.geometry)
        multiplier, added = self.input_scale * self.weight_scale, None
        if residual is not None:
            assert self.residual_scale is not None and self.residual_zero_point is not None
            added = dequantize(residual, self.residual_scale, self.residual_zero_point)
        y = requantize(sums, multiplier, self.bias, added, self.clamp)
        if self.output_scale is None or self.output_zero_point is None:
            return y
        return quantize(y, self.output_scale, self.output_zero_point)

    def extra_repr(self) -> str:  # noqa: D102
        g = self.geometry
        parts = [
            f"{g.channels}, {g.filters}, kernel_size={g.kernel_size}",
            f"stride={g.stride}" if g.stride != (1, 1) else "",
            f"padding={g.padding}" if g.padding != (0, 0) else "",
            f"dilation={g.dilation}" if g.dilation != (1, 1) else "",
            f"groups={g.groups}" if g.groups != 1 else "",
            f"columns={len(self.columns)} of {g.num_columns}",
            f"clamp={_text(self.clamp)}" if self.clamp != (-math.inf, math.inf) else "",
            "residual" if self.residual_scale is not None else "",
            f"output={'float32' if self.output_scale is None else 'uint8'}",
        ]
        return ", ".join(part for part in parts if part)


class QuantizedLinear(QuantizedConv2d):
    """A linear layer without its pruned columns, in int8: a 1×1 convolution of images of one pixel.

    The arguments are those of :class:`QuantizedConv2d`.
    """

    def __init__(self, spec: Int8Spec, *tensors: Any) -> None:
        g = spec.geometry
        if g != Geometry(g.channels, g.filters, (1, 1)) or spec.residual is not None:
            raise ValueError(f"`spec` must be a 1×1 convolution without a residual, got {spec}.")
        super().__init__(spec, *tensors)

    @property
    def in_features(self) -> int:
        """Input features, pruned ones included."""
        return self.geometry.channels

    @property
    def out_features(self) -> int:
        """Output features."""
        return self.geometry.filters

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the layer: uint8 ``(…, in_features)`` to ``(…, out_features)``."""
        if residual is not None or x.shape[-1] != self.in_features:
            raise ValueError(
                f"`x` must be of shape (…, {self.in_features}), and there is no residual; got"
                f" {tuple(x.shape)}."
            )
        rows = self._convolve(x.reshape(-1, self.in_features, 1, 1), None)
        return rows.view(*x.shape[:-1], self.out_features)


def _check_weight(weight: Tensor, columns: Tensor, geometry: Geometry) -> None:
    g = geometry
    shape = (g.filters // g.groups, len(columns))
    if weight.dtype != torch.int8 or tuple(weight.shape) != shape:
        raise ValueError(
            f"`weight` must be int8 of shape (filters / groups, columns) = {shape}, got"
            f" {weight.dtype} of shape {tuple(weight.shape)}."
        )
    if weight.numel() and int(weight.min()) < -127:
        raise ValueError("`weight` must be in [-127, 127], got -128.")
    by_group = torch.bincount(columns // (g.num_columns // g.groups))
    if len(columns) and int(by_group.max()) > _MOST_COLUMNS:
        raise ValueError(
            f"`columns` must be at most {_MOST_COLUMNS} per convolution group, so that int32 holds"
            f" the sums, got {int(by_group.max())}."
        )


def _check_numbers(name: str, numbers: Tensor, geometry: Geometry) -> None:
    if numbers.dtype != torch.float32 or tuple(numbers.shape) != (geometry.filters,):
        raise ValueError(
            f"`{name}` must be float32 of shape ({geometry.filters},), got {numbers.dtype} of shape"
            f" {tuple(numbers.shape)}."
        )
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"`{name}` must be finite.")


def _same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(a is b for a, b in zip(first, second, strict=True))


def _text(limits: tuple[Any, ...]) -> str:
    return f"({', '.join(f'{x:g}' for x in limits)})"
