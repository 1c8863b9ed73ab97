"""ColumnConv2d: a convolution that stores and computes only the columns that pruning kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, is_autocast_enabled, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter

from spp_lightning.compaction.epilogue import Clamp, Epilogue
from spp_lightning.compaction.geometry import Geometry, dense_weight, kept_columns
from spp_lightning.compaction.kernels.cpu.checks import check_columns
from spp_lightning.compaction.kernels.cpu.config import KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle
from spp_lightning.compaction.kernels.cpu.library import is_available
from spp_lightning.compaction.kernels.cpu.registry import handle_for
from spp_lightning.compaction.layers.conv_shape import ConvShape
from spp_lightning.compaction.layers.operator import column_conv2d
from spp_lightning.compaction.layers.unwatched import is_plain
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["ColumnConv2d", "need_grad"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16)

# Bound once: looked up through torch's modules in every call, they take as long as a tiny layer.
_is_tracing = torch._C._is_tracing
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_num_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


class ColumnConv2d(ConvShape, nn.Module):
    """A convolution without its pruned columns, together with its epilogue.

    Computes ``epilogue(conv(x) + residual)``. It trains like any layer; pruned columns stay pruned.
    On CPUs, where the epilogue has operations on planes, the backward pass computes the convolution
    once more instead of keeping its output.

    The layer has one prepared handle, which holds the packed weights. It is packed anew when the
    layer's tensors change (:class:`~spp_lightning.compaction.kernels.cpu.handle.Handle`).

    Args:
        geometry: The convolution.
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Indices of the kept columns, ``(columns,)``, int32, ascending: column (c, i, j) is
            ``(c · kh + i) · kw + j``, c counted over all convolution groups.
        bias: ``(filters,)``, or None.
        epilogue: Clamp or activation, and operations on planes.

    Raises:
        ValueError: If an argument is of another type, the shapes don't fit, or ``columns`` aren't
            ascending or don't exist; when the layer is called, if an input doesn't fit.

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
        epilogue: Epilogue = Epilogue(),  # noqa: B008 (immutable)
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
        if not isinstance(epilogue, Epilogue):
            raise ValueError(f"`epilogue` must be an Epilogue, got {epilogue!r}.")
        ConvSpec(geometry, epilogue).check()
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
        self.epilogue = epilogue
        self.weight = nn.Parameter(weight.detach().clone())
        own = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_parameter("bias", own)
        self.register_buffer("columns", columns.clone())
        self._handle: Handle | None = None
        self._chain: Any = None  # of this layer and those behind it
        self._gate: Any = None  # of this layer and the one behind it

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        epilogue: Epilogue = Epilogue(),  # noqa: B008 (immutable)
    ) -> ColumnConv2d:
        """The compact layer of a convolution: without the columns that are all 0.

        Args:
            conv: The convolution; it is left as it was.
            epilogue: Clamp or activation, and operations on planes.

        Raises:
            ValueError: If ``conv`` isn't an ``nn.Conv2d`` or has no weights yet, or its padding
                isn't zeros, or isn't the same on opposite sides.
        """
        if not isinstance(conv, nn.Conv2d) or isinstance(conv.weight, UninitializedParameter):
            raise ValueError(f"`conv` must be an nn.Conv2d with weights, got {conv!r}.")
        geometry = Geometry.of(conv)
        weight, columns = kept_columns(conv.weight.detach(), geometry)
        layer = cls(geometry, weight, columns, conv.bias, epilogue)
        layer.weight.requires_grad_(conv.weight.requires_grad)
        if layer.bias is not None and conv.bias is not None:
            layer.bias.requires_grad_(conv.bias.requires_grad)
        return layer

    @property
    def spec(self) -> ConvSpec:
        """The convolution and its epilogue: all of the layer but its tensors."""
        return ConvSpec(self.geometry, self.epilogue)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute the convolution and its epilogue.

        Args:
            x: Input, ``(B, C, H, W)`` or ``(C, H, W)``.
            residual: Added to the convolution's output, of its shape.

        Returns:
            The output, ``(B, N, H', W')`` or ``(N, H', W')``.

        Raises:
            ValueError: If an input is no tensor, of another shape than the layer's, on another
                device, or of another dtype outside autocast.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._takes_directly(x):
            handle = self._handle_for(x, residual)
            if handle is not None:
                return handle.forward(x, residual)
        self._check_input("x", x)
        if residual is not None:
            self._check_input("residual", residual)
        if x.dim() == 3:
            batch = None if residual is None else residual[None]
            return self.forward(x[None], batch)[0]
        if not compiling and forward_ad._current_level >= 0:
            return self._in_torch(x, residual)  # the operators have no forward derivatives
        spec = self.spec
        gradients = is_grad_enabled() and self._needs_grad(x, residual)
        tensors = (x, self.weight, self.columns, self.bias)
        fused = self.epilogue.post and self.epilogue.activation == "none"
        if not gradients or (fused and x.is_cpu):
            return column_conv2d(*tensors, residual, *spec.pack())
        # Step by step, so that the backward pass finds the convolution's output.
        y = column_conv2d(*tensors, None, *ConvSpec(spec.geometry).pack())
        return self.epilogue(y, residual)

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
        return self.epilogue(y, residual)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        # A module's dicts where that is possible: its attributes take ten times as long.
        weight, columns = self._parameters.get("weight"), self._buffers.get("columns")
        if weight is None or columns is None or "bias" not in self._parameters:  # parametrized
            return self.weight, self.columns, self.bias
        return weight, columns, self._parameters["bias"]

    def _handle_for(self, x: Tensor, residual: Tensor | None) -> Handle | None:
        """The handle, if it computes the layer for these inputs and nothing needs the operator."""
        weight, _, bias = tensors = self._tensors()
        handle = self._handle
        if handle is not None and not handle.holds(*tensors):
            handle = None
        if handle is None and type(weight) not in (nn.Parameter, Tensor):
            return None
        if weight.dtype != x.dtype or (is_grad_enabled() and need_grad(weight, bias)):
            return None
        if residual is not None and not self._adds_directly(x, residual):
            return None
        if handle is None:
            before, handle = self._handle, handle_for(*tensors, self.spec)
            if before is not None:
                handle.tuned = before.tuned
            self._handle = handle
        return handle

    def _adds_directly(self, x: Tensor, residual: Tensor) -> bool:
        return (
            type(residual) is Tensor
            and residual.dtype == x.dtype
            and is_plain(residual)
            and not (is_grad_enabled() and residual.requires_grad)
        )

    def tune(self, x: Tensor, residual: Tensor | None = None) -> dict[KernelConfig, float]:
        """Measure the kernel configs on an input, and use the fastest for inputs of its shape.

        Only configs of equal outputs, bit for bit, are measured. Copies and files of the layer know
        nothing of it.

        Args:
            x: Input, ``(B, C, H, W)``.
            residual: Added to the convolution's output, of its shape.

        Returns:
            Milliseconds by kernel config; empty where the CPU kernels don't compute the layer.
        """
        with torch.no_grad():
            handle = self._handle_for(x, residual) if self._takes_directly(x) else None
            return {} if handle is None else handle.tune(x, residual)

    def config_for(self, x: Tensor) -> KernelConfig | None:
        """The kernel config for inputs of the shape of ``x``, with as many threads as torch uses.

        Returns:
            The config; None where the CPU kernels don't compute the layer.
        """
        with torch.no_grad():
            handle = self._handle_for(x, None) if self._takes_directly(x) else None
            if handle is None:
                return None
            return handle.config_for(x.shape, x.dtype, torch.get_num_threads())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_chain": None, "_gate": None}

    def _needs_grad(self, x: Tensor, residual: Tensor | None) -> bool:
        return (
            x.requires_grad
            or self.weight.requires_grad
            or (self.bias is not None and self.bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )

    def _takes_directly(self, x: Tensor) -> bool:
        # Without torch's dispatcher, which takes longer than a small layer.
        return (
            type(x) is Tensor
            and not _is_tracing()  # whose shapes are tensors
            and x.is_cpu
            and x.dtype in _KERNEL_DTYPES
            and not (x.requires_grad and is_grad_enabled())
            and x.dim() == 4
            and x.shape[1] == self.geometry.channels
            and x.is_contiguous()
            and not x.is_neg()
            # Whoever watches or transforms what torch computes must see the operator.
            and not is_autocast_enabled("cpu")
            and not _num_dispatch_modes()
            and not _num_function_modes()
            and _transform() is None
            and forward_ad._current_level < 0
            and (self._handle is not None or is_available())
        )

    def to_dense(self) -> nn.Conv2d:
        """The convolution without its epilogue as an ``nn.Conv2d``, zeros in pruned columns."""
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
        g, clamp = self.geometry, self.epilogue.clamp
        parts = [
            f"{g.channels}, {g.filters}, kernel_size={g.kernel_size}, stride={g.stride}",
            f"padding={g.padding}",
            f"dilation={g.dilation}" if g.dilation != (1, 1) else "",
            f"groups={g.groups}" if g.groups != 1 else "",
            f"columns={len(self.columns)} of {g.num_columns}",
            "bias=False" if self.bias is None else "",
            "relu" if clamp == (0, math.inf) else "",
            f"clamp={tuple(clamp)}" if clamp not in (Clamp(), (0, math.inf)) else "",
            self.epilogue.activation if self.epilogue.activation != "none" else "",
            *(op.kind for op in self.epilogue.post),
        ]
        return ", ".join(part for part in parts if part)


def need_grad(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether torch records what is computed with these parameters."""
    return is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
