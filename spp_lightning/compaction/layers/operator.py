"""The column-pruned convolution as an operator of torch: compiled, exported, differentiated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from spp_lightning.compaction.epilogue import KINDS, Clamp, PlaneOp, size_after
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.kernels import gpu
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.kernels.cpu.plan import check_columns, plan_for

__all__ = ["column_conv2d", "column_conv2d_fused", "pack_geometry", "pack_post"]


def pack_geometry(geometry: Geometry) -> list[int]:
    """A geometry as the list of numbers that the operators take."""
    g = geometry
    return [
        *(g.channels, g.filters, *g.kernel_size, *g.stride),
        *(*g.padding, *g.dilation, g.groups),
    ]


def _geometry(numbers: Sequence[int]) -> Geometry:
    channels, filters, kh, kw, sh, sw, ph, pw, dh, dw, groups = numbers
    return Geometry(channels, filters, (kh, kw), (sh, sw), (ph, pw), (dh, dw), groups)


def pack_post(post: Sequence[PlaneOp]) -> tuple[list[int], list[float]]:
    """Plane operations as the lists of numbers that the operators take."""
    numbers = [
        number
        for op in post
        for number in (
            KINDS.index(op.kind),
            *(*op.kernel_size, *op.stride, *op.padding),
            *(int(op.ceil_mode), int(op.count_include_pad)),
        )
    ]
    return numbers, [op.alpha for op in post]


def _post(numbers: Sequence[int], alphas: Sequence[float]) -> tuple[PlaneOp, ...]:
    ops = []
    for i, alpha in enumerate(alphas):
        kind, kh, kw, sh, sw, ph, pw, ceil_mode, include = numbers[9 * i : 9 * i + 9]
        sizes = (kh, kw), (sh, sw), (ph, pw)
        ops.append(PlaneOp(KINDS[kind], *sizes, bool(ceil_mode), bool(include), alpha))
    return tuple(ops)


@torch.library.custom_op("spp_lightning::column_conv2d", mutates_args=())
def column_conv2d(
    x: Tensor, weight: Tensor, columns: Tensor, bias: Tensor | None, geometry: list[int]
) -> Tensor:
    """A convolution of which only some columns are left.

    Differentiable in ``x``, ``weight`` and ``bias``; the backward pass, too, touches kept columns
    only. On CPUs float16 is computed in float32, bfloat16 with sums in float32, and float64 as a
    dense convolution.

    Args:
        x: Input, ``(B, C, H, W)``.
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Which they are, ``(columns,)``, int32, ascending: column (c, i, j) is
            ``(c · kh + i) · kw + j``, c counted over all groups.
        bias: One per filter, ``(filters,)``, or None.
        geometry: What :func:`pack_geometry` makes of the convolution's geometry.

    Returns:
        The output, ``(B, N, H', W')``.

    Raises:
        ValueError: If ``x`` doesn't have the layer's channels, or ``columns`` aren't ascending.

    >>> from spp_lightning.compaction.geometry import Geometry
    >>> columns = torch.tensor([0, 2], dtype=torch.int32)
    >>> geometry = pack_geometry(Geometry(channels=3, filters=1, kernel_size=(1, 1)))
    >>> column_conv2d(torch.ones(1, 3, 1, 2), torch.tensor([[2.0, 5.0]]), columns, None, geometry)
    tensor([[[[7., 7.]]]])
    """
    return _compute(x, weight, columns, bias, None, _geometry(geometry), Clamp(), ())


@torch.library.custom_op("spp_lightning::column_conv2d_fused", mutates_args=())
def column_conv2d_fused(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: list[int],
    low: float,
    high: float,
    post: list[int],
    alphas: list[float],
) -> Tensor:
    """:func:`column_conv2d`, ``+ residual``, a clamp, and operations on planes.

    Differentiable in all tensors but ``columns``; the backward pass computes the convolution once
    more instead of keeping its output.

    Args:
        x: Input, ``(B, C, H, W)``.
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Which they are, ``(columns,)``.
        bias: One per filter, or None.
        residual: Of the convolution's output's shape, or None.
        geometry: What :func:`pack_geometry` makes of the convolution's geometry.
        low: Least value of the output.
        high: Greatest value of the output.
        post: What :func:`pack_post` makes of the operations on planes.
        alphas: Likewise.

    Returns:
        The output, ``(B, N, H', W')``.
    """
    ops = _post(post, alphas)
    return _compute(x, weight, columns, bias, residual, _geometry(geometry), Clamp(low, high), ops)


def _compute(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    clamp: Clamp,
    post: tuple[PlaneOp, ...],
) -> Tensor:
    if x.dim() != 4 or x.shape[1] != geometry.channels:
        raise ValueError(
            f"`x` must be (batch, {geometry.channels}, height, width), got {tuple(x.shape)}."
        )
    if not x.is_floating_point():
        raise ValueError(f"`x` must hold floating-point numbers, got {x.dtype}.")
    g = geometry
    _check_shape("weight", weight, (g.filters // g.groups, len(columns)))
    if bias is not None:
        _check_shape("bias", bias, (g.filters,))
    size = g.out_size(x.shape[2], x.shape[3])
    if residual is not None:
        _check_shape("residual", residual, (x.shape[0], g.filters, *size))
    if _on_cpu_kernels(x):
        dtype = x.dtype
        x = (x if dtype == torch.bfloat16 else x.float()).contiguous()
        residual = None if residual is None else residual.to(x.dtype).contiguous()
        plan = plan_for(weight, columns, bias, geometry, clamp, post)
        return plan.forward(x, residual).to(dtype)
    if x.is_cuda and x.dtype != torch.float64 and gpu.is_available():
        y = gpu.column_conv2d(
            x, weight, columns, bias, *geometry[2:], residual=residual, clamp=clamp
        )
    else:
        if columns.is_cpu:  # elsewhere it would wait for the device
            check_columns(columns, g)
        full = dense_weight(weight, columns, g).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        y = F.conv2d(x, full, bias, g.stride, g.padding, g.dilation, g.groups)
        y = y.to(x.dtype).contiguous()  # under autocast it may be another type
        if residual is not None:
            y = y + residual.to(y.dtype)
        if clamp != Clamp():
            y = y.clamp(*clamp)
    for op in post:
        y = op(y)
    return y


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must be of shape {shape}, got {tuple(tensor.shape)}.")


def _on_cpu_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and is_available()


@column_conv2d.register_fake
def _(
    x: Tensor, weight: Tensor, columns: Tensor, bias: Tensor | None, geometry: list[int]
) -> Tensor:
    g = _geometry(geometry)
    return x.new_empty(x.shape[0], g.filters, *g.out_size(x.shape[2], x.shape[3]))


@column_conv2d_fused.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: list[int],
    low: float,
    high: float,
    post: list[int],
    alphas: list[float],
) -> Tensor:
    g = _geometry(geometry)
    size = size_after(_post(post, alphas), g.out_size(x.shape[2], x.shape[3]))
    return x.new_empty(x.shape[0], g.filters, *size)


@torch.library.custom_op("spp_lightning::column_conv2d_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: list[int],
    low: float,
    high: float,
    post: list[int],
    alphas: list[float],
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of input, weights, bias and residual; empty where they aren't wanted."""
    g, clamp, ops = _geometry(geometry), Clamp(low, high), _post(post, alphas)
    fused = bool(ops) or clamp != Clamp()
    if fused and not (residual is None and _on_cpu_kernels(x)):
        # In float32 at least, since the greatest of rounded pixels may be another one.
        wide = torch.promote_types(x.dtype, torch.float32)
        own = None if bias is None else bias.to(wide)
        y = _compute(x.to(wide), weight.to(wide), columns, own, None, g, Clamp(), ())
        y = y if residual is None else y + residual.to(wide)
        grad = _plane_gradient(y, grad.to(wide), clamp, ops).to(grad.dtype)
        fused = False
    for_x, for_weight, for_bias, for_residual = wanted
    dx, dw, db = _conv_gradients(grad, x, weight, columns, bias, g, clamp, ops, fused, wanted)
    return [
        dx.to(x.dtype) if for_x else x.new_empty(0),
        dw.to(weight.dtype) if for_weight else x.new_empty(0),
        db.to(bias.dtype) if for_bias and bias is not None else x.new_empty(0),
        _copy(grad, residual.dtype) if for_residual and residual is not None else x.new_empty(0),
    ]


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)


def _conv_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    g: Geometry,
    clamp: Clamp,
    post: tuple[PlaneOp, ...],
    fused: bool,
    wanted: Sequence[bool],
) -> Sequence[Tensor]:
    """Gradients of input, weights and bias; the convolution's alone where it isn't ``fused``."""
    for_x, for_weight, for_bias, _ = wanted
    if _on_cpu_kernels(x):
        plan = plan_for(weight, columns, bias, g, clamp, post)
        dy, kept = grad.float().contiguous(), weight.float().contiguous()
        return plan.backward(dy, kept, x.float().contiguous(), wanted[:3], fused)
    dx = dw = x.new_empty(0)
    db = grad.sum((0, 2, 3)) if for_bias else x.new_empty(0)
    if x.is_cuda and x.dtype != torch.float64 and gpu.is_available():
        if for_x:
            dx = gpu.column_conv2d_backward_input(grad, weight, columns, tuple(x.shape), *g[2:])
        if for_weight:
            dw = gpu.column_conv2d_backward_weight(grad, x, columns, *g[2:])
        return dx, dw, db
    dense = dense_weight(weight, columns, g).to(x.dtype)
    conv = (g.stride, g.padding, g.dilation, g.groups)
    if for_x:
        dx = conv2d_input(list(x.shape), dense, grad, *conv)
    if for_weight:
        by_filter = conv2d_weight(x, list(dense.shape), grad, *conv)
        by_group = by_filter.unflatten(0, (g.groups, -1)).transpose(0, 1)
        dw = by_group.reshape(len(weight), -1)[:, columns.long()].contiguous()
    return dx, dw, db


def _plane_gradient(x: Tensor, grad: Tensor, clamp: Clamp, post: tuple[PlaneOp, ...]) -> Tensor:
    """Gradient of planes before a clamp and operations, ``grad`` being that of their output."""
    # By formulas, since torch doesn't differentiate what an operator does inside.
    inputs = [x.clamp(*clamp)]
    for op in post[:-1]:
        inputs.append(op(inputs[-1]))
    for op, planes in zip(reversed(post), reversed(inputs), strict=False):
        grad = op.backward(planes, grad)
    return torch.where((x > clamp.low) & (x < clamp.high), grad, 0).contiguous()


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: list[int],
    low: float,
    high: float,
    post: list[int],
    alphas: list[float],
    wanted: list[bool],
) -> list[Tensor]:
    like = (x, weight, bias, residual)
    return [
        of.new_empty(of.shape) if wants and of is not None else x.new_empty(0)
        for of, wants in zip(like, wanted, strict=True)
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, columns, bias, geometry = inputs
    ctx.save_for_backward(x, weight, columns, bias, None)
    ctx.arguments = (geometry, -math.inf, math.inf, [], [])


def _remember_fused(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, columns, bias, residual, *arguments = inputs
    ctx.save_for_backward(x, weight, columns, bias, residual)
    ctx.arguments = arguments


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_x, for_weight, _, for_bias, *others = ctx.needs_input_grad
    wanted = [for_x, for_weight, for_bias, len(others) > 1 and others[0]]
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.arguments, wanted)
    dx, dw, db, dr = (
        value if wants else None for value, wants in zip(gradients, wanted, strict=True)
    )
    rest: tuple[Tensor | None, ...] = (None,) if len(others) == 1 else (dr, *[None] * 5)
    return dx, dw, None, db, *rest


column_conv2d.register_autograd(_differentiate, setup_context=_remember)
column_conv2d_fused.register_autograd(_differentiate, setup_context=_remember_fused)
