"""The CPU kernels seen from Python: the library, and plans that run on it."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spp_lightning.compaction.epilogue import KINDS, Clamp, PlaneOp, size_after
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.kernels.cpu import winograd
from spp_lightning.compaction.kernels.cpu.library import _Geometry, _NativeWay, _PlaneOp, library
from spp_lightning.compaction.timing import fastest

__all__ = ["FILTERS", "SMALL", "Plan", "Way", "check_columns", "check_tensor", "plan_for"]

# Vectors of pixels, those of a tile packed first or read where they are, or vectors of filters.
_VARIANTS = (0, 1, 3)
# Vectors of pixels packed as pairs of bfloat16, vectors of filters.
_PAIRS, FILTERS = 2, 3
WINOGRAD = {4: 4, 2: 5}  # Winograd's minimal filtering, by the outputs of a tile per side
_CHUNK = 16  # filters that lie next to each other for the latter
SMALL = 20_000_000  # MACs below which one thread may be faster than several


class Way(NamedTuple):
    """How a plan computes inputs of one shape, with so many threads."""

    conv_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    native: _NativeWay  # filled once: numbers one by one take the call three times as long
    address: int  # of `native`

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        conv_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        variant: int,
        threads: int,
    ) -> Way:
        """That of inputs of a shape and a type."""
        batch, _, height, width = shape
        numbers = (batch, height, width, *conv_shape[2:], threads, variant)
        native = _NativeWay(*numbers, dtype == torch.bfloat16)
        return cls(conv_shape, out_shape, dtype, native, ctypes.addressof(native))


class Plan:
    """A column-pruned convolution, ready to run on the CPU.

    Args:
        weight: Kept columns, ``(filters / groups, columns)``.
        columns: Which they are, ``(columns,)``, int32, ascending.
        bias: One per filter, or None.
        geometry: The convolution.
        clamp: Limits of its output.
        post: What is done to the output's planes after that.

    Raises:
        ValueError: If a tensor isn't on the CPU and of the right shape, or ``columns`` aren't
            ascending, or name columns that the layer doesn't have.
        MemoryError: If there is no memory for it.
    """

    def __init__(
        self,
        weight: Tensor,
        columns: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        clamp: Clamp = Clamp(),  # noqa: B008 (immutable)
        post: tuple[PlaneOp, ...] = (),
    ) -> None:
        geometry.check()
        for op in post:
            op.check()
        check_columns(columns, geometry)
        g = geometry
        check_tensor("weight", weight, (g.filters // g.groups, len(columns)))
        check_tensor("columns", columns, (len(columns),))
        if bias is not None:
            check_tensor("bias", bias, (g.filters,))
        pair = ctypes.c_int32 * 2
        shape = _Geometry(
            g.channels,
            g.filters,
            g.groups,
            *(pair(*x) for x in (g.kernel_size, g.stride, g.padding, g.dilation)),
        )
        ops = _plane_ops(post)
        self._pairs = weight.dtype == torch.bfloat16
        weight, columns = weight.detach().float().contiguous(), columns.contiguous()
        bias = None if bias is None else bias.detach().float().contiguous()
        self.geometry = geometry
        self.post = post
        self._library = library()
        self.handle = self._library.spp_plan(
            ctypes.byref(shape),
            columns.data_ptr(),
            len(columns),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            *clamp,
            ops,
            len(post),
            self._pairs,
        )
        if not self.handle:
            raise MemoryError("There is no memory left for the weights of a convolution.")
        self._forward = self._library.spp_forward
        self._free = weakref.finalize(self, self._library.spp_free, self.handle)
        self._num_columns = len(columns)
        self._ways: dict[tuple[Any, ...], Way] = {}  # by the input's shape and type, and threads
        self._held: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Run the convolution.

        Args:
            x: Input, ``(B, C, H, W)``, float32 or bfloat16, contiguous.
            residual: Added before the clamp, of the output's shape and the input's type,
                contiguous.

        Returns:
            The output, ``(B, N, H', W')``, of the input's type.
        """
        # Which of some variants runs changes the time and nothing else: they add in the same order.
        key = (x.shape, x.dtype, torch.get_num_threads())
        way = self._ways.get(key)
        if way is None:
            way = self._ways[key] = self._fastest(x, residual)
            self.drop_unused()
        elif residual is not None:
            check_tensor("residual", residual, way.conv_shape)
        out = torch.empty(*way.out_shape, dtype=way.dtype)  # numbers are read faster than a tuple
        self._run(x, residual, out, way)
        return out

    def backward(
        self, grad: Tensor, weight: Tensor, x: Tensor, wanted: Sequence[bool], fused: bool
    ) -> list[Tensor]:
        """The gradients of the input, the weights and the bias, of their shapes.

        Args:
            grad: Gradient of the output, ``(B, N, H', W')``, float32, contiguous, like the others.
            weight: Kept columns, ``(filters / groups, columns)``, as the plan was made of.
            x: Input, ``(B, C, H, W)``.
            wanted: Which of the three; the others are empty.
            fused: Whether ``grad`` is the gradient behind clamp and post operations, or that of
                the convolution itself.
        """
        g, way = self.geometry, self._backward_way(x, fused)
        check_tensor("grad", grad, way.out_shape)
        check_tensor("weight", weight, (g.filters // g.groups, self._num_columns))
        shapes = (x.shape, weight.shape, (g.filters,))
        out = [
            torch.empty(shape if wants else 0, dtype=torch.float32)
            for shape, wants in zip(shapes, wanted, strict=True)
        ]
        pointers = [y.data_ptr() if wants else None for y, wants in zip(out, wanted, strict=True)]
        if not self._library.spp_backward(
            *(self.handle, way.address, weight.data_ptr(), x.data_ptr(), grad.data_ptr(), fused),
            *pointers,
        ):
            raise MemoryError("There is no memory left for the gradient of a convolution.")
        return out

    def _run(self, x: Tensor, residual: Tensor | None, out: Tensor, way: Way) -> None:
        if not self._forward(
            self.handle,
            way.address,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
        ):
            raise MemoryError("There is no memory left to compute a convolution.")

    def way_of(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        variant: int,
        threads: int,
        with_post: bool = True,
    ) -> Way:
        """A way to compute inputs of a shape and a type.

        Raises:
            ValueError: If they have other channels, are smaller than the kernel, or too large.
        """
        if shape[1] != self.geometry.channels:
            raise ValueError(
                f"`x` must have {self.geometry.channels} channels, got {tuple(shape)}."
            )
        conv_shape = (shape[0], self.geometry.filters, *self.geometry.out_size(*shape[2:]))
        _check_size(shape, conv_shape)
        size = size_after(self.post, conv_shape[2:]) if with_post else conv_shape[2:]
        return Way.of(shape, dtype, conv_shape, (*conv_shape[:2], *size), variant, threads)

    @property
    def padded_filters(self) -> int:
        """Filters in whole chunks of 16, as vectors of filters compute them."""
        g = self.geometry
        return g.groups * math.ceil(g.filters // g.groups / _CHUNK) * _CHUNK

    def winograd_variant(self, shape: Sequence[int], dtype: torch.dtype) -> int | None:
        """Which of :data:`WINOGRAD` computes inputs of a shape and a type, None if another way."""
        if dtype != torch.float32:
            return None
        size = self.geometry.out_size(*shape[2:])
        side = winograd.tile_side(self.geometry, self._num_columns, size)
        return None if side is None else WINOGRAD[side]

    def macs(self, way: Way) -> int:
        """Multiply-accumulate operations of a pass."""
        return math.prod(way.conv_shape) // self.geometry.groups * self._num_columns

    def drop_unused(self) -> None:
        """Free memory that only ways need which no input takes."""
        if all(way.native.variant != FILTERS for way in list(self._ways.values())):
            self._library.spp_drop_filters(self.handle)

    def _backward_way(self, x: Tensor, fused: bool) -> Way:
        threads = torch.get_num_threads()
        key = (x.shape, threads, fused)
        way = self._ways.get(key)
        if way is None:
            forward = self._ways.get((x.shape, torch.float32, threads))
            variant = 0 if forward is None else forward.native.variant
            way = self.way_of(x.shape, torch.float32, variant, threads, with_post=fused)
            self._ways[key] = way
        return way

    def _fastest(self, x: Tensor, residual: Tensor | None) -> Way:
        if x.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"`x` must be float32 or bfloat16, got {x.dtype}.")
        threads = torch.get_num_threads()
        # Some are rounded otherwise, so that they must not depend on the time that they take.
        pairs = self._pairs and x.dtype == torch.bfloat16 and self._library.spp_has_pairs()
        variants: tuple[int, ...] = (_PAIRS,) if pairs else _VARIANTS
        by_winograd = self.winograd_variant(x.shape, x.dtype)
        if by_winograd is not None:
            variants = (by_winograd,)
        elif self.post and self.padded_filters > 2 * self.geometry.filters:
            variants = tuple(
                v for v in variants if v != FILTERS
            )  # mostly of lanes without a filter
        ways = [self.way_of(x.shape, x.dtype, variant, threads) for variant in variants]
        if residual is not None:
            check_tensor("residual", residual, ways[0].conv_shape)
        if threads > 1 and self.macs(ways[0]) < SMALL:
            ways += [self.way_of(x.shape, x.dtype, variant, 1) for variant in variants]
        out = torch.empty(ways[0].out_shape, dtype=x.dtype)
        return ways[fastest([partial(self._run, x, residual, out, way) for way in ways])]


def _plane_ops(post: tuple[PlaneOp, ...]) -> Any:
    pair = ctypes.c_int32 * 2
    return (_PlaneOp * len(post))(
        *(
            _PlaneOp(
                KINDS.index(op.kind),
                *(pair(*x) for x in (op.kernel_size, op.stride, op.padding)),
                *(op.ceil_mode, op.count_include_pad, op.alpha),
            )
            for op in post
        )
    )


def _check_size(*shapes: Sequence[int]) -> None:
    for shape in shapes:
        if math.prod(shape[1:]) >= 2**31:
            raise ValueError(
                f"A picture must have fewer than 2³¹ numbers, got {tuple(shape)}; split it."
            )


def check_columns(columns: Tensor, geometry: Geometry) -> None:
    """Check that columns are ascending and exist.

    Raises:
        ValueError: If they aren't int32 of one dimension, not ascending, or out of range.
    """
    if columns.dtype != torch.int32 or columns.dim() != 1:
        raise ValueError(
            f"`columns` must be int32 of one dimension, got {columns.dtype} of shape"
            f" {tuple(columns.shape)}."
        )
    if len(columns) and not (
        int(columns[0]) >= 0
        and int(columns[-1]) < geometry.num_columns
        and bool((columns[1:] > columns[:-1]).all())
    ):
        raise ValueError(
            f"`columns` must be ascending and in [0, {geometry.num_columns}), the columns of"
            f" {geometry.channels} channels and a kernel of {geometry.kernel_size}, got"
            f" {columns.tolist() if len(columns) < 9 else [*columns[:8].tolist(), '…']}."
        )


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check that a tensor is on the CPU and of a shape.

    Raises:
        ValueError: If it isn't.
    """
    # The kernels read memory as these say: what doesn't fit would be read beyond its end.
    if tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(
            f"`{name}` must be of shape {shape} on the CPU, got {tuple(tensor.shape)} on"
            f" {tensor.device}."
        )


_References = tuple[weakref.ref[Tensor] | None, ...]
_plans: dict[tuple[Any, ...], tuple[_References, tuple[int, ...] | None, Plan]] = {}


def plan_for(
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    clamp: Clamp = Clamp(),  # noqa: B008 (immutable)
    post: tuple[PlaneOp, ...] = (),
) -> Plan:
    """The plan of a layer, made anew only when its tensors have changed.

    Changes are seen through torch's version counter and the memory's address: those in place count,
    and new memory; changes in place through ``.data`` don't. The arguments are those of
    :class:`Plan`.
    """
    tensors = (weight, columns, bias)
    key = (id(weight), id(columns), id(bias), geometry, clamp, post)
    stamp = None  # inference tensors don't count their versions: they may have changed
    if not any(x is not None and x.is_inference() for x in tensors):
        stamp = tuple(n for x in tensors if x is not None for n in (x._version, x.data_ptr()))
    found = _plans.get(key)
    # An id may be that of another tensor which is gone.
    alive = found is not None and all(
        x is None or (ref is not None and ref() is x)
        for ref, x in zip(found[0], tensors, strict=True)
    )
    if found is not None and alive and stamp is not None and found[1] == stamp:
        return found[2]
    plan = Plan(weight, columns, bias, geometry, clamp, post)
    # While the memory is held, nothing else gets its address.
    plan._held = tuple(x.detach() for x in tensors if x is not None)
    if found is not None and alive:
        references = found[0]
        if plan._pairs == found[2]._pairs:
            plan._ways = found[2]._ways  # the weights' values don't change which way is fastest
    else:
        references = tuple(
            None if x is None else weakref.ref(x, lambda _: _plans.pop(key, None)) for x in tensors
        )
    _plans[key] = (references, stamp, plan)
    return plan
