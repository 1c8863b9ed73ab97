"""ColumnConv2d: a convolution that stores and computes only the columns that pruning kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter

from spp_lightning.compaction.epilogue import Clamp, PlaneOp
from spp_lightning.compaction.geometry import Geometry, dense_weight, kept_columns
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.kernels.cpu.plan import Plan, check_columns, plan_for
from spp_lightning.compaction.layers.operator import (
    column_conv2d,
    column_conv2d_fused,
    pack_geometry,
    pack_post,
)

__all__ = ["ColumnConv2d", "is_plain", "stamp_of"]

_AT_ONCE = (torch.float32, torch.bfloat16)  # what the CPU kernels read


class ColumnConv2d(nn.Module):
    """A convolution without its pruned columns, and with what follows it computed on the way.

    Computes ``post(clamp(conv(x) + residual))``. It trains like any layer, its pruned columns stay
    pruned. On CPUs the backward pass computes the convolution once more, rather than to keep its
    output, where post operations follow.

    Args:
        geometry: The convolution.
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Which they are, ``(columns,)``, int32, ascending: column (c, i, j) is
            ``(c · kh + i) · kw + j``, c counted over all convolution groups.
        bias: One per filter, ``(filters,)``, or None.
        clamp: Limits of the output, the lower one first; ReLU is ``(0, inf)``.
        post: Operations on the planes of the clamped output.

    Raises:
        ValueError: If an argument is of another type, the shapes don't fit, or ``columns`` aren't
            ascending or don't exist; when it is called, if an input doesn't fit.

    >>> conv = nn.Conv2d(3, 8, 3, padding=1)
    >>> with torch.no_grad():
    ...     _ = conv.weight[:, 1].zero_()
    >>> compact = ColumnConv2d.of(conv)
    >>> compact
    ColumnConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), columns=18 of 27)
    >>> x = torch.ones(1, 3, 8, 8)
    >>> torch.allclose(compact(x), conv(x), atol=1e-6)
    True
    """

    columns: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        geometry: Geometry,
        weight: Tensor,
        columns: Tensor,
        bias: Tensor | None = None,
        clamp: Clamp = Clamp(),  # noqa: B008 (immutable)
        post: tuple[PlaneOp, ...] = (),
    ) -> None:
        super().__init__()
        if not isinstance(geometry, Geometry):
            raise ValueError(
                f"`geometry` must be a Geometry, got {geometry!r}; to make a layer of an nn.Conv2d,"
                " call `ColumnConv2d.of(conv)`."
            )
        given = {"weight": weight, "columns": columns} | ({} if bias is None else {"bias": bias})
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"`{name}` must be a tensor, got {tensor!r}.")
        if not weight.is_floating_point() or (bias is not None and bias.dtype != weight.dtype):
            dtypes = weight.dtype if bias is None else f"{weight.dtype} and {bias.dtype}"
            raise ValueError(f"`weight` and `bias` must be of one floating dtype, got {dtypes}.")
        geometry.check()
        _check_post(post)
        check_columns(columns, geometry)
        shape = (geometry.filters // geometry.groups, len(columns))
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"`weight` must be (filters / groups, columns) = {shape}, got"
                f" {tuple(weight.shape)}."
            )
        if bias is not None and tuple(bias.shape) != (geometry.filters,):
            raise ValueError(f"`bias` must be ({geometry.filters},), got {tuple(bias.shape)}.")
        self.geometry = geometry
        self.clamp = Clamp.of(clamp)
        self.post = tuple(post)
        self.weight = nn.Parameter(weight.detach().clone())
        own = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_parameter("bias", own)
        self.register_buffer("columns", columns.clone())
        self._known_plan: Any = None
        self._known_sequence: Any = None  # of this layer and those behind it
        self._numbers = (pack_geometry(geometry), *pack_post(post))

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        clamp: Clamp = Clamp(),  # noqa: B008 (immutable)
        post: tuple[PlaneOp, ...] = (),
    ) -> ColumnConv2d:
        """The same convolution as a layer, without the columns that are all 0.

        Raises:
            ValueError: If ``conv`` isn't an ``nn.Conv2d``, has no weights yet, or its padding isn't
                zeros of one number per side.
        """
        if not isinstance(conv, nn.Conv2d) or isinstance(conv.weight, UninitializedParameter):
            raise ValueError(f"`conv` must be an nn.Conv2d with weights, got {conv!r}.")
        geometry = Geometry.of(conv)
        weight, columns = kept_columns(conv.weight.detach(), geometry)
        layer = cls(geometry, weight, columns, conv.bias, clamp, post)
        layer.weight.requires_grad_(conv.weight.requires_grad)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer

    @property
    def in_channels(self) -> int:
        """Input channels, as of an ``nn.Conv2d``, like those below."""
        return self.geometry.channels

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.geometry.filters

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Rows and columns of the kernel."""
        return self.geometry.kernel_size

    @property
    def stride(self) -> tuple[int, int]:
        """Pixels between two outputs."""
        return self.geometry.stride

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros on each side."""
        return self.geometry.padding

    @property
    def dilation(self) -> tuple[int, int]:
        """Distance of the kernel's elements."""
        return self.geometry.dilation

    @property
    def groups(self) -> int:
        """Convolution groups."""
        return self.geometry.groups

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution and what follows it.

        Args:
            x: Input, ``(B, C, H, W)`` or ``(C, H, W)``.
            residual: Added to the convolution's output, of its shape.

        Returns:
            The output, ``(B, N, H', W')`` or ``(N, H', W')``.

        Raises:
            ValueError: If an input is no tensor, of another shape than the layer's, or on another
                device, or of another dtype outside autocast.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._takes_at_once(x):
            plan = self._plan_at_once(x, residual)
            if plan is not None:
                return plan.forward(x, residual)
        self._check_input("x", x)
        if residual is not None:
            self._check_input("residual", residual)
        if x.dim() == 3:
            batch = None if residual is None else residual[None]
            return self.forward(x[None], batch)[0]
        if not compiling and torch.autograd.forward_ad._current_level >= 0:
            return self._in_torch(x, residual)  # the operators have no forward derivatives
        shape, post, alphas = self._numbers
        gradients = torch.is_grad_enabled() and self._needs_grad(x, residual)
        if not gradients or (self.post and x.is_cpu):
            return column_conv2d_fused(
                x, self.weight, self.columns, self.bias, residual, shape, *self.clamp, post, alphas
            )
        # Step by step, so that the backward pass finds the convolution's output.
        y = column_conv2d(x, self.weight, self.columns, self.bias, shape)
        return self._after_convolution(y, residual)

    def _check_input(self, name: str, x: Tensor) -> None:
        if not isinstance(x, (Tensor, fx.Proxy)):
            raise ValueError(f"`{name}` must be a tensor, got {type(x).__name__}.")
        if x.device != self.weight.device:
            raise ValueError(
                f"`{name}` must be on the layer's device, {self.weight.device}, got {x.device}."
            )
        other = x.is_floating_point() and x.dtype != self.weight.dtype
        if other and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"`{name}` must be of the layer's type, {self.weight.dtype}, got {x.dtype};"
                " convert one of them, or use torch.autocast."
            )

    def _in_torch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        g = self.geometry
        weight = dense_weight(self.weight, self.columns, g)
        y = F.conv2d(x, weight, self.bias, g.stride, g.padding, g.dilation, g.groups)
        return self._after_convolution(y, residual)

    def _after_convolution(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y + residual
        if self.clamp == (0, math.inf):
            y = F.relu(y)
        elif self.clamp != Clamp():
            y = y.clamp(*self.clamp)
        for op in self.post:
            y = op(y)
        return y

    def _tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        # Reads a module's dicts where it can: its attributes take ten times as long.
        weight, columns = self._parameters.get("weight"), self._buffers.get("columns")
        if weight is None or columns is None or "bias" not in self._parameters:  # parametrized
            return self.weight, self.bias, self.columns
        return weight, self._parameters["bias"], columns

    def _plan_at_once(self, x: Tensor, residual: Tensor | None) -> Plan | None:
        # What computes the layer, if nothing about it needs the operator.
        weight, bias, columns = tensors = self._tensors()
        # The plan that was made last, if it still fits. That takes a microsecond, plan_for ten.
        known, plan = self._known_plan, None
        if (
            known is not None
            and known[1] is weight
            and known[2] is bias
            and known[3] is columns
            and known[4] == stamp_of(weight, bias, columns)
        ):
            plan = known[0]
        elif type(weight) not in (nn.Parameter, Tensor):
            return None
        if weight.dtype != x.dtype:
            return None
        if torch.is_grad_enabled() and (
            weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return None
        if residual is not None and not self._adds_at_once(x, residual):
            return None
        if plan is None:
            plan = plan_for(weight, columns, bias, self.geometry, self.clamp, self.post)
            if not any(t is not None and t.is_inference() for t in tensors):
                self._known_plan = (plan, *tensors, stamp_of(*tensors))
        return plan

    def _adds_at_once(self, x: Tensor, residual: Tensor) -> bool:
        return (
            type(residual) is Tensor
            and residual.dtype == x.dtype
            and is_plain(residual)
            and not (torch.is_grad_enabled() and residual.requires_grad)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known_plan": None, "_known_sequence": None}

    def _needs_grad(self, x: Tensor, residual: Tensor | None) -> bool:
        return (
            x.requires_grad
            or self.weight.requires_grad
            or (self.bias is not None and self.bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )

    def _takes_at_once(self, x: Tensor) -> bool:
        # Spares the way through torch's dispatcher, which takes longer than a small layer.
        return (
            type(x) is Tensor
            and not torch._C._is_tracing()  # whose shapes are tensors
            and x.is_cpu
            and x.dtype in _AT_ONCE
            and not (x.requires_grad and torch.is_grad_enabled())
            and x.dim() == 4
            and x.shape[1] == self.geometry.channels
            and is_plain(x)
            # Whoever watches or transforms what torch computes must see the operator.
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch.autograd.forward_ad._current_level < 0
            and (self._known_plan is not None or is_available())
        )

    def to_dense(self) -> nn.Conv2d:
        """The convolution alone as an ordinary layer, with zeros in the pruned columns."""
        g = self.geometry
        conv = nn.Conv2d(
            g.channels,
            g.filters,
            g.kernel_size,
            g.stride,
            g.padding,
            g.dilation,
            g.groups,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(dense_weight(self.weight, self.columns, g))
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:  # noqa: D102
        g = self.geometry
        parts = [
            f"{g.channels}, {g.filters}, kernel_size={g.kernel_size}, stride={g.stride}",
            f"padding={g.padding}",
            f"dilation={g.dilation}" if g.dilation != (1, 1) else "",
            f"groups={g.groups}" if g.groups != 1 else "",
            f"columns={len(self.columns)} of {g.num_columns}",
            "bias=False" if self.bias is None else "",
            "relu" if self.clamp == (0, math.inf) else "",
            f"clamp={tuple(self.clamp)}" if self.clamp not in (Clamp(), (0, math.inf)) else "",
            *(op.kind for op in self.post),
        ]
        return ", ".join(part for part in parts if part)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's memory holds its values in order; a negated view's holds the opposite."""
    return tensor.is_contiguous() and not tensor.is_neg()


def stamp_of(weight: Tensor, bias: Tensor | None, columns: Tensor) -> tuple[int, ...]:
    """What changes when a tensor's values do."""
    counts = (weight._version, weight.data_ptr(), columns._version, columns.data_ptr())
    return counts if bias is None else (*counts, bias._version, bias.data_ptr())


def _check_post(post: object) -> None:
    if not isinstance(post, (tuple, list)) or not all(isinstance(x, PlaneOp) for x in post):
        raise ValueError(f"`post` must be a tuple of PlaneOps, got {post!r}.")
    for op in post:
        op.check()
