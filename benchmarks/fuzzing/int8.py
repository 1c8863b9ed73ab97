"""Random int8 layers, by every instruction set of the machine, against exact sums in torch."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fuzzing.case import Failure
from fuzzing.layers import draw_geometry, least_size
from fuzzing.shrink import smaller_case
from spp_lightning.compaction.geometry import Geometry
from spp_lightning.compaction.int8_spec import Int8Spec, TensorScale
from spp_lightning.compaction.kernels.cpu.int8 import Int8Handle
from spp_lightning.compaction.kernels.cpu.library import library
from spp_lightning.compaction.layers.int8_reference import (
    convolve,
    dequantize,
    quantize,
    requantize,
)

__all__ = ["Int8Case", "check", "draw", "smaller"]

Values = Literal["normal", "uniform", "extremes", "large"]
VALUES: tuple[Values, ...] = ("normal", "uniform", "extremes", "large")
CLAMPS = [(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-0.5, 0.75)]
KERNELS = (
    *("base", "avx2", "avx_vnni", "avx512_vnni", "amx"),
    *("avx_vnni_emulated", "avx512_vnni_emulated", "amx_emulated"),
)


@dataclass(frozen=True)
class Int8Case:
    """An int8 layer, and what it is called with. Numbers in pairs are rows and columns."""

    geometry: Geometry
    size: tuple[int, int]
    batch: int
    columns: tuple[int, ...]
    bias: bool
    input: TensorScale
    output: TensorScale | None
    residual: TensorScale | None
    clamp: tuple[float, float]
    weights: Values
    pixels: Values
    threads: int
    seed: int

    @property
    def spec(self) -> Int8Spec:
        """All of the layer but its tensors."""
        return Int8Spec(self.geometry, self.input, self.output, self.residual, self.clamp)


def draw(seed: int) -> Int8Case:
    """A random case."""
    r = random.Random(seed)
    geometry = draw_geometry(r)
    more = [r.choice([0, 1, 3, 7, 12, 15, 16, 24, 40]) for _ in range(2)]
    size = (least_size(geometry, 0) + more[0], least_size(geometry, 1) + more[1])
    share = r.choice([0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
    columns = tuple(k for k in range(geometry.num_columns) if r.random() < share)

    def scale() -> TensorScale:
        return TensorScale(10 ** r.uniform(-4, 2), r.choice([0, 0, 128, 255, r.randrange(256)]))

    return Int8Case(
        geometry,
        size,
        r.choice([0, 1, 1, 2, 3, 9]),
        columns,
        r.random() < 0.7,
        scale(),
        scale() if r.random() < 0.7 else None,
        scale() if r.random() < 0.3 else None,
        r.choice(CLAMPS),
        r.choice(VALUES),
        r.choice(VALUES),
        r.choice([1, 1, 2]),
        seed,
    )


def check(case: Int8Case) -> None:
    """Compare a layer with exact sums, bit for bit.

    Raises:
        Failure: If an output differs.
        ValueError: If there is no such layer.
    """
    g, generator = case.geometry, torch.Generator().manual_seed(case.seed)
    weight = _drawn(case.weights, (-128, 127), generator, g.filters // g.groups, len(case.columns))
    x = _drawn(case.pixels, (0, 255), generator, case.batch, g.channels, *case.size)
    columns = torch.tensor(case.columns, dtype=torch.int32)
    scale = torch.rand(g.filters, generator=generator) * 0.02 + 1e-4
    bias = torch.randn(g.filters, generator=generator) if case.bias else None
    out = (case.batch, g.filters, *g.out_size(*case.size))
    residual = _drawn("uniform", (0, 255), generator, *out) if case.residual is not None else None
    tensors = (weight.to(torch.int8), columns, scale, bias)
    expected = _reference(case, *tensors, x, residual)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        for kernel in KERNELS:
            try:
                library().spp_int8_set_isa(kernel.encode())
            except NotImplementedError:  # this processor has no such instructions
                continue
            found = Int8Handle(*tensors, case.spec).run(x, residual)
            if found.dtype != expected.dtype or not torch.equal(found, expected):
                count = int((found != expected).sum()) if found.shape == expected.shape else -1
                raise Failure(f"{kernel}: {count} of {expected.numel()} numbers differ")
    finally:
        torch.set_num_threads(threads)
        library().spp_int8_set_isa(b"")


def _drawn(
    values: Values, limits: tuple[int, int], generator: torch.Generator, *shape: int
) -> Tensor:
    """Integers within limits; as uint8, unless some are negative."""
    low, high = limits
    middle, reach = (low + high + 1) // 2, (high - low + 1) / 2
    if values == "normal":
        drawn = torch.randn(shape, generator=generator) * reach / 3 + middle
    else:
        drawn = torch.randint(low, high + 1, shape, generator=generator).float()
    if values == "extremes":
        drawn = torch.where(drawn > middle, high, low)
    if values == "large":  # of one sign, so that sums are
        drawn = drawn.abs().clamp(min=high - 10)
    drawn = drawn.round().clamp(low, high)
    return drawn if low < 0 else drawn.to(torch.uint8)


def _reference(
    case: Int8Case,
    weight: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
) -> Tensor:
    zero = torch.tensor(case.input.zero_point, dtype=torch.uint8)
    sums = convolve(x, zero, weight, columns, case.geometry)
    added = None
    if residual is not None:
        assert case.residual is not None
        added = dequantize(residual, *_tensors(case.residual))
    y = requantize(sums, _tensors(case.input)[0] * scale, bias, added, case.clamp)
    return y if case.output is None else quantize(y, *_tensors(case.output))


def _tensors(scale: TensorScale) -> tuple[Tensor, Tensor]:
    return torch.tensor(scale.scale), torch.tensor(scale.zero_point, dtype=torch.uint8)


def smaller(case: Int8Case) -> Iterator[Int8Case]:
    """Cases with one thing less."""
    simple = {
        "residual": None,
        "output": None,
        "bias": False,
        "clamp": CLAMPS[0],
        "weights": "normal",
        "pixels": "normal",
        "threads": 1,
        "batch": 1,
    }
    yield from smaller_case(case, simple)
