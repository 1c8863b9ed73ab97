"""Compact layers in a row as one call of the CPU kernels."""

from __future__ import annotations

import ctypes
import math
import weakref
from functools import partial

import torch
from torch import Tensor

from spp_lightning.compaction.kernels.cpu.library import library
from spp_lightning.compaction.kernels.cpu.plan import FILTERS, SMALL, Plan, Way, check_tensor
from spp_lightning.compaction.timing import fastest

__all__ = ["Linear", "Sequence"]

# Numbers of a picture between two layers beyond which it leaves the cache anyway.
_MOST_NUMBERS = 2**20


class _NativeLinear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int32) for name in ("in_features", "out_features")),
    ]


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
        self._tensors = (weight, bias)  # while they are held, nobody else gets their addresses
        self._native = _NativeLinear(
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.in_features,
            self.out_features,
        )
        self.address = ctypes.addressof(self._native)

    def __call__(self, x: Tensor) -> Tensor:
        """Run it on pictures, ``(B, N, H, W)``, float32, contiguous: ``(B, out_features)``.

        Raises:
            ValueError: If they have other features.
        """
        self.check(x.shape)
        out = torch.empty((len(x), self.out_features), dtype=torch.float32)
        library().spp_linear(
            self.address, x.data_ptr(), len(x), torch.get_num_threads(), out.data_ptr()
        )
        return out

    def check(self, shape: tuple[int, ...]) -> None:
        """Check that pictures of a shape, ``(B, N, H, W)``, have its features.

        Raises:
            ValueError: If they have others.
        """
        features = math.prod(shape[1:])
        if features != self.in_features:
            raise ValueError(
                f"The linear layer reads {self.in_features} features, but the layers before it make"
                f" {features} = {' · '.join(map(str, shape[1:]))}."
            )


class _Run:
    """How inputs of one shape are computed all at once."""

    def __init__(self, plans: list[Plan], ways: list[Way], linear: Linear | None) -> None:
        functions, pointers = library(), ctypes.c_void_p * len(plans)
        self.handle = functions.spp_sequence(
            pointers(*(plan.handle for plan in plans)),
            pointers(*(way.address for way in ways)),
            len(plans),
        )
        if not self.handle:
            raise MemoryError("There is no memory left for the weights of a convolution.")
        weakref.finalize(self, functions.spp_free_sequence, self.handle)
        self.conv_shape, self.out_shape = ways[-1].conv_shape, ways[-1].out_shape
        if linear is not None:
            self.out_shape = (self.out_shape[0], linear.out_features)


class Sequence:
    """Plans of which each reads the output of the one before it, float32.

    A picture goes through all of them before the next one does, and what one plan computed is read
    by the next one from the cache and as it is.

    Args:
        plans: One or more; each but the first with a stride of 1 along the rows, and with as many
            channels as the one before it has filters.
        linear: A linear layer that reads the last plan's pictures flattened, if there is one.
        before: That of the same layers with other weights, whose choices are taken over.
    """

    def __init__(
        self, plans: list[Plan], linear: Linear | None = None, before: Sequence | None = None
    ) -> None:
        self.plans, self.linear = plans, linear
        self._forward = library().spp_forward_sequence
        self._runs: dict[tuple[int, ...], _Run | None] = {}  # None: one plan after the other
        self._threads: dict[tuple[int, ...], int] = {}  # of a run, 0 without one
        if before is not None:
            self._threads.update(before._threads)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the plans: all at once, or one after the other where that was faster.

        Args:
            x: Input, ``(B, C, H, W)``, float32, contiguous.
            residual: Added in the last plan before its clamp; contiguous.

        Returns:
            The last plan's output, the same bit for bit as one plan after the other gives; or the
            linear layer's.

        Raises:
            ValueError: If a shape doesn't fit.
        """
        key = (*x.shape, torch.get_num_threads())
        if key not in self._runs:
            if key not in self._threads:
                self._threads[key] = self._fastest(x, residual)
            threads = self._threads[key]
            self._runs[key] = self._run_of(x, threads) if threads else None
        run = self._runs[key]
        if run is None:
            return self._one_by_one(x, residual)
        if residual is not None:
            check_tensor("residual", residual, run.conv_shape)
        return self._at_once(run, x, residual)

    def _at_once(self, run: _Run, x: Tensor, residual: Tensor | None) -> Tensor:
        out = torch.empty(
            *run.out_shape, dtype=torch.float32
        )  # numbers are read faster than a tuple
        if not self._forward(
            run.handle,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if self.linear is None else self.linear.address,
            out.data_ptr(),
        ):
            raise MemoryError("There is no memory left to compute a convolution.")
        return out

    def _one_by_one(self, x: Tensor, residual: Tensor | None) -> Tensor:
        for plan in self.plans[:-1]:
            x = plan.forward(x)
        y = self.plans[-1].forward(x, residual)
        return y if self.linear is None else self.linear(y)

    def _run_of(self, x: Tensor, threads: int) -> _Run:
        return _Run(self.plans, self._ways(x, threads), self.linear)

    def _ways(self, x: Tensor, threads: int) -> list[Way]:
        ways, shape = list[Way](), tuple(x.shape)
        for plan in self.plans:
            ways.append(plan.way_of(shape, x.dtype, FILTERS, threads))
            shape = ways[-1].out_shape
        if self.linear is not None:
            self.linear.check(shape)
        return ways

    def _fastest(self, x: Tensor, residual: Tensor | None) -> int:
        counts = [torch.get_num_threads()]
        ways = self._ways(x, counts[0])
        self._one_by_one(x, residual)  # checks the residual, and times each plan's own ways
        pixels = [math.prod(way.out_shape[2:]) for way in ways[:-1]]
        numbers = (plan.padded_filters * n for plan, n in zip(self.plans, pixels, strict=False))
        if not len(x) or max(numbers, default=0) > _MOST_NUMBERS:
            return 0
        shapes = [tuple(x.shape), *(way.out_shape for way in ways[:-1])]
        chosen = (
            plan.winograd_variant(shape, x.dtype)
            for plan, shape in zip(self.plans, shapes, strict=True)
        )
        if any(variant is not None for variant in chosen):
            return 0  # the kernels of a sequence round otherwise
        macs = sum(plan.macs(way) for plan, way in zip(self.plans, ways, strict=True))
        if counts[0] > 1 and macs < SMALL:
            counts.append(1)
        runs = [self._run_of(x, count) for count in counts]
        at_once = [partial(self._at_once, run, x, residual) for run in runs]
        best = fastest([partial(self._one_by_one, x, residual), *at_once])
        if best == 0:
            for plan in self.plans:
                plan.drop_unused()
        return [0, *counts][best]
