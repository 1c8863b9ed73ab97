"""Random convolutions for the tests of the CPU kernels, and tensors for them in guarded memory."""

import math
import typing

import torch
from hypothesis import strategies as st
from torch import Tensor

from spp_lightning.compaction.epilogue import (
    ACTIVATIONS,
    LRN_ALPHA,
    Activation,
    Clamp,
    Epilogue,
    PlaneOp,
)
from spp_lightning.compaction.geometry import Geometry

SENTINEL = 12345.0
ROOM = 512  # floats of a guard on each side
# Images of which rows are whole vectors, of which planes are, and of which neither are.
SIZES = {"rows": (64, 64), "planes": (32, 130), "neither": (63, 65)}
NORM = PlaneOp("local_response_norm", (3, 3), alpha=LRN_ALPHA)


class Case(typing.NamedTuple):
    geometry: Geometry
    size: tuple[int, int]
    batch: int
    columns: tuple[int, ...]
    bias: bool = True
    residual: bool = False
    clamp: Clamp = Clamp()
    post: tuple[PlaneOp, ...] = ()
    seed: int = 0
    dtype: torch.dtype = torch.float32
    activation: Activation = "none"

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.clamp, self.post, self.activation)


def pair(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    few_filters = st.integers(1, 9) | st.sampled_from([16, 17, 40])  # parts of 16, or more
    channels, filters = groups * draw(st.integers(1, 4)), groups * draw(few_filters)
    if draw(st.integers(0, 3)) == 0:
        groups = channels = filters = draw(st.sampled_from([2, 5, 16, 17, 40]))  # depthwise
    return Geometry(
        channels,
        filters,
        draw(pair(1, 4)),
        draw(pair(1, 3) | st.just((1, 1))),
        draw(pair(0, 5)),
        draw(pair(1, 3) | st.just((1, 1))),
        groups,
    )


@st.composite
def kept(draw, geometry):
    """Columns: none, one, all, some, or those of the first group only."""
    every = range(geometry.num_columns)
    return draw(
        st.sampled_from([(), tuple(every), tuple(every[: geometry.num_columns // geometry.groups])])
        | st.integers(0, geometry.num_columns - 1).map(lambda k: (k,))
        | st.sets(st.sampled_from(every)).map(lambda some: tuple(sorted(some)))
    )


def least(geometry, axis):
    """The smallest image that the kernel fits into."""
    reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
    return max(1, reach - 2 * geometry.padding[axis])


@st.composite
def pools(draw, size):
    """A pool that fits planes of this size, or a norm."""
    kind = draw(st.sampled_from(["max_pool", "avg_pool", "local_response_norm"]))
    if kind == "local_response_norm":
        return NORM
    kernel = tuple(draw(st.integers(1, min(4, n))) for n in size)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    flags = draw(st.booleans()), draw(st.booleans())
    return PlaneOp(kind, kernel, draw(pair(1, 3)), padding, *flags)


@st.composite
def cases(draw):
    geometry = draw(geometries())
    # Mostly small; now and then several tiles wide, or one pixel.
    extra = st.integers(0, 12) | st.sampled_from([0, 15, 16, 24, 40])
    size = tuple(least(geometry, axis) + draw(extra) for axis in (0, 1))
    if draw(st.booleans()):  # rows of one length in and out: read where they are
        kernel = (geometry.kernel_size[0], 2 * draw(st.integers(0, 2)) + 1)
        padding = (geometry.padding[0], geometry.dilation[1] * (kernel[1] // 2))
        geometry = geometry._replace(kernel_size=kernel, padding=padding, stride=(1, 1))
    ops, out = [], geometry.out_size(*size)
    activation = draw(st.sampled_from(ACTIVATIONS))
    clamps = [Clamp(), Clamp(0.0), Clamp(-0.5, 0.75), Clamp(0.0, 6.0)]
    for _ in range(draw(st.integers(0, 2))):
        ops.append(draw(pools(out)))
        out = ops[-1].out_size(*out)
    return Case(
        geometry,
        size,
        draw(st.sampled_from([0, 1, 2, 5])),
        draw(kept(geometry)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(clamps)) if activation == "none" else Clamp(),
        tuple(ops),
        draw(st.integers(0, 1000)),
        activation=activation,
    )


class Tensors(typing.NamedTuple):
    x: Tensor
    weight: Tensor
    columns: Tensor
    bias: Tensor | None
    residual: Tensor | None
    grad: Tensor


def tensors(case: Case) -> Tensors:
    g, generator = case.geometry, torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(case.dtype)

    out = (case.batch, g.filters, *g.out_size(*case.size))
    return Tensors(
        guarded(normal(case.batch, g.channels, *case.size), math.nan),
        normal(g.filters // g.groups, len(case.columns)),
        torch.tensor(case.columns, dtype=torch.int32),
        normal(g.filters) if case.bias else None,
        guarded(normal(*out), math.nan) if case.residual else None,
        guarded(normal(*out), math.nan),
    )


def guarded(tensor: Tensor, fill: float) -> Tensor:
    """The same in the middle of a larger memory full of ``fill``."""
    buffer = torch.full((tensor.numel() + 2 * ROOM + 1,), fill, dtype=tensor.dtype)
    # An odd offset: no vector is aligned.
    inner = buffer[ROOM + 1 : ROOM + 1 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def intact(tensor: Tensor, fill: float = SENTINEL) -> bool:
    """Whether nothing was written around a guarded tensor."""
    buffer = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    around = torch.cat([buffer[: ROOM + 1], buffer[ROOM + 1 + tensor.numel() :]])
    return torch.equal(around, torch.full_like(around, fill))
