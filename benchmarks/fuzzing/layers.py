"""Random compact layers against float64 torch: forward, and backward for some."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fuzzing.case import Failure, any_kernel
from fuzzing.shrink import smaller_case
from spp_lightning.compaction.epilogue import ACTIVATIONS, Activation, Clamp, Epilogue, PlaneOp
from spp_lightning.compaction.geometry import Geometry, dense_weight
from spp_lightning.compaction.layers.column_conv import ColumnConv2d

__all__ = ["LayerCase", "check", "draw", "draw_geometry", "least_size", "smaller"]

Layout = Literal["contiguous", "channels last", "strided", "expanded", "without batch"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Winograd's transforms cost some digits of float32; bfloat16 has 8 bits.
EPSILON = {torch.float32: 2e-4, torch.bfloat16: 2e-2, torch.float64: 1e-12}
CLAMPS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.5, 0.75)]


@dataclass(frozen=True)
class LayerCase:
    """A layer, and what it is called with. Numbers in pairs are rows and columns."""

    geometry: Geometry
    size: tuple[int, int]
    batch: int
    columns: tuple[int, ...]
    bias: bool
    residual: bool
    clamp: tuple[float, float]
    post: tuple[PlaneOp, ...]
    activation: Activation
    dtype: str
    layout: Layout
    threads: int
    backward: bool
    seed: int

    @property
    def epilogue(self) -> Epilogue:
        """What follows the convolution."""
        return Epilogue(Clamp(*self.clamp), self.post, self.activation)


def draw(seed: int) -> LayerCase:
    """A random case."""
    r = random.Random(seed)
    geometry = draw_geometry(r)
    size = tuple(
        least_size(geometry, axis) + r.choice([0, 1, 3, 7, 12, 15, 16, 24]) for axis in (0, 1)
    )
    every = range(geometry.num_columns)
    share = r.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    columns = tuple(k for k in every if r.random() < share)
    post: list[PlaneOp] = []
    planes = geometry.out_size(*size)
    for _ in range(r.choice([0, 0, 1, 2])):
        post.append(_draw_post(r, planes))
        planes = post[-1].out_size(*planes)
    activation = r.choice(ACTIVATIONS)
    layouts: list[Layout] = ["channels last", "strided", "expanded", "without batch"]
    return LayerCase(
        geometry,
        (size[0], size[1]),
        r.choice([0, 1, 1, 2, 3, 9]),
        columns,
        r.random() < 0.7,
        r.random() < 0.3,
        r.choice(CLAMPS) if activation == "none" else CLAMPS[0],
        tuple(post),
        activation,
        r.choice(["float32", "float32", "float32", "bfloat16", "float64"]),
        r.choice(["contiguous", "contiguous", "contiguous", *layouts]),
        r.choice([1, 1, 2]),
        r.random() < 0.3,
        seed,
    )


def draw_geometry(r: random.Random) -> Geometry:
    """A random convolution."""
    groups = r.choice([1, 1, 1, 1, 2, 3, 8])
    channels = groups * r.choice([1, 2, 3, 8, 16, 20])
    filters = groups * r.choice([1, 2, 5, 8, 15, 16, 17, 32, 40])
    if r.random() < 0.2:
        groups = filters = channels  # depthwise
    kernel = r.choice([(1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (2, 4), (7, 7)])
    stride = r.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)])
    same = (kernel[0] // 2, kernel[1] // 2)
    padding = r.choice([(0, 0), same, (r.randrange(4), r.randrange(4))])
    dilation = r.choice([(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)])
    return Geometry(channels, filters, kernel, stride, padding, dilation, groups)


def _draw_post(r: random.Random, planes: tuple[int, int]) -> PlaneOp:
    kind = r.choice(["max_pool", "avg_pool", "local_response_norm"])
    if kind == "local_response_norm":
        size = r.choice([1, 3, 3, 5])
        return PlaneOp("local_response_norm", (size, size), alpha=r.choice([5e-5, 0.1]))
    kernel = (r.randint(1, min(4, planes[0])), r.randint(1, min(4, planes[1])))
    stride = (r.randint(1, 3), r.randint(1, 3))
    padding = (r.randint(0, kernel[0] // 2), r.randint(0, kernel[1] // 2))
    pool: Literal["max_pool", "avg_pool"] = "max_pool" if kind == "max_pool" else "avg_pool"
    return PlaneOp(pool, kernel, stride, padding, r.random() < 0.5, r.random() < 0.5)


def least_size(geometry: Geometry, axis: int) -> int:
    """The fewest pixels of an input along an axis."""
    reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
    return max(1, reach - 2 * geometry.padding[axis])


def check(case: LayerCase) -> None:
    """Compare a layer with float64 torch.

    Raises:
        Failure: If it differs by more than rounding explains.
        ValueError: If there is no such layer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with any_kernel(case.seed):
            _check(case)
    finally:
        torch.set_num_threads(before)


def _check(case: LayerCase) -> None:
    g, generator = case.geometry, torch.Generator().manual_seed(case.seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = normal(g.filters // g.groups, len(case.columns))
    columns = torch.tensor(case.columns, dtype=torch.int32)
    bias = normal(g.filters) if case.bias else None
    layer = ColumnConv2d(g, weight, columns, bias, case.epilogue)
    out = (case.batch, g.filters, *g.out_size(*case.size))
    x = _laid_out(normal(case.batch, g.channels, *case.size), case.layout)
    residual = normal(*out) if case.residual else None
    if case.layout == "without batch":
        x, residual = x[0], None if residual is None else residual[0]
    if not case.backward:
        layer.requires_grad_(False)
    x.requires_grad_(case.backward)
    found = layer(x) if residual is None else layer(x, residual)
    again = layer(x) if residual is None else layer(x, residual)  # with what was prepared
    if not torch.equal(found, again):
        raise Failure("the second call gives something else than the first")
    leaf = x.detach().double().requires_grad_(case.backward)
    double = [None if t is None else t.detach().double() for t in (weight, bias, residual)]
    kept, offset, added = double
    assert kept is not None
    kept.requires_grad_(case.backward)
    expected = _reference(case, leaf, kept, columns, offset, added)
    bound = _bound(case, x, weight, columns, bias, residual)
    _compare("output", found, expected, bound, dtype)
    if case.backward and found.numel():
        grad = torch.randn(found.shape, generator=generator).to(dtype)
        found.backward(grad)
        expected.backward(grad.double())
        slacks = _slacks(case, leaf, kept, columns, offset, added, bound, grad)
        for name, ours, theirs in (
            ("input", x.grad, leaf.grad),
            ("weight", layer.weight.grad, kept.grad),
        ):
            assert ours is not None and theirs is not None
            # Where a pool decides by the last bit, a gradient may go another way.
            if case.post or case.activation != "none":
                _check_finite(case, name, ours, theirs, float(slacks[name].norm()))
            else:
                most = float(theirs.abs().max()) if theirs.numel() else 0.0
                slack = slacks[name].double() / EPSILON[dtype]
                _compare(f"gradient of the {name}", ours, theirs, most * 8 + slack, dtype)


def _laid_out(x: Tensor, layout: Layout) -> Tensor:
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape) if len(x) else x
    if layout == "without batch" and len(x) == 0:
        raise ValueError("no image to take out of the batch")
    return x


def _reference(
    case: LayerCase,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    g = case.geometry
    y = F.conv2d(
        x, dense_weight(weight, columns, g), bias, g.stride, g.padding, g.dilation, g.groups
    )
    if residual is not None:
        y = y + residual
    y = Epilogue(Clamp(*case.clamp), activation=case.activation)(y)
    for op in case.post:
        y = _plane(op, y)
    return y


def _plane(op: PlaneOp, y: Tensor) -> Tensor:
    if op.kind == "local_response_norm":
        size = op.kernel_size[0]
        mean = F.avg_pool2d(y * y, size, 1, size // 2)
        return y / (1 + op.alpha * mean) ** 0.75
    return op(y)


def _bound(
    case: LayerCase,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """How large the numbers are of which the output is the sum."""
    positive = [
        None if t is None else t.detach().double().abs() for t in (x, weight, bias, residual)
    ]
    values, kept, offset, added = positive
    assert values is not None and kept is not None
    free = replace(case, clamp=CLAMPS[0], post=(), activation="none")
    y = _reference(free, values, kept, columns, offset, added)
    y = y if case.activation == "none" else y + 1  # a sigmoid of 0 isn't 0
    for op in case.post:
        if op.kind != "local_response_norm":
            y = op(y)
        else:  # mixes the window's rounding errors
            size = op.kernel_size[0]
            y = F.max_pool2d(y, size, 1, size // 2)
    return y


def _slacks(
    case: LayerCase,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    bound: Tensor,
    grad: Tensor,
) -> dict[str, Tensor]:
    """By how much gradients may differ.

    Rounding decides what the clamp lets through, and on which side of an edge of Hardsigmoid and
    Hardswish a number lies. A sigmoid's gradient is y · (1 - y), of its
    rounded output: in bfloat16 torch's is 0 from an input of 6.3 on.
    """
    free = replace(case, clamp=CLAMPS[0], activation="none")
    edges = (-3.0, 3.0) if case.activation in ("hardsigmoid", "hardswish") else case.clamp
    if case.activation == "sigmoid" and not case.post:
        near = torch.full_like(grad, torch.finfo(grad.dtype).eps, dtype=torch.float64)
    elif case.post or edges == CLAMPS[0]:
        return {"input": torch.zeros_like(x), "weight": torch.zeros_like(weight)}
    else:
        y = _reference(free, x, weight, columns, bias, residual).detach()
        near = torch.zeros_like(y, dtype=torch.bool)
        for edge in edges:
            near |= (y - edge).abs() <= EPSILON[grad.dtype] * bound
    sizes = [t.detach().abs().requires_grad_() for t in (x, weight)]
    z = _reference(free, sizes[0], sizes[1], columns, None, None)
    made = torch.autograd.grad(z, sizes, grad.double().abs() * near)
    return {"input": made[0], "weight": made[1]}


def _compare(name: str, found: Tensor, expected: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    if found.shape != expected.shape or found.dtype != dtype:
        raise Failure(f"{name}: {tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)}")
    wrong = ~((found.double() - expected).abs() <= EPSILON[dtype] * bound + 1e-30)
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise Failure(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} numbers differ, at {place}"
            f" {float(found[place])} instead of {float(expected[place])}"
        )


def _check_finite(
    case: LayerCase, name: str, found: Tensor, expected: Tensor, slack: float
) -> None:
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        raise Failure(f"gradient of the {name}: not finite, or of another shape")
    if case.post and case.activation != "none":  # which rounds different numbers to one
        return
    apart = max(float((found.double() - expected).norm()) - slack, 0.0)
    share = apart / (float(expected.norm()) + 1e-30)
    if share > (0.5 if found.dtype == torch.bfloat16 else 0.2) and float(expected.norm()) > 1e-6:
        raise Failure(f"gradient of the {name}: differs by {share:.2f} of its norm")


def smaller(case: LayerCase) -> Iterator[LayerCase]:
    """Cases with one thing less."""
    g = case.geometry
    for i in range(len(case.post)):
        yield replace(case, post=case.post[:i] + case.post[i + 1 :])
    simple = {
        "residual": False,
        "bias": False,
        "clamp": CLAMPS[0],
        "activation": "none",
        "dtype": "float32",
        "layout": "contiguous",
        "threads": 1,
        "backward": False,
        "batch": 1,
    }
    yield from smaller_case(case, simple)
    if g.is_depthwise:
        half = g.channels // 2
        kept = tuple(k for k in case.columns if k < half * g.taps)
        yield replace(
            case, geometry=g._replace(channels=half, filters=half, groups=half), columns=kept
        )
