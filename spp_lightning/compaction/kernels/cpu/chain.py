"""Layers in a row as one call of the channel-blocked kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu import autotune, cost
from spp_lightning.compaction.kernels.cpu.checks import check_tensor
from spp_lightning.compaction.kernels.cpu.config import CHUNK, Kernel, KernelConfig
from spp_lightning.compaction.kernels.cpu.handle import Handle, NativeChain
from spp_lightning.compaction.kernels.cpu.library import NativeLinear, library
from spp_lightning.compaction.kernels.cpu.tables import ShapeTable

__all__ = ["ChainHandle", "Linear", "PreparedChain", "may_follow"]


def may_follow(before: Geometry, after: Geometry) -> bool:
    """Whether the channel-blocked kernels let a layer read what another one computed.

    A depthwise layer reads whole channel blocks, so the groups of the layer before it must fill
    theirs. Any other layer has a stride of 1 along the rows.
    """
    if before.filters != after.channels:
        return False
    if not after.is_depthwise:
        return after.stride[1] == 1
    fills = before.filters // before.groups % CHUNK == 0
    return before.groups == 1 or before.is_depthwise or fills


class Linear:
    """A linear layer's tensors as the kernels read them.

    Args:
        weight: ``(out_features, in_features)``, float32, contiguous, on the CPU.
        bias: ``(out_features,)``, likewise, or None.

    Raises:
        ValueError: If the bias is of another shape.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        if bias is not None:
            check_tensor("bias", bias, (self.out_features,))
        self._tensors = (weight, bias)  # while they are held, no other tensor gets their addresses
        self._native = NativeLinear(
            *(weight.data_ptr(), weight.numel()),
            *((None, 0) if bias is None else (bias.data_ptr(), bias.numel())),
            self.in_features,
            self.out_features,
        )
        self.address = ctypes.addressof(self._native)
        self._places = (weight.data_ptr(), None if bias is None else bias.data_ptr())
        self._shapes = (weight.shape, None if bias is None else bias.shape)

    def is_of(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether it reads these tensors, at the place where they are now."""
        own_weight, own_bias = self._tensors
        (place, bias_place), (shape, bias_shape) = self._places, self._shapes
        return (
            weight is own_weight
            and bias is own_bias
            and own_weight.data_ptr() == place
            and own_weight.shape == shape
            and own_weight.is_contiguous()
            and (
                own_bias is None
                or (own_bias.data_ptr() == bias_place and own_bias.shape == bias_shape)
            )
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Compute flattened images, ``(B, N, H, W)``, float32, contiguous: ``(B, out_features)``.

        Raises:
            ValueError: If they have another number of features.
        """
        self.check(x.shape)
        out = torch.empty((len(x), self.out_features), dtype=torch.float32)
        library().spp_linear(
            *(self.address, x.data_ptr(), x.numel(), len(x), torch.get_num_threads()),
            *(out.data_ptr(), out.numel()),
        )
        return out

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that images of a shape, ``(B, N, H, W)``, have as many features as it reads.

        Raises:
            ValueError: If they don't.
        """
        features = math.prod(shape[1:])
        if features != self.in_features:
            raise ValueError(
                f"The linear layer reads {self.in_features} features, but the layers before it make"
                f" {features} = {' · '.join(map(str, shape[1:]))}."
            )


class PreparedChain(NamedTuple):
    """What a chain prepared for inputs of one shape: one call, or none for one layer at a time."""

    native: NativeChain | None
    conv_shape: tuple[int, ...] = ()  # of the last convolution's output
    out_shape: tuple[int, ...] = ()


class ChainHandle:
    """Layers of which each reads the output of the one before it, float32.

    In one call, an image goes through all layers before the next image does. A layer finds in the
    cache what the layer before it computed, in the order in which it was computed. The output is
    the same bit for bit as one layer after the other gives.

    Args:
        handles: One or more, of which each :func:`may_follow` the one before it.
        linear: A linear layer that reads the last layer's images flattened, if there is one.
        before: The chain of the same layers with their old weights, whose tuned choices are taken
            over.
    """

    def __init__(
        self,
        handles: Sequence[Handle],
        linear: Linear | None = None,
        before: ChainHandle | None = None,
    ) -> None:
        self.handles, self.linear = tuple(handles), linear
        # Threads of the one call, or 0 for one layer at a time, by shape and number of threads.
        self.tuned: dict[tuple[int, ...], int] = {} if before is None else before.tuned
        self._forward = library().spp_chain_forward
        self._prepared: ShapeTable[PreparedChain] = ShapeTable()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the layers.

        Args:
            x: Input, ``(B, C, H, W)``, float32, contiguous.
            residual: Added in the last layer before its clamp; contiguous.

        Returns:
            The last layer's output, or the linear layer's.

        Raises:
            ValueError: If a shape doesn't fit.
            MemoryError: If there is no memory for it.
        """
        prepared = self.prepared_for(x.shape, torch.get_num_threads())
        if prepared.native is None:
            return self.one_by_one(x, residual)
        if residual is not None:
            check_tensor("residual", residual, prepared.conv_shape)
        return self.at_once(prepared, x, residual)

    def prepared_for(self, shape: tuple[int, ...], threads: int) -> PreparedChain:
        """What :meth:`at_once` needs for inputs of a shape; nothing if one by one is faster.

        Raises:
            ValueError: If the shape doesn't fit the layers.
        """
        key = (*shape, threads)
        prepared = self._prepared.get(key)
        if prepared is None:
            count = self.threads_for(key[:-1], threads)
            made = self.prepare(shape, count) if count else PreparedChain(None)
            prepared = self._prepared.put(key, made)
        return prepared

    def at_once(
        self,
        prepared: PreparedChain,
        x: Tensor,
        residual: Tensor | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run all layers in one call; of shapes the numbers of elements are checked.

        Raises:
            ValueError: If a tensor has more or fewer elements than what was prepared.
            MemoryError: If there is no memory for it.
        """
        if out is None:
            # Numbers one by one are read faster than a tuple.
            out = torch.empty(*prepared.out_shape, dtype=torch.float32)
        native, linear = prepared.native, self.linear
        assert native is not None, "one layer at a time otherwise"
        # Arguments one by one: a call with unpacked tuples takes longer.
        self._forward(
            native.address,
            x.data_ptr(),
            x.numel(),
            None if residual is None else residual.data_ptr(),
            0 if residual is None else residual.numel(),
            None if linear is None else linear.address,
            out.data_ptr(),
            out.numel(),
        )
        return out

    def one_by_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Run one layer after the other."""
        for handle in self.handles[:-1]:
            x = handle.forward(x)
        y = self.handles[-1].forward(x, residual)
        return y if self.linear is None else self.linear(y)

    def threads_for(self, shape: tuple[int, ...], threads: int) -> int:
        """Threads of the one call, or 0 for one layer at a time: tuned, or by the cost model."""
        tuned = self.tuned.get((*shape, threads))
        return self.choice(shape, threads).threads if tuned is None else tuned

    def choice(self, shape: tuple[int, ...], threads: int) -> cost.ChainChoice:
        """What the cost model says of inputs of a shape."""
        if self.linear is not None:
            self.linear.check(self._shapes(shape)[-1])
        layers = tuple((handle.spec, handle.num_columns) for handle in self.handles)
        return cost.choose_chain(layers, shape, threads)

    def tune(self, x: Tensor, residual: Tensor | None = None) -> dict[int, float]:
        """Measure the chain on an input, and keep the fastest way for its shape.

        Returns:
            Milliseconds by the threads of the one call, or 0 for one layer at a time.
        """
        threads = torch.get_num_threads()
        shape = tuple(x.shape)
        calls = {0: partial(self.one_by_one, x, residual)}
        if self.choice(shape, threads).possible:
            for count in dict.fromkeys((threads, 1)):
                calls[count] = partial(self.at_once, self.prepare(shape, count), x, residual)
        times = autotune.milliseconds(list(calls.values()))
        measured = dict(zip(calls, times, strict=True))
        key = (*shape, threads)
        self.tuned[key] = min(measured, key=lambda count: measured[count])
        self._prepared.pop(key)
        autotune.note_choice()
        return measured

    def prepare(self, shape: Sequence[int], threads: int) -> PreparedChain:
        """What :meth:`at_once` needs for inputs of a shape.

        Raises:
            ValueError: If the shape doesn't fit the layers.
            MemoryError: If there is no memory for it.
        """
        config, steps = KernelConfig(Kernel.CHANNELS, threads), []
        for handle in self.handles:
            steps.append(handle.prepare(shape, torch.float32, config, alone=False))
            shape = steps[-1].out_shape
        out_shape = steps[-1].out_shape
        if self.linear is not None:
            self.linear.check(out_shape)
            out_shape = (out_shape[0], self.linear.out_features)
        native = NativeChain(self.handles, steps)
        return PreparedChain(native, steps[-1].conv_shape, out_shape)

    def _shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        shapes = [shape]
        for handle in self.handles:
            batch, _, height, width = shapes[-1]
            size = handle.spec.out_size(height, width)
            shapes.append((batch, handle.spec.geometry.filters, *size))
        return shapes
