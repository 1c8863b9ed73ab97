"""The column-pruned convolution as an operator of torch: compiled, exported, differentiated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from spp_lightning.compaction import cpu, gpu
from spp_lightning.compaction.geometry import (
    KINDS,
    Clamp,
    Geometry,
    PlaneOp,
    dense_weight,
    size_after,
)

__all__ = [
    "column_conv2d",
    "column_conv2d_fused",
    "pack_geometry",
    "pack_post",
    "plane_ops",
]


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
    """:func:`column_conv2d`, ``+ residual``, a clamp, and operations on planes; no gradients.

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
    g = geometry
    _check_shape("weight", weight, (g.filters // g.groups, len(columns)))
    if bias is not None:
        _check_shape("bias", bias, (g.filters,))
    size = g.out_size(x.shape[2], x.shape[3])
    if residual is not None:
        _check_shape("residual", residual, (x.shape[0], g.filters, *size))
    if _on_cpu_kernels(x):
        dtype = x.dtype
        x = (x.float() if dtype == torch.float16 else x).contiguous()
        residual = None if residual is None else residual.to(x.dtype).contiguous()
        plan = cpu.plan_for(weight, columns, bias, geometry, clamp, post)
        return plan.forward(x, residual).to(dtype)
    if x.is_cuda and x.dtype != torch.float64 and gpu.is_available():
        y = gpu.column_conv2d(
            x, weight, columns, bias, *geometry[2:], residual=residual, clamp=clamp
        )
    else:
        if columns.is_cpu:  # elsewhere it would wait for the device
            cpu.check_columns(columns, g)
        full = dense_weight(weight, columns, g).to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        y = F.conv2d(x, full, bias, g.stride, g.padding, g.dilation, g.groups)
        y = y.to(x.dtype).contiguous()  # under autocast it may be another type
        if residual is not None:
            y = y + residual
        if clamp != Clamp():
            y = y.clamp(*clamp)
    for op in post:
        y = op(y)
    return y


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must be of shape {shape}, got {tuple(tensor.shape)}.")


def _on_cpu_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and cpu.is_available()


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
    geometry: list[int],
    for_input: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weights; empty where they aren't wanted."""
    g = _geometry(geometry)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    size = (int(x.shape[2]), int(x.shape[3]))
    if _on_cpu_kernels(x):
        dy = grad.float().contiguous()
        plan = cpu.plan_for(weight, columns, None, g)
        if for_input:
            kept = weight.float().contiguous()
            grad_x = plan.backward_input(dy, kept, size).to(x.dtype)
        if for_weight:
            grad_weight = plan.backward_weight(dy, x.float().contiguous()).to(weight.dtype)
        return grad_x, grad_weight
    if x.is_cuda and x.dtype != torch.float64 and gpu.is_available():
        if for_input:
            grad_x = gpu.column_conv2d_backward_input(grad, weight, columns, tuple(x.shape), *g[2:])
        if for_weight:
            grad_weight = gpu.column_conv2d_backward_weight(grad, x, columns, *g[2:])
        return grad_x, grad_weight
    dense = dense_weight(weight, columns, g).to(x.dtype)
    conv = (g.stride, g.padding, g.dilation, g.groups)
    if for_input:
        grad_x = conv2d_input(list(x.shape), dense, grad, *conv)
    if for_weight:
        by_filter = conv2d_weight(x, list(dense.shape), grad, *conv)
        by_group = by_filter.unflatten(0, (g.groups, -1)).transpose(0, 1)
        kept = by_group.reshape(len(weight), -1)[:, columns.long()]
        grad_weight = kept.contiguous().to(weight.dtype)
    return grad_x, grad_weight


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    geometry: list[int],
    for_input: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if for_input else 0),
        weight.new_empty(weight.shape if for_weight else 0),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, columns, _, geometry = inputs
    ctx.save_for_backward(x, weight, columns)
    ctx.geometry = geometry


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, columns = ctx.saved_tensors
    for_x, for_weight, _, for_bias, _ = ctx.needs_input_grad
    grad_x = grad_weight = None
    if for_x or for_weight:
        grad_x, grad_weight = _backward_op(
            grad, x, weight, columns, ctx.geometry, for_x, for_weight
        )
    return (
        grad_x if for_x else None,
        grad_weight if for_weight else None,
        None,
        grad.sum((0, 2, 3)) if for_bias else None,
        None,
    )


column_conv2d.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("spp_lightning::plane_ops", mutates_args=())
def plane_ops(x: Tensor, low: float, high: float, post: list[int], alphas: list[float]) -> Tensor:
    """A clamp, then operations on each plane, as in :func:`column_conv2d_fused`, with gradients.

    Args:
        x: Planes, ``(B, N, H, W)``.
        low: Lower limit of the clamp.
        high: Upper limit of the clamp.
        post: What :func:`pack_post` makes of the operations.
        alphas: Likewise.

    Returns:
        The output, ``(B, N, H', W')``.
    """
    ops = _post(post, alphas)
    if _on_cpu_kernels(x):
        return cpu.run_planes(x.float().contiguous(), None, Clamp(low, high), ops).to(x.dtype)
    return _plane_ops_in_torch(x, low, high, ops)


def _plane_ops_in_torch(x: Tensor, low: float, high: float, ops: tuple[PlaneOp, ...]) -> Tensor:
    y = x.clamp(low, high)
    for op in ops:
        y = op(y)
    return y


@plane_ops.register_fake
def _(x: Tensor, low: float, high: float, post: list[int], alphas: list[float]) -> Tensor:
    size = size_after(_post(post, alphas), (x.shape[2], x.shape[3]))
    return x.new_empty(x.shape[0], x.shape[1], *size)


@torch.library.custom_op("spp_lightning::plane_ops_backward", mutates_args=())
def _plane_ops_backward(
    grad: Tensor, x: Tensor, low: float, high: float, post: list[int], alphas: list[float]
) -> Tensor:
    """Gradient of the input of :func:`plane_ops`."""
    ops = _post(post, alphas)
    if _on_cpu_kernels(x):
        planes, dy = x.float().contiguous(), grad.float().contiguous()
        return cpu.run_planes(planes, dy, Clamp(low, high), ops).to(x.dtype)
    # By formulas, since torch doesn't differentiate what an operator does inside.
    inputs = [x.clamp(low, high)]
    for op in ops[:-1]:
        inputs.append(op(inputs[-1]))
    for op, planes in zip(reversed(ops), reversed(inputs), strict=False):
        grad = op.backward(planes, grad)
    return torch.where((x > low) & (x < high), grad, 0).contiguous()


@_plane_ops_backward.register_fake
def _(
    grad: Tensor, x: Tensor, low: float, high: float, post: list[int], alphas: list[float]
) -> Tensor:
    return x.new_empty(x.shape)


def _remember_planes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _differentiate_planes(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _plane_ops_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


plane_ops.register_autograd(_differentiate_planes, setup_context=_remember_planes)
