"""The column-pruned convolution as an operator of torch: compiled, exported, differentiated.

There are two operators, forward and backward. Both take the layer's tensors and one description of
everything else: the two lists that :meth:`ConvSpec.pack` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from spp_lightning.compaction.epilogue import Clamp
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.kernels import gpu
from spp_lightning.compaction.kernels.cpu.checks import check_columns
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.kernels.cpu.registry import handle_for
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["column_conv2d"]


@torch.library.custom_op("spp_lightning::column_conv2d", mutates_args=())
def column_conv2d(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sizes: list[int],
    scalars: list[float],
) -> Tensor:
    """A convolution that reads only the kept columns, and its epilogue.

    Differentiable in all tensors but ``columns``. The backward pass reads kept columns only; it
    computes the convolution once more where the epilogue needs its output. On CPUs float16 is
    computed in float32, bfloat16 with sums in float32, and float64 as a dense convolution.

    Args:
        x: Input, ``(B, C, H, W)``.
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Indices of the kept columns, ``(columns,)``, int32, ascending: column (c, i, j) is
            ``(c · kh + i) · kw + j``, c counted over all groups.
        bias: ``(filters,)``, or None.
        residual: Added to the convolution's output, of its shape, or None.
        sizes: First list of :meth:`ConvSpec.pack`.
        scalars: Second list of :meth:`ConvSpec.pack`.

    Returns:
        The output, ``(B, N, H', W')``.

    Raises:
        ValueError: If a tensor has another shape than the description says, ``x`` doesn't hold
            floating-point numbers, or ``columns`` aren't ascending.

    >>> columns = torch.tensor([0, 2], dtype=torch.int32)
    >>> description = ConvSpec(Geometry(channels=3, filters=1, kernel_size=(1, 1))).pack()
    >>> x, weight = torch.ones(1, 3, 1, 2), torch.tensor([[2.0, 5.0]])
    >>> column_conv2d(x, weight, columns, None, None, *description)
    tensor([[[[7., 7.]]]])
    """
    return _forward(x, weight, columns, bias, residual, ConvSpec.unpack(sizes, scalars))


@column_conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sizes: list[int],
    scalars: list[float],
) -> Tensor:
    spec = ConvSpec.unpack(sizes, scalars)
    size = spec.out_size(x.shape[2], x.shape[3])
    return x.new_empty(x.shape[0], spec.geometry.filters, *size)


@torch.library.custom_op("spp_lightning::column_conv2d_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sizes: list[int],
    scalars: list[float],
    wanted: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias and residual; empty tensors for those that aren't wanted."""
    spec = ConvSpec.unpack(sizes, scalars)
    epilogue = spec.epilogue
    fused = not epilogue.is_empty
    if fused and not (residual is None and epilogue.activation == "none" and _on_cpu_kernels(x)):
        # In float32 at least: rounding to 16 bits may change which pixel is the greatest.
        wide = torch.promote_types(x.dtype, torch.float32)
        own = None if bias is None else bias.to(wide)
        alone = ConvSpec(spec.geometry)
        y = _forward(x.to(wide), weight.to(wide), columns, own, None, alone)
        y = y if residual is None else y + residual.to(wide)
        grad = epilogue.gradient(y, grad.to(wide)).to(grad.dtype)
        fused = False
    for_x, for_weight, for_bias, for_residual = wanted
    dx, dw, db = _conv_gradients(grad, x, weight, columns, bias, spec, fused, wanted[:3])
    return [
        dx.to(x.dtype) if for_x else x.new_empty(0),
        dw.to(weight.dtype) if for_weight else x.new_empty(0),
        db.to(bias.dtype) if for_bias and bias is not None else x.new_empty(0),
        _copy(grad, residual.dtype) if for_residual and residual is not None else x.new_empty(0),
    ]


@_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    sizes: list[int],
    scalars: list[float],
    wanted: list[bool],
) -> list[Tensor]:
    like = (x, weight, bias, residual)
    return [
        of.new_empty(of.shape) if wants and of is not None else x.new_empty(0)
        for of, wants in zip(like, wanted, strict=True)
    ]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, sizes, scalars = inputs
    ctx.save_for_backward(*tensors)
    ctx.description = sizes, scalars


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_x, for_weight, _, for_bias, for_residual, *_ = ctx.needs_input_grad
    wanted = [for_x, for_weight, for_bias, for_residual]
    gradients = _backward_op(grad, *ctx.saved_tensors, *ctx.description, wanted)
    dx, dw, db, dr = (
        value if wants else None for value, wants in zip(gradients, wanted, strict=True)
    )
    return dx, dw, None, db, dr, None, None


column_conv2d.register_autograd(_differentiate, setup_context=_remember)


@register_flop_formula(torch.ops.spp_lightning.column_conv2d)
def _flops(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    columns_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    residual_shape: Sequence[int] | None,
    sizes: list[int],
    scalars: list[float],
    **_: Any,
) -> int:
    """FLOPs as torch counts them: two per MAC."""
    geometry = ConvSpec.unpack(sizes, scalars).geometry
    return 2 * geometry.macs(x_shape, weight_shape[0] * weight_shape[1])


@register_flop_formula(torch.ops.spp_lightning.column_conv2d_backward)
def _backward_flops(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    columns_shape: Sequence[int],
    bias_shape: Sequence[int] | None,
    residual_shape: Sequence[int] | None,
    sizes: list[int],
    scalars: list[float],
    wanted: list[bool],
    **_: Any,
) -> int:
    """The gradients of ``x`` and of ``weight`` each take as many MACs as the convolution."""
    geometry = ConvSpec.unpack(sizes, scalars).geometry
    return sum(wanted[:2]) * 2 * geometry.macs(x_shape, weight_shape[0] * weight_shape[1])


def _forward(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    spec: ConvSpec,
) -> Tensor:
    _check(x, weight, columns, bias, residual, spec.geometry)
    if _on_cpu_kernels(x):
        dtype = x.dtype
        x = (x if dtype == torch.bfloat16 else x.float()).contiguous()
        residual = None if residual is None else residual.to(x.dtype).contiguous()
        return handle_for(weight, columns, bias, spec).forward(x, residual).to(dtype)
    if _on_gpu_kernels(x):
        sizes, epilogue = spec.geometry[2:], spec.epilogue
        y = gpu.column_conv2d(
            x, weight, columns, bias, *sizes, residual=residual, clamp=epilogue.clamp
        )
        return epilogue._replace(clamp=Clamp())(y)  # all that the kernel leaves
    if columns.is_cpu:  # to read them on another device would wait for it
        check_columns(columns, spec.geometry)
    y = _dense(x, weight, columns, bias, spec.geometry)
    return spec.epilogue(y, None if residual is None else residual.to(y.dtype))


def _dense(x: Tensor, weight: Tensor, columns: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    full = dense_weight(weight, columns, g).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, full, bias, g.stride, g.padding, g.dilation, g.groups)
    return y.to(x.dtype).contiguous()  # under autocast it may be of another type


def _conv_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    spec: ConvSpec,
    fused: bool,
    wanted: Sequence[bool],
) -> Sequence[Tensor]:
    """Gradients of x, weight and bias, of the convolution alone where it isn't ``fused``."""
    g, (for_x, for_weight, for_bias) = spec.geometry, wanted
    if _on_cpu_kernels(x):
        handle = handle_for(weight, columns, bias, spec)
        dy, kept = grad.float().contiguous(), weight.float().contiguous()
        return handle.backward(dy, kept, x.float().contiguous(), wanted, fused)
    dx = dw = x.new_empty(0)
    db = grad.sum((0, 2, 3)) if for_bias else x.new_empty(0)
    if _on_gpu_kernels(x):
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


def _check(
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    g: Geometry,
) -> None:
    if x.dim() != 4 or x.shape[1] != g.channels:
        raise ValueError(f"`x` must be (batch, {g.channels}, height, width), got {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise ValueError(f"`x` must hold floating-point numbers, got {x.dtype}.")
    _check_shape("weight", weight, (g.filters // g.groups, len(columns)))
    if bias is not None:
        _check_shape("bias", bias, (g.filters,))
    size = g.out_size(x.shape[2], x.shape[3])
    if residual is not None:
        _check_shape("residual", residual, (x.shape[0], g.filters, *size))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"`{name}` must be of shape {shape}, got {tuple(tensor.shape)}.")


def _on_cpu_kernels(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and is_available()


def _on_gpu_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and gpu.is_available()


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True)
