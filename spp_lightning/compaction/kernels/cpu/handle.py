"""The prepared handle of a layer: its packed weights, and what was prepared per input shape."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import ACTIVATIONS, KINDS, PlaneOp
from spp_lightning.compaction.kernels.cpu import autotune, cost
from spp_lightning.compaction.kernels.cpu.checks import check_columns, check_size, check_tensor
from spp_lightning.compaction.kernels.cpu.config import Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.library import (
    NativeConfig,
    NativeEpilogueOp,
    NativeGeometry,
    library,
)
from spp_lightning.compaction.kernels.cpu.tables import ShapeTable
from spp_lightning.compaction.spec import ConvSpec

__all__ = ["Handle", "Prepared"]

Stamp = tuple[int, ...]


class Prepared(NamedTuple):
    """What a handle prepared to compute inputs of one shape and type."""

    conv_shape: tuple[int, ...]  # of the convolution's output
    out_shape: tuple[int, ...]  # of the epilogue's output
    dtype: torch.dtype
    config: KernelConfig
    address: int  # of `native`
    native: NativeConfig
    chain: NativeChain | None  # what runs the channel-blocked kernels


class NativeChain:
    """Layers in a row as the channel-blocked kernels run them; freed with this object.

    Whoever has it holds the handles: their packed weights are read.
    """

    def __init__(self, handles: Sequence[Handle], prepared: Sequence[Prepared]) -> None:
        functions, pointers = library(), ctypes.c_void_p * len(handles)
        made = ctypes.c_void_p()
        functions.spp_chain_create(
            pointers(*(handle.address for handle in handles)),
            pointers(*(step.address for step in prepared)),
            len(handles),
            ctypes.byref(made),
        )
        self.address = made.value
        weakref.finalize(self, functions.spp_chain_free, self.address)


class Handle:
    """A layer's weights, packed for the CPU kernels.

    A handle holds for the tensors that it was made of, as long as they don't change:
    :meth:`holds` compares their identities, version counters and addresses. Changes in place
    count, changes through ``.data`` don't. Inference tensors count no versions, so their handles
    never hold.

    Args:
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Indices of the kept columns, ``(columns,)``, int32, ascending.
        bias: ``(filters,)``, or None.
        spec: The convolution and its epilogue.
        before: The layer's handle with its old weights, whose tuned configs are taken over.

    Raises:
        ValueError: If a tensor isn't on the CPU and of the right shape, or ``columns`` aren't
            ascending, or name columns that the layer doesn't have.
        MemoryError: If there is no memory for the packed weights.
    """

    def __init__(
        self,
        weight: Tensor,
        columns: Tensor,
        bias: Tensor | None,
        spec: ConvSpec,
        before: Handle | None = None,
    ) -> None:
        spec.check()
        g = spec.geometry
        check_columns(columns, g)
        check_tensor("weight", weight, (g.filters // g.groups, len(columns)))
        check_tensor("columns", columns, (len(columns),))
        if bias is not None:
            check_tensor("bias", bias, (g.filters,))
        self.spec = spec
        self.num_columns = len(columns)
        self.is_bfloat16 = weight.dtype == torch.bfloat16
        self.tuned: dict[Any, KernelConfig] = {} if before is None else before.tuned
        self._prepared: ShapeTable[Prepared] = ShapeTable()
        self._weight, self._columns = weakref.ref(weight), weakref.ref(columns)
        self._bias: Any = weakref.ref(bias) if bias is not None else lambda: None
        self._stamp = _stamp_of(weight, columns, bias)
        # While the memory is held, no other tensor gets its address.
        self._held = tuple(x.detach() for x in (weight, columns, bias) if x is not None)
        self._library = library()
        self._forward, self._forward_chain = (
            self._library.spp_forward,
            self._library.spp_chain_forward,
        )
        self.address = self._pack(weight, columns, bias)
        weakref.finalize(self, self._library.spp_plan_free, self.address)

    def _pack(self, weight: Tensor, columns: Tensor, bias: Tensor | None) -> int:
        g, epilogue = self.spec
        pair = ctypes.c_int32 * 2
        geometry = NativeGeometry(
            *(g.channels, g.filters, g.groups),
            *(pair(*x) for x in (g.kernel_size, g.stride, g.padding, g.dilation)),
        )
        weight, columns = weight.detach().float().contiguous(), columns.contiguous()
        bias = None if bias is None else bias.detach().float().contiguous()
        made = ctypes.c_void_p()
        self._library.spp_plan_create(
            *(ctypes.byref(geometry), columns.data_ptr(), len(columns)),
            *(weight.data_ptr(), weight.numel()),
            *((None, 0) if bias is None else (bias.data_ptr(), bias.numel())),
            *(*epilogue.clamp, ACTIVATIONS.index(epilogue.activation)),
            *(_plane_ops(epilogue.post), len(epilogue.post), self.is_bfloat16, ctypes.byref(made)),
        )
        return int(made.value or 0)

    def holds(self, weight: Tensor, columns: Tensor, bias: Tensor | None) -> bool:
        """Whether it is that of these tensors, and they are what they were."""
        stamp = self._stamp
        return (
            stamp is not None
            and self._weight() is weight
            and self._columns() is columns
            and self._bias() is bias
            and stamp[0] == weight._version
            and stamp[1] == weight.data_ptr()
            and stamp[2] == columns._version
            and stamp[3] == columns.data_ptr()
            and (bias is None or (stamp[4] == bias._version and stamp[5] == bias.data_ptr()))
        )

    @property
    def counts_changes(self) -> bool:
        """Whether its tensors count their versions; if not, it never holds."""
        return self._stamp is not None

    @property
    def num_prepared(self) -> int:
        """For how many input shapes something is prepared, at most 32."""
        return len(self._prepared)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: Input, ``(B, C, H, W)``, float32 or bfloat16, contiguous.
            residual: Added before the clamp; of the convolution's output's shape and the input's
                dtype, contiguous.

        Returns:
            The output, ``(B, N, H', W')``, of the input's dtype.

        Raises:
            ValueError: If a shape or a dtype doesn't fit.
            MemoryError: If there is no memory for it.
        """
        prepared = self.prepared_for(x.shape, x.dtype, torch.get_num_threads())
        if residual is not None:
            check_tensor("residual", residual, prepared.conv_shape)
        # Numbers one by one are read faster than a tuple.
        out = torch.empty(*prepared.out_shape, dtype=prepared.dtype)
        self.run(prepared, x, residual, out)
        return out

    def prepared_for(self, shape: Sequence[int], dtype: torch.dtype, threads: int) -> Prepared:
        """What :meth:`run` needs for inputs of a shape, ``(B, C, H, W)``, once prepared.

        Raises:
            ValueError: If the shape doesn't fit the layer.
        """
        key = (shape, dtype, threads)
        prepared = self._prepared.get(key)
        if prepared is None:
            made = self.prepare(shape, dtype, self.config_for(*key))
            prepared = self._prepared.put(key, made)
        return prepared

    def run(self, prepared: Prepared, x: Tensor, residual: Tensor | None, out: Tensor) -> None:
        """Run the layer as it was prepared; of shapes the numbers of elements are checked.

        Raises:
            ValueError: If a tensor has more or fewer elements than what was prepared.
            MemoryError: If there is no memory for it.
        """
        added = None if residual is None else residual.data_ptr()
        count = 0 if residual is None else residual.numel()
        x_at, x_count, out_at, out_count = x.data_ptr(), x.numel(), out.data_ptr(), out.numel()
        # Arguments one by one: a call with unpacked tuples takes longer.
        if prepared.chain is None:
            self._forward(
                self.address, prepared.address, x_at, x_count, added, count, out_at, out_count
            )
        else:
            self._forward_chain(
                prepared.chain.address, x_at, x_count, added, count, None, out_at, out_count
            )

    def config_for(self, shape: Sequence[int], dtype: torch.dtype, threads: int) -> KernelConfig:
        """The kernel config for inputs of a shape: the tuned one, or what the cost model says.

        Raises:
            ValueError: If the dtype is neither float32 nor bfloat16, or the shape doesn't fit.
        """
        shape = tuple(shape)
        return self.tuned.get((shape, dtype, threads)) or self.choice(shape, dtype, threads).config

    def choice(self, shape: Sequence[int], dtype: torch.dtype, threads: int) -> cost.Choice:
        """What the cost model says of inputs of a shape."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"`x` must be float32 or bfloat16, got {dtype}.")
        self._check_shape(shape)
        half = self.is_bfloat16 and dtype == torch.bfloat16
        pairs = half and bool(self._library.spp_has_pairs())
        return cost.choose(self.spec, self.num_columns, tuple(shape), dtype, threads, pairs)

    def tune(self, x: Tensor, residual: Tensor | None = None) -> dict[KernelConfig, float]:
        """Measure all configs of equal outputs on an input, and keep the fastest for its shape.

        Returns:
            Milliseconds by config.
        """
        threads = torch.get_num_threads()
        key = (tuple(x.shape), x.dtype, threads)
        prepared = [
            self.prepare(x.shape, x.dtype, config)
            for config in cost.candidates(self.choice(*key).config, self.spec, x.dtype, threads)
        ]
        out = torch.empty(prepared[0].out_shape, dtype=x.dtype)
        times = autotune.milliseconds([partial(self.run, p, x, residual, out) for p in prepared])
        measured = {p.config: time for p, time in zip(prepared, times, strict=True)}
        self.tuned[key] = min(measured, key=lambda config: measured[config])
        self._prepared.pop((x.shape, x.dtype, threads))
        autotune.note_choice()
        return measured

    def prepare(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        config: KernelConfig,
        with_epilogue: bool = True,
        alone: bool = True,
    ) -> Prepared:
        """What :meth:`run` needs for inputs of a shape.

        Args:
            shape: Of the input, ``(B, C, H, W)``.
            dtype: Of the input, float32 or bfloat16.
            config: Kernel and number of threads.
            with_epilogue: Whether the output is that of the epilogue, or of the convolution.
            alone: Whether the layer is to be run alone, or as a part of a chain.

        Raises:
            ValueError: If the shape doesn't fit the layer.
        """
        self._check_shape(shape)
        batch, _, height, width = shape
        size = self.spec.geometry.out_size(height, width)
        conv_shape = (batch, self.spec.geometry.filters, *size)
        check_size(shape, conv_shape)
        out_size = self.spec.epilogue.out_size(*size) if with_epilogue else size
        numbers = (batch, height, width, *size, config.threads, config.kernel)
        native = NativeConfig(*numbers, dtype == torch.bfloat16)
        made = Prepared(
            conv_shape=conv_shape,
            out_shape=(*conv_shape[:2], *out_size),
            dtype=dtype,
            config=config,
            address=ctypes.addressof(native),
            native=native,
            chain=None,
        )
        if config.kernel == Kernel.CHANNELS and alone:
            return made._replace(chain=NativeChain([self], [made]))
        return made

    def backward(
        self, grad: Tensor, weight: Tensor, x: Tensor, wanted: Sequence[bool], fused: bool
    ) -> list[Tensor]:
        """The gradients of the input, the weights and the bias, of their shapes.

        Args:
            grad: Gradient of the output, ``(B, N, H', W')``, float32, contiguous, like the others.
            weight: Kept columns, ``(filters / groups, columns)``, as the handle was made of.
            x: Input, ``(B, C, H, W)``.
            wanted: Which of the three; the others are empty.
            fused: Whether ``grad`` is the gradient of the epilogue's output, or that of the
                convolution's.
        """
        g = self.spec.geometry
        config = KernelConfig(Kernel.PIXELS, torch.get_num_threads())
        prepared = self.prepare(x.shape, torch.float32, config, with_epilogue=fused)
        check_tensor("grad", grad, prepared.out_shape)
        check_tensor("weight", weight, (g.filters // g.groups, self.num_columns))
        shapes = (x.shape, weight.shape, (g.filters,))
        out = [
            torch.empty(shape if wants else 0, dtype=torch.float32)
            for shape, wants in zip(shapes, wanted, strict=True)
        ]
        wants = [y if wants else None for y, wants in zip(out, wanted, strict=True)]
        self.run_backward(prepared, grad, weight, x, fused, wants)
        return out

    def run_backward(
        self,
        prepared: Prepared,
        grad: Tensor,
        weight: Tensor,
        x: Tensor,
        fused: bool,
        out: Sequence[Tensor | None],
    ) -> None:
        """Compute gradients as it was prepared; of shapes the numbers of elements are checked.

        Args:
            prepared: For the input.
            grad: As for :meth:`backward`, like ``weight``, ``x`` and ``fused``.
            weight: Kept columns.
            x: Input.
            fused: Whether ``grad`` is that of the epilogue's output.
            out: The gradients of input, weights and bias; None where one isn't wanted.

        Raises:
            ValueError: If a tensor has more or fewer elements than what was prepared.
            MemoryError: If there is no memory for it.
        """
        tensors = [(y.data_ptr(), y.numel()) for y in (weight, x, grad)]
        gradients = [(None, 0) if y is None else (y.data_ptr(), y.numel()) for y in out]
        self._library.spp_backward(
            *(self.address, prepared.address),
            *(number for pair in tensors for number in pair),
            fused,
            *(number for pair in gradients for number in pair),
        )

    def _check_shape(self, shape: Sequence[int]) -> None:
        if shape[1] != self.spec.geometry.channels:
            raise ValueError(
                f"`x` must have {self.spec.geometry.channels} channels, got {tuple(shape)}."
            )


def _stamp_of(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Stamp | None:
    """What changes when a tensor's values do; None where that isn't counted."""
    try:
        stamp = (weight._version, weight.data_ptr(), columns._version, columns.data_ptr())
        return stamp if bias is None else (*stamp, bias._version, bias.data_ptr())
    except RuntimeError:  # inference tensors have no version
        return None


def _plane_ops(post: tuple[PlaneOp, ...]) -> Any:
    pair = ctypes.c_int32 * 2
    return (NativeEpilogueOp * len(post))(
        *(
            NativeEpilogueOp(
                KINDS.index(op.kind),
                *(pair(*x) for x in (op.kernel_size, op.stride, op.padding)),
                *(op.ceil_mode, op.count_include_pad, op.alpha),
            )
            for op in post
        )
    )
